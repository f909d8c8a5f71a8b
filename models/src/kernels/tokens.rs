//! What a transformer does to its tokens between products: layer normalisation (Ba et al. 2016) with a
//! scale and a shift of each sample, a gate of each sample on the way to a sum, and gated linear units.
//!
//! A token is a pixel of a map of one segment. Scales, shifts and gates are parts of one vector of each
//! sample, which need not begin at whole vectors.

use super::activation::Function;
use super::arena::{Aligned, Buffer};
use super::element::ElementType;
use super::image::Image;
use super::isa::{Kernel, dispatch};
use super::program::{Memory, Operation, Split};
use super::simd::Simd;

/// Part of a vector of each sample.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Vector {
    pub(crate) buffer: Buffer,
    /// Where in the vector it begins; it is as long as a token has channels.
    pub(crate) start: usize,
}

impl Vector {
    /// Where it is for `sample`; good for reading whole vectors of a token.
    #[inline(always)]
    pub(super) fn at(&self, memory: &Memory, sample: usize) -> *mut f32 {
        memory.at(self.buffer, sample).wrapping_add(self.start)
    }
}

/// 1 for the channels of a map of one segment, 0 for its padding.
pub(super) fn mask(image: &Image) -> Aligned {
    let mut real = Aligned::zeros(image.stride());
    real.as_mut_slice()[..image.channels()].fill(1.0);
    real
}

/// Tokens of an item: about 32 KiB.
fn chunk(image: &Image) -> usize {
    (8192 / image.stride()).max(1)
}

/// The sum of a vector's lanes, in their order.
#[inline(always)]
pub(super) fn total<S: Simd>(s: S, v: S::V) -> f64 {
    let mut lanes = [0f32; 16];
    // SAFETY: no vector is longer than 16.
    unsafe { s.store(lanes.as_mut_ptr(), v) };
    lanes[..S::LANES].iter().map(|&x| f64::from(x)).sum()
}

/// `(x − mean)/σ·(one + scale) + shift`, with mean and deviation of each token.
pub(crate) struct Modulate {
    input: Image,
    output: Image,
    eps: f64,
    scale: Vector,
    shift: Vector,
    /// What is added to the scale: one where it is a change, nothing where it is a norm's weight.
    one: f32,
    /// `[pixels][2]`: where mean and one over the deviation of each token are kept as well.
    moments: Option<Buffer>,
    real: Aligned,
}

impl Modulate {
    pub(crate) fn new(
        input: Image,
        output: Image,
        eps: f64,
        ([scale, shift], one): ([Vector; 2], f32),
        moments: Option<Buffer>,
    ) -> Self {
        Self { input, output, eps, scale, shift, one, moments, real: mask(&input) }
    }
}

impl Operation for Modulate {
    fn split(&self, batch: usize, _: usize) -> Split {
        Split::one(batch * self.input.pixels().div_ceil(chunk(&self.input)))
    }
    fn reads(&self) -> Vec<Buffer> {
        vec![self.input.buffer, self.scale.buffer, self.shift.buffer]
    }
    fn writes(&self) -> Vec<Buffer> {
        [self.output.buffer].into_iter().chain(self.moments).collect()
    }
    fn name(&self) -> String {
        format!("modulate {} at {}", self.input.channels(), self.input.pixels())
    }
    unsafe fn run(&self, memory: &Memory, _: usize, item: usize, _: usize) {
        let size = chunk(&self.input);
        let chunks = self.input.pixels().div_ceil(size);
        let (sample, first) = (item / chunks, item % chunks * size);
        let count = size.min(self.input.pixels() - first);
        dispatch(memory.isa, Tokens { op: self, memory, sample, first, count });
    }
}

struct Tokens<'a, O> {
    op: &'a O,
    memory: &'a Memory<'a>,
    sample: usize,
    first: usize,
    count: usize,
}

impl Kernel for Tokens<'_, Modulate> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Modulate { input, output, eps, scale, shift, one, moments, real } = self.op;
        let (stride, channels) = (input.stride(), input.channels() as f64);
        let (from, to) = (input.element, output.element);
        let real = real.as_slice().as_ptr();
        let scale = scale.at(self.memory, self.sample).cast_const();
        let shift = shift.at(self.memory, self.sample).cast_const();
        let all = self.memory.at(input.buffer, self.sample).cast_const();
        let result = self.memory.at(output.buffer, self.sample);
        for p in self.first..self.first + self.count {
            let x = all.wrapping_add(p * input.words());
            let y = result.wrapping_add(p * output.words());
            let mut sum = s.splat(0.0);
            // SAFETY: vectors lie in the token's padded channels; scales and shifts are read up to a
            // vector's length further, which the arena's slack allows; the item's tokens are its own.
            unsafe {
                for c in (0..stride).step_by(S::LANES) {
                    sum = s.add(sum, from.load(s, x, c));
                }
                let mean = (total(s, sum) / channels) as f32;
                let centre = s.splat(mean);
                let mut squares = s.splat(0.0);
                for c in (0..stride).step_by(S::LANES) {
                    let d = s.keep(s.sub(from.load(s, x, c), centre), s.load(real.add(c)));
                    squares = s.fma(d, d, squares);
                }
                let inverse = (1.0 / (total(s, squares) / channels + eps).sqrt()) as f32;
                if let Some(moments) = moments {
                    let to = self.memory.at(*moments, self.sample).add(2 * p);
                    *to = mean;
                    *to.add(1) = inverse;
                }
                let (inverse, one) = (s.splat(inverse), s.splat(*one));
                for c in (0..stride).step_by(S::LANES) {
                    let normed = s.mul(s.sub(from.load(s, x, c), centre), inverse);
                    let factor = s.add(s.load(scale.add(c)), one);
                    let v = s.fma(normed, factor, s.load(shift.add(c)));
                    to.store(s, y, c, s.keep(v, s.load(real.add(c))));
                }
            }
        }
    }
}

/// `residual + gate·x`.
pub(crate) struct Gate {
    input: Image,
    residual: Image,
    output: Image,
    gate: Vector,
    real: Aligned,
}

impl Gate {
    pub(crate) fn new(input: Image, residual: Image, output: Image, gate: Vector) -> Self {
        Self { input, residual, output, gate, real: mask(&input) }
    }
}

impl Operation for Gate {
    fn split(&self, batch: usize, _: usize) -> Split {
        Split::one(batch * self.input.pixels().div_ceil(chunk(&self.input)))
    }
    fn reads(&self) -> Vec<Buffer> {
        vec![self.input.buffer, self.residual.buffer, self.gate.buffer]
    }
    fn writes(&self) -> Vec<Buffer> {
        vec![self.output.buffer]
    }
    fn name(&self) -> String {
        format!("gate {} at {}", self.input.channels(), self.input.pixels())
    }
    unsafe fn run(&self, memory: &Memory, _: usize, item: usize, _: usize) {
        let size = chunk(&self.input);
        let chunks = self.input.pixels().div_ceil(size);
        let (sample, first) = (item / chunks, item % chunks * size);
        let count = size.min(self.input.pixels() - first);
        dispatch(memory.isa, Tokens { op: self, memory, sample, first, count });
    }
}

impl Kernel for Tokens<'_, Gate> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Gate { input, residual, output, gate, real } = self.op;
        let (stride, real) = (input.stride(), real.as_slice().as_ptr());
        let gate = gate.at(self.memory, self.sample).cast_const();
        let place = |image: &Image| self.memory.at(image.buffer, self.sample);
        let (x, around, y) = (place(input), place(residual), place(output));
        for p in self.first..self.first + self.count {
            let x = x.wrapping_add(p * input.words());
            let around = around.wrapping_add(p * residual.words());
            let y = y.wrapping_add(p * output.words());
            for c in (0..stride).step_by(S::LANES) {
                // SAFETY: the vector lies in the token's padded channels; gates are read up to a vector's
                // length further, which the arena's slack allows; the item's tokens are its own.
                unsafe {
                    let gate = s.keep(s.load(gate.add(c)), s.load(real.add(c)));
                    let around = residual.element.load(s, around, c);
                    let v = s.fma(gate, input.element.load(s, x, c), around);
                    output.element.store(s, y, c, v);
                }
            }
        }
    }
}

/// How many tokens a prompt has: those before the zeros that it ends with, or all where there is nothing else.
pub(crate) struct CountTokens {
    /// The prompt.
    pub(crate) input: Image,
    /// One number of each sample.
    pub(crate) output: Buffer,
}

impl Operation for CountTokens {
    fn split(&self, batch: usize, _: usize) -> Split {
        Split::one(batch)
    }
    fn reads(&self) -> Vec<Buffer> {
        vec![self.input.buffer]
    }
    fn writes(&self) -> Vec<Buffer> {
        vec![self.output]
    }
    fn name(&self) -> String {
        format!("count {} tokens", self.input.pixels())
    }
    unsafe fn run(&self, memory: &Memory, _: usize, sample: usize, _: usize) {
        let (tokens, words) = (self.input.pixels(), self.input.words());
        // All bits of a word but the signs.
        let magnitude: u32 = match self.input.element {
            ElementType::F32 => 0x7fff_ffff,
            ElementType::Bf16 => 0x7fff_7fff,
        };
        let from = memory.at(self.input.buffer, sample).cast_const();
        // SAFETY: the sample's part of the input, which nothing writes now, and its number, which this item alone writes.
        unsafe {
            let states = std::slice::from_raw_parts(from, tokens * words);
            let told = |token: &[f32]| token.iter().any(|word| word.to_bits() & magnitude != 0);
            let last = states.chunks_exact(words).rposition(told);
            *memory.at(self.output, sample) = last.map_or(tokens, |last| last + 1) as f32;
        }
    }
}

/// A vector of each sample plus others, one after another. Nothing that it reads is wider.
pub(crate) struct Sum {
    input: Image,
    parts: Vec<Image>,
    output: Image,
}

impl Sum {
    pub(crate) fn new(input: Image, parts: Vec<Image>, output: Image) -> Self {
        let width: usize = parts.iter().map(Image::channels).sum();
        assert!([input, output].iter().all(|image| image.channels() == width));
        let vector = |image: &Image| image.pixels() == 1 && image.element == ElementType::F32;
        assert!(parts.iter().chain([&input, &output]).all(vector));
        Self { input, parts, output }
    }
}

impl Operation for Sum {
    fn split(&self, batch: usize, _: usize) -> Split {
        Split::one(batch)
    }
    fn reads(&self) -> Vec<Buffer> {
        self.parts.iter().chain([&self.input]).map(|image| image.buffer).collect()
    }
    fn writes(&self) -> Vec<Buffer> {
        vec![self.output.buffer]
    }
    fn name(&self) -> String {
        format!("sum {}", self.output.channels())
    }
    unsafe fn run(&self, memory: &Memory, _: usize, sample: usize, _: usize) {
        let vector = |image: &Image| {
            let from = memory.at(image.buffer, sample).cast_const();
            // SAFETY: the sample's vector, which nothing writes now.
            unsafe { std::slice::from_raw_parts(from, image.channels()) }
        };
        let to = memory.at(self.output.buffer, sample);
        // SAFETY: the sample's part of the output, which this item alone writes.
        let output = unsafe { std::slice::from_raw_parts_mut(to, self.output.stride()) };
        output.fill(0.0);
        let more = self.parts.iter().flat_map(|part| vector(part).iter());
        for (y, (a, b)) in output.iter_mut().zip(vector(&self.input).iter().zip(more)) {
            *y = a + b;
        }
    }
}

/// The gradient of one part of a [`Sum`].
pub(crate) struct SumGradient {
    /// The gradient of the sum, and where in it the part's begins.
    pub(crate) input: Vector,
    /// The part's, which is added to where something is there.
    pub(crate) output: Image,
    pub(crate) add: bool,
}

impl Operation for SumGradient {
    fn split(&self, batch: usize, _: usize) -> Split {
        Split::one(batch)
    }
    fn reads(&self) -> Vec<Buffer> {
        vec![self.input.buffer]
    }
    fn writes(&self) -> Vec<Buffer> {
        vec![self.output.buffer]
    }
    fn name(&self) -> String {
        format!("sum gradient {}", self.output.channels())
    }
    unsafe fn run(&self, memory: &Memory, _: usize, sample: usize, _: usize) {
        let (channels, stride) = (self.output.channels(), self.output.stride());
        let (from, to) = (self.input.at(memory, sample), memory.at(self.output.buffer, sample));
        // SAFETY: the sample's part of either; this item alone writes the output.
        let (input, output) = unsafe {
            (
                std::slice::from_raw_parts(from.cast_const(), channels),
                std::slice::from_raw_parts_mut(to, stride),
            )
        };
        if !self.add {
            output.fill(0.0);
        }
        for (y, x) in output.iter_mut().zip(input) {
            *y += x;
        }
    }
}

/// `a·gelu(b)` of the first and second half of each token's channels (Shazeer 2020, GEGLU), with the exact function.
pub(crate) struct Geglu {
    pub(super) input: Image,
    pub(super) output: Image,
    pub(super) real: Aligned,
}

impl Geglu {
    pub(crate) fn new(input: Image, output: Image) -> Self {
        assert_eq!(input.channels(), 2 * output.channels());
        assert!(
            output.channels().is_multiple_of(input.element.per_word()),
            "halves are whole words"
        );
        Self { input, output, real: mask(&output) }
    }
}

impl Operation for Geglu {
    fn split(&self, batch: usize, _: usize) -> Split {
        Split::one(batch * self.input.pixels().div_ceil(chunk(&self.input)))
    }
    fn reads(&self) -> Vec<Buffer> {
        vec![self.input.buffer]
    }
    fn writes(&self) -> Vec<Buffer> {
        vec![self.output.buffer]
    }
    fn name(&self) -> String {
        format!("geglu {} at {}", self.output.channels(), self.output.pixels())
    }
    unsafe fn run(&self, memory: &Memory, _: usize, item: usize, _: usize) {
        let size = chunk(&self.input);
        let chunks = self.input.pixels().div_ceil(size);
        let (sample, first) = (item / chunks, item % chunks * size);
        let count = size.min(self.input.pixels() - first);
        dispatch(memory.isa, Tokens { op: self, memory, sample, first, count });
    }
}

impl Kernel for Tokens<'_, Geglu> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Geglu { input, output, real } = self.op;
        let (stride, channels) = (output.stride(), output.channels());
        let real = real.as_slice().as_ptr();
        let all = self.memory.at(input.buffer, self.sample).cast_const();
        let result = self.memory.at(output.buffer, self.sample);
        for p in self.first..self.first + self.count {
            let x = all.wrapping_add(p * input.words());
            let y = result.wrapping_add(p * output.words());
            for c in (0..stride).step_by(S::LANES) {
                // SAFETY: the vector lies in the token's padded channels; halves are read up to a vector's length
                // further, which the next token or the arena's slack allows; the item's tokens are its own.
                unsafe {
                    let a = input.element.load(s, x, c);
                    let b = input.element.load(s, x, channels + c);
                    let v = s.mul(a, Function::Gelu.vector(s, b));
                    output.element.store(s, y, c, s.keep(v, s.load(real.add(c))));
                }
            }
        }
    }
}
