//! Settings of a training that belong together.

use clap::ValueEnum;
use understudy_models::schedule::PredictionType;

use super::training::{LearningRateSchedule, TrainingDefaults};

/// Which settings `distill` takes where a flag does not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Preset {
    /// A first student in minutes, to see whether everything works: 1,500 steps.
    Quick,
    /// What the experiments found to be best: 20,000 steps.
    Good,
    /// The DKDM paper's settings: 200,000 steps of 128 images, walks of 1000 steps, a random start.
    Paper,
}

/// What of a distillation a preset decides, beside its training.
pub(super) struct DistillDefaults {
    pub(super) training: TrainingDefaults,
    /// Size of the pool.
    pub(super) rho: f64,
    /// Steps of the teacher's walk; of a teacher whose timesteps they do not divide, the nearest that do.
    pub(super) walk_steps: usize,
    /// What a student without weights predicts; else what its teacher does.
    pub(super) prediction: Option<PredictionType>,
    /// Whether a student of the teacher's shape begins with the teacher's channels.
    pub(super) pruned: bool,
}

impl Preset {
    /// The settings.
    pub(super) fn defaults(self) -> DistillDefaults {
        let good = DistillDefaults {
            training: TrainingDefaults {
                steps: 20_000,
                batch: 32,
                learning_rate: 1e-3,
                warmup_steps: 100,
                learning_rate_schedule: LearningRateSchedule::Cosine,
            },
            rho: 0.1,
            walk_steps: 50,
            prediction: Some(PredictionType::Velocity),
            pruned: true,
        };
        match self {
            Self::Good => good,
            Self::Quick => DistillDefaults {
                training: TrainingDefaults { steps: 1500, ..good.training },
                rho: 0.02,
                ..good
            },
            Self::Paper => DistillDefaults {
                training: TrainingDefaults {
                    steps: 200_000,
                    batch: 128,
                    learning_rate: 1e-4,
                    warmup_steps: 0,
                    learning_rate_schedule: LearningRateSchedule::Constant,
                },
                rho: 0.4,
                walk_steps: 1000,
                prediction: None,
                pruned: false,
            },
        }
    }
}
