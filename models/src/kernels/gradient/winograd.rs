//! The gradient of a 3×3 convolution's weights with fewer products: `Gᵀ[Σ (Bᵀ d B) ⊙ (A ∂y Aᵀ)]G` over
//! all tiles.

use super::filter::{Filter, places};
use super::outer;
use super::scheme::{Gradient, taps};
use crate::kernels::arena::{Aligned, Buffer};
use crate::kernels::image::Image;
use crate::kernels::isa::{Kernel, dispatch};
use crate::kernels::program::{Memory, Needs, Operation, Split};
use crate::kernels::scheme::{F2, F4};
use crate::kernels::simd::Simd;
use crate::kernels::winograd::Variant;

/// Channels of a block of sums, in and out: with all positions it stays in the second cache.
const SIDE: usize = 64;
/// Tiles that are transformed together.
const TILES: usize = 16;
/// Items that there should be.
const ITEMS: usize = 8;
/// Where the streams of the positions begin, shifted so that they do not share cache sets.
const SHIFT: usize = 16;

/// The gradient of the weights of a 3×3 convolution that keeps the size of its input, or of its input
/// at twice the size.
pub(crate) struct WinogradGradient {
    variant: Variant,
    source: Image,
    /// The gradient of the convolution's output.
    output: Image,
    doubled: bool,
    filter: Filter,
    inputs: Vec<Option<usize>>,
    zeros: Aligned,
}

impl WinogradGradient {
    pub(crate) fn new(
        variant: Variant,
        source: Image,
        output: Image,
        doubled: bool,
        filter: Filter,
    ) -> Self {
        let inputs = places(&[source], 0, false);
        let zeros = Aligned::zeros(source.stride().max(output.stride()));
        Self { variant, source, output, doubled, filter, inputs, zeros }
    }

    fn blocks(&self) -> (usize, usize) {
        (self.source.stride().div_ceil(SIDE), self.output.stride().div_ceil(SIDE))
    }

    /// Tiles from top to bottom and from left to right.
    fn tiles(&self) -> (usize, usize) {
        let (out, _) = self.variant.sides();
        (self.output.height.div_ceil(out), self.output.width.div_ceil(out))
    }

    fn chunks(&self, batch: usize) -> usize {
        let (down, across) = self.tiles();
        (batch * down * across).div_ceil(TILES)
    }

    /// Parts into which the sum is cut; the threads do not decide it.
    fn parts(&self, batch: usize) -> usize {
        let (down, across) = self.blocks();
        (ITEMS / (down * across)).max(1).min(self.chunks(batch))
    }

    /// Floats of the sums of a block.
    fn block_len(&self) -> usize {
        self.variant.positions() * (SIDE * SIDE + SHIFT)
    }

    /// Where the sums of a part and block are: `[positions][in][out]`.
    fn sums(&self, memory: &Memory, part: usize, block: usize) -> *mut f32 {
        let (down, across) = self.blocks();
        let place = part * down * across + block;
        memory.shared().wrapping_add(place * self.block_len())
    }
}

impl Operation for WinogradGradient {
    fn split(&self, batch: usize, _: usize) -> Split {
        let (down, across) = self.blocks();
        let items = self.parts(batch) * down * across;
        let scratch = self.variant.positions() * 2 * (TILES * SIDE + SHIFT);
        Split {
            items: [items, down * across * SIDE / 4],
            needs: Needs { scratch, shared: items * self.block_len() },
        }
    }
    fn reads(&self) -> Vec<Buffer> {
        vec![self.source.buffer, self.output.buffer]
    }
    fn writes(&self) -> Vec<Buffer> {
        Vec::new()
    }
    fn name(&self) -> String {
        let (from, to) = (self.source.channels(), self.output.channels());
        let (height, width) = (self.output.height, self.output.width);
        let doubled = if self.doubled { " doubled" } else { "" };
        format!("weights winograd {:?}{doubled} {from}→{to} at {height}×{width}", self.variant)
    }
    fn flop(&self) -> f64 {
        18.0 * (self.output.pixels() * self.output.channels() * self.source.channels()) as f64
    }
    unsafe fn run(&self, memory: &Memory, phase: usize, item: usize, worker: usize) {
        let (down, across) = self.blocks();
        if phase == 0 {
            let (part, block) = (item / (down * across), item % (down * across));
            let scratch = memory.scratch(worker);
            dispatch(memory.isa, Accumulate { op: self, memory, part, block, scratch });
        } else {
            let (block, quarter) = (item / (SIDE / 4), item % (SIDE / 4));
            dispatch(memory.isa, Collect { op: self, memory, block, first: quarter * 4 });
        }
    }
}

/// The sums of one part and block.
struct Accumulate<'a> {
    op: &'a WinogradGradient,
    memory: &'a Memory<'a>,
    part: usize,
    block: usize,
    scratch: *mut f32,
}

impl Kernel for Accumulate<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.op.variant {
            Variant::F2 => self.with::<S, F2>(s),
            Variant::F4 => self.with::<S, F4>(s),
        }
    }
}

/// Some channels of each pixel of a map that a tile needs.
struct Tile {
    /// `side × side` pixels.
    pixels: [*const f32; 36],
    channels: usize,
}

impl Accumulate<'_> {
    #[inline(always)]
    fn with<S: Simd, F: Gradient>(&self, s: S) {
        let Self { op, memory, part, block, scratch } = *self;
        let (down, across) = op.tiles();
        let all = memory.batch * down * across;
        let (_, blocks) = op.blocks();
        let (first_in, first_out) = (block / blocks * SIDE, block % blocks * SIDE);
        let rows = SIDE.min(op.source.stride() - first_in);
        let columns = SIDE.min(op.output.stride() - first_out);
        let sums = op.sums(memory, part, block);
        let pitch = TILES * SIDE + SHIFT;
        let (seen, answers) = (scratch, scratch.wrapping_add(F::IN * F::IN * pitch));
        let (chunks, parts) = (op.chunks(memory.batch), op.parts(memory.batch));
        let own = part * chunks / parts..(part + 1) * chunks / parts;
        for chunk in own.clone() {
            let first = chunk * TILES;
            let count = TILES.min(all - first);
            for t in 0..count {
                let (sample, tile) = ((first + t) / (down * across), (first + t) % (down * across));
                let (y, x) = (tile / across * F::OUT, tile % across * F::OUT);
                // SAFETY: the pixels have these channels, and the scratch a row for each tile at each
                // position.
                unsafe {
                    let tile = self.input::<F>(sample, y, x, first_in, rows);
                    transform::<S, F, false>(s, &tile, seen.add(t * SIDE), pitch);
                    let tile = self.answer::<F>(sample, y, x, first_out, columns);
                    transform::<S, F, true>(s, &tile, answers.add(t * SIDE), pitch);
                }
            }
            for position in 0..F::IN * F::IN {
                let x = seen.wrapping_add(position * pitch).cast_const();
                let y = answers.wrapping_add(position * pitch).cast_const();
                let to = sums.wrapping_add(position * (SIDE * SIDE + SHIFT));
                let (x, y) = (move |k| x.wrapping_add(k * SIDE), move |k| y.wrapping_add(k * SIDE));
                // SAFETY: the tiles are transformed, and the sums are this item's.
                unsafe {
                    let new = chunk == own.start;
                    outer::product(s, to, SIDE, (rows, columns), new, count, x, y);
                }
            }
        }
    }

    /// The pixels under an input tile.
    #[inline(always)]
    fn input<F: Gradient>(
        &self,
        sample: usize,
        y: usize,
        x: usize,
        first: usize,
        channels: usize,
    ) -> Tile {
        let (op, source) = (self.op, &self.op.source);
        let base = self.memory.at(source.buffer, sample).cast_const();
        let shift = usize::from(op.doubled);
        let mut pixels = [op.zeros.as_slice().as_ptr(); 36];
        for i in 0..F::IN {
            for j in 0..F::IN {
                // Left of or above the image wraps to something huge.
                let (row, column) = ((y + i).wrapping_sub(1), (x + j).wrapping_sub(1));
                if row < op.output.height && column < op.output.width {
                    let pixel = (row >> shift) * source.width + (column >> shift);
                    pixels[i * F::IN + j] = base.wrapping_add(pixel * source.stride() + first);
                }
            }
        }
        Tile { pixels, channels }
    }

    /// The pixels of an output tile.
    #[inline(always)]
    fn answer<F: Gradient>(
        &self,
        sample: usize,
        y: usize,
        x: usize,
        first: usize,
        channels: usize,
    ) -> Tile {
        let output = &self.op.output;
        let base = self.memory.at(output.buffer, sample).cast_const();
        let mut pixels = [self.op.zeros.as_slice().as_ptr(); 36];
        for i in 0..F::OUT.min(output.height - y) {
            for j in 0..F::OUT.min(output.width - x) {
                let pixel = (y + i) * output.width + x + j;
                pixels[i * F::OUT + j] = base.wrapping_add(pixel * output.stride() + first);
            }
        }
        Tile { pixels, channels }
    }
}

/// `Bᵀ d B` of an input tile or, with `SPREAD`, `A ∂y Aᵀ` of an output tile.
///
/// # Safety
/// The pixels are good for reading the tile's channels, whole vectors, and `target` for writing them at
/// each position, `pitch` apart.
#[inline(always)]
unsafe fn transform<S: Simd, F: Gradient, const SPREAD: bool>(
    s: S,
    tile: &Tile,
    target: *mut f32,
    pitch: usize,
) {
    let from = if SPREAD { F::OUT } else { F::IN };
    let zero = s.splat(0.0);
    let mut c = 0;
    while c < tile.channels {
        let mut half = [[zero; 6]; 6];
        for j in 0..from {
            let mut column = [zero; 6];
            for i in 0..from {
                // SAFETY: the caller's promise.
                column[i] = unsafe { s.load(tile.pixels[i * from + j].add(c)) };
            }
            let column = one::<S, F, SPREAD>(s, column);
            for i in 0..F::IN {
                half[i][j] = column[i];
            }
        }
        for i in 0..F::IN {
            let row = one::<S, F, SPREAD>(s, half[i]);
            for j in 0..F::IN {
                // SAFETY: the caller's promise.
                unsafe { s.store(target.add((i * F::IN + j) * pitch + c), row[j]) };
            }
        }
        c += S::LANES;
    }
}

#[inline(always)]
fn one<S: Simd, F: Gradient, const SPREAD: bool>(s: S, x: [S::V; 6]) -> [S::V; 6] {
    if SPREAD { F::spread(s, x) } else { F::forward(s, x) }
}

/// Adds the parts of some rows of a block, and transforms them back.
struct Collect<'a> {
    op: &'a WinogradGradient,
    memory: &'a Memory<'a>,
    block: usize,
    first: usize,
}

impl Kernel for Collect<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.op.variant {
            Variant::F2 => self.with::<S, F2>(s),
            Variant::F4 => self.with::<S, F4>(s),
        }
    }
}

impl Collect<'_> {
    #[inline(always)]
    fn with<S: Simd, F: Gradient>(&self, s: S) {
        let Self { op, memory, block, first } = *self;
        let (_, blocks) = op.blocks();
        let (first_in, first_out) = (block / blocks * SIDE, block % blocks * SIDE);
        let columns = SIDE.min(op.output.stride() - first_out);
        let parts = op.parts(memory.batch);
        for row in first..first + 4 {
            let Some(c) = op.inputs.get(first_in + row).copied().flatten() else {
                continue;
            };
            for column in (0..columns).step_by(S::LANES) {
                let zero = s.splat(0.0);
                let mut sums = [zero; 36];
                for part in 0..parts {
                    let from = op.sums(memory, part, block).wrapping_add(row * SIDE + column);
                    for (position, sum) in sums.iter_mut().enumerate().take(F::IN * F::IN) {
                        // SAFETY: the first phase has left the sums of every part here.
                        *sum = s.add(*sum, unsafe {
                            s.load(from.add(position * (SIDE * SIDE + SHIFT)))
                        });
                    }
                }
                let mut lanes = [[0f32; 16]; 9];
                for (lanes, vector) in lanes.iter_mut().zip(taps::<S, F>(s, &sums)) {
                    // SAFETY: no vector is longer than 16.
                    unsafe { s.store(lanes.as_mut_ptr(), vector) };
                }
                for lane in 0..S::LANES {
                    let o = first_out + column + lane;
                    if o < op.output.channels() {
                        let (to, factor) = op.filter.gradients(memory, o, c);
                        for (tap, lanes) in lanes.iter().enumerate() {
                            // SAFETY: each weight belongs to one row of one block.
                            unsafe { *to.add(tap) = factor * lanes[lane] };
                        }
                    }
                }
            }
        }
    }
}
