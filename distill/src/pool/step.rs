//! One evaluation of the teacher, which is answer and step at once.

use candle_core::{DType, Tensor};
use understudy_models::rollout::{self, FiniteCheck, Row};
use understudy_models::{Error, Result, sampler};

use super::guided;
use crate::prompting::Prompting;
use crate::teacher::Teacher;
use crate::training_batch::TrainingBatch;

/// What samples went through in one evaluation.
pub(crate) struct Walked {
    /// Where they were, and the teacher's raw answer.
    pub(crate) training_batch: TrainingBatch,
    /// Where they are now, f32 `[B, C, H, W]`.
    pub(crate) next: Tensor,
}

/// Moves the samples `x`, f32 `[B, C, H, W]` at `timesteps`, one step of the teacher's walk; a guided one after prompts, where there
/// are any.
///
/// # Errors
/// [`Error::Value`] for an answer that is not finite, with its seed; a table of prompts that cannot be read; whatever the device
/// says.
pub(crate) fn step(
    teacher: &Teacher,
    prompting: Option<&Prompting>,
    x: Tensor,
    timesteps: Vec<usize>,
    moves: &[Row],
) -> Result<Walked> {
    match prompting {
        None => untold(teacher, x, timesteps, moves),
        Some(prompting) => guided::step(teacher, prompting, x, timesteps, moves),
    }
}

fn untold(teacher: &Teacher, x: Tensor, timesteps: Vec<usize>, moves: &[Row]) -> Result<Walked> {
    let (network, geometry) = (teacher.network(), teacher.geometry());
    let seeds: Vec<u64> = moves.iter().map(|row| row.seed).collect();
    let labels: Option<Vec<u32>> = seeds.iter().map(|&seed| teacher.label(seed)).collect();
    let mut training_batch =
        TrainingBatch { answer: x.clone(), x, timesteps, labels, text: None, seeds };
    training_batch.answer = training_batch.ask(network)?.to_dtype(DType::F32)?;
    check_finite(&training_batch)?;

    // Neither DDPM nor DDIM remembers anything.
    let x = &training_batch.x;
    let memory = sampler::empty_memory(x)?;
    let advanced = rollout::advance(geometry, x, &memory, &training_batch.answer, moves)?;
    Ok(Walked { training_batch, next: advanced.x })
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
