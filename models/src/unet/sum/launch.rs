//! The kernel on a GPU.

use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DeviceRepr, PushKernelArg};
use candle_core::cuda_backend::{CudaDType, CudaStorageSlice, WrapErr};
use candle_core::{CudaDevice, CudaStorage, Layout, Result, WithDType, bail, builder_arg};

use super::BiasedSum;
use crate::gpu::{over, view};
use crate::unet::KERNELS;

impl BiasedSum {
    pub(super) fn launch(
        (a, a_at): (&CudaStorage, &Layout),
        (b, b_at): (&CudaStorage, &Layout),
        (bias, bias_at): (&CudaStorage, &Layout),
    ) -> Result<CudaStorage> {
        use CudaStorageSlice::{BF16, F16, F32};
        let (device, at) = (&a.device, [a_at, b_at, bias_at]);
        match (&a.slice, &b.slice, &bias.slice) {
            (F32(a), F32(b), F32(bias)) => Self::over([a, b, bias], at, device),
            (BF16(a), BF16(b), BF16(bias)) => Self::over([a, b, bias], at, device),
            (F16(a), F16(b), F16(bias)) => Self::over([a, b, bias], at, device),
            _ => bail!("a sum's operands are of one type: f32, bf16 or f16"),
        }
    }

    fn over<T: CudaDType + DeviceRepr + WithDType>(
        operands: [&CudaSlice<T>; 3],
        at: [&Layout; 3],
        device: &CudaDevice,
    ) -> Result<CudaStorage> {
        let (channels, pixels) = Self::check(at[0], at[1], at[2])?;
        let [a, b, bias] = operands;
        let (a, b, bias) = (view(a, at[0])?, view(b, at[1])?, view(bias, at[2])?);
        let name = format!("biased_sum_{}", T::DTYPE.as_str());
        let function = device.get_or_load_custom_func(&name, KERNELS.name, KERNELS.ptx()?)?;
        let elements = at[0].shape().elem_count();
        // SAFETY: the kernel below writes all of it before anything reads it.
        let y = unsafe { device.alloc::<T>(elements)? };
        let mut builder = function.builder();
        builder.arg(&a).arg(&b).arg(&bias).arg(&y);
        builder_arg!(builder, channels as i32, pixels as i32, elements as i64);
        // SAFETY: the arguments are the kernel's, in order and type; `check` has found the shapes to fit, and the
        // kernel goes no further than so many elements.
        unsafe { builder.launch(over(elements)) }.w()?;
        Ok(CudaStorage::wrap_cuda_slice(y, device.clone()))
    }
}
