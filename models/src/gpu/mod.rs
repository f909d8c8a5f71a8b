//! What kernels of our own for NVIDIA's GPUs have in common. Each set of them is a file of CUDA, compiled when the
//! first is needed.

use std::sync::OnceLock;

use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, LaunchConfig};
use candle_core::cuda_backend::cudarc::nvrtc::compile_ptx;
use candle_core::{DType, Layout, Result, Storage, bail};

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
    ptx: OnceLock<std::result::Result<String, String>>,
}

impl Kernels {
    pub(crate) const fn new(name: &'static str, source: &'static str) -> Self {
        Self { name, source, ptx: OnceLock::new() }
    }

    /// What the driver takes; NVIDIA's compiler makes it once per process.
    ///
    /// # Errors
    /// Whatever the compiler says.
    pub(crate) fn ptx(&self) -> Result<&str> {
        let compile = || {
            let compiled = compile_ptx(self.source);
            compiled.map(|ptx| ptx.to_src()).map_err(|error| error.to_string())
        };
        match self.ptx.get_or_init(compile) {
            Ok(ptx) => Ok(ptx),
            Err(error) => bail!("the kernels of {} do not compile: {error}", self.name),
        }
    }
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
