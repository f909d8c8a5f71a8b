//! Group norm, and what is done beside it: an offset before, scale-shift and the activation after.
//!
//! On a GPU all of it is one kernel of our own (`kernels.cu`), where no gradient is asked for and the activation is
//! SiLU or none. Elsewhere it is candle's operations.

#[cfg(feature = "cuda")]
mod launch;

use candle_core::{CpuStorage, CudaStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, bail};

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
    /// `[B, channels]`, or `[1, channels]` for all samples: is added to every pixel before the norm.
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
        let tracked = [Some(x), Some(&self.weight), with.offset, with.modulation];
        let tracked = tracked.into_iter().flatten().any(Tensor::track_op);
        let kernel = matches!(x.dtype(), DType::F32 | DType::BF16 | DType::F16)
            && matches!(with.activation, None | Some(Activation::Silu));
        if x.device().is_cuda() && kernel && !tracked {
            return self.fused(x, with);
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

    /// The same in one kernel, whose only activation is SiLU; for tensors without gradients.
    fn fused(&self, x: &Tensor, with: With) -> Result<Tensor> {
        let given = |tensor: &Tensor, width| {
            tensor.broadcast_as((x.dim(0)?, width))?.to_dtype(DType::F32)?.contiguous()
        };
        let channels = x.dim(1)?;
        x.contiguous()?.apply_op1_no_bwd(&Fused {
            norm: self,
            offset: with.offset.map(|offset| given(offset, channels)).transpose()?,
            modulation: with.modulation.map(|both| given(both, 2 * channels)).transpose()?,
            silu: with.activation.is_some(),
        })
    }
}

/// The kernel.
struct Fused<'a> {
    norm: &'a GroupNorm,
    /// f32 `[B, channels]`, contiguous.
    offset: Option<Tensor>,
    /// f32 `[B, 2·channels]`, contiguous.
    modulation: Option<Tensor>,
    silu: bool,
}

impl Fused<'_> {
    /// Channels and pixels of x.
    ///
    /// # Errors
    /// Shapes and types that do not fit, which the kernel would not notice.
    fn check(&self, x: &Layout) -> Result<(usize, usize)> {
        let [batch, channels, ref pixels @ ..] = *x.dims() else {
            bail!("group norm of {:?}: has no channels", x.dims())
        };
        let parameters = [&self.norm.weight, &self.norm.bias];
        let shaped = |given: &Option<Tensor>, width| {
            given.as_ref().is_none_or(|given| given.dims() == [batch, width])
        };
        if parameters.iter().any(|one| one.dims() != [channels] || one.dtype() != DType::F32)
            || channels % self.norm.groups != 0
            || !shaped(&self.offset, channels)
            || !shaped(&self.modulation, 2 * channels)
        {
            bail!(
                "group norm of {:?} in {} groups: weights are {:?} {:?}, the offset {:?}, the modulation {:?}",
                x.dims(),
                self.norm.groups,
                self.norm.weight.dtype(),
                self.norm.weight.dims(),
                self.offset.as_ref().map(Tensor::dims),
                self.modulation.as_ref().map(Tensor::dims),
            )
        }
        let pixels = pixels.iter().product::<usize>();
        if x.shape().elem_count() == 0 || i32::try_from(channels * pixels).is_err() {
            bail!("group norm of {:?}: a sample has 1 to 2^31 - 1 values", x.dims())
        }
        Ok((channels, pixels))
    }
}

impl CustomOp1 for Fused<'_> {
    fn name(&self) -> &'static str {
        "group-norm"
    }

    /// The kernel's twin, which tests hold both against.
    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (channels, pixels) = self.check(layout)?;
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("group norm's tensors must be contiguous")
        };
        let values = |tensor: &Tensor| tensor.to_vec1::<f32>();
        let (weight, bias) = (values(&self.norm.weight)?, values(&self.norm.bias)?);
        let rows = |given: &Option<Tensor>| given.as_ref().map(Tensor::to_vec2::<f32>).transpose();
        let (offset, modulation) = (rows(&self.offset)?, rows(&self.modulation)?);
        let CpuStorage::F32(x) = x else { bail!("group norm's twin is for f32") };
        let per_group = channels / self.norm.groups;
        let mut y = Vec::with_capacity(end - start);
        for (block, x) in x[start..end].chunks_exact(per_group * pixels).enumerate() {
            let (sample, group) = (block / self.norm.groups, block % self.norm.groups);
            let size = x.len() as f32;
            let moved = |(i, x): (usize, &f32)| {
                let channel = group * per_group + i / pixels;
                x + offset.as_ref().map_or(0.0, |offset| offset[sample][channel])
            };
            let x: Vec<f32> = x.iter().enumerate().map(moved).collect();
            let mean = x.iter().sum::<f32>() / size;
            let square = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>() / size;
            let deviation = (square + self.norm.eps as f32).sqrt();
            y.extend(x.iter().enumerate().map(|(i, x)| {
                let channel = group * per_group + i / pixels;
                let (mut scale, mut shift) = (weight[channel] / deviation, bias[channel]);
                if let Some(modulation) = &modulation {
                    let factor = 1.0 + modulation[sample][channel];
                    scale *= factor;
                    shift = shift * factor + modulation[sample][channels + channel];
                }
                let y = (x - mean) * scale + shift;
                if self.silu { y / (1.0 + (-y).exp()) } else { y }
            }));
        }
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        Ok((self.launch(x, layout)?, layout.shape().clone()))
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        bail!("this build knows no GPU")
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::noise;

    fn random(seed: u64, shape: &[usize]) -> Tensor {
        let mut values = vec![0.0; shape.iter().product()];
        noise::normal(seed, 0, &mut values);
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    #[test]
    fn the_twin_of_the_kernel_is_candles_operations() {
        for (shape, groups) in
            [(&[3, 12, 5, 7][..], 4), (&[1, 6, 1, 1], 3), (&[2, 8, 33], 8), (&[2, 4, 16, 16], 1)]
        {
            let (batch, channels) = (shape[0], shape[1]);
            let (weight, bias) = (random(1, &[channels]), random(2, &[channels]));
            let norm = GroupNorm { weight, bias, groups, eps: 1e-5 };
            // Far from zero, where the mean of squares less the square of the mean would be lost.
            let x = (random(3, shape) + 10.0).unwrap();
            let modulation = random(4, &[batch, 2 * channels]);
            let offsets = [random(5, &[batch, channels]), random(6, &[1, channels])];
            let offsets = [None, Some(&offsets[0]), Some(&offsets[1])];
            for (modulation, offset) in
                offsets.map(|offset| [(None, offset), (Some(&modulation), offset)]).concat()
            {
                for activation in [None, Some(Activation::Silu)] {
                    let with = With { offset, modulation, activation };
                    let fused = norm.fused(&x, with).unwrap();
                    let composed = norm.composed(&x, with).unwrap();
                    let error = (fused - composed).unwrap().abs().unwrap().max_all().unwrap();
                    let error = error.to_scalar::<f32>().unwrap();
                    assert!(error < 5e-5, "{shape:?} {groups} {activation:?}: {error}");
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (weight, bias) = (random(1, &[8]), random(2, &[8]));
        let norm = GroupNorm { weight, bias, groups: 4, eps: 1e-5 };
        assert!(norm.fused(&random(3, &[2, 6, 4]), With::default()).is_err());
        let few = random(4, &[3, 16]);
        let x = random(3, &[2, 8, 4]);
        assert!(norm.fused(&x, With { modulation: Some(&few), ..With::default() }).is_err());
        assert!(norm.fused(&x, With { offset: Some(&few), ..With::default() }).is_err());
    }
}
