//! Convolution of codes of 8 bits: a map is quantised, then multiplied in whole numbers.
//!
//! A number `x` of a map has the code `q = clamp(round(x/s + z), 0, 255)` with scale `s` and zero point `z` (Jacob et al.
//! 2018), which depend on the layer and on the bucket of timesteps that the sample's own time is in. A weight `w` of
//! output channel `o` has the code `p = round(w/s_o)`, from −127 to 127. So `Σ x·w ≈ s·s_o·(Σ q·p − z·Σ p)`, whose sums
//! are exact in any order: they are the same bits with any instructions.

use std::sync::Arc;

use super::arena::{Aligned, Buffer, padded};
use super::direct::{Taps, panel_of};
use super::element::{Int8, Product};
use super::finish::Finish;
use super::gemm::{self, Rows};
use super::image::{self, Image};
use super::int8;
use super::isa::{Isa, Kernel, dispatch};
use super::program::{Memory, Needs, Operation, Split};
use super::simd::Simd;

/// Blocks of rows in one chunk, over which a panel of weights is used from a near cache.
const BLOCKS: usize = 8;

/// The largest sum of products of one output number: `255·127` for each.
pub(crate) const MOST_PRODUCTS: usize = i32::MAX as usize / (255 * 127);

/// How the numbers of a layer's input become codes, in each bucket of timesteps.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Grid {
    /// The input that has the time of each sample.
    pub(crate) time: usize,
    /// Where each bucket but the first begins, ascending.
    pub(crate) starts: Arc<[f32]>,
    /// Scale and zero point of each bucket.
    pub(crate) buckets: Vec<(f32, u8)>,
}

impl Grid {
    /// The bucket of a sample.
    #[inline(always)]
    fn bucket(&self, memory: &Memory, sample: usize) -> usize {
        let time = memory.inputs[self.time][sample];
        self.starts.iter().filter(|start| time >= **start).count()
    }

    /// Writes the codes of some pixels of a sample's map, whose numbers begin at `from`, to their places among all codes of
    /// the sample.
    ///
    /// # Safety
    /// `from` is good for reading the pixels, `codes` for writing those of the whole map, of which nothing else touches
    /// these.
    pub(super) unsafe fn encode(
        &self,
        memory: &Memory,
        sample: usize,
        map: &Image,
        from: *const f32,
        codes: *mut f32,
        pixels: std::ops::Range<usize>,
    ) {
        let (scale, zero) = self.buckets[self.bucket(memory, sample)];
        dispatch(
            memory.isa,
            Encode {
                from,
                to: codes.wrapping_add(pixels.start * words(map)),
                len: pixels.len() * map.stride(),
                inverse: 1.0 / scale,
                zero: f32::from(zero),
            },
        );
    }
}

/// Words of a pixel's codes.
fn words(source: &Image) -> usize {
    source.stride() / Int8::PER_WORD
}

/// The codes of a map of f32: `[pixels, stride]` bytes of each sample.
pub(crate) struct Quantize {
    source: Image,
    codes: Buffer,
    grid: Arc<Grid>,
}

impl Quantize {
    /// `codes` is [`Quantize::len`] long.
    pub(crate) fn new(source: Image, codes: Buffer, grid: Arc<Grid>) -> Self {
        assert_eq!(grid.buckets.len(), grid.starts.len() + 1);
        Self { source, codes, grid }
    }

    /// Words of a sample's codes.
    pub(crate) fn len(source: &Image) -> usize {
        source.pixels() * words(source)
    }
}

impl Operation for Quantize {
    fn split(&self, batch: usize, _: usize) -> Split {
        Split::one(batch * self.source.pixels().div_ceil(image::CHUNK))
    }
    fn reads(&self) -> Vec<Buffer> {
        vec![self.source.buffer]
    }
    fn writes(&self) -> Vec<Buffer> {
        vec![self.codes]
    }
    fn name(&self) -> String {
        format!("quantize {} at {}", self.source.channels(), self.source.pixels())
    }
    unsafe fn run(&self, memory: &Memory, _: usize, item: usize, _: usize) {
        let chunks = self.source.pixels().div_ceil(image::CHUNK);
        let (sample, first) = (item / chunks, item % chunks * image::CHUNK);
        let last = self.source.pixels().min(first + image::CHUNK);
        let map = memory.at(self.source.buffer, sample).cast_const();
        let from = map.wrapping_add(first * self.source.stride());
        let codes = memory.at(self.codes, sample);
        // SAFETY: the item's part of the map, and of the codes.
        unsafe { self.grid.encode(memory, sample, &self.source, from, codes, first..last) };
    }
}

struct Encode {
    from: *const f32,
    to: *mut f32,
    len: usize,
    inverse: f32,
    zero: f32,
}

impl Kernel for Encode {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (inverse, zero) = (s.splat(self.inverse), s.splat(self.zero));
        let (least, most) = (s.splat(0.0), s.splat(255.0));
        for i in (0..self.len).step_by(S::LANES) {
            // SAFETY: pixels are whole cache lines, and the item's part is its own.
            unsafe {
                let x = s.load(self.from.add(i));
                // Rounded twice everywhere, or the codes would depend on the instructions.
                let x = s.add(s.mul(x, inverse), zero);
                let x = s.min(s.max(x, least), most);
                s.store_u8(self.to.add(i / Int8::PER_WORD), x);
            }
        }
    }
}

/// Weights of a layer, as codes.
pub(crate) struct Weights<'a> {
    /// `[output channels, input channels, side, side]`, from −127 to 127.
    pub(crate) codes: &'a [i8],
    /// `[output channels]`.
    pub(crate) scales: &'a [f32],
}

/// A convolution of codes; the result is a map of f32.
pub(crate) struct Quantized {
    source: Image,
    codes: Buffer,
    output: Image,
    taps: Taps,
    grid: Arc<Grid>,
    /// `[panels of output channels][taps][words of a pixel][panel]` words.
    weights: Arc<Aligned>,
    /// `−z·Σ p` and `s·s_o` of each bucket: `[buckets][2][panels·panel]`, the first as i32.
    terms: Arc<Aligned>,
    finish: Finish,
    panel: usize,
    rows: usize,
    /// The code of zero, a pixel of each bucket.
    zeros: Aligned,
}

impl Quantized {
    /// Weights and terms, packed; they do not depend on the size of the maps.
    pub(crate) fn pack(
        isa: Isa,
        [source, output]: [&Image; 2],
        taps: Taps,
        weights: &Weights,
        grid: &Grid,
    ) -> [Aligned; 2] {
        let panel = panel_of(isa, output.channels());
        let (outputs, channels, count) = (output.channels(), source.channels(), taps.count());
        assert_eq!(weights.codes.len(), outputs * channels * count);
        assert_eq!(weights.scales.len(), outputs);
        assert!(channels * count <= MOST_PRODUCTS);
        let depth = depth(source);
        let whole = outputs.next_multiple_of(panel);
        let mut packed = Aligned::zeros(whole * count * depth);
        let mut sums = vec![0i32; outputs];
        let all = packed.as_mut_slice();
        for (o, sum) in sums.iter_mut().enumerate() {
            for c in 0..channels {
                for tap in 0..count {
                    let code = weights.codes[(o * channels + c) * count + tap];
                    let (k, rows) = (source.place(c), (o / panel * count + tap) * depth);
                    let word = (rows + k / Int8::PER_WORD) * panel + o % panel;
                    int8::put(&mut all[word], k, code);
                    *sum += i32::from(code);
                }
            }
        }
        let mut terms = Aligned::zeros(2 * whole * grid.buckets.len());
        let buckets = terms.as_mut_slice().chunks_exact_mut(2 * whole);
        for (bucket, &(scale, zero)) in buckets.zip(&grid.buckets) {
            let (offsets, scales) = bucket.split_at_mut(whole);
            for (o, sum) in sums.iter().enumerate() {
                offsets[o] = f32::from_bits((-i32::from(zero) * sum).cast_unsigned());
                scales[o] = scale * weights.scales[o];
            }
        }
        [packed, terms]
    }

    /// Of codes that [`Quantize`] made of `source`, with what [`Quantized::pack`] made.
    pub(crate) fn new(
        isa: Isa,
        (source, codes): (Image, Buffer),
        output: Image,
        taps: Taps,
        [weights, terms]: [Arc<Aligned>; 2],
        grid: Arc<Grid>,
        finish: Finish,
    ) -> Self {
        let pixel = words(&source);
        let mut zeros = Aligned::zeros(pixel * grid.buckets.len());
        for (pixel, (_, zero)) in zeros.as_mut_slice().chunks_exact_mut(pixel).zip(&grid.buckets) {
            pixel.fill(int8::splat(*zero));
        }
        let (panel, rows) = (panel_of(isa, output.channels()), isa.rows());
        Self { source, codes, output, taps, grid, weights, terms, finish, panel, rows, zeros }
    }

    fn panels(&self) -> usize {
        self.output.channels().div_ceil(self.panel)
    }

    /// Output pixels of a chunk.
    fn chunk(&self) -> usize {
        BLOCKS * self.rows
    }

    /// Parts into which the panels are cut, so that there is work for all threads.
    fn parts(&self, chunks: usize, threads: usize) -> usize {
        if threads == 1 { 1 } else { (4 * threads).div_ceil(chunks).min(self.panels()) }
    }

    /// Notes the codes under each tap of each row, `table[tap][row]`, and behind them the bucket of each row.
    ///
    /// # Safety
    /// `table` is good for writing so many pointers and numbers.
    unsafe fn gather(&self, memory: &Memory, first: usize, count: usize, table: *mut Row) {
        let (pixels, width, pixel_words) =
            (self.output.pixels(), self.output.width, words(&self.source));
        for row in 0..count {
            let (sample, p) = ((first + row) / pixels, (first + row) % pixels);
            let (y, x) = (p / width, p % width);
            let bucket = self.grid.bucket(memory, sample);
            let base = memory.at(self.codes, sample).cast_const();
            let zero = self.zeros.as_slice()[bucket * pixel_words..].as_ptr();
            for tap in 0..self.taps.count() {
                let pixel = self.taps.pixel(&self.source, tap, y, x);
                let codes = pixel.map_or(zero, |pixel| base.wrapping_add(pixel * pixel_words));
                // SAFETY: the caller's promise.
                unsafe { (*table.add(tap * self.chunk() + row)).codes = codes };
            }
            // SAFETY: the caller's promise.
            unsafe { (*table.add(self.taps.count() * self.chunk() + row)).bucket = bucket };
        }
    }
}

/// How many words of a pixel a product must read: with one segment the padding is left out.
fn depth(source: &Image) -> usize {
    if source.segments[1] == 0 {
        source.segments[0].div_ceil(Int8::PER_WORD)
    } else {
        words(source)
    }
}

/// A pixel's codes, or a row's bucket.
#[derive(Clone, Copy)]
union Row {
    codes: *const f32,
    bucket: usize,
}

impl Operation for Quantized {
    fn split(&self, batch: usize, threads: usize) -> Split {
        let chunks = (batch * self.output.pixels()).div_ceil(self.chunk());
        // A row of the table takes the place of two floats.
        let scratch = padded(2 * self.chunk() * (self.taps.count() + 1));
        Split {
            items: [chunks * self.parts(chunks, threads), 0],
            needs: Needs { scratch, shared: 0 },
        }
    }

    fn reads(&self) -> Vec<Buffer> {
        [self.codes].into_iter().chain(self.finish.reads()).collect()
    }

    fn writes(&self) -> Vec<Buffer> {
        vec![self.output.buffer]
    }

    fn in_place(&self) -> Option<Buffer> {
        let residual = self.finish.residual.map(|image| image.buffer);
        residual.filter(|buffer| *buffer == self.output.buffer)
    }

    fn name(&self) -> String {
        let Taps { side, stride, doubled, .. } = self.taps;
        let (from, to) = (self.source.channels(), self.output.channels());
        let size = (self.output.height, self.output.width);
        let doubled = if doubled { " doubled" } else { "" };
        format!("int8 {side}×{side}/{stride}{doubled} {from}→{to} at {}×{}", size.0, size.1)
    }

    fn flop(&self) -> f64 {
        let channels = self.source.channels() * self.taps.count();
        2.0 * (self.output.pixels() * self.output.channels() * channels) as f64
    }

    fn weight_bytes(&self) -> usize {
        4 * (self.weights.as_slice().len() + self.terms.as_slice().len())
    }

    unsafe fn run(&self, memory: &Memory, _: usize, item: usize, worker: usize) {
        let all = memory.batch * self.output.pixels();
        let parts = self.parts(all.div_ceil(self.chunk()), memory.threads);
        let (chunk, part) = (item / parts, item % parts);
        let first = chunk * self.chunk();
        let count = self.chunk().min(all - first);
        let panels = (part * self.panels() / parts)..((part + 1) * self.panels() / parts);
        let table = memory.scratch(worker).cast::<Row>();
        // SAFETY: the scratch holds a pointer for every tap and row of a chunk, and a bucket for every row.
        unsafe { self.gather(memory, first, count, table) };
        dispatch(memory.isa, Run { conv: self, memory, first, count, table, panels });
    }
}

/// Some panels of one chunk.
struct Run<'a> {
    conv: &'a Quantized,
    memory: &'a Memory<'a>,
    first: usize,
    count: usize,
    table: *const Row,
    panels: std::ops::Range<usize>,
}

impl Kernel for Run<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for panel in self.panels.clone() {
            let mut row = 0;
            let most = gemm::even::<S>(self.count);
            while row < self.count {
                let count = most.min(self.count - row);
                // SAFETY: these rows and this panel are part of the item.
                unsafe { gemm::with_rows(s, count, &RowBlock { run: &self, panel, row }) };
                row += count;
            }
        }
    }
}

struct RowBlock<'a> {
    run: &'a Run<'a>,
    panel: usize,
    row: usize,
}

impl Rows for RowBlock<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd, const R: usize>(&self, s: S) {
        // SAFETY: the caller's promise.
        unsafe {
            if self.run.conv.panel == S::LANES {
                self.columns::<S, R, 1>(s);
            } else {
                self.columns::<S, R, 2>(s);
            }
        }
    }
}

impl RowBlock<'_> {
    /// # Safety
    /// The table holds `R` rows from `row` on, and a panel is `C` vectors wide.
    #[inline(always)]
    unsafe fn columns<S: Simd, const R: usize, const C: usize>(&self, s: S) {
        let Run { conv, memory, first, table, .. } = *self.run;
        let (depth, taps, chunk) = (depth(&conv.source), conv.taps.count(), conv.chunk());
        let width = C * S::LANES;
        let whole = conv.panels() * width;
        let output = &conv.output;
        // SAFETY: the table holds `R` rows from `row` on for every tap, each good for the pixel's words, and behind them
        // the rows' buckets, each of which has terms; the packed weights have as many columns.
        let (acc, terms) = unsafe {
            let mut terms = [std::ptr::null(); R];
            let mut acc = gemm::zeros::<S, R, C>(s);
            for r in 0..R {
                let bucket = (*table.add(taps * chunk + self.row + r)).bucket;
                terms[r] = conv.terms.as_slice()[2 * whole * bucket..].as_ptr();
                terms[r] = terms[r].add(self.panel * width);
                for c in 0..C {
                    acc[r][c] = s.load(terms[r].add(c * S::LANES));
                }
            }
            let mut weights = conv.weights.as_slice().as_ptr();
            weights = weights.add(self.panel * taps * depth * width);
            for tap in 0..taps {
                let rows = *table.add(tap * chunk + self.row).cast::<[*const f32; R]>();
                gemm::accumulate::<S, Int8, R, C>(s, &mut acc, &rows, weights, width, depth);
                weights = weights.add(depth * width);
            }
            (acc, terms)
        };
        let pixels = output.pixels();
        for (r, sums) in acc.iter().enumerate() {
            let pixel = first + self.row + r;
            let (sample, pixel) = (pixel / pixels, pixel % pixels);
            let finish = conv.finish.terms(memory, sample, pixel);
            let target = memory.at(output.buffer, sample).wrapping_add(pixel * output.words());
            for (i, sum) in sums.iter().enumerate() {
                let c = self.panel * width + i * S::LANES;
                if c < padded(output.channels()) {
                    // SAFETY: the vector lies in the pixel's padded channels, and the pixel in the item; scales stand
                    // behind the offsets of the same bucket.
                    unsafe {
                        let scale = s.load(terms[r].add(whole + i * S::LANES));
                        let y = s.mul(s.floats_of(*sum), scale);
                        s.store(target.add(c), conv.finish.apply(s, y, finish, c));
                    }
                }
            }
            // A narrow panel may end before the padding does.
            let mut c = whole;
            while C == 1 && c < output.stride() {
                // SAFETY: as above.
                unsafe { s.store(target.add(c), s.splat(0.0)) };
                c += S::LANES;
            }
        }
    }
}
