//! Kernels of our own, each as a function of tensors that finds them to fit. Maps are `[B, height, width, channels]`, and
//! of one type; vectors are f32.

#[cfg(test)]
mod tests;

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::cuda_backend::cudarc::driver::LaunchConfig;
use candle_core::{CudaStorage, DType, Layout, Result, Shape, Tensor, bail};

use super::launch::{Argument, Kernels, THREADS, blocks, over, place};
use super::machine::Machine;
use crate::kernels::Function;

static LAYERS: Kernels =
    Kernels::new("layers", concat!(include_str!("numbers.cu"), include_str!("layers.cu")), None);
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
#[derive(Clone, Copy)]
pub(crate) struct Told<'a> {
    /// f32 `[B, 1, 1, …]`.
    pub(crate) all: &'a Tensor,
    pub(crate) start: usize,
}

impl Told<'_> {
    fn check(told: Option<Self>, batch: usize, width: usize) -> Result<[Argument; 2]> {
        let Some(Self { all, start }) = told else {
            return Ok([Argument::NONE, Argument::int(0)?]);
        };
        let (samples, _, _, total) = all.dims4()?;
        fit("what is told", all, DType::F32, start + width <= total && samples == batch)?;
        Ok([Argument::from(all, start)?, Argument::int(total)?])
    }
}

/// What is added to a map, and what it is multiplied with then.
#[derive(Clone, Copy)]
pub(crate) struct Ending<'a> {
    pub(crate) residual: Option<&'a Tensor>,
    /// `[channels]`.
    pub(crate) bias: Option<&'a Tensor>,
    pub(crate) offset: Option<Told<'a>>,
    pub(crate) factor: f32,
}

impl Default for Ending<'_> {
    fn default() -> Self {
        Self { residual: None, bias: None, offset: None, factor: 1.0 }
    }
}

/// A group norm and what goes with it.
#[derive(Clone, Copy)]
pub(crate) struct Norm<'a> {
    /// `[channels]`.
    pub(crate) weight: &'a Tensor,
    pub(crate) bias: &'a Tensor,
    pub(crate) groups: usize,
    pub(crate) eps: f64,
    /// `[channels]`, added before.
    pub(crate) owed: Option<&'a Tensor>,
    /// The same, of each sample.
    pub(crate) offset: Option<Told<'a>>,
    /// Scale, which is added to one, and shift of each sample, after.
    pub(crate) modulation: Option<Told<'a>>,
    pub(crate) function: Function,
}

/// A group norm of maps in rows: its parameters are `[B, 3, channels]` in f32, scale, shift and what is added before.
#[derive(Clone, Copy)]
pub(crate) struct Rows {
    pub(crate) groups: usize,
    pub(crate) eps: f64,
    pub(crate) function: Function,
}

impl Rows {
    /// Blocks of a kernel, and its last arguments.
    fn check(self, x: &Layout, parameters: &Layout) -> Result<(LaunchConfig, [Argument; 5])> {
        let &[batch, channels, ref pixels @ ..] = x.dims() else {
            bail!("group norm of {:?}: has no channels", x.dims())
        };
        let pixels = pixels.iter().product::<usize>();
        let Self { groups, eps, function } = self;
        let few = batch * channels * pixels == 0;
        if few || parameters.dims() != [batch, 3, channels] || channels % groups != 0 {
            let (x, parameters) = (x.dims(), parameters.dims());
            bail!("group norm of {x:?} in {groups} groups, with parameters {parameters:?}")
        }
        let arguments = [
            Argument::int(channels)?,
            Argument::int(groups)?,
            Argument::int(pixels)?,
            Argument::Float(eps as f32),
            Argument::Int(number(function)),
        ];
        Ok((blocks(batch * groups), arguments))
    }
}

impl Machine {
    /// Group norm of a map in rows, `[B, channels, …]`.
    pub(crate) fn norm_rows(
        &self,
        (x, x_at): (&CudaStorage, &Layout),
        (parameters, parameters_at): (&CudaStorage, &Layout),
        rows: Rows,
    ) -> Result<CudaStorage> {
        let (config, last) = rows.check(x_at, parameters_at)?;
        if x.dtype() != self.dtype || parameters.dtype() != DType::F32 {
            bail!("group norm of {:?} with parameters of {:?}", x.dtype(), parameters.dtype())
        }
        // SAFETY: the kernel writes all of it.
        let y = unsafe { self.cuda.alloc_uninit(x_at.shape(), self.dtype)? };
        let [x, parameters] = [place(x, x_at, 0)?, place(parameters, parameters_at, 0)?];
        let to = place(&y, &Layout::contiguous(x_at.shape()), 0)?;
        let first = [x, parameters, to].map(Argument::Pointer);
        let arguments: Vec<Argument> = first.into_iter().chain(last).collect();
        // SAFETY: the checks above.
        unsafe { LAYERS.launch(self, "norm_rows", config, &arguments)? };
        Ok(y)
    }

    /// The gradients of a map in rows that was normed, and of the parameters, given its own.
    pub(crate) fn norm_rows_gradient(
        &self,
        x: &Tensor,
        parameters: &Tensor,
        of_y: &Tensor,
        rows: Rows,
    ) -> Result<[Tensor; 2]> {
        let (config, last) = rows.check(x.layout(), parameters.layout())?;
        self.check("a norm's operand", x, true)?;
        self.check("a norm's gradient", of_y, of_y.dims() == x.dims())?;
        fit("a norm's parameters", parameters, DType::F32, true)?;
        let of_x = self.empty(x.shape(), self.dtype)?;
        let of_parameters = self.empty(parameters.shape(), DType::F32)?;
        let mut arguments = Vec::new();
        for tensor in [x, parameters, of_y, &of_x, &of_parameters] {
            arguments.push(Argument::from(tensor, 0)?);
        }
        arguments.extend(last);
        // SAFETY: the checks above.
        unsafe { LAYERS.launch(self, "norm_rows_gradient", config, &arguments)? };
        Ok([of_x, of_parameters])
    }

    /// Memory that a kernel will write.
    pub(crate) fn empty(&self, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
        // SAFETY: whoever asks for it has a kernel write all of it before anything reads it.
        unsafe { Tensor::empty(shape, dtype, &self.device) }
    }

    /// Group norm over the channels of `x`, or of `x` and `more` side by side.
    pub(crate) fn group_norm(
        &self,
        x: &Tensor,
        more: Option<&Tensor>,
        norm: Norm,
    ) -> Result<Tensor> {
        let (batch, height, width, own) = x.dims4()?;
        self.check("a norm's operand", x, true)?;
        let mut channels = own;
        if let Some(more) = more {
            let (.., others) = more.dims4()?;
            self.check("a norm's operand", more, more.dims()[..3] == x.dims()[..3])?;
            channels += others;
        }
        let Norm { weight, bias, groups, eps, owed, offset, modulation, function } = norm;
        for vector in [Some(weight), Some(bias), owed].into_iter().flatten() {
            fit("a norm's vector", vector, DType::F32, vector.dims() == [channels])?;
        }
        if channels % groups != 0 {
            bail!("{channels} channels do not make {groups} groups");
        }
        let y = self.empty((batch, height, width, channels), self.dtype)?;
        let [offset, of_offset] = Told::check(offset, batch, channels)?;
        let [modulation, told] = Told::check(modulation, batch, 2 * channels)?;
        let arguments = [
            Argument::from(x, 0)?,
            Argument::maybe(more)?,
            Argument::int(own)?,
            Argument::maybe(owed)?,
            offset,
            of_offset,
            modulation,
            told,
            Argument::from(weight, 0)?,
            Argument::from(bias, 0)?,
            Argument::from(&y, 0)?,
            Argument::int(channels)?,
            Argument::int(groups)?,
            Argument::int(height * width)?,
            Argument::Float(eps as f32),
            Argument::Int(number(function)),
        ];
        // SAFETY: the checks above.
        unsafe { LAYERS.launch(self, "group_norm", blocks(batch * groups), &arguments)? };
        Ok(y)
    }

    /// `y = (y + residual + bias + offset)·factor`, in place; `y` may be f32, too.
    pub(crate) fn finish(&self, y: &Tensor, end: Ending) -> Result<()> {
        let (batch, height, width, channels) = y.dims4()?;
        let Ending { residual, bias, offset, factor } = end;
        if let Some(residual) = residual {
            fit("a sum's operand", residual, y.dtype(), residual.dims() == y.dims())?;
        }
        if let Some(bias) = bias {
            fit("a bias", bias, DType::F32, bias.dims() == [channels])?;
        }
        let [offset, told] = Told::check(offset, batch, channels)?;
        let arguments = [
            Argument::from(y, 0)?,
            Argument::maybe(residual)?,
            Argument::maybe(bias)?,
            offset,
            told,
            Argument::Float(factor),
            Argument::int(channels)?,
            Argument::int(height * width)?,
            Argument::int(y.elem_count())?,
        ];
        let machine = Self { dtype: y.dtype(), ..self.clone() };
        // SAFETY: the checks above.
        unsafe { LAYERS.launch(&machine, "finish", over(y.elem_count()), &arguments) }
    }

    /// Each pixel as `times` by `times`, and zeros to the right and below, up to the height and width `seen`.
    pub(crate) fn enlarge(&self, x: &Tensor, times: usize, seen: [usize; 2]) -> Result<Tensor> {
        let (batch, height, width, channels) = x.dims4()?;
        self.check("a map to enlarge", x, true)?;
        let [tall, wide] = seen;
        let y = self.empty((batch, tall, wide, channels), self.dtype)?;
        let arguments = [
            Argument::from(x, 0)?,
            Argument::from(&y, 0)?,
            Argument::int(height)?,
            Argument::int(width)?,
            Argument::int(times)?,
            Argument::int(tall)?,
            Argument::int(wide)?,
            Argument::int(channels)?,
            Argument::int(y.elem_count())?,
        ];
        // SAFETY: the kernel reads x within its height and width.
        unsafe { LAYERS.launch(self, "enlarge", over(y.elem_count()), &arguments)? };
        Ok(y)
    }

    /// The mean of each four pixels; of an odd last row or column nothing.
    pub(crate) fn halve(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, height, width, channels) = x.dims4()?;
        self.check("a map to halve", x, height % 2 == 0 && width % 2 == 0)?;
        let y = self.empty((batch, height / 2, width / 2, channels), self.dtype)?;
        let arguments = [
            Argument::from(x, 0)?,
            Argument::from(&y, 0)?,
            Argument::int(width / 2)?,
            Argument::int(channels)?,
            Argument::int(y.elem_count())?,
        ];
        // SAFETY: x has four pixels for each of y.
        unsafe { LAYERS.launch(self, "halve", over(y.elem_count()), &arguments)? };
        Ok(y)
    }

    /// A function of every value of `x`, to which `bias` `[channels]` is added first.
    pub(crate) fn activate(
        &self,
        x: &Tensor,
        bias: Option<&Tensor>,
        function: Function,
    ) -> Result<Tensor> {
        self.check("a function's operand", x, true)?;
        let channels = x.dim(3)?;
        if let Some(bias) = bias {
            fit("a bias", bias, DType::F32, bias.dims() == [channels])?;
        }
        let y = self.empty(x.shape(), self.dtype)?;
        let arguments = [
            Argument::from(x, 0)?,
            Argument::maybe(bias)?,
            Argument::from(&y, 0)?,
            Argument::Int(number(function)),
            Argument::int(channels)?,
            Argument::int(x.elem_count())?,
        ];
        // SAFETY: both are of one size.
        unsafe { LAYERS.launch(self, "activated", over(x.elem_count()), &arguments)? };
        Ok(y)
    }

    /// Tokens normalised, times one plus part `scale` of what is told, a map of one pixel, plus part `shift`.
    pub(crate) fn modulate(
        &self,
        x: &Tensor,
        eps: f64,
        told: &Tensor,
        parts: [usize; 2],
    ) -> Result<Tensor> {
        let (_, height, width, channels) = x.dims4()?;
        let last = parts.into_iter().max().unwrap_or(0);
        self.check("a norm's operand", x, true)?;
        let total = self.parts(told, x, last)?;
        let y = self.empty(x.shape(), self.dtype)?;
        let [scale, shift] = parts.map(|part| Argument::from(told, part * channels));
        let arguments = [
            Argument::from(x, 0)?,
            scale?,
            shift?,
            total,
            Argument::from(&y, 0)?,
            Argument::int(height * width)?,
            Argument::int(channels)?,
            Argument::Float(eps as f32),
        ];
        let config = blocks(x.elem_count() / channels);
        // SAFETY: the checks above.
        unsafe { LAYERS.launch(self, "modulate", config, &arguments)? };
        Ok(y)
    }

    /// `residual + gate·(x + bias)`, with part `gate` of what is told, a map of one pixel, and a bias `[channels]`.
    pub(crate) fn gate(
        &self,
        x: &Tensor,
        bias: Option<&Tensor>,
        residual: &Tensor,
        told: &Tensor,
        gate: usize,
    ) -> Result<Tensor> {
        let (_, height, width, channels) = x.dims4()?;
        self.check("a gate's operand", x, true)?;
        self.check("a gate's operand", residual, residual.dims() == x.dims())?;
        if let Some(bias) = bias {
            fit("a bias", bias, DType::F32, bias.dims() == [channels])?;
        }
        let total = self.parts(told, x, gate)?;
        let y = self.empty(x.shape(), self.dtype)?;
        let arguments = [
            Argument::from(x, 0)?,
            Argument::maybe(bias)?,
            Argument::from(residual, 0)?,
            Argument::from(told, gate * channels)?,
            total,
            Argument::from(&y, 0)?,
            Argument::int(height * width)?,
            Argument::int(channels)?,
            Argument::int(x.elem_count())?,
        ];
        // SAFETY: the checks above.
        unsafe { LAYERS.launch(self, "gate", over(x.elem_count()), &arguments)? };
        Ok(y)
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

    /// Whether [`Machine::attend`] knows heads of so many channels; it needs tensor cores, so it knows them in 16 bits.
    pub(crate) fn attends(&self, depth: usize) -> bool {
        attention(depth).is_some() && self.dtype != DType::F32 && self.generation >= 8
    }

    /// The values that each query gathers, head by head, of scaled queries, keys and values, one after another in the
    /// channels, to which `bias` `[3·channels]` is added.
    pub(crate) fn attend(&self, qkv: &Tensor, bias: &Tensor, heads: usize) -> Result<Tensor> {
        let (batch, height, width, three) = qkv.dims4()?;
        let (tokens, depth) = (height * width, three / 3 / heads);
        let Some(name) = attention(depth).filter(|_| self.attends(depth)) else {
            bail!("no kernel for attention of {depth} channels in {:?}", self.dtype)
        };
        self.check("queries, keys and values", qkv, three == 3 * heads * depth)?;
        fit("a bias", bias, DType::F32, bias.dims() == [three])?;
        let y = self.empty((batch, height, width, heads * depth), self.dtype)?;
        let arguments = [
            Argument::from(qkv, 0)?,
            Argument::from(bias, 0)?,
            Argument::from(&y, 0)?,
            Argument::int(heads)?,
            Argument::int(tokens)?,
            Argument::int(depth)?,
        ];
        let config = LaunchConfig {
            block_dim: (32 * WARPS as u32, 1, 1),
            ..blocks(tokens.div_ceil(QUERIES * WARPS) * heads * batch)
        };
        // SAFETY: the checks above.
        unsafe { ATTENTION.launch(self, name, config, &arguments)? };
        Ok(y)
    }

    /// Numbers of what is told, which has part `last`, of as many numbers as a token of `x`.
    fn parts(&self, told: &Tensor, x: &Tensor, last: usize) -> Result<Argument> {
        let (samples, _, _, total) = told.dims4()?;
        let fits = samples == x.dim(0)? && (last + 1) * x.dim(3)? <= total;
        self.check("what is told", told, fits)?;
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
    }
}
