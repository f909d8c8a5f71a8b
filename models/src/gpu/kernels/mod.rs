//! Kernels of our own, each as a function of tensors that finds them to fit. Maps are `[B, height, width, channels]`, and
//! of one type; vectors are f32.

mod gradients;
#[cfg(test)]
mod tests;

use candle_core::cuda_backend::cudarc::driver::LaunchConfig;
use candle_core::{DType, Result, Shape, Tensor, bail};

pub(crate) use gradients::Normed;

use super::context::Context;
use super::launch::{Argument, Kernels, THREADS, blocks, over};
use crate::kernels::Function;

static LAYERS: Kernels = Kernels::new(
    "layers",
    concat!(include_str!("numbers.cu"), include_str!("functions.cu"), include_str!("layers.cu")),
    None,
);
/// For the first tensor cores that know bf16, and later ones.
static ATTENTION: Kernels = Kernels::new(
    "attention",
    concat!(include_str!("numbers.cu"), include_str!("attention.cu")),
    Some("compute_80"),
);

/// Warps of its blocks, and queries of each.
const WARPS: usize = 4;
const QUERIES: usize = 16;

/// What differs from sample to sample and is the same at every pixel: part of the projections of the time embedding.
#[derive(Clone)]
pub(crate) struct PerSample {
    /// f32 `[B, 1, 1, …]`.
    pub(crate) all: Tensor,
    pub(crate) start: usize,
}

impl PerSample {
    fn check(per_sample: Option<&Self>, batch: usize, width: usize) -> Result<[Argument; 2]> {
        let Some(Self { all, start }) = per_sample else {
            return Ok([Argument::NONE, Argument::int(0)?]);
        };
        let (samples, _, _, total) = all.dims4()?;
        fit("what differs by sample", all, DType::F32, start + width <= total && samples == batch)?;
        Ok([Argument::from(all, *start)?, Argument::int(total)?])
    }
}

/// What is added to a map, and what it is multiplied with then.
#[derive(Clone)]
pub(crate) struct Finish {
    pub(crate) residual: Option<Tensor>,
    /// f32 `[channels]`.
    pub(crate) bias: Option<Tensor>,
    pub(crate) offset: Option<PerSample>,
    pub(crate) factor: f32,
}

impl Finish {
    /// Nothing.
    pub(crate) const NONE: Self = Self { residual: None, bias: None, offset: None, factor: 1.0 };

    /// The kernels' arguments, for a map `x`.
    fn check(&self, x: &Tensor) -> Result<[Argument; 5]> {
        let (batch, .., channels) = x.dims4()?;
        let Self { residual, bias, offset, factor } = self;
        if let Some(residual) = residual {
            fit("a sum's operand", residual, x.dtype(), residual.dims() == x.dims())?;
        }
        if let Some(bias) = bias {
            fit("a bias", bias, DType::F32, bias.dims() == [channels])?;
        }
        let [offset, stride] = PerSample::check(offset.as_ref(), batch, channels)?;
        let [residual, bias] = [residual, bias].map(|tensor| Argument::maybe(tensor.as_ref()));
        Ok([residual?, bias?, offset, stride, Argument::Float(*factor)])
    }
}

/// A group norm and what goes with it.
pub(crate) struct Norm<'a> {
    /// `[channels]`.
    pub(crate) weight: &'a Tensor,
    pub(crate) bias: &'a Tensor,
    pub(crate) groups: usize,
    pub(crate) eps: f64,
    /// What is added to the first operand before.
    pub(crate) before: Finish,
    /// Whether it stays there.
    pub(crate) keep: bool,
    /// Scale, which is added to one, and shift of each sample, after.
    pub(crate) modulation: Option<PerSample>,
    pub(crate) function: Function,
}

/// Sines and cosines of a number.
#[derive(Clone)]
pub(crate) struct Waves {
    /// f32 `[half]`.
    pub(crate) frequencies: Tensor,
    pub(crate) cosines_first: bool,
    /// Of 2π times the number's logarithm, not of the number.
    pub(crate) logarithm: bool,
}

impl Context {
    /// Memory that a kernel will write.
    pub(crate) fn empty(&self, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
        // SAFETY: whoever asks for it has a kernel write all of it before anything reads it.
        unsafe { Tensor::empty(shape, dtype, &self.device) }
    }

    /// Group norm over the channels of `x`, or of `x` and `more` side by side, into `y`.
    pub(crate) fn group_norm(
        &self,
        x: &Tensor,
        more: Option<&Tensor>,
        norm: Norm,
        y: &Tensor,
    ) -> Result<()> {
        let (batch, height, width, own) = x.dims4()?;
        self.check("a norm's operand", x, true)?;
        let mut channels = own;
        if let Some(more) = more {
            let (.., others) = more.dims4()?;
            self.check("a norm's operand", more, more.dims()[..3] == x.dims()[..3])?;
            channels += others;
        }
        let Norm { weight, bias, groups, eps, before, keep, modulation, function } = norm;
        for vector in [weight, bias] {
            fit("a norm's vector", vector, DType::F32, vector.dims() == [channels])?;
        }
        if channels % groups != 0 {
            bail!("{channels} channels do not make {groups} groups");
        }
        self.check("what is normed", y, y.dims() == [batch, height, width, channels])?;
        let [modulation, stride] = PerSample::check(modulation.as_ref(), batch, 2 * channels)?;
        let [residual, pending, offset, of_offset, factor] = before.check(x)?;
        let arguments = [
            Argument::from(x, 0)?,
            residual,
            pending,
            offset,
            of_offset,
            factor,
            Argument::Int(i32::from(keep)),
            Argument::maybe(more)?,
            Argument::int(own)?,
            modulation,
            stride,
            Argument::from(weight, 0)?,
            Argument::from(bias, 0)?,
            Argument::from(y, 0)?,
            Argument::int(channels)?,
            Argument::int(groups)?,
            Argument::int(height * width)?,
            Argument::Float(eps as f32),
            Argument::Int(number(function)),
        ];
        // SAFETY: the checks above.
        unsafe { LAYERS.launch(self, "group_norm", blocks(batch * groups), &arguments) }
    }

    /// `y = function((x + residual + bias + offset)·factor)`; `y` may be `x`, and both may be f32, too.
    pub(crate) fn finish(
        &self,
        x: &Tensor,
        end: &Finish,
        function: Function,
        y: &Tensor,
    ) -> Result<()> {
        let (_, height, width, channels) = x.dims4()?;
        fit("what is finished", y, x.dtype(), y.dims() == x.dims())?;
        let [residual, bias, offset, stride, factor] = end.check(x)?;
        let arguments = [
            Argument::from(x, 0)?,
            residual,
            bias,
            offset,
            stride,
            factor,
            Argument::Int(number(function)),
            Argument::from(y, 0)?,
            Argument::int(channels)?,
            Argument::int(height * width)?,
            Argument::int(x.elem_count())?,
        ];
        let context = Self { dtype: x.dtype(), ..self.clone() };
        // SAFETY: the checks above.
        unsafe { LAYERS.launch(&context, "finish", over(x.elem_count()), &arguments) }
    }

    /// The map `y`, of what lies in `x` as `[B, channels, height, width]` from number `start` on, with samples so many
    /// numbers `apart`; times `factor`, plus `shift`.
    pub(crate) fn import(
        &self,
        x: &Tensor,
        [start, apart]: [usize; 2],
        (factor, shift): (f32, f32),
        y: &Tensor,
    ) -> Result<()> {
        let (batch, height, width, channels) = y.dims4()?;
        self.check("a map", y, true)?;
        let end = start + (batch - 1) * apart + height * width * channels;
        self.check("an input", x, end <= x.elem_count())?;
        let arguments = [
            Argument::from(x, start)?,
            Argument::int(apart)?,
            Argument::from(y, 0)?,
            Argument::Float(factor),
            Argument::Float(shift),
            Argument::int(channels)?,
            Argument::int(height * width)?,
            Argument::int(y.elem_count())?,
        ];
        // SAFETY: the checks above.
        unsafe { LAYERS.launch(self, "imported", over(y.elem_count()), &arguments) }
    }

    /// A map plus `bias` `[channels]`, divided by a number of each sample, f32 `[B]`: `[B, channels, height, width]`.
    pub(crate) fn export(
        &self,
        x: &Tensor,
        bias: Option<&Tensor>,
        divisor: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (batch, height, width, channels) = x.dims4()?;
        self.check("a map", x, true)?;
        for (what, vector, size) in [("a bias", bias, channels), ("a divisor", divisor, batch)] {
            if let Some(vector) = vector {
                fit(what, vector, DType::F32, vector.dims() == [size])?;
            }
        }
        let y = self.empty((batch, channels, height, width), self.dtype)?;
        let arguments = [
            Argument::from(x, 0)?,
            Argument::maybe(bias)?,
            Argument::maybe(divisor)?,
            Argument::from(&y, 0)?,
            Argument::int(channels)?,
            Argument::int(height * width)?,
            Argument::int(y.elem_count())?,
        ];
        // SAFETY: the checks above.
        unsafe { LAYERS.launch(self, "exported", over(y.elem_count()), &arguments)? };
        Ok(y)
    }

    /// Sines and cosines of f32 `numbers` `[B]`, or of 2π times their `logarithm`, times `frequencies` `[half]`, in `y`
    /// `[B, 1, 1, width]`, whose last is 0 if there is one too many.
    pub(crate) fn waves(&self, numbers: &Tensor, waves: &Waves, y: &Tensor) -> Result<()> {
        let (batch, _, _, width) = y.dims4()?;
        let Waves { frequencies, cosines_first, logarithm } = waves;
        let half = frequencies.elem_count();
        fit("a sample's number", numbers, DType::F32, numbers.dims() == [batch])?;
        fit("frequencies", frequencies, DType::F32, half == width / 2)?;
        self.check("waves", y, y.elem_count() == batch * width)?;
        let arguments = [
            Argument::from(numbers, 0)?,
            Argument::from(frequencies, 0)?,
            Argument::from(y, 0)?,
            Argument::int(half)?,
            Argument::int(width)?,
            Argument::Int(i32::from(*cosines_first)),
            Argument::Int(i32::from(*logarithm)),
            Argument::int(y.elem_count())?,
        ];
        // SAFETY: the checks above.
        unsafe { LAYERS.launch(self, "waves", over(y.elem_count()), &arguments) }
    }

    /// Each sample's row of `table` `[rows, channels]`, which `which` `[B]`, u32 or f32, tells, in `y` `[B, 1, 1,
    /// channels]`: NaN where there is no such row.
    pub(crate) fn rows_of(&self, table: &Tensor, which: &Tensor, y: &Tensor) -> Result<()> {
        let (batch, _, _, width) = y.dims4()?;
        let (rows, channels) = table.dims2()?;
        self.check("a table", table, channels == width)?;
        self.check("rows", y, y.elem_count() == batch * width)?;
        let labels = which.dtype() == DType::U32;
        let dtype = if labels { DType::U32 } else { DType::F32 };
        fit("a sample's row", which, dtype, which.dims() == [batch])?;
        let which = Argument::from(which, 0)?;
        let [labels, numbers] =
            if labels { [which, Argument::NONE] } else { [Argument::NONE, which] };
        let arguments = [
            Argument::from(table, 0)?,
            labels,
            numbers,
            Argument::from(y, 0)?,
            Argument::int(rows)?,
            Argument::int(channels)?,
            Argument::int(y.elem_count())?,
        ];
        // SAFETY: the kernel reads the table within its rows.
        unsafe { LAYERS.launch(self, "rows_of", over(y.elem_count()), &arguments) }
    }

    /// Each pixel as `times` by `times`, and zeros to the right and below, up to the height and width of `y`.
    pub(crate) fn enlarge(&self, x: &Tensor, times: usize, y: &Tensor) -> Result<()> {
        let (batch, height, width, channels) = x.dims4()?;
        self.check("a map to enlarge", x, true)?;
        let (samples, tall, wide, same) = y.dims4()?;
        self.check("an enlarged map", y, (samples, same) == (batch, channels))?;
        let arguments = [
            Argument::from(x, 0)?,
            Argument::from(y, 0)?,
            Argument::int(height)?,
            Argument::int(width)?,
            Argument::int(times)?,
            Argument::int(tall)?,
            Argument::int(wide)?,
            Argument::int(channels)?,
            Argument::int(y.elem_count())?,
        ];
        // SAFETY: the kernel reads x within its height and width.
        unsafe { LAYERS.launch(self, "enlarge", over(y.elem_count()), &arguments) }
    }

    /// The mean of each four pixels, in `y`.
    pub(crate) fn halve(&self, x: &Tensor, y: &Tensor) -> Result<()> {
        let (batch, height, width, channels) = x.dims4()?;
        self.check("a map to halve", x, height % 2 == 0 && width % 2 == 0)?;
        self.check("a halved map", y, y.dims() == [batch, height / 2, width / 2, channels])?;
        let arguments = [
            Argument::from(x, 0)?,
            Argument::from(y, 0)?,
            Argument::int(width / 2)?,
            Argument::int(channels)?,
            Argument::int(y.elem_count())?,
        ];
        // SAFETY: x has four pixels for each of y.
        unsafe { LAYERS.launch(self, "halve", over(y.elem_count()), &arguments) }
    }

    /// Tokens normalised, times one plus part `scale` of the vectors of each sample, a map of one pixel, plus part `shift`.
    pub(crate) fn modulate(
        &self,
        x: &Tensor,
        eps: f64,
        per_sample: &Tensor,
        parts: [usize; 2],
        y: &Tensor,
    ) -> Result<()> {
        let (_, height, width, channels) = x.dims4()?;
        let last = parts.into_iter().max().unwrap_or(0);
        self.check("a norm's operand", x, true)?;
        self.check("what is normed", y, y.dims() == x.dims())?;
        let total = self.parts(per_sample, x, last)?;
        let [scale, shift] = parts.map(|part| Argument::from(per_sample, part * channels));
        let arguments = [
            Argument::from(x, 0)?,
            scale?,
            shift?,
            total,
            Argument::from(y, 0)?,
            Argument::int(height * width)?,
            Argument::int(channels)?,
            Argument::Float(eps as f32),
        ];
        let config = blocks(x.elem_count() / channels);
        // SAFETY: the checks above.
        unsafe { LAYERS.launch(self, "modulate", config, &arguments) }
    }

    /// `y = residual + gate·(x + bias)`, with part `gate` of the vectors of each sample, a map of one pixel, and a bias `[channels]`.
    pub(crate) fn gate(
        &self,
        x: &Tensor,
        bias: Option<&Tensor>,
        residual: &Tensor,
        (per_sample, gate): (&Tensor, usize),
        y: &Tensor,
    ) -> Result<()> {
        let (_, height, width, channels) = x.dims4()?;
        self.check("a gate's operand", x, true)?;
        self.check("a gate's operand", residual, residual.dims() == x.dims())?;
        self.check("a gated map", y, y.dims() == x.dims())?;
        if let Some(bias) = bias {
            fit("a bias", bias, DType::F32, bias.dims() == [channels])?;
        }
        let total = self.parts(per_sample, x, gate)?;
        let arguments = [
            Argument::from(x, 0)?,
            Argument::maybe(bias)?,
            Argument::from(residual, 0)?,
            Argument::from(per_sample, gate * channels)?,
            total,
            Argument::from(y, 0)?,
            Argument::int(height * width)?,
            Argument::int(channels)?,
            Argument::int(x.elem_count())?,
        ];
        // SAFETY: the checks above.
        unsafe { LAYERS.launch(self, "gate", over(x.elem_count()), &arguments) }
    }

    /// Softmax over the last dimension of f32.
    pub(crate) fn softmax(&self, scores: &Tensor) -> Result<Tensor> {
        fit("scores", scores, DType::F32, true)?;
        let length = scores.dims().last().copied().unwrap_or(1);
        let rows = scores.elem_count() / length;
        let y = self.empty(scores.shape(), self.dtype)?;
        let arguments = [
            Argument::from(scores, 0)?,
            Argument::from(&y, 0)?,
            Argument::int(rows)?,
            Argument::int(length)?,
        ];
        let config = blocks(rows.div_ceil(THREADS / 32));
        // SAFETY: both have so many rows of so many numbers.
        unsafe { LAYERS.launch(self, "softmax_of_rows", config, &arguments)? };
        Ok(y)
    }

    /// Whether [`Context::attend`] knows heads of so many channels; it needs tensor cores, so it knows them in 16 bits.
    pub(crate) fn attends(&self, depth: usize) -> bool {
        attention(depth).is_some() && self.dtype != DType::F32 && self.generation >= 8
    }

    /// The values that each query gathers, head by head, of queries, which are multiplied with `scale`, keys and values,
    /// one after another in the channels, to which `bias` `[3·channels]` is added first; in `y`.
    pub(crate) fn attend(
        &self,
        qkv: &Tensor,
        bias: Option<&Tensor>,
        (heads, scale): (usize, f32),
        y: &Tensor,
    ) -> Result<()> {
        let (batch, height, width, three) = qkv.dims4()?;
        let (tokens, depth) = (height * width, three / 3 / heads);
        let Some(name) = attention(depth).filter(|_| self.attends(depth)) else {
            bail!("no kernel for attention of {depth} channels in {:?}", self.dtype)
        };
        self.check("queries, keys and values", qkv, three == 3 * heads * depth)?;
        if let Some(bias) = bias {
            fit("a bias", bias, DType::F32, bias.dims() == [three])?;
        }
        self.check("what is gathered", y, y.dims() == [batch, height, width, heads * depth])?;
        let arguments = [
            Argument::from(qkv, 0)?,
            Argument::maybe(bias)?,
            Argument::Float(scale),
            Argument::from(y, 0)?,
            Argument::int(heads)?,
            Argument::int(tokens)?,
            Argument::int(depth)?,
        ];
        let config = LaunchConfig {
            block_dim: (32 * WARPS as u32, 1, 1),
            ..blocks(tokens.div_ceil(QUERIES * WARPS) * heads * batch)
        };
        // SAFETY: the checks above.
        unsafe { ATTENTION.launch(self, name, config, &arguments) }
    }

    /// Numbers of the vectors of each sample, which have part `last`, of as many numbers as a token of `x`.
    fn parts(&self, per_sample: &Tensor, x: &Tensor, last: usize) -> Result<Argument> {
        let (samples, _, _, total) = per_sample.dims4()?;
        let fits = samples == x.dim(0)? && (last + 1) * x.dim(3)? <= total;
        self.check("what differs by sample", per_sample, fits)?;
        Argument::int(total)
    }

    fn check(&self, what: &str, tensor: &Tensor, fits: bool) -> Result<()> {
        fit(what, tensor, self.dtype, fits)
    }
}

/// The kernel for heads of so many channels: there are some for so many and fewer, in twos.
fn attention(depth: usize) -> Option<&'static str> {
    let known = [(16, "attend_16"), (32, "attend_32"), (64, "attend_64"), (128, "attend_128")];
    let fits = |&(most, _): &(usize, _)| depth <= most && depth.is_multiple_of(2);
    known.into_iter().find(fits).map(|(_, name)| name)
}

/// # Errors
/// A tensor of another type, or one that is found not to fit.
fn fit(what: &str, tensor: &Tensor, dtype: DType, fits: bool) -> Result<()> {
    if !fits || tensor.dtype() != dtype || tensor.elem_count() == 0 {
        bail!("{what}: {:?} of {:?} does not fit", tensor.dtype(), tensor.dims())
    }
    Ok(())
}

/// A function as the kernels know it.
fn number(function: Function) -> i32 {
    match function {
        Function::Identity => 0,
        Function::Silu => 1,
        Function::Mish => 2,
        Function::Gelu => 3,
        Function::GeluTanh => 4,
        Function::Relu => 5,
        Function::QuickGelu | Function::SoftClamp => {
            unreachable!("a network with it is not compiled here")
        }
    }
}
