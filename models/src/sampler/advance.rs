//! One batched operation that advances every sample, whatever its sampler and position.

mod host;
#[cfg(feature = "cuda")]
mod launch;
mod quantile;
#[cfg(test)]
mod tests;

use candle_core::{CpuStorage, CudaStorage, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};

use super::{MEMORIES, Step};

/// What [`advance`] gives, f32.
#[derive(Debug, Clone)]
pub struct Advanced {
    /// The next latents, `[B, C, H, W]`.
    pub x: Tensor,
    /// What the next steps will remember, `[B, 3·C, H, W]`.
    pub memory: Tensor,
    /// The bounded estimates of the clean samples, `[B, C, H, W]`.
    pub x0: Tensor,
}

/// The memory of samples that have taken no step: f32 `[B, 3·C, H, W]` for latents `[B, C, H, W]`, zeros.
///
/// # Errors
/// Whatever the device says.
pub fn empty_memory(x: &Tensor) -> Result<Tensor> {
    Tensor::zeros(&memory_shape(x.dims4()?)[..], DType::F32, x.device())
}

fn memory_shape((batch, channels, height, width): (usize, usize, usize, usize)) -> [usize; 4] {
    [batch, MEMORIES * channels, height, width]
}

/// Applies `steps[i]` to row `i` of a batch.
///
/// On the CPU row `i` of the result depends, to the bit, only on row `i` of the operands and on
/// `steps[i]`: a term that a row's step does not have is not added as a zero, it is left out. NaN is
/// never hidden by a bound.
///
/// # Shapes
/// - `x`, `noise`: f32 `[B, C, H, W]`; `noise` is N(0, 1), read only in rows whose step [`Step::needs_noise`], and
///   `None` where there are none.
/// - `memory`: f32 `[B, 3·C, H, W]`, the newest first; [`empty_memory`] is what samples start with.
/// - `model`: the network's answer in any float type, `[B, C, H, W]`, or `[B, 2C, H, W]` with the variance
///   half second.
///
/// # Errors
/// Shapes that do not match, a step that needs noise or a variance half that is not there, and whatever
/// the device says.
pub fn advance(
    x: &Tensor,
    memory: &Tensor,
    model: &Tensor,
    noise: Option<&Tensor>,
    steps: &[Step],
) -> Result<Advanced> {
    check(x, memory, model, noise, steps)?;
    let noise = noise.filter(|_| steps.iter().any(Step::needs_noise));
    let advance = Advance { steps, noise: noise.map(Tensor::contiguous).transpose()? };
    let model = model.to_dtype(DType::F32)?.contiguous()?;
    let all = x.contiguous()?.apply_op3_no_bwd(&memory.contiguous()?, &model, &advance)?;
    let memory = all.narrow(0, 2, MEMORIES)?.reshape(memory.dims())?;
    Ok(Advanced { x: all.get(0)?, memory, x0: all.get(1)? })
}

fn check(
    x: &Tensor,
    memory: &Tensor,
    model: &Tensor,
    noise: Option<&Tensor>,
    steps: &[Step],
) -> Result<()> {
    let (batch, channels, height, width) = x.dims4()?;
    if steps.len() != batch {
        bail!("advance: {} steps for a batch of {batch}", steps.len());
    }
    let has_variance = model.dims() == [batch, 2 * channels, height, width];
    if !has_variance && model.dims() != x.dims() {
        bail!("advance: the network answered {:?} to {:?}", model.dims(), x.dims());
    }
    if !has_variance && steps.iter().any(Step::needs_variance) {
        bail!(
            "advance: a step needs the variance half, and the network answered {:?}",
            model.dims()
        );
    }
    if noise.is_none() && steps.iter().any(Step::needs_noise) {
        bail!("advance: a step needs noise, and there is none");
    }
    if memory.dims() != memory_shape(x.dims4()?) {
        bail!("advance: the memory is {:?}, the latents are {:?}", memory.dims(), x.dims());
    }
    if let Some(noise) = noise
        && noise.dims() != x.dims()
    {
        bail!("advance: the noise is {:?}, the latents are {:?}", noise.dims(), x.dims());
    }
    for (name, tensor) in [("x", Some(x)), ("memory", Some(memory)), ("noise", noise)] {
        if let Some(tensor) = tensor
            && tensor.dtype() != DType::F32
        {
            bail!("advance: {name} is {:?}, must be F32", tensor.dtype());
        }
    }
    Ok(())
}

/// Of latents, memory and answer, contiguous f32: the next latents, the estimates and the next memory (row by row),
/// one behind the other, `[5, B, C, H, W]`.
struct Advance<'a> {
    steps: &'a [Step],
    /// f32 and contiguous, and there where a step needs it.
    noise: Option<Tensor>,
}

impl CustomOp3 for Advance<'_> {
    fn name(&self) -> &'static str {
        "advance"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_at: &Layout,
        memory: &CpuStorage,
        memory_at: &Layout,
        model: &CpuStorage,
        model_at: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let advanced = host::advance(self, (x, x_at), (memory, memory_at), (model, model_at))?;
        Ok((CpuStorage::F32(advanced), given(x_at)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_at: &Layout,
        memory: &CudaStorage,
        memory_at: &Layout,
        model: &CudaStorage,
        model_at: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        Ok((self.launch((x, x_at), (memory, memory_at), (model, model_at))?, given(x_at)))
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        bail!("this build knows no GPU")
    }
}

fn given(x: &Layout) -> Shape {
    Shape::from([&[2 + MEMORIES], x.dims()].concat())
}
