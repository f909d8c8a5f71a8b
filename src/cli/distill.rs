//! `understudy distill`: a faster network learns from a model, without any training data.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use candle_core::DType;
use clap::ValueEnum;
use serde_json::{Map, Value};
use understudy_distill::{
    generate::{Classes, Sampling},
    generated::Generated,
    objective::Dkdm,
    pool::{self, Order, Pool},
    run_dir::{self, RunDir},
    shrink,
    student::{Candidate, Student},
    teacher::Teacher,
    train::{self, Task},
    training_batch::BatchSource,
    walk::Walks,
};
use understudy_models::{
    Conditioning,
    checkpoint::{
        card::{Card, Role},
        hub, write_atomically,
    },
    sampler::{self, Kind},
    schedule::PredictionType,
};

use super::{compute::Compute, progress::TrainingProgress, training::TrainingArgs};

/// Teach a faster network (the student) what a model (the teacher) knows, without any data.
///
/// The teacher draws the noisy images itself (DKDM, CVPR 2025). The result is a model folder at --out,
/// which `understudy serve` and diffusers read. Interrupted, the same command goes on from the last
/// checkpoint, as if it had not been.
///
/// On a CPU --dtype is what the teacher is evaluated in; the student learns in f32.
#[derive(Debug, clap::Args)]
pub(super) struct DistillArgs {
    /// The teacher: a model folder, a name inside --models, or a Hub id (owner/name).
    #[arg(long, value_name = "MODEL")]
    teacher: String,
    /// The student: a config.json of its architecture (configs/ has some); a model folder, whose weights it begins with; or
    /// the part of the teacher's time that it may take, such as 0.5x: the widths are found by measuring.
    #[arg(long, value_name = "MODEL-OR-CONFIG")]
    student: PathBuf,
    /// The weights a student without any begins with: random, or its teacher's most important channels
    /// (pruned; for students of the teacher's shape, only narrower).
    #[arg(long, value_enum, default_value_t = Init::Random)]
    init: Init,
    /// The model folder to make.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Folder of model folders [default: ./models/zoo, else the bundled one].
    #[arg(long, env = "UNDERSTUDY_MODELS", value_name = "DIR")]
    models: Option<PathBuf>,
    /// dkdm, or the paper's baseline: the teacher draws --samples images, and the student is trained on
    /// them as if they were data.
    #[arg(long, value_enum, default_value_t = Method::Dkdm)]
    method: Method,
    /// Images that the baseline's teacher draws, each in --walk-steps steps of --walk-sampler.
    #[arg(long, value_name = "N", default_value_t = NonZeroUsize::new(10_000).unwrap_or(NonZeroUsize::MIN))]
    samples: NonZeroUsize,
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
enum Method {
    Dkdm,
    DataFreeBaseline,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Init {
    Random,
    Pruned,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Schedule {
    Iterative,
    Shuffled,
    Dynamic,
}

/// Runs the command.
///
/// # Errors
/// A sentence naming the flag, file or field to mend.
pub(super) fn run(args: &DistillArgs, threads: NonZeroUsize) -> Result<(), String> {
    let shown = |error: understudy_models::Error| error.to_string();
    let (device, dtype) = args.compute.for_training()?;
    super::note_name(&args.out);
    if let Some(folder) = args.keep_samples.as_deref().filter(|it| it.exists() && !it.is_dir()) {
        return Err(format!("--keep-samples {}: is no folder; name another", folder.display()));
    }
    run_dir::check_out(&args.out).map_err(shown)?;
    let settings = args.training.settings(Compute::trained(&device, dtype))?;
    let mut teacher = open_teacher(args)?;
    if !device.is_cpu() || dtype != DType::F32 {
        teacher = teacher.onto(dtype, &device).map_err(shown)?;
    }
    // Whatever no measuring is needed for is refused before anything is written.
    let asked = match share(&args.student) {
        None => Some(candidate(args, &teacher)?),
        Some(_) => None,
    };
    let run = RunDir::open(&args.out).map_err(shown)?;
    let asked = match asked {
        Some(asked) => asked,
        None => shrunk(args, &teacher, &run)?,
    };
    let student = begun(args, &teacher, asked, &run)?;
    let batches = match args.method {
        Method::Dkdm => dkdm(args, &teacher, &run),
        Method::DataFreeBaseline => data_free_baseline(args, &teacher, &student, &run),
    }?;
    let Source { mut identity, source, answers, learned, role } = batches;
    let objective =
        Dkdm::new(&teacher.schedule, answers, student.schedule.prediction_type(), learned)
            .map_err(shown)?
            .weighted(args.training.weighting());

    identity.extend(Compute::identity(&device, dtype));
    // What its network is told and answers in may be another type.
    identity.insert("teacher_dtype".into(), dtype.as_str().into());
    let mut recipe = Map::new();
    recipe.insert("initialisation".into(), student.initialisation.clone().into());
    recipe.insert("threads".into(), threads.get().into());
    let card = Card { role, recipe, ..card(&teacher) };
    eprintln!(
        "{} ({} weights) teaches {} weights",
        teacher.name,
        teacher.network().parameters(),
        student.parameters()
    );
    let student = student.onto(&device).map_err(shown)?;
    let task = Task { run, identity, source, objective, student, settings, card };
    train::train(task, &mut TrainingProgress::default()).map_err(shown)?;
    println!(
        "{}: serve it beside its teacher with `understudy serve --models` and its parent folder",
        args.out.display()
    );
    Ok(())
}

/// The student with the weights that its folder has, or random ones.
fn candidate(args: &DistillArgs, teacher: &Teacher) -> Result<Student, String> {
    let explain =
        |error: understudy_models::Error| format!("--student {}: {error}", args.student.display());
    let candidate = Candidate::open(&args.student).map_err(explain)?;
    Student::new(candidate, teacher, prediction(args)?, args.training.seed).map_err(explain)
}

/// The student before its first training batch.
fn begun(
    args: &DistillArgs,
    teacher: &Teacher,
    student: Student,
    run: &RunDir,
) -> Result<Student, String> {
    let seed = args.training.seed;
    // A resumed run has its weights in the checkpoint.
    if args.init == Init::Random || run.checkpoint().exists() {
        return Ok(student);
    }
    // Samples of the teacher's walk, at times of their own; as the training batches will be, but other ones.
    eprintln!("finding the teacher's most important channels");
    let steps = args.walk_steps.min(PROBE_STEPS);
    let settings = pool::Settings {
        order: Order::Shuffled,
        batch: 32,
        seed: seed ^ (1 << 63),
        run: String::new(),
        earlier: None,
        file: None,
        finished: None,
    };
    let shown = |error: understudy_models::Error| error.to_string();
    let learned = teacher.learned_variance();
    let walks = Walks::new(&teacher.schedule, Kind::Ddpm, steps, learned).map_err(shown)?;
    let mut pool = Pool::new(teacher, walks, settings).map_err(shown)?;
    student.pruned(teacher, &mut pool, seed).map_err(shown)
}

/// Steps of the walk on which importance is measured: every time is visited whatever their number.
const PROBE_STEPS: usize = 50;

/// `0.5x` as a number.
fn share(student: &Path) -> Option<f64> {
    student.to_str()?.strip_suffix('x')?.parse().ok()
}

/// The network found for a share of the teacher's time; a resumed run has the one of its checkpoint.
fn shrunk(args: &DistillArgs, teacher: &Teacher, run: &RunDir) -> Result<Student, String> {
    let shown = |error: understudy_models::Error| error.to_string();
    let share = share(&args.student).unwrap_or_default();
    let found = run.path().join("student.json");
    if !(run.checkpoint().exists() && found.exists()) {
        let shrunk = shrink::shrink(teacher, share).map_err(shown)?;
        eprintln!("a student of {:.2} of the teacher's time: {}", shrunk.share, found.display());
        let text = format!("{:#}\n", shrunk.config.to_json());
        write_atomically(&found, text.as_bytes()).map_err(shown)?;
    }
    let candidate = Candidate::open(&found).map_err(shown)?;
    Student::new(candidate, teacher, prediction(args)?, args.training.seed).map_err(shown)
}

/// Where training batches come from, and how they are to be read.
struct Source<'a> {
    identity: Map<String, Value>,
    source: Box<dyn BatchSource + 'a>,
    answers: PredictionType,
    learned: bool,
    role: Role,
}

/// The pool on which the teacher walks.
fn dkdm<'a>(args: &DistillArgs, teacher: &'a Teacher, run: &RunDir) -> Result<Source<'a>, String> {
    let shown = |error: understudy_models::Error| error.to_string();
    let learned = teacher.learned_variance();
    let walks = Walks::new(&teacher.schedule, walk_sampler(args)?, args.walk_steps, learned);
    let mut identity = identity(args);
    let schedule = args.schedule.to_possible_value();
    let schedule = schedule.map(|value| value.get_name().to_owned());
    identity.insert("schedule".into(), schedule.into());
    if args.schedule == Schedule::Dynamic {
        identity.insert("rho".into(), args.rho.into());
    }
    let settings = pool::Settings {
        order: match args.schedule {
            Schedule::Iterative => Order::Iterative,
            Schedule::Shuffled => Order::Shuffled,
            Schedule::Dynamic => Order::Dynamic { rho: args.rho },
        },
        batch: args.training.batch as usize,
        seed: args.training.seed,
        run: run.id().to_owned(),
        earlier: (run.checkpoint().exists())
            .then(|| args.out.file_name().unwrap_or_default().to_string_lossy().into_owned()),
        file: args.pool_file.clone(),
        finished: args.keep_samples.clone(),
    };
    let pool = Pool::new(teacher, walks.map_err(shown)?, settings).map_err(shown)?;
    let (source, role) = (Box::new(pool), Role::Student);
    let answers = teacher.schedule.prediction_type();
    Ok(Source { identity, source, answers, learned, role })
}

/// The teacher's images as data.
fn data_free_baseline<'a>(
    args: &DistillArgs,
    teacher: &'a Teacher,
    student: &Student,
    run: &RunDir,
) -> Result<Source<'a>, String> {
    let shown = |error: understudy_models::Error| error.to_string();
    if teacher.learned_variance() {
        return Err(
            "--method data-free-baseline: the teacher learns its variance, which images do \
                    not teach; use --method dkdm"
                .into(),
        );
    }
    let kind = walk_sampler(args)?;
    let trajectory = sampler::trajectory(&teacher.schedule, kind, args.walk_steps, 0.0, false);
    let identity = identity(args);
    let (batch, seed) = (args.training.batch as usize, args.training.seed);
    let sampling = Sampling {
        trajectory: trajectory.map_err(shown)?,
        classes: match teacher.geometry().conditioning {
            Conditioning::Classes(classes) => Classes::FromSeed(classes),
            _ => Classes::None,
        },
        // Runs of different seeds are to see different images.
        first_seed: seed.wrapping_mul(1 << 32),
        batch: 64,
    };
    let folder = run.path().join("teacher-samples");
    let network = (student.config.clone(), student.schedule.clone());
    let count = args.samples.get();
    let source = Box::new(Generated::new(teacher, sampling, count, folder, network, batch, seed));
    let (answers, learned) = (PredictionType::Epsilon, false);
    Ok(Source { identity, source, answers, learned, role: Role::Baseline })
}

fn walk_sampler(args: &DistillArgs) -> Result<Kind, String> {
    args.walk_sampler.parse().map_err(|error| format!("--walk-sampler: {error}"))
}

fn open_teacher(args: &DistillArgs) -> Result<Teacher, String> {
    let explain = |error| format!("--teacher {}: {error}", args.teacher);
    let models = super::models_folder(args.models.as_deref())?;
    let folder = hub::resolve(&args.teacher, &models).map_err(explain)?;
    // As `serve` calls it: a Hub model by its id, any other by its folder.
    let name = match hub::is_hub_id(&args.teacher) {
        true => hub::id_of(&args.teacher),
        false => folder.file_name().unwrap_or_default().to_string_lossy().into_owned(),
    };
    Teacher::open(&folder, name).map_err(explain)
}

fn prediction(args: &DistillArgs) -> Result<Option<PredictionType>, String> {
    let Some(name) = args.prediction.as_deref() else { return Ok(None) };
    PredictionType::from_name(name).map(Some).ok_or_else(|| {
        let names: Vec<_> = PredictionType::ALL.iter().map(|kind| kind.name()).collect();
        format!("--prediction {name}: use one of {}", names.join(", "))
    })
}

/// What makes the run another one than its neighbour.
fn identity(args: &DistillArgs) -> Map<String, Value> {
    let mut identity = args.training.identity();
    let method = args.method.to_possible_value().map(|value| value.get_name().to_owned());
    identity.insert("method".into(), method.into());
    let init = args.init.to_possible_value().map(|value| value.get_name().to_owned());
    identity.insert("init".into(), init.into());
    identity.insert("walk_steps".into(), args.walk_steps.into());
    identity.insert("walk_sampler".into(), args.walk_sampler.clone().into());
    identity.insert("student_share".into(), share(&args.student).into());
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
