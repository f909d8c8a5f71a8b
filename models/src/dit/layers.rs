//! Products and norms over tokens, `[B, tokens, channels]`; they keep the promises of [`crate::layers`].

use candle_core::{D, DType, Result, Tensor};

use super::config::Activation;
use crate::kernels::Function;
use crate::layers::working;
use crate::weights::Weights;

/// The same linear map of every token.
pub(super) struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    /// From `input` to `output` channels.
    pub(super) fn new(weights: &Weights, input: usize, output: usize) -> crate::Result<Self> {
        let bias = Some(weights.get("bias", &[output])?);
        Ok(Self { bias, ..Self::unbiased(weights, input, output)? })
    }

    /// The same without a bias.
    pub(super) fn unbiased(weights: &Weights, input: usize, output: usize) -> crate::Result<Self> {
        Ok(Self { weight: weights.get("weight", &[output, input])?, bias: None })
    }

    /// Of a kernel `[output, channels, side, side]` and a bias, over whole patches.
    pub(super) fn of_patches(
        weights: &Weights,
        channels: usize,
        side: usize,
        output: usize,
    ) -> crate::Result<Self> {
        let weight = weights.get("weight", &[output, channels, side, side])?.flatten_from(1)?;
        Ok(Self { weight, bias: Some(weights.get("bias", &[output])?) })
    }

    /// `[B, tokens, input]` → `[B, tokens, output]`; on the CPU one product per sample.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, tokens, input) = x.dims3()?;
        let (output, _) = self.weight.dims2()?;
        let y = if x.device().is_cpu() {
            x.matmul(&self.weight.t()?.broadcast_as((batch, input, output))?)?
        } else {
            let flat = x.reshape((batch * tokens, input))?.matmul(&self.weight.t()?)?;
            flat.reshape((batch, tokens, output))?
        };
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}

/// Layer normalisation (Ba et al. 2016) of every token, then `y·(1 + scale) + shift`, with `scale` and
/// `shift` `[B, 1, channels]`.
pub(super) fn normalise(x: &Tensor, eps: f64, scale: &Tensor, shift: &Tensor) -> Result<Tensor> {
    // As torch does it, or in f64 in a network that serves as the reference.
    let dtype: DType = working(x.dtype());
    let wide = x.to_dtype(dtype)?;
    let centred = wide.broadcast_sub(&wide.mean_keepdim(D::Minus1)?)?;
    let deviation = (centred.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    let normed = centred.broadcast_div(&deviation)?.to_dtype(x.dtype())?;
    normed.broadcast_mul(&(scale + 1.0)?)?.broadcast_add(shift)
}

impl Activation {
    /// Element-wise.
    pub(super) fn forward(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Gelu => x.gelu_erf(),
            Self::GeluTanh => x.gelu(),
        }
    }
}

impl From<Activation> for Function {
    fn from(activation: Activation) -> Self {
        match activation {
            Activation::Gelu => Self::Gelu,
            Activation::GeluTanh => Self::GeluTanh,
        }
    }
}
