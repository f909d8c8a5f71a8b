//! The gradients of what a transformer does to its tokens.
//!
//! With `x̂ = (x − μ)/σ` of a token of `n` channels, `y = x̂·(1 + scale) + shift` and `g = ∂y·(1 + scale)`:
//! `∂x = (g − mean(g) − x̂·mean(g·x̂))/σ`, `∂scale = Σ ∂y·x̂` and `∂shift = Σ ∂y` over the tokens.

use crate::kernels::activation::Function;
use crate::kernels::arena::{Aligned, Buffer};
use crate::kernels::image::Image;
use crate::kernels::isa::{Kernel, dispatch};
use crate::kernels::moves::CHUNK;
use crate::kernels::program::{Memory, Needs, Operation, Split};
use crate::kernels::simd::Simd;
use crate::kernels::tokens::{Vector, mask, total};

/// From the gradient of normalised tokens, that of the tokens, of scale and of shift.
pub(crate) struct ModulateGradient {
    value: Image,
    /// The gradient of the result.
    output: Image,
    /// Where that of the tokens goes.
    gradient: Image,
    /// Whether to what is there.
    add: bool,
    moments: Buffer,
    scale: Vector,
    /// What is added to the scale.
    one: f32,
    /// Where those of scale and shift go.
    of_told: [Vector; 2],
    real: Aligned,
}

impl ModulateGradient {
    pub(crate) fn new(
        value: Image,
        output: Image,
        (gradient, add): (Image, bool),
        moments: Buffer,
        (scale, one): (Vector, f32),
        of_told: [Vector; 2],
    ) -> Self {
        Self { value, output, gradient, add, moments, scale, one, of_told, real: mask(&value) }
    }
}

impl Operation for ModulateGradient {
    fn split(&self, batch: usize, _: usize) -> Split {
        let needs = Needs { scratch: 2 * self.value.stride(), shared: 0 };
        Split { items: [batch, 0], needs }
    }
    fn reads(&self) -> Vec<Buffer> {
        vec![self.value.buffer, self.output.buffer, self.moments, self.scale.buffer]
    }
    fn writes(&self) -> Vec<Buffer> {
        vec![self.gradient.buffer, self.of_told[0].buffer]
    }
    fn name(&self) -> String {
        format!("modulate gradient {} at {}", self.value.channels(), self.value.pixels())
    }
    unsafe fn run(&self, memory: &Memory, _: usize, sample: usize, worker: usize) {
        dispatch(memory.isa, Sample { op: self, memory, sample, rows: memory.scratch(worker) });
    }
}

struct Sample<'a, O> {
    op: &'a O,
    memory: &'a Memory<'a>,
    sample: usize,
    /// Sums over the tokens, each as long as a token.
    rows: *mut f32,
}

impl<O> Sample<'_, O> {
    /// Zeros in `rows` floats.
    ///
    /// # Safety
    /// The scratch has so many.
    #[inline(always)]
    unsafe fn clear(&self, len: usize) {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.rows, len) }.fill(0.0);
    }

    /// The first `channels` floats of row `row` of the scratch as part of a vector's gradient.
    ///
    /// # Safety
    /// Nothing else touches that part, and the row is there.
    #[inline(always)]
    unsafe fn hand_over(&self, row: usize, stride: usize, channels: usize, to: &Vector) {
        let to = to.at(self.memory, self.sample);
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(self.rows.add(row * stride), to, channels) };
    }
}

impl Kernel for Sample<'_, ModulateGradient> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let op = self.op;
        let (stride, channels) = (op.value.stride(), op.value.channels());
        let place = |buffer| self.memory.at(buffer, self.sample);
        let (value, output) = (place(op.value.buffer), place(op.output.buffer));
        let (gradient, moments) = (place(op.gradient.buffer), place(op.moments));
        let scale = op.scale.at(self.memory, self.sample).cast_const();
        let real = op.real.as_slice().as_ptr();
        let (of_scale, of_shift) = (self.rows, self.rows.wrapping_add(stride));
        let one = s.splat(op.one);
        // SAFETY: vectors lie in padded channels of the sample's tokens, which are this item's; scales are
        // read up to a vector's length further, which the arena's slack allows.
        unsafe {
            self.clear(2 * stride);
            for p in 0..op.value.pixels() {
                let (x, dy) = (value.add(p * stride), output.add(p * stride));
                let centre = s.splat(*moments.add(2 * p));
                let inverse = s.splat(*moments.add(2 * p + 1));
                let (mut sum, mut product) = (s.splat(0.0), s.splat(0.0));
                for c in (0..stride).step_by(S::LANES) {
                    let real = s.load(real.add(c));
                    let d = s.load(dy.add(c));
                    let normed = s.keep(s.mul(s.sub(s.load(x.add(c)), centre), inverse), real);
                    let place = of_scale.add(c);
                    s.store(place, s.fma(d, normed, s.load(place)));
                    let place = of_shift.add(c);
                    s.store(place, s.add(d, s.load(place)));
                    let g = s.keep(s.mul(d, s.add(s.load(scale.add(c)), one)), real);
                    sum = s.add(sum, g);
                    product = s.fma(g, normed, product);
                }
                let mean = s.splat((total(s, sum) / channels as f64) as f32);
                let product = s.splat((total(s, product) / channels as f64) as f32);
                for c in (0..stride).step_by(S::LANES) {
                    let real = s.load(real.add(c));
                    let normed = s.mul(s.sub(s.load(x.add(c)), centre), inverse);
                    let g = s.mul(s.load(dy.add(c)), s.add(s.load(scale.add(c)), one));
                    let rest = s.sub(s.sub(g, mean), s.mul(normed, product));
                    let v = s.keep(s.mul(rest, inverse), real);
                    let to = gradient.add(p * stride + c);
                    s.store(to, if op.add { s.add(v, s.load(to)) } else { v });
                }
            }
            self.hand_over(0, stride, channels, &op.of_told[0]);
            self.hand_over(1, stride, channels, &op.of_told[1]);
        }
    }
}

/// From the gradient of `residual + gate·x`, that of `x` and of the gate; that of the residual is the same.
pub(crate) struct GateGradient {
    value: Image,
    /// The gradient of the sum.
    output: Image,
    /// Where that of `x` goes.
    gradient: Image,
    gate: Vector,
    /// Where that of the gate goes.
    of_gate: Vector,
    real: Aligned,
}

impl GateGradient {
    pub(crate) fn new(
        value: Image,
        output: Image,
        gradient: Image,
        gate: Vector,
        of_gate: Vector,
    ) -> Self {
        Self { value, output, gradient, gate, of_gate, real: mask(&value) }
    }
}

impl Operation for GateGradient {
    fn split(&self, batch: usize, _: usize) -> Split {
        let needs = Needs { scratch: self.value.stride(), shared: 0 };
        Split { items: [batch, 0], needs }
    }
    fn reads(&self) -> Vec<Buffer> {
        vec![self.value.buffer, self.output.buffer, self.gate.buffer]
    }
    fn writes(&self) -> Vec<Buffer> {
        vec![self.gradient.buffer, self.of_gate.buffer]
    }
    fn name(&self) -> String {
        format!("gate gradient {} at {}", self.value.channels(), self.value.pixels())
    }
    unsafe fn run(&self, memory: &Memory, _: usize, sample: usize, worker: usize) {
        dispatch(memory.isa, Sample { op: self, memory, sample, rows: memory.scratch(worker) });
    }
}

impl Kernel for Sample<'_, GateGradient> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let op = self.op;
        let stride = op.value.stride();
        let place = |image: &Image| self.memory.at(image.buffer, self.sample);
        let (value, output, gradient) = (place(&op.value), place(&op.output), place(&op.gradient));
        let gate = op.gate.at(self.memory, self.sample).cast_const();
        let real = op.real.as_slice().as_ptr();
        // SAFETY: as for `ModulateGradient`.
        unsafe {
            self.clear(stride);
            for p in 0..op.value.pixels() {
                for c in (0..stride).step_by(S::LANES) {
                    let at = p * stride + c;
                    let d = s.load(output.add(at));
                    let place = self.rows.add(c);
                    s.store(place, s.fma(d, s.load(value.add(at)), s.load(place)));
                    let gate = s.keep(s.load(gate.add(c)), s.load(real.add(c)));
                    s.store(gradient.add(at), s.mul(d, gate));
                }
            }
            self.hand_over(0, stride, op.value.channels(), &op.of_gate);
        }
    }
}

/// From the gradient of `function(x)`, that of `x`.
pub(crate) struct ActivateGradient {
    pub(crate) value: Image,
    /// The gradient of the result.
    pub(crate) output: Image,
    /// Where that of `x` goes.
    pub(crate) gradient: Image,
    /// Whether to what is there.
    pub(crate) add: bool,
    pub(crate) function: Function,
}

impl Operation for ActivateGradient {
    fn split(&self, batch: usize, _: usize) -> Split {
        let lens = [&self.value, &self.output, &self.gradient].map(|image| image.buffer.len);
        assert!(lens.iter().all(|len| *len == lens[0]), "maps of one size");
        Split::one(batch * self.value.buffer.len.div_ceil(CHUNK))
    }
    fn reads(&self) -> Vec<Buffer> {
        vec![self.value.buffer, self.output.buffer]
    }
    fn writes(&self) -> Vec<Buffer> {
        vec![self.gradient.buffer]
    }
    fn name(&self) -> String {
        let Self { function, value, .. } = self;
        format!("{function:?} gradient {} at {}", value.channels(), value.pixels())
    }
    unsafe fn run(&self, memory: &Memory, _: usize, item: usize, _: usize) {
        let chunks = self.value.buffer.len.div_ceil(CHUNK);
        let (sample, first) = (item / chunks, item % chunks * CHUNK);
        let len = CHUNK.min(self.value.buffer.len - first);
        let [value, output, gradient] = [self.value, self.output, self.gradient]
            .map(|image| memory.at(image.buffer, sample).wrapping_add(first));
        let (function, add) = (self.function, self.add);
        dispatch(memory.isa, Slopes { function, add, value, output, gradient, len });
    }
}

struct Slopes {
    function: Function,
    add: bool,
    value: *const f32,
    output: *const f32,
    gradient: *mut f32,
    len: usize,
}

impl Kernel for Slopes {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.function {
            Function::Silu => self.with(s, Function::Silu),
            Function::GeluTanh => self.with(s, Function::GeluTanh),
            other => self.with(s, other),
        }
    }
}

impl Slopes {
    #[inline(always)]
    fn with<S: Simd>(&self, s: S, function: Function) {
        for i in (0..self.len).step_by(S::LANES) {
            // SAFETY: buffers are whole cache lines, and the item's part is its own.
            unsafe {
                let slope = function.slopes(s, s.load(self.value.add(i)));
                let v = s.mul(slope, s.load(self.output.add(i)));
                let to = self.gradient.add(i);
                s.store(to, if self.add { s.add(v, s.load(to)) } else { v });
            }
        }
    }
}

/// That of [`crate::kernels::Geglu`]; nothing is there yet.
pub(crate) struct GegluGradient {
    value: Image,
    /// The gradient of the result.
    output: Image,
    gradient: Image,
    real: Aligned,
}

impl GegluGradient {
    pub(crate) fn new(value: Image, output: Image, gradient: Image) -> Self {
        Self { value, output, gradient, real: mask(&output) }
    }
}

impl Operation for GegluGradient {
    fn split(&self, batch: usize, _: usize) -> Split {
        Split::one(batch)
    }
    fn reads(&self) -> Vec<Buffer> {
        vec![self.value.buffer, self.output.buffer]
    }
    fn writes(&self) -> Vec<Buffer> {
        vec![self.gradient.buffer]
    }
    fn name(&self) -> String {
        format!("geglu gradient {} at {}", self.output.channels(), self.output.pixels())
    }
    unsafe fn run(&self, memory: &Memory, _: usize, sample: usize, _: usize) {
        dispatch(memory.isa, Sample { op: self, memory, sample, rows: std::ptr::null_mut() });
    }
}

impl Kernel for Sample<'_, GegluGradient> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let op = self.op;
        let (wide, narrow, channels) =
            (op.value.stride(), op.output.stride(), op.output.channels());
        let place = |buffer| self.memory.at(buffer, self.sample);
        let (value, output) = (place(op.value.buffer), place(op.output.buffer));
        let gradient = place(op.gradient.buffer);
        let real = op.real.as_slice().as_ptr();
        for p in 0..op.value.pixels() {
            // SAFETY: vectors lie in padded channels of the sample's tokens, which are this item's; halves are read up
            // to a vector's length further, which the next token or the arena's slack allows.
            unsafe {
                for second in [false, true] {
                    for c in (0..narrow).step_by(S::LANES) {
                        let a = s.load(value.add(p * wide + c));
                        let b = s.load(value.add(p * wide + channels + c));
                        let dy = s.keep(s.load(output.add(p * narrow + c)), s.load(real.add(c)));
                        let v = match second {
                            false => s.mul(dy, Function::Gelu.vector(s, b)),
                            true => s.mul(dy, s.mul(a, Function::Gelu.slopes(s, b))),
                        };
                        let mut lanes = [0f32; 16];
                        s.store(lanes.as_mut_ptr(), v);
                        let to = gradient.add(p * wide + c + if second { channels } else { 0 });
                        let count = S::LANES.min(channels.saturating_sub(c));
                        std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, count);
                    }
                }
                for c in 2 * channels..wide {
                    *gradient.add(p * wide + c) = 0.0;
                }
            }
        }
    }
}
