//! One step of a text-to-image teacher's walk: both its answers, which guide the walk, and what of them is learned.

use candle_core::Tensor;
use understudy_models::rollout::{self, Row};
use understudy_models::{Result, sampler};

use super::walked::{Walked, check_finite};
use crate::guidance::{Guidance, guided};
use crate::prompting::Prompting;
use crate::teacher::Teacher;
use crate::training_batch::TrainingBatch;

/// Moves the samples `x`, f32 `[B, C, H, W]` at `timesteps`, one guided step of the teacher's walk. Where guidance is kept
/// the training batch has `2·B` rows, those with the prompts first; where it is distilled it has `B`.
///
/// # Errors
/// As [`super::step::step`].
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
    let text = prompting.conditions(&seeds, device)?;
    let prompts = [&text.prompts, &prompting.empty(rows, device)?];
    let mut asked =
        TrainingBatch { answer: x.clone(), x, timesteps, labels: None, text: None, seeds };
    let both = asked.ask_both(network, prompts)?;
    asked.text = Some(text);
    check_finite(&both)?;

    let scale = |&seed: &u64| prompting.guidance().scale(seed);
    let scales: Vec<f64> = asked.seeds.iter().map(scale).collect();
    let [with, without] = [0, rows].map(|first| both.answer.narrow(0, first, rows));
    let answer = guided(&with?, &without?, &scales)?;
    // Neither DDPM nor DDIM remembers anything.
    let memory = sampler::empty_memory(&asked.x)?;
    let next = rollout::advance(geometry, &asked.x, &memory, &answer, moves)?.x;
    let training_batch = match prompting.guidance() {
        Guidance::Keep { .. } => both,
        Guidance::Distil { .. } => TrainingBatch { answer, ..asked },
    };
    Ok(Walked { training_batch, next })
}
