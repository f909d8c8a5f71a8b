//! A student that begins with the blocks of its teacher that it has, too.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use understudy_models::{Error, NetworkConfig, Result};

use crate::teacher::Teacher;

/// Weights for `student`, which has fewer blocks than its teacher, out of the teacher's. What it does with a guidance scale
/// that its teacher does not take begins as nothing.
///
/// # Errors
/// [`Error::Value`] naming a weight that the teacher has not, or has of another shape; as [`Teacher::weights`].
pub fn weights(teacher: &Teacher, student: &NetworkConfig) -> Result<BTreeMap<String, Tensor>> {
    let theirs = teacher.weights()?;
    let plain = student.with_guidance(teacher.geometry().guidance);
    let plain = plain.as_ref().unwrap_or(student);
    let common = plain.weight_shapes();
    let take = |(name, shape): (String, Vec<usize>)| {
        if !common.contains_key(&name) {
            let nothing = Tensor::zeros(shape, DType::F32, &Device::Cpu)?;
            return Ok((name, nothing));
        }
        let larger = teacher.config.larger_name(plain, &name);
        match larger.as_ref().and_then(|larger| theirs.get(larger)) {
            Some(weight) if weight.dims() == shape => Ok((name, weight.clone())),
            _ => Err(Error::value(
                "init",
                "blocks",
                format!(
                    "the teacher has no `{}` of the student's shape {shape:?}; take --student base, small or tiny, or \
                     begin from random weights (--init random)",
                    larger.unwrap_or(name)
                ),
            )),
        }
    };
    student.weight_shapes().into_iter().map(take).collect()
}
