//! Arguments that every kind of training shares.

use std::{
    num::{NonZeroU32, NonZeroU64},
    path::Path,
};

use candle_core::DType;
use clap::ValueEnum;
use serde::Serialize;
use understudy_distill::{objective::Weighting, run_dir::RUN_DIR, train};

use crate::mlflow::{Place, Tracking};

/// Arguments of every kind of training.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Training")]
pub(super) struct TrainingArgs {
    /// Training steps [default: 20000; distill: the preset's].
    #[arg(long)]
    steps: Option<NonZeroU64>,
    /// Images per step [default: 64; distill: the preset's].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    batch: Option<u32>,
    /// Parts a batch is cut into, so that memory for one part is enough.
    #[arg(long, value_name = "PARTS", default_value_t = NonZeroU32::MIN)]
    accumulate: NonZeroU32,
    /// Learning rate of AdamW after the warm-up [default: 2e-4; distill: the preset's].
    #[arg(long)]
    learning_rate: Option<f64>,
    /// Steps over which the learning rate rises from 0 [default: 200; distill: the preset's].
    #[arg(long)]
    warmup_steps: Option<u64>,
    /// After the warm-up the learning rate stays (constant), or falls to 0 over --steps (cosine), which gives
    /// cleaner images for the same steps [default: cosine; distill: the preset's].
    #[arg(long, value_enum)]
    learning_rate_schedule: Option<LearningRateSchedule>,
    /// How errors in the noise are weighted: alike at all timesteps (uniform), or more at noisier ones (velocity).
    #[arg(long, value_enum, default_value_t = WeightingName::Uniform, hide = true)]
    weighting: WeightingName,
    /// Decoupled weight decay.
    #[arg(long, default_value_t = 0.0)]
    weight_decay: f64,
    /// Largest norm of the gradients; larger ones are scaled down to it.
    #[arg(long, default_value_t = 1.0)]
    clip_norm: f64,
    /// Decay of the running average of the weights, which becomes the model.
    #[arg(long, default_value_t = 0.999)]
    ema: f64,
    /// Seed of the run: weights, noise, order.
    #[arg(long, default_value_t = 0)]
    pub(super) seed: u64,
    /// Steps between checkpoints.
    #[arg(long, value_name = "STEPS", default_value_t = NonZeroU64::new(500).unwrap_or(NonZeroU64::MIN))]
    checkpoint_every: NonZeroU64,
    /// Steps between grids of samples (DIR/training/samples-….png); 0 for none.
    #[arg(long, value_name = "STEPS", default_value_t = 1000)]
    sample_every: u64,
    /// Log parameters, metrics and the report to an MLflow tracking server, such as http://localhost:5000. A server that does not
    /// answer is reported once, and holds nothing up.
    #[arg(long, value_name = "URL", env = "UNDERSTUDY_MLFLOW")]
    mlflow: Option<String>,
    /// The experiment there, made when it is not there.
    #[arg(long, value_name = "NAME", default_value = "understudy")]
    mlflow_experiment: String,
    /// Measure, say what the run will cost, and stop.
    #[arg(long)]
    pub(super) dry_run: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum LearningRateSchedule {
    Constant,
    Cosine,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum WeightingName {
    Uniform,
    Velocity,
}

/// What is taken where a flag does not say.
#[derive(Debug, Clone, Copy)]
pub(super) struct TrainingDefaults {
    pub(super) steps: u64,
    pub(super) batch: u32,
    pub(super) learning_rate: f64,
    pub(super) warmup_steps: u64,
    pub(super) learning_rate_schedule: LearningRateSchedule,
}

/// What makes a run another one than its neighbour, beside the loop's settings.
#[derive(Debug, Clone, Serialize)]
pub(super) struct TrainingIdentity {
    weighting: WeightingName,
    batch: u32,
    seed: u64,
}

impl TrainingArgs {
    /// How errors are weighted.
    pub(super) fn weighting(&self) -> Weighting {
        match self.weighting {
            WeightingName::Uniform => Weighting::Uniform,
            WeightingName::Velocity => {
                super::note_retired("--weighting velocity", "it showed no difference to uniform");
                Weighting::Velocity
            }
        }
    }

    /// Images per step.
    pub(super) fn batch(&self, defaults: &TrainingDefaults) -> u32 {
        self.batch.unwrap_or(defaults.batch)
    }

    /// The settings of the loop, for a student that is evaluated in `dtype`.
    ///
    /// # Errors
    /// A sentence naming the flag, its value and the limit.
    pub(super) fn settings(
        &self,
        defaults: &TrainingDefaults,
        dtype: DType,
    ) -> Result<train::Settings, String> {
        let refuse =
            |flag: &str, value: f64, limit: &str| Err(format!("--{flag} {value}: {limit}"));
        let positive = |value: f64| value.is_finite() && value > 0.0;
        let steps = self.steps.map_or(defaults.steps, NonZeroU64::get);
        let batch = self.batch(defaults);
        let learning_rate = self.learning_rate.unwrap_or(defaults.learning_rate);
        let schedule = self.learning_rate_schedule.unwrap_or(defaults.learning_rate_schedule);
        if !positive(learning_rate) {
            return refuse("learning-rate", learning_rate, "must be above 0, such as 2e-4");
        }
        if !positive(self.clip_norm) {
            return refuse("clip-norm", self.clip_norm, "must be above 0, such as 1");
        }
        if !(self.weight_decay.is_finite() && self.weight_decay >= 0.0) {
            return refuse("weight-decay", self.weight_decay, "must not be negative");
        }
        if !(0.0..1.0).contains(&self.ema) {
            return refuse("ema", self.ema, "must be from 0 to below 1, such as 0.999");
        }
        if !batch.is_multiple_of(self.accumulate.get()) {
            return Err(format!("--accumulate {}: must divide --batch {batch}", self.accumulate));
        }
        Ok(train::Settings {
            steps,
            accumulate: self.accumulate.get() as usize,
            optimizer: understudy_distill::optimizer::Settings {
                learning_rate,
                warmup_steps: self.warmup_steps.unwrap_or(defaults.warmup_steps),
                decay_steps: (schedule == LearningRateSchedule::Cosine).then_some(steps),
                weight_decay: self.weight_decay,
                clip_norm: self.clip_norm,
                beta1: understudy_distill::optimizer::BETA1,
            },
            average: self.ema,
            checkpoint_every: self.checkpoint_every.get(),
            sample_every: self.sample_every,
            dtype,
        })
    }

    /// Who is told of the run that makes `out`.
    ///
    /// # Errors
    /// A sentence naming the flag.
    pub(super) fn tracking(&self, out: &Path) -> Result<Option<Tracking>, String> {
        let Some(url) = self.mlflow.clone().filter(|_| !self.dry_run) else { return Ok(None) };
        let place = Place { url, experiment: self.mlflow_experiment.clone() };
        Tracking::new(place, super::folder_name(out), out.join(RUN_DIR)).map(Some)
    }

    /// What of it makes a run another one, beside the loop's settings.
    pub(super) fn identity(&self, defaults: &TrainingDefaults) -> TrainingIdentity {
        let (weighting, seed) = (self.weighting, self.seed);
        TrainingIdentity { weighting, batch: self.batch(defaults), seed }
    }
}
