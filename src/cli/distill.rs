//! `understudy distill`: a faster network learns from a model, without any training data.

use std::{
    num::NonZeroUsize,
    path::{Path, PathBuf},
};

use candle_core::DType;
use serde::Serialize;
use serde_json::Map;
use understudy_distill::{
    generate::{Classes, Sampling},
    generated::Generated,
    objective::{Dkdm, Objective, SegmentEnd},
    pool::{self, Order, Pool, segments::Segments},
    run_dir::{self, RunDir},
    shrink,
    student::{Candidate, Student},
    teacher::Teacher,
    train::{self, Outcome, Task},
    training_batch::BatchSource,
    walk::Walks,
};
use understudy_models::{
    Conditioning, FewerBlocks, NetworkConfig,
    checkpoint::{
        card::{Card, Defaults, Role},
        hub, write_atomically,
    },
    sampler::{self, Kind},
    schedule::PredictionType,
};

use super::{
    compute::Compute,
    distill_args::{DistillArgs, Init, Method, Schedule},
    few_steps,
    interrupt::Interrupt,
    measure::MeasureArgs,
    preset::DistillDefaults,
    progress::TrainingProgress,
    prompting::{self, Asking},
    report,
    training::TrainingIdentity,
};

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
    method: Method,
    /// Evaluations of a student that learns the ends of segments.
    evaluations: Option<usize>,
    /// A target cost, a config.json or a model folder.
    student: PathBuf,
    share: Option<f64>,
    init: Init,
    walk_steps: usize,
    batch: usize,
    /// What a text-to-image teacher is asked.
    asking: Option<Asking>,
    /// Samples of a batch.
    samples: usize,
}

impl<'a> Asked<'a> {
    /// # Errors
    /// A sentence for flags that contradict each other.
    fn new(args: &'a DistillArgs, teacher: &'a Teacher) -> Result<Self, String> {
        let defaults = defaults(args);
        let evaluations = args.evaluations.map(NonZeroUsize::get);
        let method = method(args)?;
        prompting::check_latent(args, teacher, method)?;
        let asking = Asking::new(args, teacher)?;
        let batch = args.training.batch(&defaults.training) as usize;
        let samples = asking.as_ref().map_or(Ok(batch), |asking| asking.samples(batch))?;
        if let Some(asking) = &asking {
            asking.check(teacher)?;
        }
        let walk_steps = match evaluations {
            Some(evaluations) => {
                let steps = few_steps::walk_steps(args, teacher, evaluations);
                few_steps::check(args, teacher, evaluations, steps)?;
                steps
            }
            None => args.walk_steps.unwrap_or_else(|| {
                Walks::nearest_steps(teacher.schedule.train_timesteps(), defaults.walk_steps)
            }),
        };
        if method == Method::Dkdm {
            // Refused before anything is written.
            let learned = teacher.learned_variance();
            let sampler = args.walk_sampler.unwrap_or(Kind::Ddpm);
            Walks::new(&teacher.schedule, sampler, walk_steps, learned)
                .map_err(|error| error.to_string())?;
        }
        let student = match (&args.student, evaluations) {
            (Some(student), _)
                if share(student).is_none() && blocks(student).is_none() && !student.exists() =>
            {
                let named = student.to_str().and_then(|name| args.models.folders().find(name));
                named.unwrap_or_else(|| student.clone())
            }
            (Some(student), _) => student.clone(),
            (None, Some(_)) => few_steps::usual_student(args, teacher)?,
            (None, None) => PathBuf::from(USUAL_SHARE),
        };
        let share = share(&student);
        let default_init = match share {
            Some(_) if defaults.pruned => Init::Pruned,
            None if blocks(&student).is_some() => Init::Blocks,
            _ => Init::Random,
        };
        Ok(Self {
            args,
            teacher,
            method,
            evaluations,
            student,
            share,
            init: args.init.unwrap_or(default_init),
            walk_steps,
            batch,
            asking,
            samples,
            defaults,
        })
    }

    fn identity(&self) -> RunIdentity {
        let schedule = (self.method == Method::Dkdm).then(|| self.schedule());
        RunIdentity {
            training: self.args.training.identity(&self.defaults.training),
            method: self.method,
            init: self.init,
            walk_steps: self.walk_steps,
            walk_sampler: self.walk_sampler().name(),
            student_share: self.share,
            schedule,
            rho: (schedule == Some(Schedule::Dynamic)).then(|| self.rho()),
            teacher_dtype: self.teacher.network().dtype().as_str(),
        }
    }

    fn schedule(&self) -> Schedule {
        self.args.schedule.unwrap_or(Schedule::Dynamic)
    }

    fn walk_sampler(&self) -> Kind {
        let usual = if self.evaluations.is_some() { Kind::Ddim } else { Kind::Ddpm };
        self.args.walk_sampler.unwrap_or(usual)
    }

    fn rho(&self) -> f64 {
        self.args.rho.unwrap_or(self.defaults.rho)
    }

    /// The network, with an input for a guidance scale where the student is to have one.
    fn of_guidance(&self, config: NetworkConfig) -> NetworkConfig {
        match &self.asking {
            Some(asking) => asking.student(config),
            None => config,
        }
    }

    /// A student of this architecture, with the weights that came with it or random ones.
    fn student(&self, candidate: Candidate) -> Result<Student, understudy_models::Error> {
        let default = match candidate.trained {
            Some(_) => None,
            None if self.evaluations.is_some() => Some(PredictionType::Velocity),
            None => self.defaults.prediction,
        };
        let prediction = self.args.prediction.or(default);
        let student = Student::new(candidate, self.teacher, prediction, self.args.training.seed)?;
        match self.evaluations {
            Some(_) => student.of_few_steps(),
            None => Ok(student),
        }
    }
}

/// The student where nobody says.
const USUAL_SHARE: &str = "0.5x";

/// What the preset says. A student of few steps goes on from one that has learned before: half the learning rate.
fn defaults(args: &DistillArgs) -> DistillDefaults {
    let mut defaults = args.preset.defaults();
    if args.evaluations.is_some() {
        defaults.training.learning_rate *= 0.5;
    }
    defaults
}

/// The method that the flags mean.
fn method(args: &DistillArgs) -> Result<Method, String> {
    match (args.method, args.evaluations) {
        (None, None) => Ok(Method::Dkdm),
        (None | Some(Method::SegmentRegression), Some(_)) => Ok(Method::SegmentRegression),
        (Some(Method::SegmentRegression), None) => {
            Err("--method segment-regression: say how many steps the student is to need, such as --evaluations 4".into())
        }
        (Some(method), None) => Ok(method),
        (Some(method), Some(evaluations)) => Err(format!(
            "--method {}: does not reduce the number of steps; leave out --evaluations {evaluations}, or use --method \
             segment-regression",
            super::word(method)
        )),
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
    let settings =
        args.training.settings(&defaults(args).training, Compute::trained(&device, dtype))?;
    let teacher = open_teacher(args, &device, dtype)?;
    let asked = Asked::new(args, &teacher)?;
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
    // Evaluations are named for the one method that is told them.
    let Source { source, objective, role } = match asked.evaluations {
        Some(evaluations) => segment_regression(&asked, evaluations),
        None if asked.method == Method::DataFreeBaseline => {
            data_free_baseline(&asked, &student, &run)
        }
        None => dkdm(&asked, &student, &run),
    }?;

    let mut identity = super::object(&asked.identity())?;
    identity.extend(Compute::identity(&device, dtype));
    let mut recipe = Map::new();
    recipe.insert("initialisation".into(), student.initialisation.clone().into());
    recipe.insert("threads".into(), threads.get().into());
    let card = Card { role, recipe, ..card(&asked) };
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
    // Latent and text-to-image models are not evaluated yet.
    let reports = !args.no_report && teacher.makes_pixels();
    if reports {
        progress = progress.before_report(report_seconds);
    }
    let outcome = train::train(task, &mut progress).map_err(shown)?;
    super::write_command(&args.out)?;
    match outcome {
        Outcome::Stopped { step } => progress.stopped(step, &args.out),
        Outcome::Finished => finished(args, &teacher, weights, reports, &progress),
    }
}

/// Says what there is now, and whether it is good.
fn finished(
    args: &DistillArgs,
    teacher: &Teacher,
    weights: usize,
    reports: bool,
    progress: &TrainingProgress,
) -> Result<(), String> {
    let mut lines = vec![format!(
        "Student saved to {} ({} parameters{}).",
        args.out.display(),
        super::grouped(weights),
        progress.took()
    )];
    if reports {
        let seconds = report_seconds(progress.seconds());
        let measure = MeasureArgs::default();
        let report =
            report::after_training(&args.out, teacher.folder(), &measure, &args.compute, seconds);
        // The student is there all the same.
        match report {
            Ok((verdict, page)) => lines.extend([verdict, format!("Report: {}", page.display())]),
            Err(problem) => lines.push(format!("No report: {problem}")),
        }
    } else if !args.no_report {
        let grids = args.out.join("training");
        lines.push(format!(
            "No report: models of latents have none yet. Look at the grids of samples in {}.",
            grids.display()
        ));
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
    let path = &asked.student;
    let explain = |problem: String| format!("--student {}: {problem}", path.display());
    let candidate = match blocks(path).map(|how| asked.teacher.config.fewer_blocks(how)) {
        Some(Some(config)) => {
            config.map(|config| Candidate { config: asked.of_guidance(config), trained: None })
        }
        Some(None) => {
            let problem = "leaves out blocks of a text-to-image teacher of Stable Diffusion's shape; take 0.5x";
            return Err(explain(problem.into()));
        }
        None => Candidate::open(path),
    };
    let candidate = candidate.map_err(|error| explain(error.to_string()))?;
    if let Some(asking) = &asked.asking {
        asking.check_student(&candidate.config)?;
    }
    asked.student(candidate).map_err(|error| explain(error.to_string()))
}

/// The student before its first training batch.
fn begun(asked: &Asked<'_>, student: Student, run: &RunDir) -> Result<Student, String> {
    let (teacher, seed) = (asked.teacher, asked.args.training.seed);
    // A resumed run has its weights in the checkpoint.
    if asked.init == Init::Random || run.checkpoint().exists() {
        return Ok(student);
    }
    let shown = |error: understudy_models::Error| error.to_string();
    if asked.init == Init::Blocks {
        return student.of_blocks(teacher).map_err(shown);
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
    let steps =
        asked.walk_steps.min(Walks::nearest_steps(teacher.schedule.train_timesteps(), PROBE_STEPS));
    let learned = teacher.learned_variance();
    let walks = Walks::new(&teacher.schedule, Kind::Ddpm, steps, learned).map_err(shown)?;
    let prompting = asked.asking.as_ref().map(|asking| asking.of_probe(teacher)).transpose()?;
    let mut pool = Pool::new(teacher, walks, settings).map_err(shown)?.prompted(prompting);
    student.pruned(teacher, &mut pool, seed).map_err(shown)
}

/// Steps of the walk on which importance is measured: every timestep is visited whatever their number.
const PROBE_STEPS: usize = 50;

/// `base`, `small` or `tiny`.
fn blocks(student: &Path) -> Option<FewerBlocks> {
    FewerBlocks::ALL.into_iter().find(|how| student.to_str() == Some(how.name()))
}

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
    let config = asked.of_guidance(shrunk.config);
    if !asked.args.training.dry_run {
        write_config(&found, &config)?;
    }
    asked.student(Candidate { config, trained: None }).map_err(shown)
}

fn write_config(path: &Path, config: &NetworkConfig) -> Result<(), String> {
    let text = format!("{:#}\n", config.to_json());
    write_atomically(path, text.as_bytes()).map_err(|error| error.to_string())
}

/// Where training batches come from, and how they are to be read.
struct Source<'a> {
    source: Box<dyn BatchSource + 'a>,
    objective: Objective,
    role: Role,
}

/// The pool on which the teacher walks.
fn dkdm<'a>(asked: &Asked<'a>, student: &Student, run: &RunDir) -> Result<Source<'a>, String> {
    let shown = |error: understudy_models::Error| error.to_string();
    let (args, teacher) = (asked.args, asked.teacher);
    let learned = teacher.learned_variance();
    let walks = Walks::new(&teacher.schedule, asked.walk_sampler(), asked.walk_steps, learned);
    let walks = walks.map_err(shown)?;
    let settings = pool::Settings {
        order: match asked.schedule() {
            Schedule::Iterative => Order::Iterative,
            Schedule::Shuffled => Order::Shuffled,
            Schedule::Dynamic => Order::Dynamic { rho: asked.rho() },
        },
        batch: asked.samples,
        seed: args.training.seed,
        run: run.id().to_owned(),
        earlier: (run.checkpoint().exists())
            .then(|| args.out.file_name().unwrap_or_default().to_string_lossy().into_owned()),
        file: args.pool_file.clone(),
        finished: args.keep_samples.clone(),
    };
    let prompting = asked.asking.as_ref().map(|asking| asking.of_run(teacher, run)).transpose()?;
    let pool = Pool::new(teacher, walks, settings).map_err(shown)?;
    let source = Box::new(pool.prompted(prompting));
    let objective = in_eps(asked, teacher.schedule.prediction_type(), student, learned)?;
    Ok(Source { source, objective, role: Role::Student })
}

/// The loss in eps, of answers that are `answers`.
fn in_eps(
    asked: &Asked<'_>,
    answers: PredictionType,
    student: &Student,
    learned: bool,
) -> Result<Objective, String> {
    let predicted = student.schedule.prediction_type();
    let objective = Dkdm::new(&asked.teacher.schedule, answers, predicted, learned);
    let objective = objective.map_err(|error| error.to_string())?;
    Ok(Objective::Dkdm(objective.weighted(asked.args.training.weighting())))
}

/// The pool on which the teacher walks a segment at a time.
fn segment_regression<'a>(asked: &Asked<'a>, evaluations: usize) -> Result<Source<'a>, String> {
    let walk = (evaluations, asked.walk_steps, asked.batch);
    let settings = few_steps::pool(asked.args, asked.teacher, &asked.defaults, walk);
    let pool = Segments::new(asked.teacher, settings).map_err(|error| error.to_string())?;
    let objective = Objective::SegmentEnd(SegmentEnd);
    Ok(Source { source: Box::new(pool), objective, role: Role::Student })
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
    let (kind, steps) = (asked.walk_sampler(), asked.walk_steps);
    let trajectory = sampler::trajectory(&teacher.schedule, kind, steps, 0.0, false);
    let seed = args.training.seed;
    let sampling = Sampling {
        trajectory: trajectory.map_err(shown)?,
        classes: match teacher.geometry().conditioning {
            Conditioning::Classes(classes) => Classes::FromSeed(classes),
            _ => Classes::None,
        },
        captions: None,
        // Runs of different seeds are to see different images.
        first_seed: seed.wrapping_mul(1 << 32),
        batch: 64,
    };
    let folder = run.path().join("teacher-samples");
    let network = (student.config.clone(), student.schedule.clone());
    let (count, batch) = (args.samples.get(), asked.batch);
    let source = Box::new(Generated::new(teacher, sampling, count, folder, network, batch, seed));
    let objective = in_eps(asked, PredictionType::Epsilon, student, false)?;
    Ok(Source { source, objective, role: Role::Baseline })
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
fn card(asked: &Asked<'_>) -> Card {
    let teacher = asked.teacher;
    let mut defaults = match asked.evaluations {
        None => teacher.card.defaults.clone(),
        Some(evaluations) => Defaults {
            num_inference_steps: Some(evaluations),
            scheduler: Some(Kind::Ddim.name().into()),
            ..teacher.card.defaults.clone()
        },
    };
    let range = asked.asking.as_ref().and_then(Asking::range);
    if let Some([least, most]) = range {
        let scale = defaults.guidance_scale.unwrap_or(1.0).clamp(least, most);
        defaults.guidance_scale = Some(scale);
    }
    Card {
        guidance_range: range,
        example_prompts: teacher.card.example_prompts.clone(),
        teacher: Some(teacher.name.clone()),
        class_names: teacher.card.class_names.clone(),
        null_class: teacher.card.null_class,
        defaults,
        evaluations: asked.evaluations.map(few_steps::evaluations).unwrap_or_default(),
        ..Card::default()
    }
}
