//! Convolutions, products and activations.
//!
//! They keep the promises of [`crate::layers`].

use candle_core::{Result, Tensor};

use super::config::Activation;
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
        self.without_bias(x)?.broadcast_add(&self.bias.reshape((1, (), 1, 1))?)
    }

    /// The same, without the bias, which whoever takes it must add.
    pub(super) fn without_bias(&self, x: &Tensor) -> Result<Tensor> {
        x.conv2d(&self.weight, self.padding, self.stride, 1, 1)
    }

    /// `[output]`.
    pub(super) fn bias(&self) -> &Tensor {
        &self.bias
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
        let product = self.weight.broadcast_as((x.dim(0)?, output, input))?.matmul(x)?;
        product.broadcast_add(&self.bias.reshape((1, (), 1))?)
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
