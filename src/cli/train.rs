//! `understudy train`: an ordinary diffusion model, from images.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use serde_json::Map;
use understudy_distill::{
    noised::Noised,
    objective::{Dkdm, Objective},
    ranks::Shards,
    run_dir::{self, RunDir},
    student::{Candidate, Student},
    train::{self, Outcome, Task},
};
use understudy_models::{
    Conditioning, NetworkConfig,
    checkpoint::{
        card::{Card, Role},
        read,
    },
    schedule::{BetaSchedule, Class, PredictionType, ScheduleConfig},
};

use super::{
    compute::Compute,
    interrupt::Interrupt,
    open_images,
    progress::{DRY, TrainingProgress},
    training::{LearningRateSchedule, TrainingArgs, TrainingDefaults},
};
use crate::mlflow::Status;

/// Train a diffusion model on images: a teacher, or a baseline to hold a student against.
///
/// The result is a model folder at --out, which `understudy serve` and diffusers read. Interrupted, the
/// same command goes on from the last checkpoint, as if it had not been.
#[derive(Debug, clap::Args)]
pub(super) struct TrainArgs {
    /// The images: an idx file (MNIST, Fashion-MNIST), a folder or tar of pictures with a subfolder per
    /// class, or an .npz. Smaller ones are padded with black to the network's size.
    #[arg(long, value_name = "PATH")]
    data: PathBuf,
    /// The architecture: a config.json as diffusers writes it.
    #[arg(long, value_name = "FILE", required_unless_present = "init")]
    config: Option<PathBuf>,
    /// Go on from a model folder's weights, on its noise schedule.
    #[arg(long, value_name = "MODEL", conflicts_with_all = ["config", "noise_schedule"])]
    init: Option<PathBuf>,
    /// The noise schedule: a scheduler_config.json [default: cosine, 1000 timesteps, v_prediction].
    #[arg(long, value_name = "FILE")]
    noise_schedule: Option<PathBuf>,
    /// The model folder to make.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// The card says that the model is a baseline, to be held against students of this teacher.
    #[arg(long, value_name = "TEACHER")]
    baseline_of: Option<String>,
    #[command(flatten)]
    training: TrainingArgs,
    #[command(flatten)]
    pub(super) compute: Compute,
}

/// Runs the command.
///
/// # Errors
/// A sentence naming the flag, file or field to mend.
pub(super) fn run(args: &TrainArgs, threads: NonZeroUsize) -> Result<(), String> {
    let shown = |error: understudy_models::Error| error.to_string();
    let (device, dtype) = args.compute.for_training()?;
    if dtype != Compute::trained(&device, dtype) {
        return Err(format!("--dtype {}: a CPU trains in f32; use auto", args.compute.dtype));
    }
    super::note_name(&args.out);
    run_dir::check_out(&args.out).map_err(shown)?;
    let settings = args.training.settings(&DEFAULTS, dtype)?;
    let (interrupt, tracking) = (Interrupt::listen()?, args.training.tracking(&args.out)?);
    let student = match (&args.init, &args.config) {
        (Some(folder), _) => Student::continued(Candidate::open(folder).map_err(shown)?),
        (None, Some(file)) => {
            let schedule = noise_schedule(args.noise_schedule.as_deref())?;
            Student::untaught(Candidate::open(file).map_err(shown)?, schedule, args.training.seed)
        }
        (None, None) => return Err("--config: name the architecture, or --init a model".into()),
    }
    .map_err(shown)?;
    let images = open_images("--data", &args.data)?;
    let (count, names) = (images.len(), images.class_names.clone());
    let (batch, seed) = (args.training.batch(&DEFAULTS) as usize, args.training.seed);
    let batches =
        Noised::new(images, &student.config, &student.schedule, batch, seed).map_err(shown)?;
    // What the training batches hold is the noise, whatever the network predicts.
    let objective = Dkdm::new(
        &student.schedule,
        PredictionType::Epsilon,
        student.schedule.prediction_type(),
        false,
    )
    .map_err(shown)?;
    let objective = Objective::Dkdm(objective.weighted(args.training.weighting()));

    let mut identity = super::object(&args.training.identity(&DEFAULTS))?;
    identity.extend(Compute::identity(&device, dtype));
    let mut recipe = Map::new();
    recipe.insert("method".into(), "training on images".into());
    recipe.insert("initialisation".into(), student.initialisation.clone().into());
    recipe.insert("threads".into(), threads.get().into());
    let card = Card {
        role: if args.baseline_of.is_some() { Role::Baseline } else { Role::Teacher },
        teacher: args.baseline_of.clone(),
        class_names: fitting_names(names, &student.config, args),
        recipe,
        ..Card::default()
    };
    let weights = student.parameters();
    eprintln!(
        "{} parameters learn from {} images.",
        super::grouped(weights),
        super::grouped(count)
    );
    let student = student.onto(&device).map_err(shown)?;
    let run = Some(RunDir::open(&args.out).map_err(shown)?);
    let shards = Shards::one(Box::new(batches));
    let task = Task { run, identity, shards, objective, matching: None, student, settings, card };
    let mut progress =
        TrainingProgress::new("Reading the images", args.training.dry_run, interrupt, tracking);
    let outcome = train::train(task, &mut progress).map_err(shown)?;
    super::write_command(&args.out)?;
    match outcome {
        Outcome::Stopped { step } => {
            progress.stopped(step, &args.out)?;
            super::print(DRY)
        }
        Outcome::Finished => {
            progress.ended(Status::Finished, None);
            super::print(format!(
                "Model saved to {} ({} parameters{}). Serve it:\n  {}",
                args.out.display(),
                super::grouped(weights),
                progress.took(),
                super::serve_command(&args.out, None)
            ))
        }
    }
}

/// What is taken where a flag does not say.
const DEFAULTS: TrainingDefaults = TrainingDefaults {
    steps: 20_000,
    batch: 64,
    learning_rate: 2e-4,
    warmup_steps: 200,
    learning_rate_schedule: LearningRateSchedule::Cosine,
};

fn noise_schedule(file: Option<&Path>) -> Result<ScheduleConfig, String> {
    let Some(path) = file else {
        let mut cosine = ScheduleConfig::new(Class::Ddpm);
        cosine.beta_schedule = Some(BetaSchedule::SquaredCosine);
        cosine.prediction_type = Some(PredictionType::Velocity);
        return Ok(cosine);
    };
    let text = read::text(path, read::DESCRIPTION_LIMIT)
        .map_err(|error| format!("--noise-schedule {error}"))?;
    ScheduleConfig::from_text(&text, &path.display().to_string())
        .map_err(|error| format!("--noise-schedule: {error}"))
}

/// The data's names for classes, where the network has as many.
fn fitting_names(names: Vec<String>, network: &NetworkConfig, args: &TrainArgs) -> Vec<String> {
    match network.geometry().conditioning {
        Conditioning::Classes(classes) if classes == names.len() => return names,
        Conditioning::Classes(classes) if !names.is_empty() => eprintln!(
            "--data {}: has {} class folders, the network {classes} classes; the model will know its classes \
             by number only",
            args.data.display(),
            names.len()
        ),
        _ => {}
    }
    Vec::new()
}
