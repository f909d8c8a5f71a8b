//! The step on a GPU: one kernel, to which all rows' coefficients go up in one copy.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::{CudaStorage, Layout, Result, Tensor, bail, builder_arg};

use super::Advance;
use super::host::log_scale;
use super::quantile::threshold;
use crate::gpu::{Kernels, numbers, over, view};
use crate::sampler::{Bound, MEMORIES, NoiseScale, Remember, Step};

static KERNELS: Kernels = Kernels::new("advance", include_str!("kernel.cu"), None);

/// Fields of the kernel's `Row`.
const FIELDS: usize = 15;

impl Advance<'_> {
    pub(super) fn launch(
        &self,
        (x, x_at): (&CudaStorage, &Layout),
        (memory, memory_at): (&CudaStorage, &Layout),
        (model, model_at): (&CudaStorage, &Layout),
    ) -> Result<CudaStorage> {
        let device = &x.device;
        let x = view(x.as_cuda_slice::<f32>()?, x_at)?;
        let memory = view(memory.as_cuda_slice::<f32>()?, memory_at)?;
        let model = view(model.as_cuda_slice::<f32>()?, model_at)?;
        let count = x_at.shape().elem_count();
        if count == 0 {
            bail!("advance: {:?} has no values", x_at.dims());
        }
        let (length, answer) =
            (count / self.steps.len(), model_at.shape().elem_count() / self.steps.len());
        if i32::try_from(answer).is_err() {
            bail!("advance: a row of {answer} values; a GPU's kernel counts to 2^31 - 1");
        }
        let mut rows = Vec::with_capacity(self.steps.len() * FIELDS);
        for (i, step) in self.steps.iter().enumerate() {
            let (limit, divisor) = match step.bound {
                Bound::None => (f32::INFINITY, 1.0),
                Bound::Clamp { range } => (range as f32, 1.0),
                Bound::Threshold { ratio, max } => {
                    // No device sorts long rows, and thresholding is rare: this row comes down.
                    let [start, answered] = [i * length, i * answer];
                    let x = device.clone_dtoh(&x.slice(start..start + length))?;
                    let model = device.clone_dtoh(&model.slice(answered..answered + length))?;
                    let (p, q) = (step.p as f32, step.q as f32);
                    let raw: Vec<f32> = x.iter().zip(&model).map(|(x, m)| p * x + q * m).collect();
                    let limit = threshold(&raw, ratio, max);
                    (limit, limit)
                }
            };
            rows.extend(fields(step, limit, divisor));
        }
        let rows = device.clone_htod(&rows)?;
        let noise = self.noise.as_ref().map(Tensor::storage_and_layout);
        let noise = match &noise {
            Some((storage, layout)) => Some(view(numbers::<f32>(storage)?, layout)?),
            None => None,
        };
        let name = "advance";
        let function = device.get_or_load_custom_func(name, KERNELS.name, KERNELS.ptx()?)?;
        // SAFETY: the kernel below writes all of it before anything reads it.
        let given = unsafe { device.alloc::<f32>((2 + MEMORIES) * count)? };
        let mut builder = function.builder();
        builder.arg(&rows).arg(&x).arg(&memory).arg(&model);
        match &noise {
            Some(noise) => builder.arg(noise),
            None => builder.arg(&0_u64),
        };
        builder.arg(&given);
        builder_arg!(builder, length as i32, answer as i32, count as i64);
        // SAFETY: the arguments are the kernel's, in order and type; `check` has found the shapes to fit, and noise
        // and variance to be there where a row's step reads them; the kernel goes no further than `count` values.
        unsafe { builder.launch(over(count)) }.w()?;
        Ok(CudaStorage::wrap_cuda_slice(given, device.clone()))
    }
}

/// A step as the kernel's `Row`.
fn fields(step: &Step, limit: f32, divisor: f32) -> [f32; FIELDS] {
    let flag = |set: bool| if set { 1.0 } else { 0.0 };
    // The kernel's names are FIXED for 1, LEARNED_RANGE for 2 and LEARNED for 3.
    let (mut fixed, mut middle, mut slope) = (0.0, 0.0, 0.0);
    let noise = match step.d {
        NoiseScale::Fixed(scale) => {
            fixed = scale as f32;
            flag(step.needs_noise())
        }
        NoiseScale::LearnedRange { min_log, max_log } => {
            (middle, slope) = log_scale(min_log, max_log);
            2.0
        }
        NoiseScale::Learned => 3.0,
    };
    // Its names are X0 for 1 and ANSWER for 2.
    let remember = match step.remember {
        Remember::Nothing => 0.0,
        Remember::X0 => 1.0,
        Remember::Answer => 2.0,
    };
    [
        step.p as f32,
        step.q as f32,
        step.a as f32,
        step.b as f32,
        step.e as f32,
        step.c[0] as f32,
        step.c[1] as f32,
        step.c[2] as f32,
        fixed,
        middle,
        slope,
        limit,
        divisor,
        remember,
        noise,
    ]
}
