//! The kernel on a GPU.

use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DeviceRepr, PushKernelArg};
use candle_core::cuda_backend::{CudaDType, CudaStorageSlice, WrapErr};
use candle_core::{CudaDevice, CudaStorage, Layout, Result, Tensor, WithDType, bail, builder_arg};

use super::Fused;
use crate::gpu::{blocks, numbers, view};
use crate::unet::KERNELS;

impl Fused<'_> {
    pub(super) fn launch(&self, x: &CudaStorage, layout: &Layout) -> Result<CudaStorage> {
        let device = &x.device;
        match &x.slice {
            CudaStorageSlice::F32(x) => self.over(x, layout, device),
            CudaStorageSlice::BF16(x) => self.over(x, layout, device),
            CudaStorageSlice::F16(x) => self.over(x, layout, device),
            _ => bail!("group norm has kernels for f32, bf16 and f16"),
        }
    }

    fn over<T: CudaDType + DeviceRepr + WithDType>(
        &self,
        x: &CudaSlice<T>,
        layout: &Layout,
        device: &CudaDevice,
    ) -> Result<CudaStorage> {
        let (channels, pixels) = self.check(layout)?;
        let x = view(x, layout)?;
        let (weight, weight_layout) = self.norm.weight.storage_and_layout();
        let (bias, bias_layout) = self.norm.bias.storage_and_layout();
        let weight = view(numbers::<f32>(&weight)?, weight_layout)?;
        let bias = view(numbers::<f32>(&bias)?, bias_layout)?;
        let offset = self.offset.as_ref().map(Tensor::storage_and_layout);
        let modulation = self.modulation.as_ref().map(Tensor::storage_and_layout);
        let offset = match &offset {
            Some((storage, layout)) => Some(view(numbers::<f32>(storage)?, layout)?),
            None => None,
        };
        let modulation = match &modulation {
            Some((storage, layout)) => Some(view(numbers::<f32>(storage)?, layout)?),
            None => None,
        };
        let name = format!("group_norm_{}", T::DTYPE.as_str());
        let function = device.get_or_load_custom_func(&name, KERNELS.name, KERNELS.ptx()?)?;
        let elements = layout.shape().elem_count();
        // SAFETY: the kernel below writes all of it before anything reads it.
        let y = unsafe { device.alloc::<T>(elements)? };
        let mut builder = function.builder();
        builder.arg(&x).arg(&y);
        match &offset {
            Some(offset) => builder.arg(offset),
            None => builder.arg(&0_u64),
        };
        builder.arg(&weight).arg(&bias);
        match &modulation {
            Some(modulation) => builder.arg(modulation),
            None => builder.arg(&0_u64),
        };
        builder_arg!(builder, channels as i32, self.norm.groups as i32, pixels as i32);
        builder_arg!(builder, self.norm.eps as f32, i32::from(self.silu));
        // SAFETY: the arguments are the kernel's, in order and type; `check` has found the shapes to fit, so
        // that a block reads and writes its own group alone, and the parameters of its channels.
        unsafe { builder.launch(blocks(elements / (channels / self.norm.groups * pixels))) }.w()?;
        Ok(CudaStorage::wrap_cuda_slice(y, device.clone()))
    }
}
