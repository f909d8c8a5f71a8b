//! Looking at a tensor in host memory without copying it.

use candle_core::{CpuStorage, Result, Storage, Tensor, bail};

/// Hands the values of a contiguous f32 tensor on the CPU to `look`.
///
/// # Errors
/// Another element type, device or layout.
pub(crate) fn with_f32<T>(tensor: &Tensor, look: impl FnOnce(&[f32]) -> T) -> Result<T> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(CpuStorage::F32(values)) = &*storage else {
        bail!("expected f32 in host memory, found {:?} {:?}", tensor.device(), tensor.dtype())
    };
    match layout.contiguous_offsets() {
        Some((from, to)) => Ok(look(&values[from..to])),
        None => bail!("expected a contiguous tensor"),
    }
}
