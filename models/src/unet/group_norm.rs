//! Group norm, and what is done beside it: an offset before, scale-shift and the activation after.
//!
//! On a GPU all of it is one operation of our own (`crate::gpu`), elsewhere it is candle's.

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
    pub(super) fn forward(&self, x: &Tensor, with: With) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() && crate::gpu::knows(x.dtype()) {
            return self.on_gpu(x, with);
        }
        self.composed(x, with)
    }

    /// `(x − mean)·scale + shift`: norm, affine map and modulation in one product and one sum.
    fn composed(&self, x: &Tensor, with: With) -> Result<Tensor> {
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

    /// The same in one operation.
    #[cfg(feature = "cuda")]
    fn on_gpu(&self, x: &Tensor, with: With) -> Result<Tensor> {
        use crate::kernels::Function;

        let (batch, channels) = (x.dim(0)?, x.dim(1)?);
        let (mut scale, mut shift) = (self.weight.unsqueeze(0)?, self.bias.unsqueeze(0)?);
        if let Some(modulation) = with.modulation {
            let parts = modulation.to_dtype(self.weight.dtype())?.chunk(2, 1)?;
            let factor = (&parts[0] + 1.0)?;
            scale = scale.broadcast_mul(&factor)?;
            shift = (shift.broadcast_mul(&factor)? + &parts[1])?;
        }
        let offset = match with.offset {
            Some(offset) => offset.to_dtype(self.weight.dtype())?,
            None => self.bias.zeros_like()?.unsqueeze(0)?,
        };
        let every = |part: &Tensor| part.broadcast_as((batch, channels));
        let parameters = Tensor::stack(&[every(&scale)?, every(&shift)?, every(&offset)?], 1)?;
        let function = with.activation.map_or(Function::Identity, Function::from);
        crate::gpu::group_norm(x, &parameters, (self.groups, self.eps), function)
    }
}

#[cfg(feature = "cuda")]
#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;
    use crate::noise;

    fn random(seed: u64, shape: &[usize], device: &Device) -> Var {
        let mut values = vec![0.0f32; shape.iter().product()];
        noise::normal(seed, 0, &mut values);
        Var::from_tensor(&Tensor::from_vec(values, shape, device).unwrap()).unwrap()
    }

    /// Relative, and NaN is no small one.
    fn error(given: &Tensor, expected: &Tensor) -> f32 {
        let norm = |tensor: Tensor| {
            let square = tensor.to_dtype(DType::F32).unwrap().sqr().unwrap();
            square.sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt()
        };
        let expected = expected.to_dtype(DType::F32).unwrap();
        let wrong = (given.to_dtype(DType::F32).unwrap() - &expected).unwrap();
        norm(wrong) / norm(expected)
    }

    #[test]
    #[ignore = "needs a GPU, or one in software"]
    fn one_operation_is_candles_many_and_has_their_gradients() -> Result<()> {
        let device = Device::new_cuda(0)?;
        let activations =
            [None, Some(Activation::Silu), Some(Activation::Mish), Some(Activation::Gelu)];
        for (shape, groups) in
            [([3, 12, 5, 7], 4), ([1, 6, 1, 2], 3), ([2, 8, 16, 17], 8), ([2, 4, 3, 3], 1)]
        {
            let (batch, channels) = (shape[0], shape[1]);
            let (x, weight, bias) = (
                random(1, &shape, &device),
                random(2, &[channels], &device),
                random(3, &[channels], &device),
            );
            let (offset, modulation) = (
                random(4, &[batch, channels], &device),
                random(5, &[batch, 2 * channels], &device),
            );
            let weighing = random(6, &shape, &device);
            let norm = GroupNorm {
                weight: weight.as_tensor().clone(),
                bias: bias.as_tensor().clone(),
                groups,
                eps: 1e-5,
            };
            for (which, activation) in activations.into_iter().enumerate() {
                let with = With {
                    offset: (which % 2 == 0).then_some(offset.as_tensor()),
                    modulation: (which > 1).then_some(modulation.as_tensor()),
                    activation,
                };
                let (given, expected) = (norm.on_gpu(&x, with)?, norm.composed(&x, with)?);
                assert!(error(&given, &expected) < 2e-6, "{shape:?} {activation:?}");
                let gradients = |y: &Tensor| (y * weighing.as_tensor())?.sum_all()?.backward();
                let (given, expected) = (gradients(&given)?, gradients(&expected)?);
                for var in [&x, &weight, &bias, &offset, &modulation] {
                    match (given.get(var), expected.get(var)) {
                        // What is added to a group that is one channel changes nothing.
                        (Some(_), Some(_)) if var.id() == offset.id() && channels == groups => {}
                        (Some(given), Some(expected)) => {
                            let error = error(given, expected);
                            assert!(
                                error < 1e-5,
                                "{shape:?} {activation:?} {:?}: {error}",
                                var.dims()
                            );
                        }
                        (given, expected) => assert_eq!(given.is_some(), expected.is_some()),
                    }
                }
                let half = x.to_dtype(DType::BF16)?;
                let offset = with.offset.map(|offset| offset.to_dtype(DType::BF16)).transpose()?;
                let with = With { offset: offset.as_ref(), ..with };
                let given = norm.on_gpu(&half, with)?;
                assert!(error(&given, &norm.composed(&half, with)?) < 1e-2, "{shape:?}");
            }
        }
        Ok(())
    }
}
