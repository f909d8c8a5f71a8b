//! `understudy train`: an ordinary diffusion model, from images.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use serde_json::Map;
use understudy_distill::{
    data::Images,
    encoded::Encoded,
    guidance::Guidance,
    noised::Noised,
    objective::{Dkdm, Objective},
    prompting::Prompting,
    prompts::Prompts,
    ranks::Shards,
    run_dir::{self, RUN_DIR, RunDir},
    student::{Candidate, Student},
    teacher::Teacher,
    train::{self, Outcome, Task},
    training_batch::BatchSource,
};
use understudy_models::{
    Conditioning, NetworkConfig,
    checkpoint::{
        ModelFolder,
        card::{Card, Role},
        read,
    },
    schedule::{BetaSchedule, Class, PredictionType, ScheduleConfig},
};

use super::{
    compute::Compute,
    interrupt::Interrupt,
    models_arg::ModelsArg,
    open_images,
    progress::{DRY, TrainingProgress},
    prompting,
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
    /// The autoencoder, text encoder and tokenizer of a model, for a network that makes latents: pictures are taken as its
    /// autoencoder has them, with their captions (`text` in a metadata.jsonl), on its noise schedule.
    #[arg(long, value_name = "MODEL", conflicts_with_all = ["init", "noise_schedule"])]
    components: Option<String>,
    /// Go on from a model folder's weights, on its noise schedule; with its components, where it has some.
    #[arg(long, value_name = "MODEL", conflicts_with_all = ["config", "noise_schedule"])]
    init: Option<String>,
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
    models: ModelsArg,
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
    let images = open_images("--data", &args.data)?;
    let (count, names) = (images.len(), images.class_names.clone());
    let init = args.init.as_ref().map(|name| args.models.resolve("--init", name)).transpose()?;
    let network = init.as_ref().or(args.config.as_ref());
    let network = network.ok_or("--config: name the architecture, or --init a model")?;
    let (student, batches, card) = match components(args, init.as_deref())? {
        Some(folder) => of_latents(args, network, &folder, images, (&device, dtype))?,
        None => of_pixels(args, network, images)?,
    };
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
        ..card
    };
    let weights = student.parameters();
    eprintln!(
        "{} parameters learn from {} images.",
        super::grouped(weights),
        super::grouped(count)
    );
    let student = student.onto(&device).map_err(shown)?;
    let run = Some(RunDir::open(&args.out).map_err(shown)?);
    let shards = Shards::one(batches);
    let task = Task { run, identity, shards, objective, matching: None, student, settings, card };
    let mut progress =
        TrainingProgress::new("Reading the images", args.training.dry_run, interrupt, tracking);
    let outcome = train::train(task, &mut progress).map_err(shown)?;
    if !args.training.dry_run {
        super::write_command(&args.out)?;
    }
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

/// Who learns, what it is shown, and what its card says whatever it learns.
type Learning = (Student, Box<dyn BatchSource>, Card);

/// The folder with the components of a network that does not make pixels by itself.
fn components(args: &TrainArgs, init: Option<&Path>) -> Result<Option<PathBuf>, String> {
    if let Some(name) = &args.components {
        return args.models.resolve("--components", name).map(Some);
    }
    let Some(folder) = init else { return Ok(None) };
    let model = ModelFolder::open(folder).map_err(|error| error.to_string())?;
    Ok((!model.makes_pixels()).then(|| folder.to_owned()))
}

/// A network whose samples are images.
fn of_pixels(args: &TrainArgs, network: &Path, images: Images) -> Result<Learning, String> {
    let shown = |error: understudy_models::Error| error.to_string();
    let (batch, seed) = (args.training.batch(&DEFAULTS) as usize, args.training.seed);
    let candidate = Candidate::open(network).map_err(shown)?;
    let student = match args.init {
        Some(_) => Student::continued(candidate),
        None => Student::untaught(candidate, noise_schedule(args.noise_schedule.as_deref())?, seed),
    }
    .map_err(shown)?;
    if student.config.geometry().prompt.is_some() {
        return Err(format!(
            "--config {}: the network draws after prompts; name the model whose text encoder and autoencoder it has: \
             --components MODEL",
            network.display()
        ));
    }
    let batches = Noised::new(images, &student.config, &student.schedule, batch, seed);
    Ok((student, Box::new(batches.map_err(shown)?), Card::default()))
}

/// A network whose samples are what an autoencoder makes of images, between that and a text encoder, where there is one.
fn of_latents(
    args: &TrainArgs,
    network: &Path,
    folder: &Path,
    images: Images,
    (device, dtype): (&Device, DType),
) -> Result<Learning, String> {
    let shown = |error: understudy_models::Error| error.to_string();
    let (batch, seed) = (args.training.batch(&DEFAULTS) as usize, args.training.seed);
    let model = Teacher::open(folder, super::folder_name(folder), dtype, device).map_err(shown)?;
    let candidate = Candidate::open(network).map_err(shown)?;
    let student = Student::new(candidate, &model, None, seed).map_err(shown)?;
    let [_, height, width] = model.model().image_shape();
    let encoder = model.model().image_encoder([height, width], dtype, device).map_err(shown)?;
    let encoder = encoder.ok_or_else(|| {
        let flag = if args.components.is_some() { "--components" } else { "--init" };
        format!(
            "{flag} {}: has no autoencoder to make latents of pictures; name a model that has one",
            folder.display()
        )
    })?;
    let defaults = model.card.defaults.clone();
    let captions = match (model.geometry().prompt, &images.captions) {
        (None, _) => None,
        (Some(_), None) => {
            return Err(format!(
                "--data {}: has no captions, and the network draws after text; write them into a metadata.jsonl, such as \
                 {{\"file_name\": \"1.png\", \"text\": \"a red apple\"}}",
                args.data.display()
            ));
        }
        (Some(_), Some(captions)) => {
            let (prompts, numbers) = Prompts::of_captions(captions);
            if prompts.texts().is_empty() {
                return Err(format!(
                    "--data {}: all captions are empty, and the network draws after text; write what pictures show",
                    args.data.display()
                ));
            }
            let guidance = Guidance::Keep { scale: defaults.guidance_scale.unwrap_or(1.0) };
            let table = args.out.join(RUN_DIR).join(prompting::TABLE);
            let prompting =
                Prompting::new(&model, prompts, guidance, Some(table)).map_err(shown)?;
            Some((prompting, numbers))
        }
    };
    let shapes = (student.config.geometry(), &student.schedule);
    let files = model.model().autoencoder_files().map_err(shown)?;
    let encoder = (encoder, &files[..]);
    let batches = Encoded::new(images, encoder, captions, shapes, batch, seed).map_err(shown)?;
    let card = Card {
        example_prompts: model.card.example_prompts.clone(),
        null_class: model.card.null_class,
        defaults,
        ..Card::default()
    };
    Ok((student, Box::new(batches), card))
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
