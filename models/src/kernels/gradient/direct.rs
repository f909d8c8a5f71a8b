//! The gradient of a convolution's weights as sums of products, for any kernel size, stride and
//! padding.

use super::filter::{Filter, places};
use super::outer;
use crate::kernels::arena::{Aligned, Buffer};
use crate::kernels::direct::Taps;
use crate::kernels::image::Image;
use crate::kernels::isa::{Kernel, dispatch};
use crate::kernels::program::{Memory, Needs, Operation, Split};
use crate::kernels::simd::Simd;

/// Channels of a block of sums, in and out: it stays in the nearest cache.
const SIDE: usize = 64;
/// Pixels that are gone through for all sums of a block before the next ones.
const CHUNK: usize = 64;
/// Items that there should be.
const ITEMS: usize = 8;

/// `Σ x(pixel under tap) ⊗ ∂y(pixel)` over all output pixels of the batch.
pub(crate) struct DirectGradient {
    source: Image,
    /// The gradient of the convolution's output.
    output: Image,
    taps: Taps,
    filter: Filter,
    inputs: Vec<Option<usize>>,
    zeros: Aligned,
}

impl DirectGradient {
    /// `first` is the number of the source's first channel among the filter's.
    pub(crate) fn new(
        source: Image,
        output: Image,
        taps: Taps,
        filter: Filter,
        first: usize,
    ) -> Self {
        let inputs = places(&[source], first, false);
        Self { source, output, taps, filter, inputs, zeros: Aligned::zeros(source.stride()) }
    }

    fn blocks(&self) -> (usize, usize) {
        (self.source.stride().div_ceil(SIDE), self.output.stride().div_ceil(SIDE))
    }

    fn chunks(&self, batch: usize) -> usize {
        (batch * self.output.pixels()).div_ceil(CHUNK)
    }

    /// Parts into which the sum is cut; the threads do not decide it.
    fn parts(&self, batch: usize) -> usize {
        let (down, across) = self.blocks();
        (ITEMS / (down * across * self.taps.count())).max(1).min(self.chunks(batch))
    }

    /// Where the sums of a part, tap and block are.
    fn sums(&self, memory: &Memory, part: usize, tap: usize, (i, j): (usize, usize)) -> *mut f32 {
        let (down, across) = self.blocks();
        let block = ((part * self.taps.count() + tap) * down + i) * across + j;
        memory.shared().wrapping_add(block * SIDE * SIDE)
    }
}

impl Operation for DirectGradient {
    fn split(&self, batch: usize, _: usize) -> Split {
        let (down, across) = self.blocks();
        let blocks = down * across;
        let items = self.parts(batch) * self.taps.count() * blocks;
        Split {
            items: [items, blocks * SIDE / 4],
            needs: Needs { scratch: 0, shared: items * SIDE * SIDE },
        }
    }
    fn reads(&self) -> Vec<Buffer> {
        vec![self.source.buffer, self.output.buffer]
    }
    fn writes(&self) -> Vec<Buffer> {
        Vec::new()
    }
    fn name(&self) -> String {
        let Taps { side, stride, .. } = self.taps;
        let (from, to) = (self.source.channels(), self.output.channels());
        let size = (self.output.height, self.output.width);
        format!("weights direct {side}×{side}/{stride} {from}→{to} at {}×{}", size.0, size.1)
    }
    fn flop(&self) -> f64 {
        let (from, to) = (self.source.channels(), self.output.channels());
        2.0 * (self.output.pixels() * from * to * self.taps.count()) as f64
    }
    unsafe fn run(&self, memory: &Memory, phase: usize, item: usize, _: usize) {
        let (down, across) = self.blocks();
        if phase == 0 {
            let (block, rest) = (item % (down * across), item / (down * across));
            let (tap, part) = (rest % self.taps.count(), rest / self.taps.count());
            let block = (block / across, block % across);
            return dispatch(memory.isa, Run { op: self, memory, part, tap, block });
        }
        let (block, quarter) = (item / (SIDE / 4), item % (SIDE / 4));
        let block = (block / across, block % across);
        for row in quarter * 4..quarter * 4 + 4 {
            let Some(c) = self.inputs.get(block.0 * SIDE + row).copied().flatten() else {
                continue;
            };
            let columns = SIDE.min(self.output.channels().saturating_sub(block.1 * SIDE));
            let parts = self.parts(memory.batch);
            let of_part = self.taps.count() * down * across * SIDE * SIDE;
            for tap in 0..self.taps.count() {
                let from = self.sums(memory, 0, tap, block).wrapping_add(row * SIDE);
                for column in 0..columns {
                    let (to, factor) = self.filter.gradients(memory, block.1 * SIDE + column, c);
                    // SAFETY: the sums of all parts are there; each weight has one item.
                    unsafe {
                        let mut sum = *from.add(column);
                        for part in 1..parts {
                            sum += *from.add(part * of_part + column);
                        }
                        *to.add(tap) = factor * sum;
                    }
                }
            }
        }
    }
}

struct Run<'a> {
    op: &'a DirectGradient,
    memory: &'a Memory<'a>,
    part: usize,
    tap: usize,
    block: (usize, usize),
}

impl Kernel for Run<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { op, memory, part, tap, block } = self;
        let (first_in, first_out) = (block.0 * SIDE, block.1 * SIDE);
        // Of a few channels most of the padding is left out.
        let rows = SIDE.min(op.source.depth() - first_in.min(op.source.depth()));
        let rows = rows.next_multiple_of(outer::rows::<S>());
        let columns = SIDE.min(op.output.stride() - first_out);
        let sums = op.sums(memory, part, tap, block);
        let (stride, pixels, width) = (op.output.stride(), op.output.pixels(), op.output.width);
        let all = memory.batch * pixels;
        let start = memory.at(op.output.buffer, 0).wrapping_add(first_out).cast_const();
        let chunks = op.chunks(memory.batch);
        let parts = op.parts(memory.batch);
        let own = part * chunks / parts..(part + 1) * chunks / parts;
        let mut table = [std::ptr::null::<f32>(); CHUNK];
        for chunk in own.clone() {
            let first = chunk * CHUNK;
            let count = CHUNK.min(all - first);
            for (row, pointer) in table.iter_mut().enumerate().take(count) {
                let (sample, p) = ((first + row) / pixels, (first + row) % pixels);
                *pointer = match op.taps.pixel(&op.source, tap, p / width, p % width) {
                    None => op.zeros.as_slice().as_ptr(),
                    Some(pixel) => memory
                        .at(op.source.buffer, sample)
                        .wrapping_add(pixel * op.source.stride())
                        .cast_const(),
                }
                .wrapping_add(first_in);
            }
            let table = &table;
            // SAFETY: the pixels have as many channels; the samples of the output follow each other
            // without gaps; the sums are this item's.
            unsafe {
                let x = move |k: usize| *table.get_unchecked(k);
                let y = move |k: usize| start.wrapping_add((first + k) * stride);
                let new = chunk == own.start;
                outer::product(s, sums, SIDE, (rows, columns), new, count, x, y);
            }
        }
    }
}
