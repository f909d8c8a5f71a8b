//! Arguments that every kind of training shares.

use std::num::{NonZeroU32, NonZeroU64};

use candle_core::DType;
use clap::ValueEnum;
use serde_json::{Map, Value, json};
use understudy_distill::{objective::Weighting, train};

/// Arguments of every kind of training.
#[derive(Debug, clap::Args)]
pub(super) struct TrainingArgs {
    /// Steps of the student.
    #[arg(long, default_value_t = NonZeroU64::new(20_000).unwrap_or(NonZeroU64::MIN))]
    pub(super) steps: NonZeroU64,
    /// Images per step.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub(super) batch: u32,
    /// Parts a batch is cut into, so that memory for one part is enough.
    #[arg(long, value_name = "PARTS", default_value_t = NonZeroU32::MIN)]
    pub(super) accumulate: NonZeroU32,
    /// Learning rate of AdamW after the warm-up.
    #[arg(long, default_value_t = 2e-4)]
    pub(super) learning_rate: f64,
    /// Steps over which the learning rate rises from nothing.
    #[arg(long, default_value_t = 200)]
    pub(super) warmup_steps: u64,
    /// After the warm-up the learning rate stays (constant, as in the paper), or falls to nothing over
    /// --steps (cosine), which gives cleaner images for the same steps.
    #[arg(long, value_enum, default_value_t = LearningRateSchedule::Constant)]
    pub(super) learning_rate_schedule: LearningRateSchedule,
    /// How much an error in the noise counts: the same at all times (uniform, as in the paper), or more
    /// where little of the image is left in it (velocity), where it decides what the image will be.
    #[arg(long, value_enum, default_value_t = WeightingName::Uniform)]
    weighting: WeightingName,
    /// Decoupled weight decay.
    #[arg(long, default_value_t = 0.0)]
    pub(super) weight_decay: f64,
    /// Largest norm of the gradients; larger ones are scaled down to it.
    #[arg(long, default_value_t = 1.0)]
    pub(super) clip_norm: f64,
    /// Decay of the running average of the weights, which is what becomes the model.
    #[arg(long, default_value_t = 0.999)]
    pub(super) ema: f64,
    /// Seed of the run: weights, noise, order.
    #[arg(long, default_value_t = 0)]
    pub(super) seed: u64,
    /// Steps between checkpoints.
    #[arg(long, value_name = "STEPS", default_value_t = NonZeroU64::new(500).unwrap_or(NonZeroU64::MIN))]
    pub(super) checkpoint_every: NonZeroU64,
    /// Steps between grids of samples (DIR/training/samples-….png); 0 for none.
    #[arg(long, value_name = "STEPS", default_value_t = 1000)]
    pub(super) sample_every: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum LearningRateSchedule {
    Constant,
    Cosine,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum WeightingName {
    Uniform,
    Velocity,
}

impl TrainingArgs {
    /// How much errors count.
    pub(super) fn weighting(&self) -> Weighting {
        match self.weighting {
            WeightingName::Uniform => Weighting::Uniform,
            WeightingName::Velocity => Weighting::Velocity,
        }
    }

    fn decay_steps(&self) -> Option<u64> {
        (self.learning_rate_schedule == LearningRateSchedule::Cosine).then(|| self.steps.get())
    }

    /// The settings of the loop, for a student that is evaluated in `dtype`.
    ///
    /// # Errors
    /// A sentence naming the flag, its value and the limit.
    pub(super) fn settings(&self, dtype: DType) -> Result<train::Settings, String> {
        let refuse =
            |flag: &str, value: f64, limit: &str| Err(format!("--{flag} {value}: {limit}"));
        let positive = |value: f64| value.is_finite() && value > 0.0;
        if !positive(self.learning_rate) {
            return refuse("learning-rate", self.learning_rate, "must be above 0, such as 2e-4");
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
        if !self.batch.is_multiple_of(self.accumulate.get()) {
            return Err(format!(
                "--accumulate {}: must divide --batch {}",
                self.accumulate, self.batch
            ));
        }
        Ok(train::Settings {
            steps: self.steps.get(),
            accumulate: self.accumulate.get() as usize,
            optimizer: understudy_distill::optimizer::Settings {
                learning_rate: self.learning_rate,
                warmup_steps: self.warmup_steps,
                decay_steps: self.decay_steps(),
                weight_decay: self.weight_decay,
                clip_norm: self.clip_norm,
            },
            average: self.ema,
            checkpoint_every: self.checkpoint_every.get(),
            sample_every: self.sample_every,
            dtype,
        })
    }

    /// What of it makes a run another one, beside the loop's settings.
    pub(super) fn identity(&self) -> Map<String, Value> {
        let weighting = self.weighting.to_possible_value().map(|name| name.get_name().to_owned());
        let identity = json!({ "weighting": weighting, "batch": self.batch, "seed": self.seed });
        identity.as_object().cloned().unwrap_or_default()
    }
}
