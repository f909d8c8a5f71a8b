//! The kernel on a GPU.

use std::sync::OnceLock;

use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaView, DeviceRepr, LaunchConfig, PushKernelArg,
};
use candle_core::cuda_backend::cudarc::nvrtc::compile_ptx;
use candle_core::cuda_backend::{CudaDType, CudaStorageSlice, WrapErr};
use candle_core::{CudaDevice, CudaStorage, Layout, Result, Storage, bail, builder_arg};

use super::Fused;

/// Threads of a block, as the kernel has them.
const THREADS: u32 = 256;

impl Fused<'_> {
    pub(super) fn launch(&self, x: &CudaStorage, layout: &Layout) -> Result<CudaStorage> {
        let device = &x.device;
        match &x.slice {
            CudaStorageSlice::F32(x) => self.over("group_norm_f32", x, layout, device),
            CudaStorageSlice::BF16(x) => self.over("group_norm_bf16", x, layout, device),
            CudaStorageSlice::F16(x) => self.over("group_norm_f16", x, layout, device),
            _ => bail!("group norm has kernels for f32, bf16 and f16"),
        }
    }

    fn over<T: CudaDType + DeviceRepr>(
        &self,
        name: &str,
        x: &CudaSlice<T>,
        layout: &Layout,
        device: &CudaDevice,
    ) -> Result<CudaStorage> {
        let (channels, pixels) = self.check(layout)?;
        let x = view(x, layout)?;
        let (weight, weight_layout) = self.norm.weight.storage_and_layout();
        let (bias, bias_layout) = self.norm.bias.storage_and_layout();
        let modulation = self.modulation.as_ref().map(|tensor| tensor.storage_and_layout());
        let weight = view(floats(&weight)?, weight_layout)?;
        let bias = view(floats(&bias)?, bias_layout)?;
        let modulation = match &modulation {
            Some((storage, layout)) => Some(view(floats(storage)?, layout)?),
            None => None,
        };
        let function = device.get_or_load_custom_func(name, "group_norm", ptx()?)?;
        let elements = layout.shape().elem_count();
        let blocks = elements / (channels / self.norm.groups * pixels);
        // SAFETY: the kernel below writes all of it before anything reads it.
        let y = unsafe { device.alloc::<T>(elements)? };
        let mut builder = function.builder();
        builder.arg(&x).arg(&y).arg(&weight).arg(&bias);
        match &modulation {
            Some(modulation) => builder.arg(modulation),
            None => builder.arg(&0_u64),
        };
        builder_arg!(builder, channels as i32, self.norm.groups as i32, pixels as i32);
        builder_arg!(builder, self.norm.eps as f32, i32::from(self.silu));
        let config = LaunchConfig {
            grid_dim: (blocks as u32, 1, 1),
            block_dim: (THREADS, 1, 1),
            shared_mem_bytes: 0,
        };
        // SAFETY: the arguments are the kernel's, in order and type; `check` has found the shapes to fit, so
        // that a block reads and writes its own group alone, and the parameters of its channels.
        unsafe { builder.launch(config) }.w()?;
        Ok(CudaStorage::wrap_cuda_slice(y, device.clone()))
    }
}

/// The kernels for the driver; NVIDIA's compiler makes them once per process.
fn ptx() -> Result<&'static str> {
    static PTX: OnceLock<std::result::Result<String, String>> = OnceLock::new();
    let compile = || {
        let compiled = compile_ptx(include_str!("kernel.cu"));
        compiled.map(|ptx| ptx.to_src()).map_err(|error| error.to_string())
    };
    match PTX.get_or_init(compile) {
        Ok(ptx) => Ok(ptx),
        Err(error) => bail!("group norm's kernel does not compile: {error}"),
    }
}

fn floats(storage: &Storage) -> Result<&CudaSlice<f32>> {
    match storage {
        Storage::Cuda(storage) => storage.as_cuda_slice(),
        _ => bail!("group norm's parameters are not on the GPU"),
    }
}

fn view<'a, T>(slice: &'a CudaSlice<T>, layout: &Layout) -> Result<CudaView<'a, T>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(slice.slice(start..end)),
        None => bail!("group norm's tensors must be contiguous"),
    }
}
