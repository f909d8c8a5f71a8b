//! Convolution as a product whose rows are gathered by pointers: any kernel size, stride and padding.
//!
//! Each output pixel's row is, tap by tap, the channels of the input pixel under that tap, or a row
//! of zeros outside the image; nothing is copied (the indirect convolution of Dukhan 2019).

use std::marker::PhantomData;

use super::arena::{Aligned, Buffer, padded};
use super::constants::Constants;
use super::element::{Bf16, Element, ElementType, F32};
use super::finish::{Finish, Terms};
use super::gemm::{self, Rows};
use super::image::Image;
use super::isa::{Isa, Kernel, dispatch};
use super::program::{Memory, Needs, Operation, Split};
use super::simd::Simd;

/// Blocks of rows in one chunk, over which a panel of weights is used from a near cache.
const BLOCKS: usize = 8;

/// Words of a panel's weights from which a near cache does not hold them until the next block of rows wants them again.
const MANY: usize = 1 << 17;

/// Where the taps of a convolution are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Taps {
    /// The kernel's side: 1 to 4.
    pub(crate) side: usize,
    /// Input pixels from one output pixel to the next.
    pub(crate) stride: usize,
    /// Zeros above and left of the image; as many as needed below and right.
    pub(crate) padding: usize,
    /// Whether the input is seen at twice its size, each pixel as four.
    pub(crate) doubled: bool,
}

impl Taps {
    /// A linear map of every pixel.
    pub(crate) const POINT: Self = Self { side: 1, stride: 1, padding: 0, doubled: false };

    /// A 3×3 convolution that keeps the map's size.
    pub(crate) const SAME: Self = Self { side: 3, stride: 1, padding: 1, doubled: false };

    /// Output pixels of so many input pixels in a row or column.
    pub(crate) fn output(self, input: usize) -> usize {
        (input << usize::from(self.doubled)) / self.stride
    }

    /// Taps per output pixel.
    pub(crate) fn count(self) -> usize {
        self.side * self.side
    }

    /// The input pixel under tap `tap` of the output pixel in row `y` and column `x`.
    #[inline(always)]
    pub(super) fn pixel(self, input: &Image, tap: usize, y: usize, x: usize) -> Option<usize> {
        let shift = usize::from(self.doubled);
        // Left of or above the image wraps to something huge.
        let row = (y * self.stride + tap / self.side).wrapping_sub(self.padding);
        let column = (x * self.stride + tap % self.side).wrapping_sub(self.padding);
        (row < input.height << shift && column < input.width << shift)
            .then(|| (row >> shift) * input.width + (column >> shift))
    }

    /// The output pixel, in a map like `output`, that sees the input pixel in row `y` and column `x`
    /// under tap `tap`; of the input at twice its size, where that is what is seen.
    #[inline(always)]
    fn pixel_above(self, output: &Image, tap: usize, y: usize, x: usize) -> Option<usize> {
        let row = (y + self.padding).wrapping_sub(tap / self.side);
        let column = (x + self.padding).wrapping_sub(tap % self.side);
        let (down, across) = (row / self.stride, column / self.stride);
        let whole = row.is_multiple_of(self.stride) && column.is_multiple_of(self.stride);
        (whole && down < output.height && across < output.width)
            .then(|| down * output.width + across)
    }
}

/// A convolution of one image, or of two as if they were one with the channels of both.
pub(crate) struct Direct {
    sources: Vec<Image>,
    output: Image,
    taps: Taps,
    element: ElementType,
    /// `[panels of output channels][taps][depth of all sources][panel]` words.
    weights: Constants,
    finish: Finish,
    /// Whether this is the gradient of the convolution with these taps: its output pixels are that
    /// one's input pixels.
    reversed: bool,
    panel: usize,
    rows: usize,
    zeros: Aligned,
    /// Whether rows are copied together instead of gathered by pointers: for the few channels of a
    /// network's input.
    copied: bool,
}

/// Columns of a panel: few output channels need not pay for a whole one.
pub(super) fn panel_of(isa: Isa, outputs: usize) -> usize {
    if outputs <= isa.lanes() { isa.lanes() } else { isa.panel() }
}

/// Rows up to this length are copied.
const SHORT: usize = 64;

impl Direct {
    /// `weights` is `[output channels, input channels, side, side]`.
    pub(crate) fn new(
        isa: Isa,
        sources: &[Image],
        output: Image,
        taps: Taps,
        weights: &[f32],
        finish: Finish,
    ) -> Self {
        let packed = Self::pack(isa, sources, output, taps, weights);
        Self::with(isa, sources, output, taps, Constants::Own(packed.into()), finish)
    }

    /// Weights as [`Direct::new`] has them, packed; they do not depend on the size of the maps.
    pub(crate) fn pack(
        isa: Isa,
        sources: &[Image],
        output: Image,
        taps: Taps,
        weights: &[f32],
    ) -> Aligned {
        let panel = panel_of(isa, output.channels());
        let channels: usize = sources.iter().map(Image::channels).sum();
        let depth: usize = sources.iter().map(Image::depth).sum();
        let (outputs, count) = (output.channels(), taps.count());
        assert_eq!(weights.len(), outputs * channels * count);
        let numbers = sources[0].element;
        assert!(sources.iter().all(|source| source.element == numbers));
        let mut places = Vec::with_capacity(channels);
        let mut before = 0;
        for source in sources {
            places.extend((0..source.channels()).map(|c| before + source.place(c)));
            before += source.depth() * numbers.per_word();
        }
        let mut packed = Aligned::zeros(outputs.div_ceil(panel) * count * depth * panel);
        let all = packed.as_mut_slice();
        for o in 0..outputs {
            for (c, place) in places.iter().enumerate() {
                for tap in 0..count {
                    let words = &mut all[(o / panel * count + tap) * depth * panel..];
                    let weight = weights[(o * channels + c) * count + tap];
                    numbers.put(words, *place, panel, o % panel, weight);
                }
            }
        }
        packed
    }

    /// `weights` is packed.
    pub(crate) fn with(
        isa: Isa,
        sources: &[Image],
        output: Image,
        taps: Taps,
        weights: Constants,
        finish: Finish,
    ) -> Self {
        let depth: usize = sources.iter().map(Image::depth).sum();
        let widest = sources.iter().map(Image::words).max().unwrap_or(0);
        let (count, numbers) = (taps.count(), sources[0].element);
        Self {
            sources: sources.to_vec(),
            output,
            taps,
            element: numbers,
            weights,
            finish,
            reversed: false,
            panel: panel_of(isa, output.channels()),
            rows: isa.rows(),
            zeros: Aligned::zeros(widest),
            copied: numbers == ElementType::F32 && count > 1 && count * depth <= SHORT,
        }
    }

    /// The gradient of the convolution with these taps.
    pub(crate) fn reversed(self) -> Self {
        Self { reversed: true, ..self }
    }

    fn depth(&self) -> usize {
        self.sources.iter().map(Image::depth).sum()
    }

    fn panels(&self) -> usize {
        self.output.channels().div_ceil(self.panel)
    }

    /// Floats that the table of pointers takes: a pointer takes the place of two.
    fn table_len(&self) -> usize {
        padded(2 * self.chunk() * self.taps.count() * self.sources.len())
    }

    /// Output pixels of a chunk.
    fn chunk(&self) -> usize {
        BLOCKS * self.rows
    }

    /// Parts into which the panels are cut, so that there is work for all threads.
    fn parts(&self, chunks: usize, threads: usize) -> usize {
        if threads == 1 { 1 } else { (4 * threads).div_ceil(chunks).min(self.panels()) }
    }
}

impl Operation for Direct {
    fn split(&self, batch: usize, threads: usize) -> Split {
        let chunks = (batch * self.output.pixels()).div_ceil(self.chunk());
        Split {
            items: [chunks * self.parts(chunks, threads), 0],
            needs: Needs { scratch: self.table_len() + self.chunk() * SHORT, shared: 0 },
        }
    }

    fn reads(&self) -> Vec<Buffer> {
        let sources = self.sources.iter().map(|source| source.buffer);
        sources.chain(self.finish.reads()).collect()
    }

    fn writes(&self) -> Vec<Buffer> {
        vec![self.output.buffer]
    }

    fn placed(&self) -> Vec<Buffer> {
        self.weights.placed().into_iter().chain(self.finish.bias.placed()).collect()
    }

    fn in_place(&self) -> Option<Buffer> {
        let residual = self.finish.residual.map(|image| image.buffer);
        residual.filter(|buffer| *buffer == self.output.buffer)
    }

    fn name(&self) -> String {
        let Taps { side, stride, doubled, .. } = self.taps;
        let from: usize = self.sources.iter().map(Image::channels).sum();
        let to = self.output.channels();
        let size = (self.output.height, self.output.width);
        let doubled = if doubled { " doubled" } else { "" };
        let direct = if self.reversed { "direct reversed" } else { "direct" };
        format!("{direct} {side}×{side}/{stride}{doubled} {from}→{to} at {}×{}", size.0, size.1)
    }

    fn flop(&self) -> f64 {
        let channels: usize = self.sources.iter().map(Image::channels).sum();
        2.0 * (self.output.pixels() * self.output.channels() * channels * self.taps.count()) as f64
    }

    fn weight_bytes(&self) -> usize {
        4 * self.weights.own_len()
    }

    unsafe fn run(&self, memory: &Memory, _: usize, item: usize, worker: usize) {
        let all = memory.batch * self.output.pixels();
        let parts = self.parts(all.div_ceil(self.chunk()), memory.threads);
        let (chunk, part) = (item / parts, item % parts);
        let first = chunk * self.chunk();
        let count = self.chunk().min(all - first);
        let panels = (part * self.panels() / parts)..((part + 1) * self.panels() / parts);
        let table = memory.scratch(worker).cast::<*const f32>();
        let sums = memory.scratch(worker).wrapping_add(self.table_len());
        // SAFETY: the scratch holds a pointer for every tap, source and row of a chunk.
        unsafe { self.gather(memory, first, count, table) };
        if self.copied {
            // SAFETY: behind the table there is room for a row of `SHORT` for each row of the chunk.
            unsafe { self.copy(count, table, sums) };
        }
        dispatch(memory.isa, Run { conv: self, memory, first, count, table, sums, panels });
    }
}

impl Direct {
    /// Notes the input pixel of each tap, source and row: `table[tap][source][row]`.
    ///
    /// # Safety
    /// `table` is good for writing that many pointers.
    unsafe fn gather(&self, memory: &Memory, first: usize, count: usize, table: *mut *const f32) {
        let (pixels, width) = (self.output.pixels(), self.output.width);
        let (chunk, sources) = (self.chunk(), self.sources.len());
        for row in 0..count {
            let (sample, p) = ((first + row) / pixels, (first + row) % pixels);
            let (y, x) = (p / width, p % width);
            for tap in 0..self.taps.count() {
                for (i, source) in self.sources.iter().enumerate() {
                    let pixel = if self.reversed {
                        self.taps.pixel_above(source, tap, y, x)
                    } else {
                        self.taps.pixel(source, tap, y, x)
                    };
                    let pointer = match pixel {
                        None => self.zeros.as_slice().as_ptr(),
                        Some(pixel) => memory
                            .at(source.buffer, sample)
                            .wrapping_add(pixel * source.words())
                            .cast_const(),
                    };
                    // SAFETY: the caller's promise.
                    unsafe { *table.add((tap * sources + i) * chunk + row) = pointer };
                }
            }
        }
    }
}

impl Direct {
    /// Copies what the table points to into one row after another, and makes the table that of one
    /// tap.
    ///
    /// # Safety
    /// `table` is as [`Direct::gather`] left it; `rows` is good for `count` rows of `SHORT`.
    unsafe fn copy(&self, count: usize, table: *mut *const f32, rows: *mut f32) {
        for row in 0..count {
            let start = rows.wrapping_add(row * SHORT);
            let mut to = start;
            for tap in 0..self.taps.count() {
                for (i, source) in self.sources.iter().enumerate() {
                    let place = (tap * self.sources.len() + i) * self.chunk() + row;
                    for c in 0..source.depth() {
                        // SAFETY: the caller's promise; all taps together are at most `SHORT` long.
                        unsafe { *to.add(c) = *(*table.add(place)).add(c) };
                    }
                    to = to.wrapping_add(source.depth());
                }
            }
            // SAFETY: the caller's promise; what stood there has been copied.
            unsafe { *table.add(row) = start };
        }
    }
}

/// Some panels of one chunk.
struct Run<'a> {
    conv: &'a Direct,
    memory: &'a Memory<'a>,
    first: usize,
    count: usize,
    table: *const *const f32,
    /// Room for what a panel makes of each row, where rows are not copied.
    sums: *mut f32,
    panels: std::ops::Range<usize>,
}

impl Kernel for Run<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.conv.element {
            ElementType::Bf16 if S::BF16 => self.of::<S, Bf16>(s),
            _ => self.of::<S, F32>(s),
        }
    }
}

impl Run<'_> {
    #[inline(always)]
    fn of<S: Simd, E: Element>(&self, s: S) {
        let conv = self.conv;
        let taps = conv.taps.count();
        // Then all rows have one tap after another, and their sums wait in between.
        let apart = taps * conv.depth() * conv.panel > MANY && self.count > S::ROWS;
        let step = if apart { 1 } else { taps };
        let most = gemm::even::<S>(self.count);
        for panel in self.panels.clone() {
            for tap in (0..taps).step_by(step) {
                let taps = tap..tap + step;
                let mut row = 0;
                while row < self.count {
                    let count = most.min(self.count - row);
                    let (numbers, taps) = (PhantomData::<E>, taps.clone());
                    let block = RowBlock { run: self, numbers, panel, row, taps };
                    // SAFETY: these rows and this panel are part of the item.
                    unsafe { gemm::with_rows(s, count, &block) };
                    row += count;
                }
            }
        }
    }
}

struct RowBlock<'a, E> {
    numbers: PhantomData<E>,
    run: &'a Run<'a>,
    panel: usize,
    row: usize,
    /// Whose products are added; behind the last one the sums are finished.
    taps: std::ops::Range<usize>,
}

impl<E: Element> Rows for RowBlock<'_, E> {
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

impl<E: Element> RowBlock<'_, E> {
    /// # Safety
    /// The table holds `R` rows from `row` on, and a panel is `C` vectors wide.
    #[inline(always)]
    unsafe fn columns<S: Simd, const R: usize, const C: usize>(&self, s: S) {
        let Run { conv, memory, first, table, sums, .. } = *self.run;
        let (depth, taps) = (conv.depth(), conv.taps.count());
        let width = C * S::LANES;
        let sums = sums.wrapping_add(self.row * width);
        let mut acc = gemm::zeros::<S, R, C>(s);
        // SAFETY: the table holds `R` rows from `row` on for every tap and source, each good for the
        // source's depth; the packed weights have as many columns. The sums have a place for each row.
        unsafe {
            let before = self.panel * taps + self.taps.start;
            let mut weights = conv.weights.at(memory).add(before * depth * width);
            let mut row = table.add(self.taps.start * conv.sources.len() * conv.chunk() + self.row);
            if self.taps.start > 0 {
                for r in 0..R {
                    for c in 0..C {
                        acc[r][c] = s.load(sums.add(r * width + c * S::LANES));
                    }
                }
            }
            if conv.copied {
                let rows = *row.cast::<[*const f32; R]>();
                gemm::accumulate::<S, E, R, C>(s, &mut acc, &rows, weights, width, taps * depth);
            } else {
                for _ in self.taps.clone() {
                    for source in &conv.sources {
                        let rows = *row.cast::<[*const f32; R]>();
                        let depth = source.depth();
                        gemm::accumulate::<S, E, R, C>(s, &mut acc, &rows, weights, width, depth);
                        weights = weights.add(depth * width);
                        row = row.wrapping_add(conv.chunk());
                    }
                }
            }
            if self.taps.end < taps {
                for r in 0..R {
                    for c in 0..C {
                        s.store(sums.add(r * width + c * S::LANES), acc[r][c]);
                    }
                }
                return;
            }
        }
        let (output, pixels) = (&conv.output, conv.output.pixels());
        for (r, sums) in acc.iter().enumerate() {
            let pixel = first + self.row + r;
            let (sample, pixel) = (pixel / pixels, pixel % pixels);
            let terms: Terms = conv.finish.terms(memory, sample, pixel);
            let target = memory.at(conv.output.buffer, sample).wrapping_add(pixel * output.words());
            for (i, sum) in sums.iter().enumerate() {
                let c = self.panel * width + i * S::LANES;
                if c < padded(output.channels()) {
                    // SAFETY: the vector lies in the pixel's padded channels, and the pixel in the item.
                    unsafe {
                        let y = conv.finish.apply(s, *sum, terms, c);
                        output.element.store(s, target, c, y);
                    }
                }
            }
            // A narrow panel may end before the padding does.
            let mut c = conv.panels() * width;
            while C == 1 && c < output.stride() {
                // SAFETY: as above.
                unsafe { output.element.store(s, target, c, s.splat(0.0)) };
                c += S::LANES;
            }
        }
    }
}
