//! Convolutions, products, norms and activations.
//!
//! They keep the promises of [`crate::layers`].

use candle_core::{Result, Tensor};

use super::config::Activation;
use super::convolution::convolve;
use crate::layers::working;
use crate::weights::Weights;

/// A convolution with bias.
pub(super) struct Conv2d {
    weight: Tensor,
    bias: Tensor,
    stride: usize,
    padding: usize,
}

impl Conv2d {
    /// A 3×3 convolution that keeps the image's size.
    pub(super) fn same(weights: &Weights, input: usize, output: usize) -> crate::Result<Self> {
        Self::new(weights, input, output, 1, 1)
    }

    /// A 3×3 convolution from `input` to `output` channels.
    pub(super) fn new(
        weights: &Weights,
        input: usize,
        output: usize,
        stride: usize,
        padding: usize,
    ) -> crate::Result<Self> {
        let weight = weights.get("weight", &[output, input, 3, 3])?;
        Ok(Self { weight, bias: weights.get("bias", &[output])?, stride, padding })
    }

    /// `[B, input, H, W]` → `[B, output, H', W']`.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.convolve(x)?.broadcast_add(&self.bias.reshape((1, (), 1, 1))?)
    }

    /// The same, plus `offset` `[B, output]` at every pixel: one pass over the image for both sums.
    pub(super) fn forward_plus(&self, x: &Tensor, offset: &Tensor) -> Result<Tensor> {
        let offset = offset.broadcast_add(&self.bias)?;
        self.convolve(x)?.broadcast_add(&offset.unsqueeze(2)?.unsqueeze(3)?)
    }

    fn convolve(&self, x: &Tensor) -> Result<Tensor> {
        convolve(x, &self.weight, self.padding, self.stride)
    }
}

/// The same linear map at every position of a sample: a 1×1 convolution.
pub(super) struct Pointwise {
    weight: Tensor,
    bias: Tensor,
}

impl Pointwise {
    /// From weights stored as a 1×1 convolution.
    pub(super) fn convolution(
        weights: &Weights,
        input: usize,
        output: usize,
    ) -> crate::Result<Self> {
        let weight = weights.get("weight", &[output, input, 1, 1])?.squeeze(3)?.squeeze(2)?;
        Ok(Self { weight, bias: weights.get("bias", &[output])? })
    }

    /// From weights stored as a linear layer.
    pub(super) fn linear(weights: &Weights, input: usize, output: usize) -> crate::Result<Self> {
        let weight = weights.get("weight", &[output, input])?;
        Ok(Self { weight, bias: weights.get("bias", &[output])? })
    }

    /// From a weight `[output, input]` and a bias `[output]`.
    pub(super) fn from_tensors(weight: Tensor, bias: Tensor) -> Self {
        Self { weight, bias }
    }

    /// Weight `[output, input]` and bias `[output]`.
    pub(super) fn into_tensors(self) -> (Tensor, Tensor) {
        (self.weight, self.bias)
    }

    /// `[B, input, L]` → `[B, output, L]`, one product per sample.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (output, input) = self.weight.dims2()?;
        let weight = self.weight.broadcast_as((x.dim(0)?, output, input))?;
        weight.matmul(x)?.broadcast_add(&self.bias.reshape((1, (), 1))?)
    }
}

/// Group normalisation (Wu & He 2018).
pub(super) struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: usize,
    eps: f64,
}

impl GroupNorm {
    /// Over `channels` channels in `groups` groups.
    pub(super) fn new(
        weights: &Weights,
        channels: usize,
        groups: usize,
        eps: f64,
    ) -> crate::Result<Self> {
        // Statistics and affine map are worked out in f32, as torch does, or in f64 in a network that
        // serves as the reference.
        let dtype = working(weights.dtype());
        let weight = weights.get_as("weight", &[channels], dtype)?;
        let bias = weights.get_as("bias", &[channels], dtype)?;
        Ok(Self { weight, bias, groups, eps })
    }

    /// `[B, channels, …]` → the same shape.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.normalise(x, |scale, shift| Ok((scale, shift)))
    }

    /// The norm followed by `y·(1 + scale) + shift`, with `scale` and `shift` `[B, channels]`.
    pub(super) fn forward_modulated(
        &self,
        x: &Tensor,
        scale: &Tensor,
        shift: &Tensor,
    ) -> Result<Tensor> {
        self.normalise(x, |own_scale, own_shift| {
            let dtype = self.weight.dtype();
            let factor = (scale.to_dtype(dtype)? + 1.0)?.unsqueeze(2)?;
            let shift = shift.to_dtype(dtype)?.unsqueeze(2)?;
            Ok(((own_scale * &factor)?, (own_shift.broadcast_mul(&factor)? + shift)?))
        })
    }

    /// `(x − mean)·scale + shift`: norm, affine map and modulation in one product and one sum.
    ///
    /// `modulate` is given the scale `[B, C, 1]` and the shift `[1, C, 1]`.
    fn normalise(
        &self,
        x: &Tensor,
        modulate: impl FnOnce(Tensor, Tensor) -> Result<(Tensor, Tensor)>,
    ) -> Result<Tensor> {
        let (batch, channels) = (x.dim(0)?, x.dim(1)?);
        let grouped = x.to_dtype(self.weight.dtype())?.reshape((batch, self.groups, ()))?;
        let centred = grouped.broadcast_sub(&grouped.mean_keepdim(2)?)?;
        let deviation = (centred.sqr()?.mean_keepdim(2)? + self.eps)?.sqrt()?;
        let scale = self
            .weight
            .reshape((1, self.groups, channels / self.groups))?
            .broadcast_div(&deviation)?
            .reshape((batch, channels, 1))?;
        let (scale, shift) = modulate(scale, self.bias.reshape((1, channels, 1))?)?;
        let y = centred.reshape((batch, channels, ()))?.broadcast_mul(&scale)?;
        y.broadcast_add(&shift)?.reshape(x.shape())?.to_dtype(x.dtype())
    }
}

impl Activation {
    /// Element-wise.
    pub(super) fn forward(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Silu => x.silu(),
            Self::Gelu => x.gelu_erf(),
            Self::Relu => x.relu(),
            // ln(1 + eˣ) = max(x, 0) + ln(1 + e^−|x|), which cannot overflow.
            Self::Mish => x * (x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?)?.tanh()?,
        }
    }
}

/// Each pixel becomes four: `[B, C, H, W]` → `[B, C, 2H, 2W]`.
pub(super) fn upsample_nearest(x: &Tensor) -> Result<Tensor> {
    let (height, width) = (x.dim(2)?, x.dim(3)?);
    // candle's gradient of this operation replaces what its argument has gathered so far instead of
    // adding to it, so the argument must be a tensor that nothing else uses.
    let x = if x.track_op() { &x.copy()? } else { x };
    x.upsample_nearest2d(2 * height, 2 * width)
}

/// The mean of each four pixels: `[B, C, H, W]` → `[B, C, H/2, W/2]`.
pub(super) fn downsample_mean(x: &Tensor) -> Result<Tensor> {
    x.avg_pool2d(2)
}
