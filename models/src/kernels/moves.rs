//! Single passes: element-wise functions, and maps that are the same for every sample.

use std::sync::Arc;

use super::activation::Function;
use super::arena::{Aligned, Buffer};
use super::element::ElementType;
use super::image::{self, Image};
use super::isa::{Kernel, dispatch};
use super::program::{Memory, Operation, Split};
use super::simd::Simd;

/// Numbers of an item.
pub(super) const CHUNK: usize = 8192;

/// `function(x)` of every number.
pub(crate) struct Activate {
    pub(crate) input: Image,
    pub(crate) output: Image,
    pub(crate) function: Function,
}

impl Operation for Activate {
    fn split(&self, batch: usize, _: usize) -> Split {
        assert_eq!(self.numbers(), self.input.pixels() * self.input.stride(), "maps of one size");
        Split::one(batch * self.numbers().div_ceil(CHUNK))
    }
    fn reads(&self) -> Vec<Buffer> {
        vec![self.input.buffer]
    }
    fn writes(&self) -> Vec<Buffer> {
        vec![self.output.buffer]
    }
    fn name(&self) -> String {
        format!("{:?} {} at {}", self.function, self.input.channels(), self.input.pixels())
    }
    unsafe fn run(&self, memory: &Memory, _: usize, item: usize, _: usize) {
        let chunks = self.numbers().div_ceil(CHUNK);
        let (sample, first) = (item / chunks, item % chunks * CHUNK);
        let len = CHUNK.min(self.numbers() - first);
        let at = |image: &Image| {
            memory.at(image.buffer, sample).wrapping_add(image.element.words(first))
        };
        let (from, to) = (at(&self.input), at(&self.output));
        let elements = [self.input.element, self.output.element];
        dispatch(memory.isa, Numbers { function: self.function, from, to, elements, len });
    }
}

impl Activate {
    /// Numbers of a sample, padding counted.
    fn numbers(&self) -> usize {
        self.output.pixels() * self.output.stride()
    }
}

struct Numbers {
    function: Function,
    from: *const f32,
    to: *mut f32,
    /// What both are made of.
    elements: [ElementType; 2],
    len: usize,
}

impl Kernel for Numbers {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // One loop for each function, so that the choice is not made for each vector.
        match self.function {
            Function::Silu => self.with(s, Function::Silu),
            Function::GeluTanh => self.with(s, Function::GeluTanh),
            other => self.with(s, other),
        }
    }
}

impl Numbers {
    #[inline(always)]
    fn with<S: Simd>(&self, s: S, function: Function) {
        let [from, to] = self.elements;
        for i in (0..self.len).step_by(S::LANES) {
            // SAFETY: buffers are whole cache lines, and the item's part is its own.
            unsafe {
                let x = from.load(s, self.from, i);
                to.store(s, self.to, i, function.vector(s, x));
            }
        }
    }
}

/// The same map for every sample.
pub(crate) struct Fill {
    values: Arc<Aligned>,
    output: Image,
}

impl Fill {
    /// `values` is `[pixels, channels]` of a map of one segment.
    pub(crate) fn new(values: &[f32], output: Image) -> Self {
        Self::with(Self::pack(values, output).into(), output)
    }

    /// `values` is packed.
    pub(crate) fn with(values: Arc<Aligned>, output: Image) -> Self {
        assert_eq!(values.as_slice().len(), output.pixels() * output.stride());
        Self { values, output }
    }

    /// Such numbers as they lie in the map.
    pub(crate) fn pack(values: &[f32], output: Image) -> Aligned {
        let (channels, stride) = (output.channels(), output.stride());
        assert_eq!(values.len(), output.pixels() * channels);
        let mut all = Aligned::zeros(output.pixels() * stride);
        let pixels = all.as_mut_slice().chunks_exact_mut(stride).zip(values.chunks_exact(channels));
        for (pixel, values) in pixels {
            pixel[..channels].copy_from_slice(values);
        }
        all
    }
}

impl Operation for Fill {
    fn split(&self, batch: usize, _: usize) -> Split {
        Split::one(batch)
    }
    fn reads(&self) -> Vec<Buffer> {
        Vec::new()
    }
    fn writes(&self) -> Vec<Buffer> {
        vec![self.output.buffer]
    }
    fn name(&self) -> String {
        "fill".to_string()
    }
    fn weight_bytes(&self) -> usize {
        4 * self.values.as_slice().len()
    }
    unsafe fn run(&self, memory: &Memory, _: usize, sample: usize, _: usize) {
        let (values, to) = (self.values.as_slice(), memory.at(self.output.buffer, sample));
        // SAFETY: the sample's part of the output, which this item alone writes, is as long.
        unsafe { std::slice::from_raw_parts_mut(to, values.len()) }.copy_from_slice(values);
    }
}

/// The weights of a network that is trained as the same map for every sample.
pub(crate) struct Learned {
    /// Numbers of the parameters whose values lie one after another, `[pixels, channels]` of the map.
    pub(crate) parameters: Vec<usize>,
    pub(crate) output: Image,
}

impl Operation for Learned {
    fn split(&self, batch: usize, _: usize) -> Split {
        Split::one(batch)
    }
    fn reads(&self) -> Vec<Buffer> {
        Vec::new()
    }
    fn writes(&self) -> Vec<Buffer> {
        vec![self.output.buffer]
    }
    fn name(&self) -> String {
        "learned".to_string()
    }
    unsafe fn run(&self, memory: &Memory, _: usize, sample: usize, _: usize) {
        let (channels, stride) = (self.output.channels(), self.output.stride());
        let to = memory.at(self.output.buffer, sample);
        let values = self.parameters.iter().flat_map(|&number| memory.parameters[number]);
        // SAFETY: the sample's part of the output, which this item alone writes.
        let output = unsafe { std::slice::from_raw_parts_mut(to, self.output.pixels() * stride) };
        output.fill(0.0);
        for (i, value) in values.enumerate() {
            output[i / channels * stride + i % channels] = *value;
        }
    }
}

/// The gradient of [`Learned`]'s weights: the sum over all samples.
pub(crate) struct LearnedGradient {
    /// The gradient of the map.
    pub(crate) input: Image,
    /// Where among all gradients those of the weights begin, one after another.
    pub(crate) gradient: usize,
}

impl Operation for LearnedGradient {
    fn split(&self, _: usize, _: usize) -> Split {
        Split::one(self.input.pixels())
    }
    fn reads(&self) -> Vec<Buffer> {
        vec![self.input.buffer]
    }
    fn writes(&self) -> Vec<Buffer> {
        Vec::new()
    }
    fn name(&self) -> String {
        "learned gradient".to_string()
    }
    unsafe fn run(&self, memory: &Memory, _: usize, pixel: usize, _: usize) {
        let (channels, stride) = (self.input.channels(), self.input.stride());
        for c in 0..channels {
            let of = |sample| {
                let from = memory.at(self.input.buffer, sample).wrapping_add(pixel * stride + c);
                // SAFETY: the sample's gradient is there, and nothing writes it now.
                f64::from(unsafe { *from })
            };
            let sum: f64 = (0..memory.batch).map(of).sum();
            let to = memory.gradients().wrapping_add(self.gradient + pixel * channels + c);
            // SAFETY: the pixel's weights, which this item alone writes.
            unsafe { *to = sum as f32 };
        }
    }
}

/// Of each token the row of a table, plus the row of its place.
pub(crate) struct Embed {
    input: usize,
    /// `[rows, channels]`.
    table: Arc<Aligned>,
    /// `[tokens, channels]`.
    places: Arc<Aligned>,
    output: Image,
}

impl Embed {
    /// Of the input that has the numbers of rows; the map is of f32.
    pub(crate) fn new(input: usize, tables: [Arc<Aligned>; 2], output: Image) -> Self {
        let ([table, places], channels) = (tables, output.channels());
        assert_eq!(places.as_slice().len(), output.pixels() * channels);
        assert!(table.as_slice().len().is_multiple_of(channels));
        assert_eq!(output.element, ElementType::F32);
        Self { input, table, places, output }
    }
}

impl Operation for Embed {
    fn split(&self, batch: usize, _: usize) -> Split {
        Split::one(batch)
    }
    fn reads(&self) -> Vec<Buffer> {
        Vec::new()
    }
    fn writes(&self) -> Vec<Buffer> {
        vec![self.output.buffer]
    }
    fn name(&self) -> String {
        "embed".to_string()
    }
    fn weight_bytes(&self) -> usize {
        4 * (self.table.as_slice().len() + self.places.as_slice().len())
    }
    unsafe fn run(&self, memory: &Memory, _: usize, sample: usize, _: usize) {
        let (tokens, channels) = (self.output.pixels(), self.output.channels());
        let ids = &memory.inputs[self.input][sample * tokens..][..tokens];
        let (to, stride) = (memory.at(self.output.buffer, sample), self.output.stride());
        // SAFETY: the sample's part of the output, which this item alone writes.
        let output = unsafe { std::slice::from_raw_parts_mut(to, tokens * stride) };
        let (table, places) = (self.table.as_slice(), self.places.as_slice());
        let rows = ids.iter().zip(places.chunks_exact(channels));
        for (token, (&id, place)) in output.chunks_exact_mut(stride).zip(rows) {
            let row = &table[id as usize * channels..][..channels];
            token[channels..].fill(0.0);
            for (value, (a, b)) in token.iter_mut().zip(row.iter().zip(place)) {
                *value = a + b;
            }
        }
    }
}

/// Rows of a table that are looked at together.
const BLOCK: usize = 64;

/// Of each pixel, the nearest row of a table.
pub(crate) struct Nearest {
    input: Image,
    output: Image,
    /// `[channels][rows]`; infinite after the last row, to whole blocks.
    columns: Arc<Aligned>,
    /// Rows with those after the last.
    rows: usize,
}

impl Nearest {
    /// Of a packed table; both maps are of f32 and one segment.
    pub(crate) fn new(columns: Arc<Aligned>, input: Image, output: Image) -> Self {
        assert_eq!(output.channels(), input.channels());
        assert!([input, output].iter().all(|image| image.element == ElementType::F32));
        let rows = columns.as_slice().len() / input.channels();
        Self { input, output, columns, rows }
    }

    /// A table `[rows, channels]`, packed.
    pub(crate) fn pack(table: &[f32], channels: usize) -> Aligned {
        let rows = (table.len() / channels).next_multiple_of(BLOCK);
        let mut packed = Aligned::zeros(rows * channels);
        let columns = packed.as_mut_slice();
        columns.fill(f32::INFINITY);
        for (row, values) in table.chunks_exact(channels).enumerate() {
            for (c, &value) in values.iter().enumerate() {
                columns[c * rows + row] = value;
            }
        }
        packed
    }

    /// The row with the smallest squared distance, of several the first.
    fn row(&self, pixel: &[f32]) -> usize {
        let (mut nearest, mut least) = (0, f32::INFINITY);
        for first in (0..self.rows).step_by(BLOCK) {
            let mut distances = [0f32; BLOCK];
            for (&x, column) in pixel.iter().zip(self.columns.as_slice().chunks_exact(self.rows)) {
                for (distance, &value) in distances.iter_mut().zip(&column[first..]) {
                    *distance += (x - value) * (x - value);
                }
            }
            for (i, &distance) in distances.iter().enumerate() {
                if distance < least {
                    (nearest, least) = (first + i, distance);
                }
            }
        }
        nearest
    }
}

impl Operation for Nearest {
    fn split(&self, batch: usize, _: usize) -> Split {
        Split::one(batch * self.output.pixels().div_ceil(image::CHUNK))
    }
    fn reads(&self) -> Vec<Buffer> {
        vec![self.input.buffer]
    }
    fn writes(&self) -> Vec<Buffer> {
        vec![self.output.buffer]
    }
    fn name(&self) -> String {
        format!("nearest of {} at {}", self.rows, self.input.pixels())
    }
    fn weight_bytes(&self) -> usize {
        4 * self.columns.as_slice().len()
    }
    unsafe fn run(&self, memory: &Memory, _: usize, item: usize, _: usize) {
        let (channels, stride) = (self.input.channels(), self.input.stride());
        image::resample(&self.input, &self.output, memory, item, |input, p, pixel| {
            let row = self.row(&input[p * stride..][..channels]);
            pixel.fill(0.0);
            for (c, value) in pixel[..channels].iter_mut().enumerate() {
                *value = self.columns.as_slice()[c * self.rows + row];
            }
        });
    }
}
