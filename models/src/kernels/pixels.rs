//! Pixels of one map, or of a table, as those of another.

use std::sync::Arc;

use super::arena::{Aligned, Buffer};
use super::element::ElementType;
use super::image::{CHUNK, Image};
use super::isa::{Kernel, dispatch};
use super::program::{Memory, Operation, Split};
use super::simd::Simd;

/// Some pixels of a map as pixels of another, of as many channels.
pub(crate) struct CopyPixels {
    input: Image,
    output: Image,
    /// The first pixel of either.
    first: [usize; 2],
    count: usize,
}

impl CopyPixels {
    /// So many, from the first pixel of either on.
    pub(crate) fn new(input: Image, output: Image, first: [usize; 2], count: usize) -> Self {
        assert_eq!((input.stride(), input.segments[1]), (output.stride(), output.segments[1]));
        assert!(first[0] + count <= input.pixels() && first[1] + count <= output.pixels());
        Self { input, output, first, count }
    }
}

impl Operation for CopyPixels {
    fn split(&self, batch: usize, _: usize) -> Split {
        Split::one(batch * self.count.div_ceil(CHUNK))
    }
    fn reads(&self) -> Vec<Buffer> {
        vec![self.input.buffer]
    }
    fn writes(&self) -> Vec<Buffer> {
        vec![self.output.buffer]
    }
    fn name(&self) -> String {
        format!("copy {} at {}", self.input.channels(), self.count)
    }
    unsafe fn run(&self, memory: &Memory, _: usize, item: usize, _: usize) {
        let chunks = self.count.div_ceil(CHUNK);
        let (sample, begin) = (item / chunks, item % chunks * CHUNK);
        let count = CHUNK.min(self.count - begin);
        let at = |image: &Image, first: usize| {
            memory.at(image.buffer, sample).wrapping_add((first + begin) * image.words())
        };
        let (from, to) = (at(&self.input, self.first[0]), at(&self.output, self.first[1]));
        dispatch(memory.isa, Pixels { op: self, from, to, count });
    }
}

struct Pixels<'a> {
    op: &'a CopyPixels,
    from: *const f32,
    to: *mut f32,
    count: usize,
}

impl Kernel for Pixels<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let CopyPixels { input, output, .. } = self.op;
        for p in 0..self.count {
            let x = self.from.wrapping_add(p * input.words());
            let y = self.to.wrapping_add(p * output.words());
            for c in (0..input.stride()).step_by(S::LANES) {
                // SAFETY: the vector lies in the padded channels of a pixel of either map; the item's pixels are its own.
                unsafe { output.element.store(s, y, c, input.element.load(s, x, c)) };
            }
        }
    }
}

/// The middle of a square table of places, the same for every sample.
pub(crate) struct Crop {
    /// `[side·side, channels]`.
    table: Arc<Aligned>,
    side: usize,
    output: Image,
}

impl Crop {
    /// Of a table of at least as many rows and columns as the map, which is of f32.
    pub(crate) fn new(table: Arc<Aligned>, side: usize, output: Image) -> Self {
        assert_eq!(table.as_slice().len(), side * side * output.channels());
        assert!(output.height <= side && output.width <= side);
        assert_eq!(output.element, ElementType::F32);
        Self { table, side, output }
    }
}

impl Operation for Crop {
    fn split(&self, batch: usize, _: usize) -> Split {
        Split::one(batch * self.output.height)
    }
    fn reads(&self) -> Vec<Buffer> {
        Vec::new()
    }
    fn writes(&self) -> Vec<Buffer> {
        vec![self.output.buffer]
    }
    fn name(&self) -> String {
        "crop".to_string()
    }
    fn weight_bytes(&self) -> usize {
        4 * self.table.as_slice().len()
    }
    unsafe fn run(&self, memory: &Memory, _: usize, item: usize, _: usize) {
        let Image { height, width, .. } = self.output;
        let (sample, row) = (item / height, item % height);
        let (channels, stride) = (self.output.channels(), self.output.stride());
        let [top, left] = [height, width].map(|side| (self.side - side) / 2);
        let first = ((top + row) * self.side + left) * channels;
        let places = self.table.as_slice()[first..][..width * channels].chunks_exact(channels);
        let to = memory.at(self.output.buffer, sample).wrapping_add(row * width * stride);
        // SAFETY: a row of the sample's part of the output, which this item alone writes.
        let output = unsafe { std::slice::from_raw_parts_mut(to, width * stride) };
        for (pixel, place) in output.chunks_exact_mut(stride).zip(places) {
            pixel[..channels].copy_from_slice(place);
            pixel[channels..].fill(0.0);
        }
    }
}
