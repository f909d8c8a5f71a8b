//! What `understudy distill` is told.

use std::{num::NonZeroUsize, path::PathBuf};

use clap::ValueEnum;
use serde::Serialize;
use understudy_models::{sampler::Kind, schedule::PredictionType};

use super::{compute::Compute, models_arg::ModelsArg, preset::Preset, training::TrainingArgs};

/// Flags of a run.
#[derive(Debug, clap::Args)]
pub(super) struct DistillArgs {
    /// The teacher: a model folder, a name inside --models, or a Hub id (owner/name).
    #[arg(long, value_name = "MODEL")]
    pub(super) teacher: String,
    /// What a text-to-image teacher is asked to draw: a file with one prompt a line, or a template such as "{red|blue}
    /// {apple|house}, flat style", which stands for every combination of its lists. May be given several times. The empty
    /// prompt is always among them.
    #[arg(long, value_name = "FILE-OR-TEMPLATE")]
    pub(super) prompts: Vec<String>,
    /// The student: a target cost such as 0.5x, half the teacher's time per evaluation, for which channel widths are
    /// found by measuring; of Stable Diffusion's shape base, small or tiny, which leave out blocks as BK-SDM does; a
    /// config.json of its architecture (configs/ has some); or a model to go on from [default: 0.5x; with --evaluations a
    /// student of the teacher among --models].
    #[arg(long, value_name = "MODEL-OR-CONFIG")]
    pub(super) student: Option<PathBuf>,
    /// Make a student that needs so many evaluations an image, such as 4. Go on from it for 2, and from that for 1.
    #[arg(long, value_name = "K")]
    pub(super) evaluations: Option<NonZeroUsize>,
    /// The model folder to make.
    #[arg(long, value_name = "DIR")]
    pub(super) out: PathBuf,
    /// Settings that belong together; flags change single ones.
    #[arg(long, value_enum, default_value_t = Preset::Good)]
    pub(super) preset: Preset,
    #[command(flatten)]
    pub(super) models: ModelsArg,
    /// Weights that a student without any begins with: random ones, its teacher's most important channels (pruned; for
    /// students of the teacher's shape, only narrower), or those of its teacher's blocks that it has (blocks) [default:
    /// pruned where --student is a target cost, blocks where it is base, small or tiny].
    #[arg(long, value_enum, help_heading = "Method")]
    pub(super) init: Option<Init>,
    /// What the student predicts [default: v_prediction; in preset paper what its teacher does].
    #[arg(long, value_parser = super::one_of(PredictionType::ALL.iter().copied(), PredictionType::name), help_heading = "Method")]
    pub(super) prediction: Option<PredictionType>,
    /// dkdm; the paper's baseline, in which the teacher generates --samples images, and the student is trained on them as
    /// if they were data; or, for --evaluations, segment-regression: each step of the student learns where the teacher's
    /// walk goes in many; or distribution-matching, which goes on from that: a critic learns what the student's samples
    /// are, and the student is pulled to where the teacher would have them [default: dkdm; with --evaluations
    /// segment-regression].
    #[arg(long, value_enum, help_heading = "Method")]
    pub(super) method: Option<Method>,
    /// Images, or latents, that the baseline's teacher generates, each in --walk-steps steps of --walk-sampler [default: 10000].
    #[arg(
        long,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=10_000_000),
        help_heading = "Method"
    )]
    pub(super) samples: Option<u32>,
    /// How training batches are drawn: all rows at one timestep (iterative), each at its own (shuffled), or from a pool
    /// (dynamic, the paper's choice) [default: dynamic].
    #[arg(long, value_enum, help_heading = "Method")]
    pub(super) schedule: Option<Schedule>,
    /// Size of the pool: rho × training timesteps batches; filling it costs half a walk of the teacher per image
    /// [default: the preset's, 0.1; with --evaluations a fifth of it].
    #[arg(long, help_heading = "Method")]
    pub(super) rho: Option<f64>,
    /// Steps of the teacher's walk from noise to image; must divide its training timesteps [default: the preset's, 50;
    /// with --evaluations 40].
    #[arg(long, value_name = "STEPS", help_heading = "Method")]
    pub(super) walk_steps: Option<usize>,
    /// The teacher's sampler on its walk [default: ddpm; with --evaluations ddim].
    #[arg(
        long,
        value_name = "SAMPLER",
        value_parser = super::one_of([Kind::Ddpm, Kind::Ddim], Kind::name),
        help_heading = "Method"
    )]
    pub(super) walk_sampler: Option<Kind>,
    /// What the student of a text-to-image teacher learns of guidance: to be guided as its teacher is (keep), or the
    /// guided answer for any scale in a range (distil 1..8): it takes the scale as an input, and an image needs half the
    /// evaluations [default: keep].
    #[arg(long, num_args = 1..=2, value_names = ["keep|distil", "LEAST..MOST"], help_heading = "Method")]
    pub(super) guidance: Vec<String>,
    /// Classifier-free guidance of the teacher's walks, where the student keeps it; 1 is none [default: the teacher's
    /// card's, else 1].
    #[arg(long, value_name = "SCALE", help_heading = "Method")]
    pub(super) guidance_scale: Option<f64>,
    /// Keep the pool in this memory-mapped file instead of in memory.
    #[arg(long, value_name = "FILE", help_heading = "Method")]
    pub(super) pool_file: Option<PathBuf>,
    /// Keep the images that the teacher finishes on its walks, as DIR/CLASS/SEED.png.
    #[arg(long, value_name = "DIR", hide = true)]
    pub(super) keep_samples: Option<PathBuf>,
    /// Parts of a batch, each from a pool of its own, that `mpirun` may share among as many processes or fewer: the student is
    /// the same, to the bit. A power of two that divides --batch.
    #[arg(long, value_name = "SHARDS", default_value_t = NonZeroUsize::MIN, help_heading = "Method")]
    pub(super) shards: NonZeroUsize,
    /// Leave out the report that follows the training.
    #[arg(long)]
    pub(super) no_report: bool,
    #[command(flatten)]
    pub(super) training: TrainingArgs,
    #[command(flatten)]
    pub(super) compute: Compute,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Method {
    Dkdm,
    DataFreeBaseline,
    SegmentRegression,
    DistributionMatching,
}

impl Method {
    /// Whether it makes a student of few steps.
    pub(super) fn reduces_steps(self) -> bool {
        matches!(self, Self::SegmentRegression | Self::DistributionMatching)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Init {
    Random,
    Pruned,
    Blocks,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Schedule {
    Iterative,
    Shuffled,
    Dynamic,
}
