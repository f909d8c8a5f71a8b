//! Many tensors as one vector, and back.

use candle_core::{Result, Tensor, Var, bail};

/// The numbers of f32 tensors, one tensor after the other: f32 `[N]`. On a GPU this is one operation, not one for each
/// tensor.
///
/// # Errors
/// No tensors, tensors of other types or of several devices, and whatever the device says.
pub fn join(tensors: &[Tensor]) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if tensors.first().is_some_and(|tensor| tensor.device().is_cuda()) {
        let tensors: Result<Vec<Tensor>> = tensors.iter().map(Tensor::contiguous).collect();
        return crate::gpu::join(&tensors?);
    }
    let flat: Result<Vec<Tensor>> = tensors.iter().map(Tensor::flatten_all).collect();
    Tensor::cat(&flat?, 0)
}

/// Sets variables to what [`join`] would have read from them: `flat` is f32 `[N]`.
///
/// # Errors
/// As [`join`], and a vector of another length.
pub fn part(flat: &Tensor, variables: &[&Var]) -> Result<()> {
    #[cfg(feature = "cuda")]
    if flat.device().is_cuda() {
        let tensors: Vec<Tensor> = variables.iter().map(|var| var.as_detached_tensor()).collect();
        return crate::gpu::part(&flat.contiguous()?, &tensors);
    }
    let total: usize = variables.iter().map(|variable| variable.elem_count()).sum();
    if flat.dims() != [total] {
        bail!("{:?} is not [{total}], the numbers of {} variables", flat.dims(), variables.len())
    }
    let mut start = 0;
    for variable in variables {
        let length = variable.elem_count();
        variable.set(&flat.narrow(0, start, length)?.reshape(variable.dims())?)?;
        start += length;
    }
    Ok(())
}
