//! `understudy distill`: a faster network learns from a model, without any training data.

use std::{
    num::NonZeroUsize,
    path::{Path, PathBuf},
};

use candle_core::DType;
use clap::ValueEnum;
use serde::Serialize;
use serde_json::Map;
use understudy_distill::{
    generate::{Classes, Sampling},
    generated::Generated,
    objective::Dkdm,
    pool::{self, Order, Pool},
    run_dir::{self, RunDir},
    shrink,
    student::{Candidate, Student},
    teacher::Teacher,
    train::{self, Outcome, Task},
    training_batch::BatchSource,
    walk::Walks,
};
use understudy_models::{
    Conditioning, NetworkConfig,
    checkpoint::{
        card::{Card, Role},
        hub, write_atomically,
    },
    sampler::{self, Kind},
    schedule::PredictionType,
};

use super::{
    compute::Compute,
    interrupt::Interrupt,
    measure::MeasureArgs,
    models_arg::ModelsArg,
    preset::{DistillDefaults, Preset},
    progress::TrainingProgress,
    report,
    training::{TrainingArgs, TrainingIdentity},
};

/// Distil a model (the teacher) into a faster one (the student) without any training data.
///
/// The teacher generates the noisy images itself (DKDM, CVPR 2025). The result is a model folder at --out, which
/// `understudy serve` and diffusers read. An interrupted run goes on from its last checkpoint when the same command is
/// given again, with the same result.
///
/// On a CPU --dtype is what the teacher is evaluated in; the student learns in f32.
#[derive(Debug, clap::Args)]
pub(super) struct DistillArgs {
    /// The teacher: a model folder, a name inside --models, or a Hub id (owner/name).
    #[arg(long, value_name = "MODEL")]
    teacher: String,
    /// The student: a target cost such as 0.5x, half the teacher's time per evaluation, for which channel widths are
    /// found by measuring; a config.json of its architecture (configs/ has some); or a model folder to go on from.
    #[arg(long, value_name = "MODEL-OR-CONFIG", default_value = "0.5x")]
    student: PathBuf,
    /// The model folder to make.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Settings that belong together; flags change single ones.
    #[arg(long, value_enum, default_value_t = Preset::Good)]
    preset: Preset,
    #[command(flatten)]
    models: ModelsArg,
    /// Weights that a student without any begins with: random ones, or its teacher's most important channels (pruned;
    /// for students of the teacher's shape, only narrower) [default: pruned where --student is a target cost].
    #[arg(long, value_enum, help_heading = "Method")]
    init: Option<Init>,
    /// What the student predicts [default: v_prediction; in preset paper what its teacher does].
    #[arg(long, value_parser = super::one_of(PredictionType::ALL.iter().copied(), PredictionType::name), help_heading = "Method")]
    prediction: Option<PredictionType>,
    /// dkdm, or the paper's baseline: the teacher generates --samples images, and the student is trained on them as if
    /// they were data.
    #[arg(long, value_enum, default_value_t = Method::Dkdm, help_heading = "Method")]
    method: Method,
    /// Images that the baseline's teacher generates, each in --walk-steps steps of --walk-sampler.
    #[arg(
        long,
        value_name = "N",
        default_value_t = NonZeroUsize::new(10_000).unwrap_or(NonZeroUsize::MIN),
        help_heading = "Method"
    )]
    samples: NonZeroUsize,
    /// How training batches are drawn: all rows at one timestep (iterative), each at its own (shuffled), or from a pool
    /// (dynamic, the paper's choice).
    #[arg(long, value_enum, default_value_t = Schedule::Dynamic, help_heading = "Method")]
    schedule: Schedule,
    /// Size of the pool: rho × training timesteps batches; filling it costs half a walk of the teacher per image
    /// [default: the preset's, 0.1].
    #[arg(long, help_heading = "Method")]
    rho: Option<f64>,
    /// Steps of the teacher's walk from noise to image; must divide its training timesteps [default: the preset's, 50].
    #[arg(long, value_name = "STEPS", help_heading = "Method")]
    walk_steps: Option<usize>,
    /// The teacher's sampler on its walk.
    #[arg(
        long,
        value_name = "SAMPLER",
        default_value = "ddpm",
        value_parser = super::one_of([Kind::Ddpm, Kind::Ddim], Kind::name),
        help_heading = "Method"
    )]
    walk_sampler: Kind,
    /// Keep the pool in this memory-mapped file instead of in memory.
    #[arg(long, value_name = "FILE", help_heading = "Method")]
    pool_file: Option<PathBuf>,
    /// Keep the images that the teacher finishes on its walks, as DIR/CLASS/SEED.png.
    #[arg(long, value_name = "DIR", hide = true)]
    keep_samples: Option<PathBuf>,
    /// Leave out the report that follows the training.
    #[arg(long)]
    no_report: bool,
    #[command(flatten)]
    training: TrainingArgs,
    #[command(flatten)]
    pub(super) compute: Compute,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Method {
    Dkdm,
    DataFreeBaseline,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Init {
    Random,
    Pruned,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Schedule {
    Iterative,
    Shuffled,
    Dynamic,
}

/// What makes the run another one than its neighbour, beside what the parts of the task say of themselves. A resumed
/// run must find the same.
#[derive(Debug, Serialize)]
struct RunIdentity {
    #[serde(flatten)]
    training: TrainingIdentity,
    method: Method,
    init: Init,
    walk_steps: usize,
    walk_sampler: &'static str,
    student_share: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    schedule: Option<Schedule>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rho: Option<f64>,
    /// The student may be evaluated in another type.
    teacher_dtype: &'static str,
}

/// What the flags come to, with the preset's settings where they say nothing.
struct Asked<'a> {
    args: &'a DistillArgs,
    defaults: DistillDefaults,
    teacher: &'a Teacher,
    share: Option<f64>,
    init: Init,
    walk_steps: usize,
    batch: usize,
}

impl<'a> Asked<'a> {
    fn new(args: &'a DistillArgs, teacher: &'a Teacher) -> Self {
        let defaults = args.preset.defaults();
        let share = share(&args.student);
        let default_init = match share {
            Some(_) if defaults.pruned => Init::Pruned,
            _ => Init::Random,
        };
        let timesteps = teacher.schedule.train_timesteps();
        let nearest = || Walks::nearest_steps(timesteps, defaults.walk_steps);
        Self {
            args,
            teacher,
            share,
            init: args.init.unwrap_or(default_init),
            walk_steps: args.walk_steps.unwrap_or_else(nearest),
            batch: args.training.batch(&defaults.training) as usize,
            defaults,
        }
    }

    fn identity(&self) -> RunIdentity {
        let pooled = self.args.method == Method::Dkdm;
        let schedule = pooled.then_some(self.args.schedule);
        RunIdentity {
            training: self.args.training.identity(&self.defaults.training),
            method: self.args.method,
            init: self.init,
            walk_steps: self.walk_steps,
            walk_sampler: self.args.walk_sampler.name(),
            student_share: self.share,
            schedule,
            rho: (schedule == Some(Schedule::Dynamic)).then(|| self.rho()),
            teacher_dtype: self.teacher.network().dtype().as_str(),
        }
    }

    fn rho(&self) -> f64 {
        self.args.rho.unwrap_or(self.defaults.rho)
    }

    /// A student of this architecture, with the weights that came with it or random ones.
    fn student(&self, candidate: Candidate) -> Result<Student, understudy_models::Error> {
        let default = match candidate.trained {
            Some(_) => None,
            None => self.defaults.prediction,
        };
        let prediction = self.args.prediction.or(default);
        Student::new(candidate, self.teacher, prediction, self.args.training.seed)
    }
}

/// Runs the command.
///
/// # Errors
/// A sentence naming the flag, file or field to mend.
pub(super) fn run(args: &DistillArgs, threads: NonZeroUsize) -> Result<(), String> {
    let shown = |error: understudy_models::Error| error.to_string();
    let interrupt = Interrupt::listen()?;
    let (device, dtype) = args.compute.for_training()?;
    super::note_name(&args.out);
    if let Some(folder) = args.keep_samples.as_deref().filter(|it| it.exists() && !it.is_dir()) {
        return Err(format!("--keep-samples {}: is no folder; name another", folder.display()));
    }
    if args.keep_samples.is_some() {
        super::note_retired("--keep-samples", "`understudy sample` draws the images of a teacher");
    }
    run_dir::check_out(&args.out).map_err(shown)?;
    let defaults = args.preset.defaults().training;
    let settings = args.training.settings(&defaults, Compute::trained(&device, dtype))?;
    let teacher = open_teacher(args, &device, dtype)?;
    let asked = Asked::new(args, &teacher);
    // Whatever no measuring is needed for is refused before anything is written.
    let given = match asked.share {
        None => Some(given(&asked)?),
        Some(_) => None,
    };
    let run = RunDir::open(&args.out).map_err(shown)?;
    let student = match given {
        Some(student) => student,
        None => shrunk(&asked, &run)?,
    };
    let student = begun(&asked, student, &run)?;
    let Source { source, answers, learned, role } = match args.method {
        Method::Dkdm => dkdm(&asked, &run),
        Method::DataFreeBaseline => data_free_baseline(&asked, &student, &run),
    }?;
    let predicted = student.schedule.prediction_type();
    let objective = Dkdm::new(&teacher.schedule, answers, predicted, learned)
        .map_err(shown)?
        .weighted(args.training.weighting());

    let mut identity = super::object(&asked.identity())?;
    identity.extend(Compute::identity(&device, dtype));
    let mut recipe = Map::new();
    recipe.insert("initialisation".into(), student.initialisation.clone().into());
    recipe.insert("threads".into(), threads.get().into());
    let card = Card { role, recipe, ..card(&teacher) };
    let weights = student.parameters();
    eprintln!(
        "Teacher {}: {} parameters. Student: {} parameters.",
        teacher.name,
        super::grouped(teacher.network().parameters()),
        super::grouped(weights)
    );
    let student = student.onto(&device).map_err(shown)?;
    let task = Task { run, identity, source, objective, student, settings, card };
    let mut progress =
        TrainingProgress::new("Filling the sample pool", args.training.dry_run, interrupt);
    if !args.no_report {
        progress = progress.before_report(report_seconds);
    }
    let outcome = train::train(task, &mut progress).map_err(shown)?;
    super::write_command(&args.out)?;
    match outcome {
        Outcome::Stopped { step } => progress.stopped(step, &args.out),
        Outcome::Finished => finished(args, &teacher, weights, &progress),
    }
}

/// Says what there is now, and whether it is good.
fn finished(
    args: &DistillArgs,
    teacher: &Teacher,
    weights: usize,
    progress: &TrainingProgress,
) -> Result<(), String> {
    let mut lines = vec![format!(
        "Student saved to {} ({} parameters{}).",
        args.out.display(),
        super::grouped(weights),
        progress.took()
    )];
    if !args.no_report {
        let seconds = report_seconds(progress.seconds());
        let measure = MeasureArgs::default();
        let report =
            report::after_training(&args.out, teacher.folder(), &measure, &args.compute, seconds);
        // The student is there all the same.
        match report {
            Ok((verdict, page)) => lines.extend([verdict, format!("Report: {}", page.display())]),
            Err(problem) => lines.push(format!("No report: {problem}")),
        }
    }
    let command = super::serve_command(&args.out, Some(teacher.folder()));
    lines.push(format!("Compare it with its teacher:\n  {command}"));
    super::print(lines.join("\n"))
}

/// Seconds for the report of a run that took so many.
fn report_seconds(run: f64) -> f64 {
    (0.1 * run).clamp(90.0, 900.0)
}

/// The student that `--student` names.
fn given(asked: &Asked<'_>) -> Result<Student, String> {
    let path = &asked.args.student;
    Candidate::open(path)
        .and_then(|candidate| asked.student(candidate))
        .map_err(|error| format!("--student {}: {error}", path.display()))
}

/// The student before its first training batch.
fn begun(asked: &Asked<'_>, student: Student, run: &RunDir) -> Result<Student, String> {
    let (teacher, seed) = (asked.teacher, asked.args.training.seed);
    // A resumed run has its weights in the checkpoint.
    if asked.init == Init::Random || run.checkpoint().exists() {
        return Ok(student);
    }
    // Samples of the teacher's walk, at times of their own; as the training batches will be, but other ones.
    eprintln!("Finding the teacher's most important channels.");
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
    let steps =
        asked.walk_steps.min(Walks::nearest_steps(teacher.schedule.train_timesteps(), PROBE_STEPS));
    let learned = teacher.learned_variance();
    let walks = Walks::new(&teacher.schedule, Kind::Ddpm, steps, learned).map_err(shown)?;
    let mut pool = Pool::new(teacher, walks, settings).map_err(shown)?;
    student.pruned(teacher, &mut pool, seed).map_err(shown)
}

/// Steps of the walk on which importance is measured: every timestep is visited whatever their number.
const PROBE_STEPS: usize = 50;

/// `0.5x` as a number.
fn share(student: &Path) -> Option<f64> {
    student.to_str()?.strip_suffix('x')?.parse().ok()
}

/// The network found for a share of the teacher's time; a resumed run has the one of its checkpoint.
fn shrunk(asked: &Asked<'_>, run: &RunDir) -> Result<Student, String> {
    let shown = |error: understudy_models::Error| error.to_string();
    let found = run.path().join("student.json");
    if run.checkpoint().exists() && found.exists() {
        let student = Candidate::open(&found).and_then(|candidate| asked.student(candidate));
        return student.map_err(shown);
    }
    eprintln!("Measuring narrower networks.");
    let shrunk = shrink::shrink(asked.teacher, asked.share.unwrap_or_default()).map_err(shown)?;
    eprintln!("Found one that takes {:.2} of the teacher's time per evaluation.", shrunk.share);
    if !asked.args.training.dry_run {
        write_config(&found, &shrunk.config)?;
    }
    asked.student(Candidate { config: shrunk.config, trained: None }).map_err(shown)
}

fn write_config(path: &Path, config: &NetworkConfig) -> Result<(), String> {
    let text = format!("{:#}\n", config.to_json());
    write_atomically(path, text.as_bytes()).map_err(|error| error.to_string())
}

/// Where training batches come from, and how they are to be read.
struct Source<'a> {
    source: Box<dyn BatchSource + 'a>,
    answers: PredictionType,
    learned: bool,
    role: Role,
}

/// The pool on which the teacher walks.
fn dkdm<'a>(asked: &Asked<'a>, run: &RunDir) -> Result<Source<'a>, String> {
    let shown = |error: understudy_models::Error| error.to_string();
    let (args, teacher) = (asked.args, asked.teacher);
    let learned = teacher.learned_variance();
    let walks = Walks::new(&teacher.schedule, args.walk_sampler, asked.walk_steps, learned);
    let walks = walks.map_err(shown)?;
    let settings = pool::Settings {
        order: match args.schedule {
            Schedule::Iterative => Order::Iterative,
            Schedule::Shuffled => Order::Shuffled,
            Schedule::Dynamic => Order::Dynamic { rho: asked.rho() },
        },
        batch: asked.batch,
        seed: args.training.seed,
        run: run.id().to_owned(),
        earlier: (run.checkpoint().exists())
            .then(|| args.out.file_name().unwrap_or_default().to_string_lossy().into_owned()),
        file: args.pool_file.clone(),
        finished: args.keep_samples.clone(),
    };
    let source = Box::new(Pool::new(teacher, walks, settings).map_err(shown)?);
    let answers = teacher.schedule.prediction_type();
    Ok(Source { source, answers, learned, role: Role::Student })
}

/// The teacher's images as data.
fn data_free_baseline<'a>(
    asked: &Asked<'a>,
    student: &Student,
    run: &RunDir,
) -> Result<Source<'a>, String> {
    let shown = |error: understudy_models::Error| error.to_string();
    let (args, teacher) = (asked.args, asked.teacher);
    if teacher.learned_variance() {
        return Err(
            "--method data-free-baseline: the teacher learns its variance, which images do \
                    not teach; use --method dkdm"
                .into(),
        );
    }
    let (kind, steps) = (args.walk_sampler, asked.walk_steps);
    let trajectory = sampler::trajectory(&teacher.schedule, kind, steps, 0.0, false);
    let seed = args.training.seed;
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
    let (count, batch) = (args.samples.get(), asked.batch);
    let source = Box::new(Generated::new(teacher, sampling, count, folder, network, batch, seed));
    let (answers, learned) = (PredictionType::Epsilon, false);
    Ok(Source { source, answers, learned, role: Role::Baseline })
}

fn open_teacher(
    args: &DistillArgs,
    device: &candle_core::Device,
    dtype: DType,
) -> Result<Teacher, String> {
    let explain = |error| format!("--teacher {}: {error}", args.teacher);
    let folder = args.models.resolve("--teacher", &args.teacher)?;
    // As `serve` calls it: a Hub model by its id, any other by its folder.
    let name = match hub::is_hub_id(&args.teacher) && folder != Path::new(&args.teacher) {
        true => hub::id_of(&args.teacher),
        false => super::folder_name(&folder),
    };
    Teacher::open(&folder, name, dtype, device).map_err(explain)
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
