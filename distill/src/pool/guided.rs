//! One step of a text-to-image teacher's walk: both its answers, which guide the walk, and what of them is learned.

use candle_core::{DType, Tensor};
use understudy_models::rollout::{self, Row};
use understudy_models::{Result, sampler};

use super::step::{Walked, check_finite};
use crate::guidance::{Guidance, guided};
use crate::prompting::Prompting;
use crate::teacher::Teacher;
use crate::training_batch::{TextConditions, TrainingBatch};

/// Moves the samples `x`, f32 `[B, C, H, W]` at `timesteps`, one guided step of the teacher's walk. Where guidance is kept
/// the training batch has `2·B` rows, those with the prompts first; where it is distilled it has `B`.
///
/// # Errors
/// As [`super::step::step`]; a table of prompts that cannot be read.
pub(super) fn step(
    teacher: &Teacher,
    prompting: &Prompting,
    x: Tensor,
    timesteps: Vec<usize>,
    moves: &[Row],
) -> Result<Walked> {
    let (network, geometry) = (teacher.network(), teacher.geometry());
    let (rows, device) = (moves.len(), network.device());
    let seeds: Vec<u64> = moves.iter().map(|row| row.seed).collect();
    let prompts = prompting.of_trajectories(&seeds, device)?;
    let empty = prompting.empty(rows, device)?;
    let twice = Tensor::cat(&[&x, &x], 0)?;
    let mut both = TrainingBatch {
        answer: twice.clone(),
        x: twice,
        timesteps: [&timesteps[..], &timesteps].concat(),
        labels: None,
        text: Some(TextConditions {
            prompts: Tensor::cat(&[&prompts, &empty], 0)?,
            guidance: None,
        }),
        seeds: [&seeds[..], &seeds].concat(),
    };
    both.answer = both.ask(network)?.to_dtype(DType::F32)?;
    check_finite(&both)?;

    let scales: Vec<f64> = seeds.iter().map(|&seed| prompting.guidance().scale(seed)).collect();
    let [with, without] = [0, rows].map(|first| both.answer.narrow(0, first, rows));
    let answer = guided(&with?, &without?, &scales)?;
    // Neither DDPM nor DDIM remembers anything.
    let memory = sampler::empty_memory(&x)?;
    let next = rollout::advance(geometry, &x, &memory, &answer, moves)?.x;
    let training_batch = match prompting.guidance() {
        Guidance::Keep { .. } => both,
        Guidance::Distil { .. } => {
            let text = Some(prompting.conditions(&seeds, device)?);
            TrainingBatch { x, timesteps, labels: None, text, answer, seeds }
        }
    };
    Ok(Walked { training_batch, next })
}
