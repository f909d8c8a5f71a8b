//! DKDM's objective (Xiang et al., CVPR 2025, eq. 12–14): the teacher's noise, and its variance.

use candle_core::{Result, Tensor};
use understudy_models::Error;
use understudy_models::schedule::{Class, PredictionType, ScheduleConfig, VarianceType};

use super::Losses;
use super::parametrisation::{Linear, apply, column, to_eps, to_x0};
use crate::training_batch::TrainingBatch;

/// `L = L_simple + λ·L_vlb`, both means over elements and batch.
///
/// - `L_simple = mean w_t·(eps_T − eps_S)²`, of the teacher's raw answer, not bounded. Networks that predict
///   something else are compared in eps; [`to_eps`] says what that weighs. `w_t` is 1 unless
///   [`Dkdm::weighted`] says otherwise.
/// - `L_vlb = mean KL(p_T(x_{t−1}|x_t) ‖ p_S(x_{t−1}|x_t))` in bits per dimension, where both learn their
///   variance. It trains only Σ_S: the student's mean is held constant (Nichol & Dhariwal 2021, §3.1).
///   `log Σ = v·log β_t + (1 − v)·log β̃_t` with `v = (r + 1)/2` (eq. 15 there); β̃_0 = 0 is replaced by β̃_1. The
///   teacher's mean comes from x0 clamped to [−1, 1], the student's from x0 as it is. At t = 0 it is the
///   same divergence, no likelihood.
#[derive(Debug, Clone)]
pub struct Dkdm {
    teacher: PredictionType,
    student: PredictionType,
    /// λ; nothing where the networks tell no variance.
    variance_weight: Option<f64>,
    weighting: Weighting,
    alpha_bar: Vec<f64>,
    posterior: Vec<Posterior>,
}

/// How much an error in eps counts at each time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Weighting {
    /// The same at all times, as in the paper.
    #[default]
    Uniform,
    /// As if it were one in v, `1/ᾱ_t` (Salimans & Ho 2022, §4: SNR + 1 in x0), at most [`MOST_WEIGHT`]:
    /// where little signal is left, a small error in eps is a large one in x0, and decides what the image
    /// will be.
    Velocity,
}

/// The weight's limit. Beyond, where ᾱ_t is below 0.01, the teacher's own error is what would be learned.
pub const MOST_WEIGHT: f64 = 100.0;

impl Weighting {
    fn at(self, alpha_bar: f64) -> f64 {
        match self {
            Self::Uniform => 1.0,
            Self::Velocity => alpha_bar.recip().min(MOST_WEIGHT),
        }
    }
}

/// q(x_{t−1} | x_t, x0) (Ho et al. 2020, eq. 7), and the range of its learned variance.
#[derive(Debug, Clone, Copy)]
struct Posterior {
    from_x0: f64,
    from_x: f64,
    min_log: f64,
    max_log: f64,
}

impl Dkdm {
    /// The objective for a teacher and a student on one noise schedule. `learned_variance` says whether
    /// both answer with twice their input's channels; λ is then 0.001·T, as in the paper's code.
    ///
    /// # Errors
    /// [`Error::Value`] for betas that make no usable schedule, and for a variance that is
    /// learned otherwise than within the range of β̃_t and β_t.
    pub fn new(
        schedule: &ScheduleConfig,
        teacher: PredictionType,
        student: PredictionType,
        learned_variance: bool,
    ) -> understudy_models::Result<Self> {
        let schedule = schedule.schedule(Class::Ddpm)?;
        if learned_variance && schedule.variance_type != VarianceType::LearnedRange {
            return Err(Error::value(
                format!("{}: variance_type", schedule.file),
                schedule.variance_type.name(),
                "a network that tells a variance is distilled as learned_range",
            ));
        }
        let weight = 0.001 * schedule.train_timesteps() as f64;
        Ok(Self {
            teacher,
            student,
            variance_weight: learned_variance.then_some(weight),
            weighting: Weighting::Uniform,
            posterior: posterior(&schedule.betas, &schedule.alpha_bar),
            alpha_bar: schedule.alpha_bar,
        })
    }

    /// The same, with errors weighted so.
    pub fn weighted(self, weighting: Weighting) -> Self {
        Self { weighting, ..self }
    }

    /// The losses of a student's raw answer, of the shape of the teacher's.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn losses(&self, training_batch: &TrainingBatch, student: &Tensor) -> Result<Losses> {
        let channels = training_batch.x.dim(1)?;
        let target = training_batch.answer.narrow(1, 0, channels)?;
        let answer = student.narrow(1, 0, channels)?;
        let to_eps =
            |prediction| self.rows(training_batch, |alpha_bar| to_eps(prediction, alpha_bar));
        let eps_t = apply(&to_eps(self.teacher), &training_batch.x, &target)?;
        let eps_s = apply(&to_eps(self.student), &training_batch.x, &answer)?;
        let squares = (eps_t - eps_s)?.sqr()?;
        let simple = squares.mean_all()?;
        let weighted = match self.weighting {
            Weighting::Uniform => simple.clone(),
            weighting => {
                let weights =
                    training_batch.timesteps.iter().map(|&t| weighting.at(self.alpha_bar[t]));
                squares.broadcast_mul(&column(weights, training_batch.x.device())?)?.mean_all()?
            }
        };
        let Some(weight) = self.variance_weight else {
            return Ok(Losses { total: weighted, simple, vlb: None });
        };
        let vlb = self.divergence(training_batch, &target, student)?;
        Ok(Losses { total: (weighted + (&vlb * weight)?)?, simple, vlb: Some(vlb) })
    }

    /// Mean bits per dimension of `KL(p_T ‖ p_S)`, with a gradient to the student's variance alone.
    fn divergence(
        &self,
        training_batch: &TrainingBatch,
        target: &Tensor,
        student: &Tensor,
    ) -> Result<Tensor> {
        let channels = training_batch.x.dim(1)?;
        let x0 = |prediction, answer: &Tensor| {
            let rows = self.rows(training_batch, |alpha_bar| to_x0(prediction, alpha_bar));
            apply(&rows, &training_batch.x, answer)
        };
        let answer = student.narrow(1, 0, channels)?.detach();
        let mean_t = self.mean(training_batch, &x0(self.teacher, target)?.clamp(-1f32, 1f32)?)?;
        let mean_s = self.mean(training_batch, &x0(self.student, &answer)?)?;
        let log_t = self
            .log_variance(training_batch, &training_batch.answer.narrow(1, channels, channels)?)?;
        let log_s = self.log_variance(training_batch, &student.narrow(1, channels, channels)?)?;

        // KL of two normal distributions, in nats: ½(−1 + log Σ_S − log Σ_T + Σ_T/Σ_S + (μ_T − μ_S)²/Σ_S).
        let difference = (&log_s - &log_t)?;
        let distance = ((mean_t - mean_s)?.sqr()? * log_s.neg()?.exp()?)?;
        let nats = (((&difference - 1.0)? + difference.neg()?.exp()?)? + distance)?;
        nats.mean_all()? * (0.5 / std::f64::consts::LN_2)
    }

    /// μ(x_t, x0) of the posterior.
    fn mean(&self, training_batch: &TrainingBatch, x0: &Tensor) -> Result<Tensor> {
        let rows = |part: fn(&Posterior) -> f64| {
            let rows = training_batch.timesteps.iter().map(|&t| part(&self.posterior[t]));
            column(rows, training_batch.x.device())
        };
        x0.broadcast_mul(&rows(|posterior| posterior.from_x0)?)?
            + training_batch.x.broadcast_mul(&rows(|posterior| posterior.from_x)?)?
    }

    /// log Σ of the variance half `r`.
    fn log_variance(&self, training_batch: &TrainingBatch, r: &Tensor) -> Result<Tensor> {
        let rows = |part: fn(&Posterior) -> f64| {
            let rows = training_batch.timesteps.iter().map(|&t| part(&self.posterior[t]));
            column(rows, training_batch.x.device())
        };
        let middle = rows(|posterior| (posterior.max_log + posterior.min_log) / 2.0)?;
        let half = rows(|posterior| (posterior.max_log - posterior.min_log) / 2.0)?;
        r.broadcast_mul(&half)?.broadcast_add(&middle)
    }

    fn rows(&self, training_batch: &TrainingBatch, linear: impl Fn(f64) -> Linear) -> Vec<Linear> {
        training_batch.timesteps.iter().map(|&t| linear(self.alpha_bar[t])).collect()
    }
}

fn posterior(betas: &[f64], alpha_bar: &[f64]) -> Vec<Posterior> {
    let variance = |t: usize| {
        let before = if t == 0 { 1.0 } else { alpha_bar[t - 1] };
        betas[t] * (1.0 - before) / (1.0 - alpha_bar[t])
    };
    let row = |t: usize| {
        let before = if t == 0 { 1.0 } else { alpha_bar[t - 1] };
        // A schedule of one step has no β̃_1.
        let clipped = variance(t.max(1).min(betas.len() - 1)).max(1e-20);
        Posterior {
            from_x0: betas[t] * before.sqrt() / (1.0 - alpha_bar[t]),
            from_x: (1.0 - before) * (1.0 - betas[t]).sqrt() / (1.0 - alpha_bar[t]),
            min_log: clipped.ln(),
            max_log: betas[t].ln(),
        }
    };
    (0..betas.len()).map(row).collect()
}
