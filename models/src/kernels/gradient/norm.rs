//! The gradients of group normalisation with modulation and activation.
//!
//! With `a = x·F + T` per channel, `y = f(a)`, and `g = ∂y·f'(a)`: over a group of `n` numbers with mean
//! μ, deviation σ and `x̂ = (x − μ)/σ`, and `W` the weight times one plus the scale,
//! `∂x = (g·W − mean(g·W) − x̂·mean(g·W·x̂)) / σ`.

use super::filter::Row;
use crate::kernels::activation::Function;
use crate::kernels::arena::{Aligned, Buffer};
use crate::kernels::image::Image;
use crate::kernels::isa::{Kernel, dispatch};
use crate::kernels::program::{Memory, Needs, Operation, Split};
use crate::kernels::simd::Simd;

/// A map that was normalised, and where its gradient goes.
#[derive(Clone, Copy)]
pub(crate) struct NormSource {
    pub(crate) value: Image,
    pub(crate) gradient: Image,
    /// Whether to what is there.
    pub(crate) add: bool,
}

/// From the gradient of the normalised map, those of all that went in.
pub(crate) struct NormGradient {
    pub(crate) sources: Vec<NormSource>,
    /// The normalised map, for where its channels are, with its gradient as the buffer; that is used up.
    pub(crate) target: Image,
    pub(crate) function: Function,
    pub(crate) groups: usize,
    /// `[2][stride of the target]`: `F` and `T` of [`crate::kernels::GroupNormAffine`].
    pub(crate) map: Buffer,
    /// `[2][groups]`: means and one over deviations, of the same.
    pub(crate) moments: Buffer,
    pub(crate) weight: Row,
    pub(crate) bias: Row,
    /// Scales and then shifts of each sample, and where their gradients go.
    pub(crate) modulation: Option<(Buffer, Buffer)>,
    /// `[2][channels]`: what a sample adds to the gradients of weight and bias.
    pub(crate) shares: Buffer,
    /// 1 for channels, 0 for padding.
    pub(crate) real: Aligned,
}

impl NormGradient {
    /// The mask of a map's channels.
    pub(crate) fn mask(target: &Image) -> Aligned {
        let mut real = Aligned::zeros(target.stride());
        for c in 0..target.channels() {
            real.as_mut_slice()[target.place(c)] = 1.0;
        }
        real
    }
}

/// Vectors of a pixel's length that an item needs.
const ROWS: usize = 5;

impl Operation for NormGradient {
    fn split(&self, batch: usize, _: usize) -> Split {
        let needs = Needs { scratch: ROWS * self.target.stride(), shared: 0 };
        Split { items: [batch, 1], needs }
    }
    fn reads(&self) -> Vec<Buffer> {
        let values = self.sources.iter().map(|source| source.value.buffer);
        let modulation = self.modulation.map(|(values, _)| values);
        values.chain(modulation).chain([self.map, self.moments]).collect()
    }
    fn writes(&self) -> Vec<Buffer> {
        let mut gradients: Vec<_> = self.sources.iter().map(|one| one.gradient.buffer).collect();
        // A map joined to itself gets both parts, one after the other.
        gradients.dedup();
        let modulation = self.modulation.map(|(_, gradients)| gradients);
        gradients.into_iter().chain(modulation).chain([self.target.buffer, self.shares]).collect()
    }
    fn name(&self) -> String {
        let (height, width) = (self.target.height, self.target.width);
        format!("norm gradient {:?} {} at {height}×{width}", self.function, self.target.channels())
    }
    unsafe fn run(&self, memory: &Memory, phase: usize, item: usize, worker: usize) {
        if phase == 0 {
            let rows = memory.scratch(worker);
            return dispatch(memory.isa, Sample { op: self, memory, sample: item, rows });
        }
        let channels = self.target.channels();
        for (start, row) in [(0, self.weight), (channels, self.bias)] {
            for c in 0..channels {
                // SAFETY: the shares of every sample are there, and nothing else writes these gradients.
                unsafe {
                    let of = |s| f64::from(*memory.at(self.shares, s).add(start + c));
                    let sum: f64 = (0..memory.batch).map(of).sum();
                    *memory.gradients().add(row.gradient + c) = sum as f32;
                }
            }
        }
    }
}

struct Sample<'a> {
    op: &'a NormGradient,
    memory: &'a Memory<'a>,
    sample: usize,
    /// `[ROWS][stride]`.
    rows: *mut f32,
}

impl Kernel for Sample<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let [means, ..] = self.vectors();
        // SAFETY: the vectors are as long as a pixel, and this item's.
        unsafe {
            self.spread_means(means);
            match self.op.function {
                Function::Identity => self.sum(s, Function::Identity),
                Function::Silu => self.sum(s, Function::Silu),
                other => self.sum(s, other),
            }
            self.settle();
        }
        self.apply(s);
    }
}

impl Sample<'_> {
    /// Means, sums of `g`, sums of `g·(x − μ)`, and what `x` is multiplied with and what is added for `∂x`.
    #[inline(always)]
    fn vectors(&self) -> [*mut f32; ROWS] {
        std::array::from_fn(|i| self.rows.wrapping_add(i * self.op.target.stride()))
    }

    /// # Safety
    /// `means` is as long as a pixel.
    #[inline(always)]
    unsafe fn spread_means(&self, means: *mut f32) {
        let (op, memory) = (self.op, self.memory);
        let width = op.target.channels() / op.groups;
        let moments = memory.at(op.moments, self.sample);
        for place in 0..op.target.stride() {
            // SAFETY: the caller's promise.
            unsafe { *means.add(place) = 0.0 };
        }
        for c in 0..op.target.channels() {
            // SAFETY: the caller's promise; there are as many moments as groups.
            unsafe { *means.add(op.target.place(c)) = *moments.add(c / width) };
        }
    }

    /// Replaces `∂y` by `g`, and sums it.
    ///
    /// # Safety
    /// The means are there; nothing else touches the sample's part of the target's gradient.
    #[inline(always)]
    unsafe fn sum<S: Simd>(&self, s: S, function: Function) {
        let (op, memory) = (self.op, self.memory);
        let [means, sums, products, ..] = self.vectors();
        let stride = op.target.stride();
        let map = memory.at(op.map, self.sample).cast_const();
        let gradient = memory.at(op.target.buffer, self.sample);
        let mut before = 0;
        for source in &op.sources {
            let own = source.value.stride();
            let from = memory.at(source.value.buffer, self.sample).cast_const();
            for c in (0..own).step_by(S::LANES) {
                let at = before + c;
                // SAFETY: the vector is one of the source's padded channels, which follow `before`
                // others in the target.
                unsafe {
                    let (factor, term) = (s.load(map.add(at)), s.load(map.add(stride + at)));
                    let mask = s.load(op.real.as_slice().as_ptr().add(at));
                    let mean = s.load(means.add(at));
                    let zero = s.splat(0.0);
                    let (mut sum, mut product) = ([zero; 4], [zero; 4]);
                    let pixels = op.target.pixels();
                    let mut p = 0;
                    while p < pixels {
                        for i in 0..4.min(pixels - p) {
                            let x = s.load(from.add((p + i) * own + c));
                            let place = gradient.add((p + i) * stride + at);
                            let slope = function.slopes(s, s.fma(x, factor, term));
                            // Padding may hold anything in the map: make it 0.
                            let g = s.keep(s.mul(s.load(place), slope), mask);
                            s.store(place, g);
                            sum[i] = s.add(sum[i], g);
                            product[i] = s.fma(g, s.sub(x, mean), product[i]);
                        }
                        p += 4;
                    }
                    let pairs = |v: [S::V; 4]| s.add(s.add(v[0], v[1]), s.add(v[2], v[3]));
                    s.store(sums.add(at), pairs(sum));
                    s.store(products.add(at), pairs(product));
                }
            }
            before += own;
        }
    }

    /// From the sums, the sample's shares and what `∂x` is made with.
    ///
    /// # Safety
    /// The sums are there.
    #[inline(always)]
    unsafe fn settle(&self) {
        let (op, memory, target) = (self.op, self.memory, &self.op.target);
        let [_, sums, products, factors, terms] = self.vectors();
        let (channels, width) = (target.channels(), target.channels() / op.groups);
        let moments = memory.at(op.moments, self.sample);
        let shares = memory.at(op.shares, self.sample);
        let weight = memory.parameters[op.weight.parameter];
        let bias = memory.parameters[op.bias.parameter];
        let count = (width * target.pixels()) as f64;
        for place in 0..target.stride() {
            // SAFETY: the vectors are as long as a pixel.
            unsafe {
                *factors.add(place) = 0.0;
                *terms.add(place) = 0.0;
            }
        }
        for group in 0..op.groups {
            // SAFETY: moments, shares, modulation and vectors have places for each group or channel.
            unsafe {
                let mean = f64::from(*moments.add(group));
                let inverse = f64::from(*moments.add(op.groups + group));
                let (mut of_sums, mut of_products) = (0.0, 0.0);
                for c in group * width..(group + 1) * width {
                    let place = target.place(c);
                    // `Σ g` and `Σ g·x̂`.
                    let sum = f64::from(*sums.add(place));
                    let product = f64::from(*products.add(place)) * inverse;
                    let (w, b) = (f64::from(weight[c]), f64::from(bias[c]));
                    let scale = match op.modulation {
                        None => 1.0,
                        Some((values, gradients)) => {
                            let to = memory.at(gradients, self.sample);
                            *to.add(c) = (product * w + sum * b) as f32;
                            *to.add(channels + c) = sum as f32;
                            1.0 + f64::from(*memory.at(values, self.sample).add(c))
                        }
                    };
                    *shares.add(c) = (product * scale) as f32;
                    *shares.add(channels + c) = (sum * scale) as f32;
                    of_sums += sum * w * scale;
                    of_products += product * w * scale;
                }
                let (of_sums, of_products) = (of_sums / count, of_products / count);
                let factor = -of_products * inverse * inverse;
                for c in group * width..(group + 1) * width {
                    *factors.add(target.place(c)) = factor as f32;
                    *terms.add(target.place(c)) = (-of_sums * inverse - mean * factor) as f32;
                }
            }
        }
        if let Some((_, gradients)) = op.modulation {
            for i in 2 * channels..gradients.len {
                // SAFETY: the padding of the modulation's gradient.
                unsafe { *memory.at(gradients, self.sample).add(i) = 0.0 };
            }
        }
    }

    /// `∂x = g·F + x·factor + term`.
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S) {
        let (op, memory) = (self.op, self.memory);
        let [.., factors, terms] = self.vectors();
        let stride = op.target.stride();
        let map = memory.at(op.map, self.sample).cast_const();
        let gradient = memory.at(op.target.buffer, self.sample).cast_const();
        let mut before = 0;
        for source in &op.sources {
            let own = source.value.stride();
            let from = memory.at(source.value.buffer, self.sample).cast_const();
            let to = memory.at(source.gradient.buffer, self.sample);
            for c in (0..own).step_by(S::LANES) {
                let at = before + c;
                // SAFETY: as in `sum`; this item alone writes the sample's part of the gradient.
                unsafe {
                    let mask = s.load(op.real.as_slice().as_ptr().add(at));
                    let scale = s.keep(s.load(map.add(at)), mask);
                    let (factor, term) = (s.load(factors.add(at)), s.load(terms.add(at)));
                    for p in 0..op.target.pixels() {
                        let x = s.load(from.add(p * own + c));
                        let g = s.load(gradient.add(p * stride + at));
                        let y = s.fma(g, scale, s.fma(x, factor, term));
                        let place = to.add(p * own + c);
                        s.store(place, if source.add { s.add(y, s.load(place)) } else { y });
                    }
                }
            }
            before += own;
        }
    }
}
