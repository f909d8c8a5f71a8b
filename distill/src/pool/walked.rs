//! What an evaluation of the teacher was for the samples that it moved.

use candle_core::Tensor;
use understudy_models::rollout::FiniteCheck;
use understudy_models::{Error, Result};

use crate::training_batch::TrainingBatch;

/// What samples went through in one evaluation.
pub(crate) struct Walked {
    /// Where they were, and the teacher's raw answer.
    pub(crate) training_batch: TrainingBatch,
    /// Where they are now, f32 `[B, C, H, W]`.
    pub(crate) next: Tensor,
}

/// Refuses an answer that is not made of numbers.
///
/// # Errors
/// [`Error::Value`] naming the seed and the timestep.
pub(super) fn check_finite(training_batch: &TrainingBatch) -> Result<()> {
    match FiniteCheck::new(&training_batch.answer)?.first_bad()? {
        None => Ok(()),
        Some(row) => Err(Error::value(
            "teacher's answer",
            format!(
                "not finite for the trajectory with seed {} at timestep {}",
                training_batch.seeds[row], training_batch.timesteps[row]
            ),
            "check its weights and schedule: `understudy sample` shows whether it draws at all",
        )),
    }
}
