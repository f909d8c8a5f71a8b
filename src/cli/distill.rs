//! `understudy distill`: a faster network learns from a model, without any training data.

use std::num::{NonZeroU32, NonZeroU64, NonZeroUsize};
use std::path::PathBuf;

use clap::ValueEnum;
use serde_json::{Map, Value, json};
use understudy_distill::{
    objective::Dkdm,
    pool::{self, Order, Pool},
    student::{Candidate, Student},
    teacher::Teacher,
    train::{self, Task},
    walk::Walks,
};
use understudy_models::{
    checkpoint::{
        card::{Card, Role},
        hub,
    },
    sampler::Kind,
    schedule::PredictionType,
};

use super::{compute::Compute, progress::Progress};

/// Teach a faster network (the student) what a model (the teacher) knows, without any data.
///
/// The teacher draws the noisy images itself (DKDM, CVPR 2025). The result is a model folder at --out,
/// which `understudy serve` and diffusers read. Interrupted, the same command goes on from the last
/// checkpoint, as if it had not been.
#[derive(Debug, clap::Args)]
pub(super) struct DistillArgs {
    /// The teacher: a model folder, a name inside --models, or a Hub id (owner/name).
    #[arg(long, value_name = "MODEL")]
    teacher: String,
    /// The student: a config.json of its architecture, or a model folder, whose weights it begins with.
    #[arg(long, value_name = "MODEL-OR-CONFIG")]
    student: PathBuf,
    /// The model folder to make.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Folder of model folders [default: ./models/zoo, else the bundled one].
    #[arg(long, env = "UNDERSTUDY_MODELS", value_name = "DIR")]
    models: Option<PathBuf>,
    /// In which order the student sees noisy images: all of a batch at one time (iterative), each at
    /// its own (shuffled), or drawn from a pool (dynamic, the paper's choice).
    #[arg(long, value_enum, default_value_t = Schedule::Dynamic)]
    schedule: Schedule,
    /// Size of the dynamic pool: rho × training timesteps batches. The paper has 0.4; filling it costs
    /// half a walk of the teacher per image.
    #[arg(long, default_value_t = 0.1)]
    rho: f64,
    /// Steps of the teacher's walk from noise to image. The paper has 1000; with fewer it costs less and
    /// its images are fresher. Must divide the teacher's training timesteps.
    #[arg(long, value_name = "STEPS", default_value_t = 50)]
    walk_steps: usize,
    /// The teacher's sampler on its walk: ddpm or ddim.
    #[arg(long, value_name = "SAMPLER", default_value = "ddpm")]
    walk_sampler: String,
    /// Keep the pool in this file, memory-mapped, instead of in memory.
    #[arg(long, value_name = "FILE")]
    pool_file: Option<PathBuf>,
    /// Keep the images that the teacher finishes on the way, as DIR/CLASS/SEED.png.
    #[arg(long, value_name = "DIR")]
    keep_samples: Option<PathBuf>,
    /// What the student predicts: epsilon, sample or v_prediction [default: what its teacher does].
    #[arg(long)]
    prediction: Option<String>,
    #[command(flatten)]
    training: TrainingArgs,
    #[command(flatten)]
    pub(super) compute: Compute,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Schedule {
    Iterative,
    Shuffled,
    Dynamic,
}

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
    /// Learning rate of AdamW, constant after the warm-up.
    #[arg(long, default_value_t = 2e-4)]
    pub(super) learning_rate: f64,
    /// Steps over which the learning rate rises from nothing.
    #[arg(long, default_value_t = 200)]
    pub(super) warmup_steps: u64,
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

impl TrainingArgs {
    /// The settings of the loop.
    ///
    /// # Errors
    /// A sentence naming the flag, its value and the limit.
    pub(super) fn settings(&self) -> Result<train::Settings, String> {
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
                weight_decay: self.weight_decay,
                clip_norm: self.clip_norm,
            },
            average: self.ema,
            checkpoint_every: self.checkpoint_every.get(),
            sample_every: self.sample_every,
        })
    }

    /// What of it makes a run another one.
    pub(super) fn identity(&self) -> Map<String, Value> {
        let identity = json!({
            "batch": self.batch, "accumulate": self.accumulate, "learning_rate": self.learning_rate,
            "warmup_steps": self.warmup_steps, "weight_decay": self.weight_decay,
            "clip_norm": self.clip_norm, "ema": self.ema, "seed": self.seed,
        });
        identity.as_object().cloned().unwrap_or_default()
    }
}

/// Runs the command.
///
/// # Errors
/// A sentence naming the flag, file or field to mend.
pub(super) fn run(args: &DistillArgs, threads: NonZeroUsize) -> Result<(), String> {
    let shown = |error: understudy_models::Error| error.to_string();
    args.compute.for_training()?;
    let settings = args.training.settings()?;
    let teacher = open_teacher(args)?;
    let student = Candidate::open(&args.student)
        .map_err(|error| format!("--student {}: {error}", args.student.display()))?;
    let student =
        Student::new(student, &teacher, prediction(args)?, args.training.seed).map_err(shown)?;

    let sampler: Kind =
        args.walk_sampler.parse().map_err(|error| format!("--walk-sampler: {error}"))?;
    let learned = teacher.learned_variance();
    let walks = Walks::new(&teacher.schedule, sampler, args.walk_steps, learned).map_err(shown)?;
    let identity = identity(args, &teacher, &student);
    let pool = Pool::new(
        &teacher,
        walks,
        pool::Settings {
            order: match args.schedule {
                Schedule::Iterative => Order::Iterative,
                Schedule::Shuffled => Order::Shuffled,
                Schedule::Dynamic => Order::Dynamic { rho: args.rho },
            },
            batch: args.training.batch as usize,
            seed: args.training.seed,
            run: args.out.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            file: args.pool_file.clone(),
            finished: args.keep_samples.clone(),
        },
    )
    .map_err(shown)?;
    let objective = Dkdm::new(
        &teacher.schedule,
        teacher.schedule.prediction_type(),
        student.schedule.prediction_type(),
        learned,
    )
    .map_err(shown)?;

    let mut recipe = identity.clone();
    recipe.insert("method".into(), "dkdm".into());
    recipe.insert("pool_samples".into(), pool.len().into());
    recipe.insert("initialisation".into(), student.initialisation.clone().into());
    recipe.insert("threads".into(), threads.get().into());
    let card = Card { role: Role::Student, recipe, ..card(&teacher) };
    let parameters = student.parameters();
    eprintln!(
        "{} ({} weights) teaches {} weights; {} samples in the pool",
        teacher.name,
        teacher.network().parameters(),
        parameters,
        pool.len()
    );
    let curriculum = Box::new(pool);
    let out = args.out.clone();
    let task = Task { out, identity, curriculum, objective, student, settings, card };
    train::train(task, &mut Progress::new()).map_err(shown)?;
    println!(
        "{}: serve it beside its teacher with `understudy serve --models` and its parent folder",
        args.out.display()
    );
    Ok(())
}

fn open_teacher(args: &DistillArgs) -> Result<Teacher, String> {
    let explain = |error| format!("--teacher {}: {error}", args.teacher);
    let models = super::models_folder(args.models.as_deref())?;
    let folder = hub::resolve(&args.teacher, &models).map_err(explain)?;
    Teacher::open(&folder, hub::id_of(&args.teacher)).map_err(explain)
}

fn prediction(args: &DistillArgs) -> Result<Option<PredictionType>, String> {
    let Some(name) = args.prediction.as_deref() else { return Ok(None) };
    PredictionType::from_name(name).map(Some).ok_or_else(|| {
        let names: Vec<_> = PredictionType::ALL.iter().map(|kind| kind.name()).collect();
        format!("--prediction {name}: use one of {}", names.join(", "))
    })
}

/// What makes the run another one than its neighbour.
fn identity(args: &DistillArgs, teacher: &Teacher, student: &Student) -> Map<String, Value> {
    let mut identity = args.training.identity();
    let schedule = args.schedule.to_possible_value();
    let schedule = schedule.map(|value| value.get_name().to_owned());
    if args.schedule == Schedule::Dynamic {
        identity.insert("rho".into(), args.rho.into());
    }
    identity.insert("schedule".into(), schedule.into());
    identity.insert("walk_steps".into(), args.walk_steps.into());
    identity.insert("walk_sampler".into(), args.walk_sampler.clone().into());
    identity.insert("teacher_sha256".into(), teacher.hash.clone().into());
    identity.insert("prediction".into(), student.schedule.prediction_type().name().into());
    identity.insert("student_network".into(), student.config.to_json());
    identity
}

/// What a student's card takes over from its teacher's.
fn card(teacher: &Teacher) -> Card {
    Card {
        teacher: Some(teacher.name.clone()),
        class_names: teacher.card.class_names.clone(),
        null_class: teacher.card.null_class,
        defaults: teacher.card.defaults.clone(),
        ..Card::default()
    }
}
