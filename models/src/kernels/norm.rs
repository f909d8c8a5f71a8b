//! Group normalisation (Wu & He 2018) in three steps: statistics of each channel, from them a factor
//! and a term for each channel, and one pass that applies these and the activation.
//!
//! The statistics belong to a map, not to a norm, so a map that is normalised twice (once alone, once
//! joined to another) is measured once.

use std::sync::Arc;

use super::activation::Function;
use super::arena::{Aligned, Buffer};
use super::constants::Values;
use super::element::{Bf16, Element, ElementType, F32};
use super::image::Image;
use super::isa::{Kernel, dispatch};
use super::program::{Memory, Needs, Operation, Split};
use super::quantized::Grid;
use super::simd::Simd;

/// Pixels whose mean and squared deviations are worked out together; merged in order, in f64.
const CHUNK: usize = 64;

/// Mean and sum of squared deviations of each channel in each chunk of pixels.
pub(crate) struct GroupNormStatistics {
    pub(crate) input: Image,
    /// `[chunks][2][stride]`.
    pub(crate) output: Buffer,
}

impl GroupNormStatistics {
    /// Floats per sample of the result.
    pub(crate) fn len(input: &Image) -> usize {
        input.pixels().div_ceil(CHUNK) * 2 * input.stride()
    }
}

impl Operation for GroupNormStatistics {
    fn split(&self, batch: usize, _: usize) -> Split {
        Split::one(batch * self.input.pixels().div_ceil(CHUNK))
    }
    fn reads(&self) -> Vec<Buffer> {
        vec![self.input.buffer]
    }
    fn writes(&self) -> Vec<Buffer> {
        vec![self.output]
    }
    fn name(&self) -> String {
        "measure".to_string()
    }
    unsafe fn run(&self, memory: &Memory, _: usize, item: usize, _: usize) {
        let (pixels, stride) = (self.input.pixels(), self.input.stride());
        let chunks = pixels.div_ceil(CHUNK);
        let (sample, chunk) = (item / chunks, item % chunks);
        let first = chunk * CHUNK * self.input.words();
        let from = memory.at(self.input.buffer, sample).wrapping_add(first);
        let to = memory.at(self.output, sample).wrapping_add(chunk * 2 * stride);
        let count = CHUNK.min(pixels - chunk * CHUNK);
        dispatch(memory.isa, Moments { input: &self.input, from, to, count });
    }
}

struct Moments<'a> {
    input: &'a Image,
    from: *const f32,
    to: *mut f32,
    count: usize,
}

impl Kernel for Moments<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.input.element {
            ElementType::Bf16 if S::BF16 => self.of::<S, Bf16>(s),
            _ => self.of::<S, F32>(s),
        }
    }
}

impl Moments<'_> {
    #[inline(always)]
    fn of<S: Simd, E: Element>(&self, s: S) {
        let stride = self.input.stride();
        let mut c = 0;
        while c < stride {
            let share = s.splat(1.0 / self.count as f32);
            let mean = s.mul(self.sum::<S, E>(s, c, s.splat(0.0), false), share);
            let squares = self.sum::<S, E>(s, c, mean, true);
            // SAFETY: the result has two rows of `stride` for this chunk.
            unsafe {
                s.store(self.to.add(c), mean);
                s.store(self.to.add(stride + c), squares);
            }
            c += S::LANES;
        }
    }

    /// The sum of `x − centre`, or of its square, in four chains that are then added in pairs.
    #[inline(always)]
    fn sum<S: Simd, E: Element>(&self, s: S, c: usize, centre: S::V, squared: bool) -> S::V {
        let words = self.input.words();
        let mut sums = [s.splat(0.0); 4];
        let mut p = 0;
        while p < self.count {
            for (i, sum) in sums.iter_mut().enumerate() {
                if p + i < self.count {
                    // SAFETY: the pixel is one of the chunk, and the vector one of its channels.
                    let x = unsafe { E::load(s, self.from.add((p + i) * words), c) };
                    let x = s.sub(x, centre);
                    *sum = if squared { s.fma(x, x, *sum) } else { s.add(*sum, x) };
                }
            }
            p += 4;
        }
        s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3]))
    }
}

/// From statistics, `factor = weight/σ·(1 + scale)` and `term = (bias − mean·weight/σ)·(1 + scale) + shift`
/// for each channel.
pub(crate) struct GroupNormAffine {
    /// Maps that are normalised as one with the channels of all, and their statistics.
    pub(crate) sources: Vec<(Image, Buffer)>,
    /// The normalised map, for where its channels are.
    pub(crate) target: Image,
    pub(crate) groups: usize,
    pub(crate) eps: f64,
    pub(crate) weight: Values,
    pub(crate) bias: Values,
    /// Scales and then shifts of each sample: the buffer and where in it they begin.
    pub(crate) modulation: Option<(Buffer, usize)>,
    /// `[2][stride of the target]`.
    pub(crate) output: Buffer,
    /// Where the mean and one over the deviation of each group are kept as well: `[2][groups]`.
    pub(crate) moments: Option<Buffer>,
}

impl Operation for GroupNormAffine {
    fn split(&self, batch: usize, _: usize) -> Split {
        Split::one(batch * self.groups.div_ceil(self.groups_per_item()))
    }
    fn reads(&self) -> Vec<Buffer> {
        let modulation = self.modulation.map(|(buffer, _)| buffer);
        self.sources.iter().map(|(_, buffer)| *buffer).chain(modulation).collect()
    }
    fn writes(&self) -> Vec<Buffer> {
        [self.output].into_iter().chain(self.moments).collect()
    }
    fn name(&self) -> String {
        "settle".to_string()
    }
    unsafe fn run(&self, memory: &Memory, _: usize, item: usize, _: usize) {
        let items = self.groups.div_ceil(self.groups_per_item());
        let (sample, first) = (item / items, item % items * self.groups_per_item());
        for group in first..(first + self.groups_per_item()).min(self.groups) {
            // SAFETY: groups are distinct, so this writes channels that nothing else does.
            unsafe { self.group(memory, sample, group) };
        }
    }
}

impl GroupNormAffine {
    fn groups_per_item(&self) -> usize {
        self.groups.div_ceil(4)
    }

    /// Calls `f(pixels, mean, squares)` for each chunk of each channel of a group.
    #[inline(always)]
    fn visit(
        &self,
        memory: &Memory,
        sample: usize,
        channels: std::ops::Range<usize>,
        mut f: impl FnMut(f64, f64, f64),
    ) {
        let mut before = 0;
        for (image, statistics) in &self.sources {
            let (pixels, stride, own) = (image.pixels(), image.stride(), image.channels());
            let chunks = pixels.div_ceil(CHUNK);
            // SAFETY: the statistics were written in an earlier phase, and nothing writes them now.
            let rows = unsafe {
                std::slice::from_raw_parts(memory.at(*statistics, sample), chunks * 2 * stride)
            };
            let (from, to) = (channels.start.max(before), channels.end.min(before + own));
            for (chunk, rows) in rows.chunks_exact(2 * stride).enumerate() {
                let count = CHUNK.min(pixels - chunk * CHUNK) as f64;
                for c in from..to {
                    let place = image.place(c - before);
                    f(count, f64::from(rows[place]), f64::from(rows[stride + place]));
                }
            }
            before += own;
        }
    }

    /// # Safety
    /// Nothing else reads or writes the result's places for the group's channels.
    unsafe fn group(&self, memory: &Memory, sample: usize, group: usize) {
        let channels = self.target.channels();
        let width = channels / self.groups;
        let own = group * width..(group + 1) * width;
        let (mut sum, mut count) = (0.0, 0.0);
        self.visit(memory, sample, own.clone(), |n, mean, _| {
            sum += n * mean;
            count += n;
        });
        let mean = sum / count;
        let mut squares = 0.0;
        self.visit(memory, sample, own.clone(), |n, m, s| {
            squares += s + n * (m - mean) * (m - mean)
        });
        let inverse = 1.0 / (squares / count + self.eps).sqrt();
        if let Some(moments) = self.moments {
            let to = memory.at(moments, sample);
            // SAFETY: the buffer has two rows of `groups`, and this group's place is this item's.
            unsafe {
                *to.add(group) = mean as f32;
                *to.add(self.groups + group) = inverse as f32;
            }
        }
        let (weight, bias) = (self.weight.get(memory), self.bias.get(memory));
        let to = memory.at(self.output, sample);
        for c in own {
            let (scale, shift) = match self.modulation {
                None => (1.0, 0.0),
                Some((buffer, start)) => {
                    let from = memory.at(buffer, sample).wrapping_add(start);
                    // SAFETY: the buffer has `channels` scales and as many shifts at `start`.
                    unsafe { (1.0 + f64::from(*from.add(c)), f64::from(*from.add(channels + c))) }
                }
            };
            let factor = f64::from(weight[c]) * inverse;
            let term = (f64::from(bias[c]) - mean * factor) * scale + shift;
            let place = self.target.place(c);
            // SAFETY: the result has two rows of the target's stride.
            unsafe {
                *to.add(place) = (factor * scale) as f32;
                *to.add(self.target.stride() + place) = term as f32;
            }
        }
    }
}

/// `function(x·factor + term)`, for one map or for two whose channels are then joined.
pub(crate) struct GroupNormApply {
    sources: Vec<Image>,
    output: Image,
    /// `[2][stride of the output]`: factors and terms; where there are none, `x` as it is.
    map: Buffer,
    function: Function,
    /// 1 for channels, 0 for padding.
    real: Aligned,
    /// How the result becomes codes, where it does: then only these are kept, in the output's memory.
    grid: Option<Arc<Grid>>,
}

impl GroupNormApply {
    pub(crate) fn new(sources: &[Image], output: Image, map: Buffer, function: Function) -> Self {
        assert!(sources.iter().all(|source| source.element == output.element));
        let mut real = Aligned::zeros(output.stride());
        for c in 0..output.channels() {
            real.as_mut_slice()[output.place(c)] = 1.0;
        }
        Self { sources: sources.to_vec(), output, map, function, real, grid: None }
    }

    /// The same, whose output's memory takes the codes of the result, as [`super::Quantize`] would make them.
    pub(crate) fn quantized(self, grid: Arc<Grid>) -> Self {
        assert_eq!(self.output.element, ElementType::F32);
        Self { grid: Some(grid), ..self }
    }

    /// Pixels of an item: about 32 KiB.
    fn chunk(&self) -> usize {
        (8192 / self.output.stride()).max(1)
    }
}

impl Operation for GroupNormApply {
    fn split(&self, batch: usize, _: usize) -> Split {
        let scratch = self.grid.as_ref().map_or(0, |_| self.chunk() * self.output.stride());
        Split {
            items: [batch * self.output.pixels().div_ceil(self.chunk()), 0],
            needs: Needs { scratch, shared: 0 },
        }
    }
    fn reads(&self) -> Vec<Buffer> {
        self.sources.iter().map(|source| source.buffer).chain([self.map]).collect()
    }
    fn writes(&self) -> Vec<Buffer> {
        vec![self.output.buffer]
    }
    fn name(&self) -> String {
        let (height, width) = (self.output.height, self.output.width);
        format!("apply {:?} {} at {height}×{width}", self.function, self.output.channels())
    }
    unsafe fn run(&self, memory: &Memory, _: usize, item: usize, worker: usize) {
        let chunks = self.output.pixels().div_ceil(self.chunk());
        let (sample, first) = (item / chunks, item % chunks * self.chunk());
        let count = self.chunk().min(self.output.pixels() - first);
        let output = memory.at(self.output.buffer, sample);
        let to = match &self.grid {
            None => output.wrapping_add(first * self.output.words()),
            Some(_) => memory.scratch(worker),
        };
        dispatch(memory.isa, Pixels { apply: self, memory, sample, first, count, to });
        if let Some(grid) = &self.grid {
            let (from, pixels) = (to.cast_const(), first..first + count);
            // SAFETY: the scratch holds these pixels, and the output's memory has a place for their codes.
            unsafe { grid.encode(memory, sample, &self.output, from, output, pixels) };
        }
    }
}

struct Pixels<'a> {
    apply: &'a GroupNormApply,
    memory: &'a Memory<'a>,
    sample: usize,
    first: usize,
    count: usize,
    /// Where the first of them goes.
    to: *mut f32,
}

impl Kernel for Pixels<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // One loop for each function, so that the choice is not made for each vector.
        match self.apply.function {
            Function::Identity => self.with(s, Function::Identity),
            Function::Silu => self.with(s, Function::Silu),
            Function::Relu => self.with(s, Function::Relu),
            other => self.with(s, other),
        }
    }
}

impl Pixels<'_> {
    #[inline(always)]
    fn with<S: Simd>(&self, s: S, function: Function) {
        match self.apply.output.element {
            ElementType::Bf16 if S::BF16 => self.of::<S, Bf16>(s, function),
            _ => self.of::<S, F32>(s, function),
        }
    }

    #[inline(always)]
    fn of<S: Simd, E: Element>(&self, s: S, function: Function) {
        let GroupNormApply { sources, output, map, real, .. } = self.apply;
        let (stride, words) = (output.stride(), output.words());
        let map = self.memory.at(*map, self.sample).cast_const();
        let to = self.to;
        let mut before = 0;
        for source in sources {
            let (own, pixel) = (source.stride(), source.words());
            let from = self.memory.at(source.buffer, self.sample).wrapping_add(self.first * pixel);
            let mut c = 0;
            while c < own {
                // SAFETY: the vector is one of the source's padded channels, which follow `before`
                // others in the output, and the pixels are those of the item.
                unsafe {
                    // Padding may hold anything in the map: make it 0.
                    let factor = s.load(map.add(before + c));
                    let term = s.load(map.add(stride + before + c));
                    let whole = *real.as_slice().get_unchecked(before + c + S::LANES - 1) == 1.0;
                    let mask = s.load(real.as_slice().as_ptr().add(before + c));
                    for p in 0..self.count {
                        let x = E::load(s, from.add(p * pixel), c);
                        let y = function.vector(s, s.fma(x, factor, term));
                        let y = if whole { y } else { s.keep(y, mask) };
                        E::store(s, to.add(p * words), before + c, y);
                    }
                }
                c += S::LANES;
            }
            before += own;
        }
    }
}
