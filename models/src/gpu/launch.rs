//! Kernels of our own, asked to work on tensors. Each set of them is a file of CUDA, compiled when the first is needed.

use std::sync::OnceLock;

use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaStream, CudaView, DevicePtr, LaunchConfig, PushKernelArg,
};
use candle_core::cuda_backend::cudarc::nvrtc::{CompileOptions, compile_ptx_with_opts};
use candle_core::cuda_backend::{CudaDType, CudaStorageSlice, WrapErr};
use candle_core::{CudaStorage, DType, Layout, Result, Storage, Tensor, bail};

use super::context::Context;

/// Threads of a block, as the kernels have them.
pub(crate) const THREADS: usize = 256;

/// Blocks at most of a kernel that goes over any number of values; each of their threads takes several then.
const MOST_BLOCKS: usize = 4096;

/// Whether there are kernels for numbers of this type.
pub(crate) fn knows(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::BF16 | DType::F16)
}

/// A set of kernels.
pub(crate) struct Kernels {
    /// What a device keeps them under.
    pub(crate) name: &'static str,
    source: &'static str,
    arch: Option<&'static str>,
    ptx: OnceLock<std::result::Result<String, String>>,
}

impl Kernels {
    /// `arch` is the generation of GPUs whose instructions it has, where they are not everybody's.
    pub(crate) const fn new(
        name: &'static str,
        source: &'static str,
        arch: Option<&'static str>,
    ) -> Self {
        Self { name, source, arch, ptx: OnceLock::new() }
    }

    /// What the driver takes; NVIDIA's compiler makes it once per process.
    ///
    /// # Errors
    /// Whatever the compiler says.
    pub(crate) fn ptx(&self) -> Result<&str> {
        let compile = || {
            let options = CompileOptions { arch: self.arch, ..CompileOptions::default() };
            let compiled = compile_ptx_with_opts(self.source, options);
            compiled.map(|ptx| ptx.to_src()).map_err(|error| error.to_string())
        };
        match self.ptx.get_or_init(compile) {
            Ok(ptx) => Ok(ptx),
            Err(error) => bail!("the kernels of {} do not compile: {error}", self.name),
        }
    }

    /// Runs one, `name` for numbers of its type.
    ///
    /// # Safety
    /// The arguments are the kernel's, in order and type, and the tensors as large as it takes them to be.
    ///
    /// # Errors
    /// Whatever the driver says.
    pub(super) unsafe fn launch(
        &self,
        context: &Context,
        name: &str,
        config: LaunchConfig,
        arguments: &[Argument],
    ) -> Result<()> {
        let name = format!("{name}_{}", context.dtype.as_str());
        let function = context.cuda.get_or_load_custom_func(&name, self.name, self.ptx()?)?;
        let mut builder = function.builder();
        for argument in arguments {
            match argument {
                Argument::Pointer(pointer) => builder.arg(pointer),
                Argument::Int(int) => builder.arg(int),
                Argument::Float(float) => builder.arg(float),
            };
        }
        // SAFETY: the caller's promise.
        unsafe { builder.launch(config) }.w()?;
        Ok(())
    }
}

/// What a kernel is given. A tensor may go when the kernel has been asked for: its memory is given back after it.
pub(super) enum Argument {
    Pointer(u64),
    Int(i32),
    Float(f32),
}

impl Argument {
    pub(super) const NONE: Self = Self::Pointer(0);

    /// Where a contiguous tensor's numbers begin, or those from `start` on.
    ///
    /// # Errors
    /// One that is not contiguous, or not on a GPU.
    pub(super) fn from(tensor: &Tensor, start: usize) -> Result<Self> {
        pointer(tensor, start).map(Self::Pointer)
    }

    /// The same, or nothing.
    pub(super) fn maybe(tensor: Option<&Tensor>) -> Result<Self> {
        tensor.map_or(Ok(Self::NONE), |tensor| Self::from(tensor, 0))
    }

    /// # Errors
    /// More than a kernel counts to.
    pub(super) fn int(value: usize) -> Result<Self> {
        match i32::try_from(value) {
            Ok(value) => Ok(Self::Int(value)),
            Err(_) => bail!("a kernel is to count to {value}: it counts to 2^31 - 1"),
        }
    }
}

/// The address of number `start` of a contiguous tensor on a GPU.
pub(super) fn pointer(tensor: &Tensor, start: usize) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cuda(storage) => place(storage, layout, start),
        _ => bail!("a kernel's operand is not on the GPU"),
    }
}

/// The same of what a tensor holds.
pub(super) fn place(storage: &CudaStorage, layout: &Layout, start: usize) -> Result<u64> {
    let Some((first, end)) = layout.contiguous_offsets() else {
        bail!("a kernel's operand is {layout:?}, not contiguous")
    };
    if first + start >= end {
        bail!("a kernel's operand {layout:?} has no number {start}")
    }
    let stream = storage.device.cuda_stream();
    let (begin, bytes) = match &storage.slice {
        CudaStorageSlice::F32(slice) => (address(slice, &stream), 4),
        CudaStorageSlice::BF16(slice) => (address(slice, &stream), 2),
        CudaStorageSlice::F16(slice) => (address(slice, &stream), 2),
        CudaStorageSlice::U32(slice) => (address(slice, &stream), 4),
        _ => bail!("there are kernels for f32, bf16, f16 and u32"),
    };
    Ok(begin + ((first + start) * bytes) as u64)
}

pub(super) fn address<T>(slice: &CudaSlice<T>, stream: &CudaStream) -> u64 {
    slice.device_ptr(stream).0
}

/// So many blocks of [`THREADS`] threads.
pub(crate) fn blocks(count: usize) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (count as u32, 1, 1),
        block_dim: (THREADS as u32, 1, 1),
        shared_mem_bytes: 0,
    }
}

/// Blocks whose threads go over so many values.
pub(crate) fn over(values: usize) -> LaunchConfig {
    blocks(values.div_ceil(THREADS).clamp(1, MOST_BLOCKS))
}

/// The numbers of a contiguous tensor.
///
/// # Errors
/// One that is not contiguous.
pub(crate) fn view<'a, T>(slice: &'a CudaSlice<T>, layout: &Layout) -> Result<CudaView<'a, T>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(slice.slice(start..end)),
        None => bail!("a kernel's operand is {layout:?}, not contiguous"),
    }
}

/// The numbers of a tensor on a GPU.
///
/// # Errors
/// One that is elsewhere, or of another type.
pub(crate) fn numbers<T: CudaDType>(storage: &Storage) -> Result<&CudaSlice<T>> {
    match storage {
        Storage::Cuda(storage) => storage.as_cuda_slice(),
        _ => bail!("a kernel's operand is not on the GPU"),
    }
}
