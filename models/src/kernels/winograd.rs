//! 3×3 convolution with fewer products (Winograd 1980; Lavin & Gray 2016).
//!
//! A tile of the output is `Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A`, so that after the transforms the products
//! are independent matrix products, one for each position in the transformed tile: 36 for four by
//! four pixels instead of 144, 16 for two by two instead of 36.

mod taps;

use std::marker::PhantomData;

use super::arena::{Aligned, Buffer, padded};
use super::constants::Constants;
use super::element::{Bf16, Element, ElementType, F32};
use super::finish::Finish;
use super::gemm::{self, Rows};
use super::image::Image;
use super::isa::{Isa, Kernel, dispatch};
use super::program::{Memory, Needs, Operation, Split};
use super::scheme::{F2, F4, Scheme};
use super::simd::Simd;

/// Blocks of rows in a block of tiles, where all weights stay in a cache that is near enough, and where
/// they are so many bytes that each should be used more often when it comes by.
const BLOCKS: usize = 4;
const BLOCKS_FOR_MANY: usize = 6;
const MANY: usize = 2 << 20;
/// Where the streams of the 36 products begin, shifted by a line so that they do not share cache sets.
const SHIFT: usize = 16;

/// Which transforms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Variant {
    /// Two by two pixels.
    F2,
    /// Four by four pixels.
    F4,
}

impl Variant {
    /// Side of the output tile, and of the input tile.
    pub(super) fn sides(self) -> (usize, usize) {
        match self {
            Self::F2 => (F2::OUT, F2::IN),
            Self::F4 => (F4::OUT, F4::IN),
        }
    }

    /// Products of a tile: pixels of its input tile.
    pub(super) fn positions(self) -> usize {
        let (_, side) = self.sides();
        side * side
    }

    /// The rows of `G`.
    pub(super) fn weight_rows(self) -> &'static [[f64; 3]] {
        match self {
            Self::F2 => &F2::G,
            Self::F4 => &F4::G,
        }
    }
}

/// A 3×3 convolution that keeps the size of its input, or of its input at twice the size.
pub(crate) struct Winograd {
    variant: Variant,
    source: Image,
    output: Image,
    doubled: bool,
    /// `[groups][positions][panels of a group][depth][panel]` words, in the order in which it is read; or as
    /// [`Direct::pack`](super::Direct::pack) leaves them.
    weights: Constants,
    /// Whether the weights are the convolution's, and are transformed as they are used.
    of_taps: bool,
    finish: Finish,
    panel: usize,
    /// Panels of output channels whose products are worked out before they are transformed back; the
    /// last group may have fewer.
    group: usize,
    rows: usize,
    zeros: Aligned,
}

impl Winograd {
    /// `weights` is `[output channels, input channels, 3, 3]`.
    pub(crate) fn new(
        isa: Isa,
        variant: Variant,
        source: Image,
        output: Image,
        doubled: bool,
        weights: &[f32],
        finish: Finish,
    ) -> Self {
        let packed = Self::pack(isa, variant, source, output, weights);
        let weights = Constants::Own(packed.into());
        Self::with(isa, variant, source, output, doubled, weights, finish)
    }

    /// Weights as [`Winograd::new`] has them, transformed and packed; they do not depend on the size of the maps.
    pub(crate) fn pack(
        isa: Isa,
        variant: Variant,
        source: Image,
        output: Image,
        weights: &[f32],
    ) -> Aligned {
        let (panel, channels, outputs) = (isa.panel(), source.channels(), output.channels());
        assert_eq!(weights.len(), outputs * channels * 9);
        let depth = source.words();
        let side = variant.sides().1;
        let positions = variant.positions();
        let panels = outputs.div_ceil(panel);
        let group = group_size(panels);
        let mut packed = Aligned::zeros(panels * positions * depth * panel);
        let all = packed.as_mut_slice();
        let g = variant.weight_rows();
        for o in 0..outputs {
            for c in 0..channels {
                let taps = &weights[(o * channels + c) * 9..][..9];
                for (i, gi) in g.iter().enumerate() {
                    for (j, gj) in g.iter().enumerate() {
                        let mut sum = 0.0;
                        for (t, tap) in taps.iter().enumerate() {
                            sum += gi[t / 3] * gj[t % 3] * f64::from(*tap);
                        }
                        let start = panel_place(panels, group, positions, o / panel, i * side + j);
                        let (place, words) = (source.place(c), &mut all[start * depth * panel..]);
                        source.element.put(words, place, panel, o % panel, sum as f32);
                    }
                }
            }
        }
        packed
    }

    /// `weights` is transformed and packed.
    pub(crate) fn with(
        isa: Isa,
        variant: Variant,
        source: Image,
        output: Image,
        doubled: bool,
        weights: Constants,
        finish: Finish,
    ) -> Self {
        let panel = isa.panel();
        let group = group_size(output.channels().div_ceil(panel));
        let (rows, zeros) = (isa.rows(), Aligned::zeros(source.words()));
        let of_taps = false;
        Self {
            variant,
            source,
            output,
            doubled,
            weights,
            of_taps,
            finish,
            panel,
            group,
            rows,
            zeros,
        }
    }

    /// Tiles down and across.
    fn tiles(&self) -> (usize, usize) {
        let (out, _) = self.variant.sides();
        (self.output.height.div_ceil(out), self.output.width.div_ceil(out))
    }

    fn positions(&self) -> usize {
        self.variant.positions()
    }

    fn panels(&self) -> usize {
        self.output.channels().div_ceil(self.panel)
    }

    fn groups(&self) -> usize {
        self.panels().div_ceil(self.group)
    }

    /// How the work is cut for so many samples and threads.
    fn cut(&self, batch: usize, threads: usize) -> Cut {
        let (down, across) = self.tiles();
        let all = batch * down * across;
        let many = 4 * self.weights.len() > MANY;
        let most = self.rows * if many { BLOCKS_FOR_MANY } else { BLOCKS };
        let blocks = all.div_ceil(most);
        // Few blocks leave threads without work, and each of them reads all weights: then all tiles are
        // transformed first, and the products are cut by groups of panels as well.
        let apart = threads > 1 && blocks < 2 * threads;
        let blocks = if apart { blocks } else { blocks.next_multiple_of(threads) };
        let block = all.div_ceil(blocks);
        let blocks = all.div_ceil(block);
        let parts = if apart { (4 * threads).div_ceil(blocks).min(self.groups()) } else { 1 };
        Cut { all, block, blocks, apart, parts }
    }
}

/// Panels in a group.
pub(super) fn group_size(panels: usize) -> usize {
    // More would use the tiles more often, but their products would leave the near cache.
    if panels < 8 { 1 } else { 2 }
}

/// The number of a panel's weights for a position in the order of `[groups][positions][panels of a
/// group]`.
#[inline(always)]
pub(super) fn panel_place(
    panels: usize,
    group: usize,
    positions: usize,
    panel: usize,
    position: usize,
) -> usize {
    let first = panel / group * group;
    let size = group.min(panels - first);
    first * positions + position * size + panel - first
}

/// Tiles and panels as items.
#[derive(Clone, Copy)]
struct Cut {
    /// Tiles of the whole batch.
    all: usize,
    /// Tiles of a block.
    block: usize,
    blocks: usize,
    /// Whether transforming the input is a phase of its own.
    apart: bool,
    /// Parts into which the panels are cut.
    parts: usize,
}

/// Tiles of an item of the phase that transforms the input.
const PIECE: usize = 4;

impl Operation for Winograd {
    fn split(&self, batch: usize, threads: usize) -> Split {
        let cut = self.cut(batch, threads);
        let position = |tiles: usize| tiles * self.source.words() + SHIFT;
        let products =
            self.positions() * self.group * (cut.block * self.panel + self.transformed_len());
        if cut.apart {
            let shared = self.positions() * position(cut.all);
            Split {
                items: [cut.all.div_ceil(PIECE), cut.blocks * cut.parts],
                needs: Needs { scratch: products, shared },
            }
        } else {
            let scratch = products + self.positions() * position(cut.block);
            Split { items: [cut.blocks, 0], needs: Needs { scratch, shared: 0 } }
        }
    }

    fn reads(&self) -> Vec<Buffer> {
        let mut reads = vec![self.source.buffer];
        reads.extend(self.finish.reads());
        reads
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
        let (from, to) = (self.source.channels(), self.output.channels());
        let (height, width) = (self.output.height, self.output.width);
        let doubled = if self.doubled { " doubled" } else { "" };
        let of_taps = if self.of_taps { " of taps" } else { "" };
        format!("winograd {:?}{of_taps}{doubled} {from}→{to} at {height}×{width}", self.variant)
    }

    fn flop(&self) -> f64 {
        18.0 * (self.output.pixels() * self.output.channels() * self.source.channels()) as f64
    }

    fn weight_bytes(&self) -> usize {
        4 * self.weights.own_len()
    }

    unsafe fn run(&self, memory: &Memory, phase: usize, item: usize, worker: usize) {
        let cut = self.cut(memory.batch, memory.threads);
        let depth = self.source.words();
        let scratch = memory.scratch(worker);
        let all = Tiles { first: 0, count: cut.all };
        let pitch = |tiles: usize| tiles * depth + SHIFT;
        if !cut.apart {
            let tiles = all.part(item, cut.block);
            let pitch = pitch(cut.block);
            let products = scratch.wrapping_add(self.positions() * pitch);
            let transformed = Transformed { start: scratch, pitch };
            dispatch(memory.isa, Forward { conv: self, memory, tiles, to: transformed });
            let panels = 0..self.panels();
            let run = Multiply { conv: self, memory, tiles, from: transformed, products, panels };
            dispatch(memory.isa, run);
        } else if phase == 0 {
            let tiles = all.part(item, PIECE);
            let pitch = pitch(cut.all);
            let start = memory.shared().wrapping_add(tiles.first * depth);
            let to = Transformed { start, pitch };
            dispatch(memory.isa, Forward { conv: self, memory, tiles, to });
        } else {
            let (block, part) = (item / cut.parts, item % cut.parts);
            let tiles = all.part(block, cut.block);
            let pitch = pitch(cut.all);
            let start = memory.shared().wrapping_add(tiles.first * depth);
            let from = Transformed { start, pitch };
            let count = self.groups();
            let groups = (part * count / cut.parts)..((part + 1) * count / cut.parts);
            let panels = groups.start * self.group..self.panels().min(groups.end * self.group);
            let run = Multiply { conv: self, memory, tiles, from, products: scratch, panels };
            dispatch(memory.isa, run);
        }
    }
}

/// Some of the batch's tiles.
#[derive(Clone, Copy)]
struct Tiles {
    first: usize,
    count: usize,
}

impl Tiles {
    /// Part `i` when cut into parts of `size`.
    fn part(self, i: usize, size: usize) -> Self {
        Self { first: self.first + i * size, count: size.min(self.count - i * size) }
    }
}

/// Transformed tiles: `[positions][tiles][depth]` words, `pitch` from one position to the next.
#[derive(Clone, Copy)]
struct Transformed {
    start: *mut f32,
    pitch: usize,
}

/// Where a tile is.
struct Place {
    sample: usize,
    y: usize,
    x: usize,
}

impl Winograd {
    #[inline(always)]
    fn place(&self, tile: usize) -> Place {
        let (down, across) = self.tiles();
        let (out, _) = self.variant.sides();
        let (sample, tile) = (tile / (down * across), tile % (down * across));
        Place { sample, y: tile / across * out, x: tile % across * out }
    }
}

/// `Bᵀ d B` of some tiles.
struct Forward<'a> {
    conv: &'a Winograd,
    memory: &'a Memory<'a>,
    tiles: Tiles,
    to: Transformed,
}

impl Kernel for Forward<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match (self.conv.variant, self.conv.source.element) {
            (Variant::F2, ElementType::Bf16) if S::BF16 => self.tiles::<S, F2, Bf16>(s),
            (Variant::F4, ElementType::Bf16) if S::BF16 => self.tiles::<S, F4, Bf16>(s),
            (Variant::F2, _) => self.tiles::<S, F2, F32>(s),
            (Variant::F4, _) => self.tiles::<S, F4, F32>(s),
        }
    }
}

impl Forward<'_> {
    #[inline(always)]
    fn tiles<S: Simd, F: Scheme, E: Element>(&self, s: S) {
        let (channels, depth) = (self.conv.source.stride(), self.conv.source.words());
        for t in 0..self.tiles.count {
            let pixels = self.pixels::<F>(self.tiles.first + t);
            let to = self.to.start.wrapping_add(t * depth);
            let mut c = 0;
            while c < channels {
                // SAFETY: each pixel has so many channels, and so has the tile at each position.
                unsafe { self.vector::<S, F, E>(s, &pixels, c, to) };
                c += S::LANES;
            }
        }
    }

    /// The pixels of the input tile, or zeros outside the image.
    #[inline(always)]
    fn pixels<F: Scheme>(&self, tile: usize) -> [*const f32; 36] {
        let (conv, place) = (self.conv, self.conv.place(tile));
        let source = &conv.source;
        let base = self.memory.at(source.buffer, place.sample).cast_const();
        let zeros = conv.zeros.as_slice().as_ptr();
        let shift = usize::from(conv.doubled);
        let mut pixels = [zeros; 36];
        for i in 0..F::IN {
            for j in 0..F::IN {
                // Left of or above the image wraps to something huge.
                let (row, column) = ((place.y + i).wrapping_sub(1), (place.x + j).wrapping_sub(1));
                if row < conv.output.height && column < conv.output.width {
                    let pixel = (row >> shift) * source.width + (column >> shift);
                    pixels[i * F::IN + j] = base.wrapping_add(pixel * source.words());
                }
            }
        }
        pixels
    }

    /// # Safety
    /// The pixels are good for reading a vector at `c`, and the tile `to` for writing one at each position.
    #[inline(always)]
    unsafe fn vector<S: Simd, F: Scheme, E: Element>(
        &self,
        s: S,
        pixels: &[*const f32; 36],
        c: usize,
        to: *mut f32,
    ) {
        let zero = s.splat(0.0);
        let mut half = [[zero; 6]; 6];
        for j in 0..F::IN {
            let mut column = [zero; 6];
            for i in 0..F::IN {
                // SAFETY: the caller's promise.
                column[i] = unsafe { E::load(s, pixels[i * F::IN + j], c) };
            }
            let column = F::forward(s, column);
            for i in 0..F::IN {
                half[i][j] = column[i];
            }
        }
        for i in 0..F::IN {
            let row = F::forward(s, half[i]);
            for j in 0..F::IN {
                // SAFETY: the caller's promise.
                unsafe { E::store(s, to.add((i * F::IN + j) * self.to.pitch), c, row[j]) };
            }
        }
    }
}

/// The products of some tiles and panels, and `Aᵀ m A` of them.
struct Multiply<'a> {
    conv: &'a Winograd,
    memory: &'a Memory<'a>,
    tiles: Tiles,
    from: Transformed,
    /// `[panels of a group][positions][tiles][panel]`.
    products: *mut f32,
    panels: std::ops::Range<usize>,
}

impl Kernel for Multiply<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.conv.source.element {
            ElementType::Bf16 if S::BF16 => self.of::<S, Bf16>(s),
            _ => self.of::<S, F32>(s),
        }
    }
}

impl Multiply<'_> {
    #[inline(always)]
    fn of<S: Simd, E: Element>(&self, s: S) {
        let conv = self.conv;
        let mut panel = self.panels.start;
        while panel < self.panels.end {
            let count = conv.group.min(self.panels.end - panel);
            if conv.of_taps {
                self.of_taps::<S, E>(s, panel, count);
            } else {
                let (depth, positions) = (conv.source.words(), conv.positions());
                for position in 0..positions {
                    for i in 0..count {
                        let (panels, panel) = (conv.panels(), panel + i);
                        let place = panel_place(panels, conv.group, positions, panel, position);
                        let weights = conv.weights.at(self.memory);
                        let weights = weights.wrapping_add(place * depth * conv.panel);
                        // SAFETY: there the panel's weights for the position are.
                        unsafe { self.rows::<S, E>(s, position, i, weights, 0..depth) };
                    }
                }
            }
            for i in 0..count {
                match self.conv.variant {
                    Variant::F2 => self.back::<S, F2>(s, panel + i, i),
                    Variant::F4 => self.back::<S, F4>(s, panel + i, i),
                }
            }
            panel += count;
        }
    }

    /// The products of all tiles with the panel number `i` of a group, at a position, of some words of the depth.
    ///
    /// # Safety
    /// `weights` is good for reading the panel's words of that depth.
    #[inline(always)]
    unsafe fn rows<S: Simd, E: Element>(
        &self,
        s: S,
        position: usize,
        i: usize,
        weights: *const f32,
        words: std::ops::Range<usize>,
    ) {
        let mut row = 0;
        let most = gemm::even::<S>(self.tiles.count);
        while row < self.tiles.count {
            let rows = most.min(self.tiles.count - row);
            let (numbers, first, count) = (PhantomData::<E>, words.start, words.len());
            let block = RowBlock { run: self, numbers, position, i, row, weights, first, count };
            // SAFETY: these rows and this panel are part of the item; the caller vouches for the weights.
            unsafe { gemm::with_rows(s, rows, &block) };
            row += rows;
        }
    }

    /// Where the products of panel `i` of the group begin for a position and a tile.
    #[inline(always)]
    fn product(&self, i: usize, position: usize, tile: usize) -> *mut f32 {
        let row = (i * self.conv.positions() + position) * self.tiles.count + tile;
        self.products.wrapping_add(row * self.conv.panel)
    }

    #[inline(always)]
    fn back<S: Simd, F: Scheme>(&self, s: S, panel: usize, i: usize) {
        let conv = self.conv;
        for t in 0..self.tiles.count {
            let place = conv.place(self.tiles.first + t);
            for half in 0..2 {
                let c = panel * conv.panel + half * S::LANES;
                if c < padded(conv.output.channels()) {
                    let from = self.product(i, 0, t).wrapping_add(half * S::LANES);
                    // SAFETY: the products of this tile and panel are all there, and the vector lies
                    // in the padded channels of the output.
                    unsafe { self.vector::<S, F>(s, &place, from, c) };
                }
            }
        }
    }

    /// # Safety
    /// `from` is good for reading a vector at each position; `c` is a whole vector within the padded
    /// channels of the output; `place` is a tile of this item.
    #[inline(always)]
    unsafe fn vector<S: Simd, F: Scheme>(&self, s: S, place: &Place, from: *const f32, c: usize) {
        let (conv, output) = (self.conv, &self.conv.output);
        let pitch = self.tiles.count * conv.panel;
        let zero = s.splat(0.0);
        let mut half = [[zero; 6]; 4];
        for j in 0..F::IN {
            let mut column = [zero; 6];
            for i in 0..F::IN {
                // SAFETY: the caller's promise.
                column[i] = unsafe { s.load(from.add((i * F::IN + j) * pitch)) };
            }
            let column = F::back(s, column);
            for i in 0..F::OUT {
                half[i][j] = column[i];
            }
        }
        let target = self.memory.at(output.buffer, place.sample);
        for i in 0..F::OUT.min(output.height - place.y) {
            let row = F::back(s, half[i]);
            for j in 0..F::OUT.min(output.width - place.x) {
                let pixel = (place.y + i) * output.width + place.x + j;
                let terms = conv.finish.terms(self.memory, place.sample, pixel);
                // SAFETY: the pixel is in the image, and the vector in its padded channels.
                unsafe {
                    let y = conv.finish.apply(s, row[j], terms, c);
                    output.element.store(s, target.add(pixel * output.words()), c, y);
                }
            }
        }
    }
}

struct RowBlock<'a, E> {
    numbers: PhantomData<E>,
    run: &'a Multiply<'a>,
    position: usize,
    /// The panel's number in its group.
    i: usize,
    row: usize,
    /// Of the panel at the position, from the first of the words on.
    weights: *const f32,
    /// Words of the depth, and how many.
    first: usize,
    count: usize,
}

impl<E: Element> Rows for RowBlock<'_, E> {
    #[inline(always)]
    unsafe fn run<S: Simd, const R: usize>(&self, s: S) {
        let (run, conv) = (self.run, self.run.conv);
        let (depth, width) = (conv.source.words(), 2 * S::LANES);
        // SAFETY: `R` tiles from `row` on are transformed at every position, the weights have
        // as many columns, and the products have a place for each row.
        unsafe {
            let start = run.from.start.add(self.position * run.from.pitch + self.row * depth);
            let mut rows = [start.add(self.first).cast_const(); R];
            for (r, pointer) in rows.iter_mut().enumerate() {
                *pointer = pointer.add(r * depth);
            }
            let target = run.product(self.i, self.position, self.row);
            let mut acc = gemm::zeros::<S, R, 2>(s);
            if self.first > 0 {
                for (r, sums) in acc.iter_mut().enumerate() {
                    sums[0] = s.load(target.add(r * width));
                    sums[1] = s.load(target.add(r * width + S::LANES));
                }
            }
            gemm::accumulate::<S, E, R, 2>(s, &mut acc, &rows, self.weights, width, self.count);
            for (r, sums) in acc.iter().enumerate() {
                s.store(target.add(r * width), sums[0]);
                s.store(target.add(r * width + S::LANES), sums[1]);
            }
        }
    }
}
