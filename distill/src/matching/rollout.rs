//! A student's samples by its own steps, and noised again.

use std::ops::Range;

use candle_core::{DType, Tensor};
use understudy_models::rollout::{self, Row};
use understudy_models::schedule::PredictionType;
use understudy_models::{Denoiser, Result, sampler};

use super::{Matching, Renoised};
use crate::objective::{Linear, apply, to_eps, to_x0};
use crate::random::{self, Purpose};
use crate::training_batch::{TextConditions, TrainingBatch};

/// Samples at the beginning of one of the student's steps, without a gradient.
pub(super) struct Begun {
    batch: TrainingBatch,
    /// Which step, of each row.
    segments: Vec<usize>,
    rows: Range<usize>,
}

/// The end of that step.
pub(super) struct End {
    /// The student's estimate of the clean image, f32 `[B, C, H, W]`, with a gradient.
    pub(super) x0: Tensor,
    /// Where the step ends, f32 `[B, C, H, W]`, with a gradient.
    x: Tensor,
}

/// How many samples are drawn together to be looked at.
const TOGETHER: usize = 64;

/// The largest signal-to-noise ratio that an error is weighted by (Hang et al. 2023, arXiv 2303.09556).
const MOST_SNR: f64 = 5.0;

impl Matching<'_> {
    /// Walks new samples to the beginning of a step each, all steps alike often.
    pub(super) fn begin(
        &self,
        student: &dyn Denoiser,
        step: u64,
        rows: Range<usize>,
    ) -> Result<Begun> {
        let draw = |purpose, row: usize| random::number(self.seed, purpose, step, row as u64);
        let seeds: Vec<u64> = rows.clone().map(|row| draw(Purpose::Generated, row) >> 11).collect();
        let evaluations = self.levels.evaluations();
        let segment =
            |row: usize| random::below(self.seed, Purpose::Segment, step, row as u64, evaluations);
        // Those that go on are the first ones.
        let mut segments: Vec<usize> = rows.clone().map(segment).collect();
        segments.sort_unstable_by(|a, b| b.cmp(a));
        let (labels, text) = (self.labels(&seeds), self.text(&seeds, step)?);
        let x = self.walk(student, &seeds, (labels.as_deref(), text.as_ref()), &segments)?;
        let timesteps = segments.iter().map(|&segment| self.levels.start(segment)).collect();
        let batch = TrainingBatch { answer: x.clone(), x, timesteps, labels, text, seeds };
        Ok(Begun { batch, segments, rows })
    }

    /// The student's images or latents from these seeds, once prompts are encoded, f32 `[B, C, H, W]`.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn images(&self, student: &dyn Denoiser, seeds: &[u64]) -> Result<Tensor> {
        let mut images = Vec::new();
        for seeds in seeds.chunks(TOGETHER) {
            let all = vec![self.levels.evaluations(); seeds.len()];
            let (labels, text) = (self.labels(seeds), self.text(seeds, 1)?);
            images.push(self.walk(student, seeds, (labels.as_deref(), text.as_ref()), &all)?);
        }
        Ok(Tensor::cat(&images, 0)?)
    }

    /// The class of each seed, as the teacher's walks have it.
    fn labels(&self, seeds: &[u64]) -> Option<Vec<u32>> {
        seeds.iter().map(|&seed| self.teacher.label(seed)).collect()
    }

    /// Where `student` comes to from seeds in so many steps each, the most first; without a gradient.
    fn walk(
        &self,
        student: &dyn Denoiser,
        seeds: &[u64],
        (labels, text): (Option<&[u32]>, Option<&TextConditions>),
        segments: &[usize],
    ) -> Result<Tensor> {
        let geometry = student.geometry();
        let mut x = rollout::start(geometry, seeds, student.device())?;
        let mut arrived = Vec::new();
        for position in 0..=self.levels.evaluations() {
            let going = segments.iter().filter(|segment| **segment > position).count();
            let here = x.dim(0)? - going;
            if here > 0 {
                arrived.push(x.narrow(0, going, here)?);
            }
            if going == 0 {
                break;
            }
            let asked = TrainingBatch {
                x: x.narrow(0, 0, going)?.contiguous()?,
                answer: x.clone(),
                timesteps: vec![self.levels.start(position); going],
                labels: labels.map(|labels| labels[..going].to_vec()),
                text: text.map(|text| text.part(0..going)).transpose()?,
                seeds: seeds[..going].to_vec(),
            };
            let answer = asked.ask(student)?.detach().to_dtype(DType::F32)?;
            let next = |&seed: &u64| Row { seed, position, step: self.levels.steps[position].step };
            let moves: Vec<Row> = asked.seeds.iter().map(next).collect();
            let memory = sampler::empty_memory(&asked.x)?;
            x = rollout::advance(geometry, &asked.x, &memory, &answer, &moves)?.x;
        }
        arrived.reverse();
        Ok(Tensor::cat(&arrived, 0)?)
    }

    /// The student's step from there.
    pub(super) fn last_step(&self, student: &dyn Denoiser, begun: &Begun) -> Result<End> {
        let Begun { batch, segments, .. } = begun;
        let channels = batch.x.dim(1)?;
        let v = batch.ask(student)?.to_dtype(DType::F32)?.narrow(1, 0, channels)?;
        let levels = &self.levels;
        let of_rows = |linear: &dyn Fn(f64) -> Linear| -> Vec<Linear> {
            batch.timesteps.iter().map(|&t| linear(levels.alpha_bar(t))).collect()
        };
        let x0 = apply(&of_rows(&|level| to_x0(PredictionType::Velocity, level)), &batch.x, &v)?;
        let eps = apply(&of_rows(&|level| to_eps(PredictionType::Velocity, level)), &batch.x, &v)?;
        let ends: Vec<Linear> = segments
            .iter()
            .map(|&segment| {
                let alpha_bar = levels.end_alpha_bar(segment);
                Linear { x: alpha_bar.sqrt(), model: (1.0 - alpha_bar).sqrt() }
            })
            .collect();
        Ok(End { x: apply(&ends, &x0, &eps)?, x0 })
    }

    /// The ends of steps noised again, x_τ with its gradient, and what of them the critic is to learn.
    ///
    /// x_τ = α/α'·x + σ·ε, with σ² = 1 − ᾱ/ᾱ' the noise that is added to x, at a level ᾱ'. The score of what x_τ is drawn
    /// from is the mean of −ε/σ (denoising score matching, Vincent 2011), which is what the critic learns: in the clean image it is
    /// `x0 = (x_τ − s²/σ·ε) / α`. That is the student's own estimate where a step ends in an image. Between steps it is not,
    /// since what noise x has is not independent of the estimate. The error is weighted by the signal-to-noise ratio,
    /// at most 5, and by σ²/s², so that the little noise of a short way does not make all of the loss.
    pub(super) fn renoise(&self, end: &End, step: u64, begun: &Begun) -> Result<Renoised> {
        let Begun { batch, segments, rows } = begun;
        let timestep = |(row, &segment): (usize, &usize)| {
            let range = self.levels.renoised(segment);
            let count = range.end() - range.start() + 1;
            range.start() + random::below(self.seed, Purpose::RenoisedTo, step, row as u64, count)
        };
        let timesteps: Vec<usize> = rows.clone().zip(segments).map(timestep).collect();
        let seed = |row| random::number(self.seed, Purpose::Renoised, step, row as u64);
        let seeds: Vec<u64> = rows.clone().map(seed).collect();
        let geometry = self.teacher.geometry();
        let noise = rollout::start(geometry, &seeds, end.x.device())?;

        let mut added = Vec::with_capacity(seeds.len());
        let mut learned = Vec::with_capacity(seeds.len());
        let mut weights = Vec::with_capacity(seeds.len());
        for (&t, &segment) in timesteps.iter().zip(segments) {
            let alpha_bar = self.levels.alpha_bar(t);
            let share = alpha_bar / self.levels.end_alpha_bar(segment);
            let (variance, sigma) = (1.0 - alpha_bar, (1.0 - share).sqrt());
            added.push(Linear { x: share.sqrt(), model: sigma });
            let alpha = alpha_bar.sqrt();
            learned.push(Linear { x: 1.0 / alpha, model: -variance / sigma / alpha });
            weights.push((alpha_bar / variance).min(MOST_SNR) * sigma * sigma / variance);
        }
        let x = apply(&added, &end.x, &noise)?;
        let answer = apply(&learned, &x, &noise)?.detach();
        let (labels, text) = (batch.labels.clone(), batch.text.clone());
        let batch = TrainingBatch { x, timesteps, labels, text, answer, seeds };
        Ok(Renoised { batch, weights })
    }
}
