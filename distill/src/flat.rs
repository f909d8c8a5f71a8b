//! All parameters as one vector on their device, so that what is done to each of them is one operation
//! there, not one per parameter: a GPU takes longer to begin an operation than to do it to a few thousand
//! numbers.

use candle_core::{Result, Tensor};
use understudy_models::lists;

use crate::parameters::Parameters;

/// The parameters one after the other, in their order: f32 `[N]`.
///
/// # Errors
/// Whatever the device says.
pub(crate) fn joined(parameters: &Parameters) -> Result<Tensor> {
    let weights: Vec<Tensor> = parameters.iter().map(|(_, var)| var.as_detached_tensor()).collect();
    lists::join(&weights)
}

/// What of `flat` belongs to each parameter, in its shape.
///
/// # Errors
/// Whatever the device says.
pub(crate) fn parts(flat: &Tensor, parameters: &Parameters) -> Result<Vec<Tensor>> {
    let mut begin = 0;
    let mut part = |length: usize| {
        let part = flat.narrow(0, begin, length);
        begin += length;
        part
    };
    parameters.iter().map(|(_, var)| part(var.elem_count())?.reshape(var.dims())).collect()
}
