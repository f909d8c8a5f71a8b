//! One evaluation of the teacher, which is answer and step at once.

use candle_core::{DType, Tensor};
use understudy_models::rollout::{self, Row};
use understudy_models::{Result, sampler};

use super::guided;
use super::walked::{Walked, check_finite};
use crate::prompting::Prompting;
use crate::teacher::Teacher;
use crate::training_batch::TrainingBatch;

/// Moves the samples `x`, f32 `[B, C, H, W]` at `timesteps`, one step of the teacher's walk; a guided one after prompts, where there
/// are any.
///
/// # Errors
/// [`understudy_models::Error::Value`] for an answer that is not finite, with its seed; a table of prompts that cannot be read; whatever the device
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
