//! Group norm, and what is done beside it: an offset before, scale-shift and the activation after.

use candle_core::{Result, Tensor};

use super::config::Activation;
use crate::layers::working;
use crate::weights::Weights;

/// Group normalisation (Wu & He 2018).
pub(super) struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: usize,
    eps: f64,
}

/// What is done beside the norm.
#[derive(Clone, Copy, Default)]
pub(super) struct With<'a> {
    /// `[B, channels]`: is added to every pixel before the norm.
    pub(super) offset: Option<&'a Tensor>,
    /// `[B, 2·channels]`, scale and shift, one behind the other: `y·(1 + scale) + shift` after it.
    pub(super) modulation: Option<&'a Tensor>,
    /// At the end.
    pub(super) activation: Option<Activation>,
}

impl With<'_> {
    /// An activation, and nothing else.
    pub(super) fn activation(activation: Activation) -> Self {
        Self { activation: Some(activation), ..Self::default() }
    }
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
    ///
    /// `(x − mean)·scale + shift`: norm, affine map and modulation in one product and one sum.
    pub(super) fn forward(&self, x: &Tensor, with: With) -> Result<Tensor> {
        let (batch, channels, dtype) = (x.dim(0)?, x.dim(1)?, self.weight.dtype());
        let grouped = match with.offset {
            Some(offset) => x.flatten_from(2)?.broadcast_add(&offset.unsqueeze(2)?)?,
            None => x.clone(),
        };
        let grouped = grouped.to_dtype(dtype)?.reshape((batch, self.groups, ()))?;
        let centred = grouped.broadcast_sub(&grouped.mean_keepdim(2)?)?;
        let deviation = (centred.sqr()?.mean_keepdim(2)? + self.eps)?.sqrt()?;
        let mut scale = self
            .weight
            .reshape((1, self.groups, channels / self.groups))?
            .broadcast_div(&deviation)?
            .reshape((batch, channels, 1))?;
        let mut shift = self.bias.reshape((1, channels, 1))?;
        if let Some(modulation) = with.modulation {
            let parts = modulation.to_dtype(dtype)?.chunk(2, 1)?;
            let factor = (&parts[0] + 1.0)?.unsqueeze(2)?;
            scale = (scale * &factor)?;
            shift = (shift.broadcast_mul(&factor)? + parts[1].unsqueeze(2)?)?;
        }
        let y = centred.reshape((batch, channels, ()))?.broadcast_mul(&scale)?;
        let y = y.broadcast_add(&shift)?.reshape(x.shape())?.to_dtype(x.dtype())?;
        match with.activation {
            Some(activation) => activation.forward(&y),
            None => Ok(y),
        }
    }
}
