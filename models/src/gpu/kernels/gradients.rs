//! The kernels of gradients, as [`super`] has those of layers. Where it is to `add`, a gradient is added to what is there.

use candle_core::{DType, Result, Tensor, bail};

use super::{PerSample, fit, number};
use crate::gpu::context::Context;
use crate::gpu::launch::{Argument, Kernels, THREADS, blocks, over};
use crate::kernels::Function;

static GRADIENTS: Kernels = Kernels::new(
    "gradients",
    concat!(include_str!("numbers.cu"), include_str!("functions.cu"), include_str!("gradients.cu")),
    None,
);

/// A group norm whose gradient is asked for.
pub(crate) struct Normed<'a> {
    pub(crate) x: &'a Tensor,
    pub(crate) more: Option<&'a Tensor>,
    /// `[channels]`.
    pub(crate) weight: &'a Tensor,
    pub(crate) bias: &'a Tensor,
    pub(crate) groups: usize,
    pub(crate) eps: f64,
    pub(crate) modulation: Option<PerSample>,
    pub(crate) function: Function,
}

/// Where a gradient goes, and whether it is added there.
pub(crate) type Into<'a> = (&'a Tensor, bool);

impl Context {
    /// The gradients of `x` and `more`, of that of what [`Context::group_norm`] gave, and in `shares` f32 `[B, 2,
    /// channels]` what each sample adds to those of scale and shift.
    pub(crate) fn norm_gradient(
        &self,
        norm: &Normed,
        of_y: &Tensor,
        of_x: Into,
        of_more: Option<Into>,
        shares: &Tensor,
    ) -> Result<()> {
        let Normed { x, more, weight, bias, groups, eps, ref modulation, function } = *norm;
        let (batch, height, width, channels) = of_y.dims4()?;
        self.check("a norm's gradient", of_y, true)?;
        let own = x.dim(3)?;
        let mut last = own;
        for (value, gradient) in [(Some(x), Some(of_x)), (more, of_more)] {
            let (Some(value), Some((gradient, _))) = (value, gradient) else { continue };
            let pixels = value.dims()[..3] == of_y.dims()[..3];
            self.check("a norm's operand", value, pixels)?;
            self.check("a norm's gradient", gradient, gradient.dims() == value.dims())?;
            last = value.dim(3)?;
        }
        let joined = own + if more.is_some() { last } else { 0 };
        if joined != channels || channels % groups != 0 || more.is_some() != of_more.is_some() {
            bail!("the gradient of a norm of {joined} channels in {groups} groups, of {channels}")
        }
        for vector in [weight, bias] {
            fit("a norm's vector", vector, DType::F32, vector.dims() == [channels])?;
        }
        fit("a norm's shares", shares, DType::F32, shares.elem_count() == batch * 2 * channels)?;
        let [modulation, stride] = PerSample::check(modulation.as_ref(), batch, 2 * channels)?;
        let arguments = [
            Argument::from(x, 0)?,
            Argument::maybe(more)?,
            Argument::int(own)?,
            modulation,
            stride,
            Argument::from(weight, 0)?,
            Argument::from(bias, 0)?,
            Argument::from(of_y, 0)?,
            Argument::from(of_x.0, 0)?,
            Argument::Int(i32::from(of_x.1)),
            Argument::maybe(of_more.map(|(gradient, _)| gradient))?,
            Argument::Int(i32::from(of_more.is_some_and(|(_, add)| add))),
            Argument::from(shares, 0)?,
            Argument::int(channels)?,
            Argument::int(groups)?,
            Argument::int(height * width)?,
            Argument::Float(eps as f32),
            Argument::Int(number(function)),
        ];
        // SAFETY: the checks above.
        unsafe { GRADIENTS.launch(self, "norm_gradient", blocks(batch * groups), &arguments) }
    }

    /// The gradients of a norm's weight and bias, f32 `[channels]`, and, beside `modulation`, of that, of the shares
    /// `[B, 2, channels]` of all samples.
    pub(crate) fn norm_shares(
        &self,
        norm: &Normed,
        shares: &Tensor,
        of_modulation: Option<PerSample>,
        [of_weight, of_bias]: [&Tensor; 2],
    ) -> Result<()> {
        let (batch, channels) = (norm.x.dim(0)?, norm.weight.elem_count());
        fit("a norm's shares", shares, DType::F32, shares.elem_count() == batch * 2 * channels)?;
        for gradient in [of_weight, of_bias] {
            fit("a norm's gradient", gradient, DType::F32, gradient.dims() == [channels])?;
        }
        let [modulation, stride] = PerSample::check(norm.modulation.as_ref(), batch, 2 * channels)?;
        let [of_modulation, of_stride] =
            PerSample::check(of_modulation.as_ref(), batch, 2 * channels)?;
        let same = match (&stride, &of_stride) {
            (Argument::Int(stride), Argument::Int(of_stride)) => stride == of_stride,
            _ => false,
        };
        if !same {
            bail!("a modulation and its gradient lie differently")
        }
        let arguments = [
            Argument::from(shares, 0)?,
            Argument::from(norm.weight, 0)?,
            Argument::from(norm.bias, 0)?,
            modulation,
            of_modulation,
            stride,
            Argument::from(of_weight, 0)?,
            Argument::from(of_bias, 0)?,
            Argument::int(channels)?,
            Argument::int(batch)?,
        ];
        let config = blocks(channels.div_ceil(THREADS));
        // SAFETY: the checks above.
        unsafe { GRADIENTS.launch(&self.in_f32(), "norm_shares", config, &arguments) }
    }

    /// The sums over all pixels of each sample of a map, in `y` f32, from number `start` on and with samples so many
    /// numbers `apart`.
    pub(crate) fn sums(&self, x: &Tensor, y: &Tensor, [start, apart]: [usize; 2]) -> Result<()> {
        let (batch, height, width, channels) = x.dims4()?;
        self.check("what is summed", x, true)?;
        let end = start + (batch - 1) * apart + channels;
        fit("sums", y, DType::F32, apart >= channels && end <= y.elem_count())?;
        let arguments = [
            Argument::from(x, 0)?,
            Argument::from(y, start)?,
            Argument::int(apart)?,
            Argument::int(channels)?,
            Argument::int(height * width)?,
        ];
        let config = blocks(batch * channels.div_ceil(32));
        // SAFETY: the checks above.
        unsafe { GRADIENTS.launch(self, "sums", config, &arguments) }
    }

    /// The sums over all samples of what [`Context::sums`] wrote, in `y` `[channels]`.
    pub(crate) fn totals(
        &self,
        x: &Tensor,
        [start, apart]: [usize; 2],
        batch: usize,
        y: &Tensor,
    ) -> Result<()> {
        let columns = y.elem_count();
        let end = start + (batch - 1) * apart + columns;
        fit("sums", x, DType::F32, apart >= columns && end <= x.elem_count())?;
        fit("totals", y, DType::F32, true)?;
        let arguments = [
            Argument::from(x, start)?,
            Argument::int(apart)?,
            Argument::from(y, 0)?,
            Argument::int(columns)?,
            Argument::int(batch)?,
        ];
        let config = blocks(columns.div_ceil(THREADS));
        // SAFETY: the checks above.
        unsafe { GRADIENTS.launch(&self.in_f32(), "totals", config, &arguments) }
    }

    /// The gradient of what [`Context::enlarge`] made larger.
    pub(crate) fn enlarge_gradient(
        &self,
        of_y: &Tensor,
        times: usize,
        (of_x, add): Into,
    ) -> Result<()> {
        let (batch, height, width, channels) = of_x.dims4()?;
        let (samples, tall, wide, same) = of_y.dims4()?;
        let fits = times * height <= tall && times * width <= wide;
        self.check("a gradient", of_x, fits)?;
        self.check("a gradient", of_y, (samples, same) == (batch, channels))?;
        let arguments = [
            Argument::from(of_y, 0)?,
            Argument::from(of_x, 0)?,
            Argument::Int(i32::from(add)),
            Argument::int(height)?,
            Argument::int(width)?,
            Argument::int(times)?,
            Argument::int(tall)?,
            Argument::int(wide)?,
            Argument::int(channels)?,
            Argument::int(of_x.elem_count())?,
        ];
        let config = over(of_x.elem_count());
        // SAFETY: the checks above.
        unsafe { GRADIENTS.launch(self, "enlarge_gradient", config, &arguments) }
    }

    /// The gradient of what [`Context::halve`] took the means of.
    pub(crate) fn halve_gradient(&self, of_y: &Tensor, (of_x, add): Into) -> Result<()> {
        let (batch, height, width, channels) = of_x.dims4()?;
        let fits = of_y.dims() == [batch, height / 2, width / 2, channels];
        self.check("a gradient", of_x, height % 2 == 0 && width % 2 == 0)?;
        self.check("a gradient", of_y, fits)?;
        let arguments = [
            Argument::from(of_y, 0)?,
            Argument::from(of_x, 0)?,
            Argument::Int(i32::from(add)),
            Argument::int(width)?,
            Argument::int(channels)?,
            Argument::int(of_x.elem_count())?,
        ];
        let config = over(of_x.elem_count());
        // SAFETY: the checks above.
        unsafe { GRADIENTS.launch(self, "halve_gradient", config, &arguments) }
    }

    /// The gradient of the scores, of that of what [`Context::softmax`] gave, `y`; f32 becomes the context's type.
    pub(crate) fn softmax_gradient(&self, y: &Tensor, of_y: &Tensor) -> Result<Tensor> {
        self.check("what softmax gave", y, true)?;
        fit("a gradient", of_y, DType::F32, of_y.dims() == y.dims())?;
        let length = y.dims().last().copied().unwrap_or(1);
        let rows = y.elem_count() / length;
        let of_scores = self.empty(y.shape(), self.dtype)?;
        let arguments = [
            Argument::from(y, 0)?,
            Argument::from(of_y, 0)?,
            Argument::from(&of_scores, 0)?,
            Argument::int(rows)?,
            Argument::int(length)?,
        ];
        let config = blocks(rows.div_ceil(THREADS / 32));
        // SAFETY: all three have so many rows of so many numbers.
        unsafe { GRADIENTS.launch(self, "softmax_gradient", config, &arguments)? };
        Ok(of_scores)
    }

    /// A filter's gradient `[outputs, 3, 3, inputs]` as f32 `[outputs, inputs, 3, 3]`, in `y` of any shape.
    pub(crate) fn weights_back(&self, x: &Tensor, y: &Tensor) -> Result<()> {
        let (_, tall, wide, inputs) = x.dims4()?;
        self.check("a filter's gradient", x, true)?;
        fit("a filter's gradient", y, DType::F32, y.elem_count() == x.elem_count())?;
        let arguments = [
            Argument::from(x, 0)?,
            Argument::from(y, 0)?,
            Argument::int(inputs)?,
            Argument::int(tall * wide)?,
            Argument::int(y.elem_count())?,
        ];
        // SAFETY: both are of one size.
        unsafe { GRADIENTS.launch(self, "weights_back", over(y.elem_count()), &arguments) }
    }

    fn in_f32(&self) -> Self {
        Self { dtype: DType::F32, ..self.clone() }
    }
}
