//! `understudy distill`: a faster network learns from a model, without any training data.

use std::{
    num::NonZeroUsize,
    path::{Path, PathBuf},
    rc::Rc,
};

use candle_core::DType;
use serde_json::Map;
use understudy_distill::{
    generate::{Classes, Sampling},
    generated::{self, Latents, Pictures},
    matching::{self, Matching},
    objective::{Dkdm, Objective, SegmentEnd},
    pool::{self, Order, Pool, segments::Segments},
    prompting::Prompting,
    ranks::{self, Alone, Exchange, Shards, World},
    run_dir::{self, RunDir},
    shrink,
    student::{self, Candidate, Student},
    teacher::Teacher,
    train::{self, Outcome, Task},
    training_batch::BatchSource,
    walk::Walks,
};
use understudy_models::{
    Conditioning, NetworkConfig,
    checkpoint::{
        card::{Card, Defaults, Role},
        hub, write_atomically,
    },
    noise,
    sampler::{self, Kind},
    schedule::PredictionType,
};

use super::{
    compute::Compute,
    distill_args::{DistillArgs, Init, Method, Schedule},
    distill_plan::{Plan, blocks, defaults},
    few_steps,
    interrupt::Interrupt,
    measure::MeasureArgs,
    progress::{DRY, TrainingProgress},
    prompting::PromptArgs,
    report,
};
use crate::mlflow::Status;

/// Runs the command.
///
/// # Errors
/// A sentence naming the flag, file or field to mend.
pub(super) fn run(
    args: &DistillArgs,
    threads: NonZeroUsize,
    world: &dyn World,
) -> Result<(), String> {
    stage(args, threads, world, Interrupt::listen()?, Before::default())?;
    if args.training.dry_run && world.rank() == 0 { super::print(DRY) } else { Ok(()) }
}

/// What was there before a run.
#[derive(Default)]
pub(super) struct Before {
    /// It is a stage of a recipe: one that had ended is passed over.
    pub(super) stage: bool,
    /// The network of the stage that the student goes on from, which a dry run has not made.
    pub(super) network: Option<NetworkConfig>,
}

/// What a run leaves.
pub(super) struct Ran {
    /// The student's.
    pub(super) network: NetworkConfig,
    /// What was left of it when it began.
    pub(super) estimated_seconds: f64,
}

/// Refuses what can be refused before the run begins; `goes_on` where its student is not there yet. A teacher that was opened
/// for the run before is taken again.
///
/// # Errors
/// A sentence naming the flag, file or field to mend.
pub(super) fn check(
    args: &DistillArgs,
    goes_on: bool,
    teacher: &mut Option<(String, Teacher)>,
) -> Result<(), String> {
    let (device, dtype) = args.compute.for_training()?;
    run_dir::check_out(&args.out).map_err(|error| error.to_string())?;
    let settings =
        args.training.settings(&defaults(args).training, Compute::trained(&device, dtype))?;
    let (_, teacher) = match teacher.take().filter(|(name, _)| *name == args.teacher) {
        Some(opened) => teacher.insert(opened),
        None => teacher.insert((args.teacher.clone(), open_teacher(args, &device, dtype)?)),
    };
    let plan = Plan::new(args, teacher)?;
    ranks::check(plan.shards, plan.batch, settings.accumulate, &Alone)
        .map_err(|error| error.to_string())?;
    if !goes_on && plan.share.is_none() {
        given(&plan, None)?;
    }
    Ok(())
}

/// Does a run.
///
/// # Errors
/// A sentence naming the flag, file or field to mend; for one that was interrupted, how to go on.
pub(super) fn stage(
    args: &DistillArgs,
    threads: NonZeroUsize,
    world: &dyn World,
    interrupt: Interrupt,
    before: Before,
) -> Result<Ran, String> {
    let shown = |error: understudy_models::Error| error.to_string();
    let first = world.rank() == 0;
    let (device, dtype) = args.compute.for_training()?;
    let tracking = if first { args.training.tracking(&args.out)? } else { None };
    if first {
        super::note_name(&args.out);
    }
    if let Some(folder) = args.keep_samples.as_deref().filter(|it| it.exists() && !it.is_dir()) {
        return Err(format!("--keep-samples {}: is no folder; name another", folder.display()));
    }
    if args.keep_samples.is_some() && first {
        super::note_retired("--keep-samples", "`understudy sample` draws the images of a teacher");
    }
    run_dir::check_out(&args.out).map_err(shown)?;
    let mut settings =
        args.training.settings(&defaults(args).training, Compute::trained(&device, dtype))?;
    let teacher = open_teacher(args, &device, dtype)?;
    let plan = Plan::new(args, &teacher)?;
    ranks::check(plan.shards, plan.batch, settings.accumulate, world).map_err(shown)?;
    let exchange = Exchange::open(world, &device).map_err(shown)?;
    if first && world.size() > 1 {
        eprintln!("{} ranks: gradients go {}.", world.size(), exchange.way());
    }
    // Whatever no measuring is needed for is refused before anything is written.
    let given = match plan.share {
        None => Some(given(&plan, before.network)?),
        Some(_) => None,
    };
    let run = if first { Some(RunDir::open(&args.out).map_err(shown)?) } else { None };
    let student = match given {
        Some(student) => student,
        None => shrunk(&plan, run.as_ref(), world)?,
    };
    let student = begun(&plan, student, run.as_ref())?;
    let prompting = asked(&plan, run.as_ref())?;
    // Evaluations are named for the one method that is told them.
    let shards = Shards::new(world, plan.shards, |shard| {
        let shard = Shard::new(&plan, shard);
        match plan.evaluations {
            Some(evaluations) => segment_regression(&plan, &shard, &prompting, evaluations),
            None if plan.method == Method::DataFreeBaseline => {
                data_free_baseline(&plan, &student, run.as_ref(), &prompting)
            }
            None => dkdm(&plan, &shard, run.as_ref(), &prompting),
        }
    })?
    .exchanging(exchange);
    let (objective, role) = objective(&plan, &student)?;

    let mut identity = super::object(&plan.identity())?;
    identity.extend(Compute::identity(&device, dtype));
    let mut recipe = Map::new();
    recipe.insert("initialisation".into(), student.initialisation.clone().into());
    recipe.insert("threads".into(), threads.get().into());
    let card = Card { role, recipe, ..card(&plan) };
    let (weights, network) = (student.parameters(), student.config.clone());
    if first {
        eprintln!(
            "Teacher {}: {} parameters. Student: {} parameters.",
            teacher.name,
            super::grouped(teacher.network().parameters()),
            super::grouped(weights)
        );
    }
    let student = student.onto(&device).map_err(shown)?;
    let matching = match plan.evaluations.filter(|_| plan.method == Method::DistributionMatching) {
        None => None,
        Some(evaluations) => {
            // The mean of past gradients is one of a critic that was another.
            settings.optimizer.beta1 = 0.0;
            let (seed, dtype) = (args.training.seed, settings.dtype);
            let of_matching =
                matching::Settings { evaluations, seed, optimizer: settings.optimizer, dtype };
            let matching = Matching::new(&teacher, &student.schedule, of_matching, &device);
            Some(matching.map_err(shown)?.prompted(prompting))
        }
    };
    let task = Task { run, identity, shards, objective, matching, student, settings, card };
    let mut progress = TrainingProgress::new(
        "Filling the sample pool",
        args.training.dry_run,
        interrupt,
        tracking,
    )
    .silent(!first);
    if !args.no_report {
        progress = progress.before_report(report_seconds);
    }
    let outcome = train::train(task, &mut progress).map_err(shown)?;
    // What is left is the first rank's to do.
    world.close();
    let estimated_seconds = progress.estimated_seconds();
    if !first {
        return Ok(Ran { network, estimated_seconds });
    }
    if !args.training.dry_run {
        super::write_command(&args.out)?;
    }
    match outcome {
        Outcome::Stopped { step } => progress.stopped(step, &args.out)?,
        Outcome::Finished
            if estimated_seconds == 0.0 && (before.stage || args.training.dry_run) =>
        {
            eprintln!("It is done already: {} has the model.", args.out.display());
        }
        Outcome::Finished => {
            let (lines, report) = finished(args, &teacher, weights, &progress);
            progress.ended(Status::Finished, report);
            super::print(lines.join("\n"))?;
        }
    }
    Ok(Ran { network, estimated_seconds })
}

/// What there is now, and whether it is good, in lines; and the report that tells more.
fn finished(
    args: &DistillArgs,
    teacher: &Teacher,
    weights: usize,
    progress: &TrainingProgress,
) -> (Vec<String>, Option<PathBuf>) {
    let mut written = None;
    let mut lines = vec![format!(
        "Student saved to {} ({} parameters{}).",
        args.out.display(),
        super::grouped(weights),
        progress.took()
    )];
    if !args.no_report {
        let seconds = report_seconds(progress.seconds());
        let measure = MeasureArgs { prompts: args.prompts.clone(), ..MeasureArgs::default() };
        let report =
            report::after_training(&args.out, teacher.folder(), &measure, &args.compute, seconds);
        // The student is there all the same.
        match report {
            Ok((verdict, page)) => {
                lines.extend([verdict, format!("Report: {}", page.display())]);
                written = Some(page);
            }
            Err(problem) => lines.push(format!("No report: {problem}")),
        }
    }
    let command = super::serve_command(&args.out, Some(teacher.folder()));
    lines.push(format!("Compare it with its teacher:\n  {command}"));
    (lines, written)
}

/// Seconds for the report of a run that took so many.
fn report_seconds(run: f64) -> f64 {
    (0.1 * run).clamp(90.0, 900.0)
}

/// The student that `--student` names; one of that network where it is not there yet.
fn given(plan: &Plan<'_>, to_be: Option<NetworkConfig>) -> Result<Student, String> {
    let path = &plan.student;
    let explain = |problem: String| format!("--student {}: {problem}", path.display());
    let candidate = match blocks(path).map(|how| plan.teacher.config.fewer_blocks(how)) {
        Some(Some(config)) => {
            config.map(|config| Candidate { config: plan.of_guidance(config), trained: None })
        }
        Some(None) => {
            let problem = "leaves out blocks of a text-to-image teacher of Stable Diffusion's shape; take 0.5x";
            return Err(explain(problem.into()));
        }
        None => match to_be.filter(|_| plan.args.training.dry_run && !path.exists()) {
            Some(config) => Ok(Candidate { config, trained: None }),
            None => Candidate::open(path),
        },
    };
    let candidate = candidate.map_err(|error| explain(error.to_string()))?;
    if candidate.trained.is_some() && plan.args.init == Some(Init::Random) {
        let problem = "has weights, which --init random would leave; give its config.json, or leave out --init";
        return Err(explain(problem.into()));
    }
    if let Some(prompted) = &plan.prompted {
        prompted.check_student(&candidate.config)?;
    }
    plan.student(candidate).map_err(|error| explain(error.to_string()))
}

/// The student before its first training batch.
fn begun(plan: &Plan<'_>, mut student: Student, run: Option<&RunDir>) -> Result<Student, String> {
    let (teacher, seed) = (plan.teacher, plan.args.training.seed);
    if plan.init == Init::Random {
        return Ok(student);
    }
    // A resumed run has its weights in the checkpoint, and other ranks than the first have them from that.
    if run.is_none_or(|run| run.checkpoint().exists()) {
        let began = if plan.init == Init::Blocks { student::BLOCKS } else { student::CHANNELS };
        student.initialisation = began.into();
        return Ok(student);
    }
    let shown = |error: understudy_models::Error| error.to_string();
    if plan.init == Init::Blocks {
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
        plan.walk_steps.min(Walks::nearest_steps(teacher.schedule.train_timesteps(), PROBE_STEPS));
    let learned = teacher.learned_variance();
    let walks = Walks::new(&teacher.schedule, Kind::Ddpm, steps, learned).map_err(shown)?;
    let prompting =
        plan.prompted.as_ref().map(|prompted| prompted.of_probe(teacher)).transpose()?;
    let mut pool =
        Pool::new(teacher, walks, settings).map_err(shown)?.prompted(prompting.map(Rc::new));
    student.pruned(teacher, &mut pool, seed).map_err(shown)
}

/// Steps of the walk on which importance is measured: every timestep is visited whatever their number.
const PROBE_STEPS: usize = 50;

/// The network found for a share of the teacher's time, by the first rank; a resumed run has the one of its checkpoint.
fn shrunk(plan: &Plan<'_>, run: Option<&RunDir>, world: &dyn World) -> Result<Student, String> {
    let shown = |error: understudy_models::Error| error.to_string();
    let found = run.map(|run| narrower(plan, run)).transpose()?;
    let mut text =
        found.map_or_else(String::new, |config| config.to_json().to_string()).into_bytes();
    world.broadcast(&mut text);
    let config = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
    let config = NetworkConfig::from_json(&config, "the network found by the first rank");
    plan.student(Candidate { config: config.map_err(shown)?, trained: None }).map_err(shown)
}

/// The network that takes the student's share of the teacher's time.
fn narrower(plan: &Plan<'_>, run: &RunDir) -> Result<NetworkConfig, String> {
    let shown = |error: understudy_models::Error| error.to_string();
    let found = run.path().join("student.json");
    if run.checkpoint().exists() && found.exists() {
        return Ok(Candidate::open(&found).map_err(shown)?.config);
    }
    eprintln!("Measuring narrower networks.");
    let shrunk = shrink::shrink(plan.teacher, plan.share.unwrap_or_default()).map_err(shown)?;
    eprintln!("Found one that takes {:.2} of the teacher's time per evaluation.", shrunk.share);
    let config = plan.of_guidance(shrunk.config);
    if !plan.args.training.dry_run {
        write_config(&found, &config)?;
    }
    Ok(config)
}

fn write_config(path: &Path, config: &NetworkConfig) -> Result<(), String> {
    let text = format!("{:#}\n", config.to_json());
    write_atomically(path, text.as_bytes()).map_err(|error| error.to_string())
}

/// What training batches are to be, of one shard.
struct Shard {
    batch: usize,
    samples: usize,
    seed: u64,
}

impl Shard {
    fn new(plan: &Plan<'_>, shard: usize) -> Self {
        let Plan { batch, samples, shards, .. } = *plan;
        let seed = ranks::seed(plan.args.training.seed, shard);
        Self { batch: batch / shards, samples: samples / shards, seed }
    }
}

/// Where training batches come from.
type Source<'a> = Box<dyn BatchSource + 'a>;

/// How training batches are to be read, and what learns from them.
fn objective(plan: &Plan<'_>, student: &Student) -> Result<(Objective, Role), String> {
    let teacher = plan.teacher;
    Ok(match plan.method {
        _ if plan.evaluations.is_some() => (Objective::SegmentEnd(SegmentEnd), Role::Student),
        Method::DataFreeBaseline => {
            (in_eps(plan, PredictionType::Epsilon, student, false)?, Role::Baseline)
        }
        _ => {
            let learned = teacher.learned_variance();
            let answers = teacher.schedule.prediction_type();
            (in_eps(plan, answers, student, learned)?, Role::Student)
        }
    })
}

/// What a text-to-image teacher is asked, which one rank has alone.
fn asked(plan: &Plan<'_>, run: Option<&RunDir>) -> Result<Option<Rc<Prompting>>, String> {
    let both = plan.prompted.as_ref().zip(run);
    both.map(|(prompted, run)| prompted.of_run(plan.teacher, run).map(Rc::new)).transpose()
}

/// The pool on which the teacher walks.
fn dkdm<'a>(
    plan: &Plan<'a>,
    shard: &Shard,
    run: Option<&RunDir>,
    prompting: &Option<Rc<Prompting>>,
) -> Result<Source<'a>, String> {
    let shown = |error: understudy_models::Error| error.to_string();
    let (args, teacher) = (plan.args, plan.teacher);
    let learned = teacher.learned_variance();
    let walks = Walks::new(&teacher.schedule, plan.walk_sampler(), plan.walk_steps, learned);
    let walks = walks.map_err(shown)?;
    let settings = pool::Settings {
        order: match plan.schedule() {
            Schedule::Iterative => Order::Iterative,
            Schedule::Shuffled => Order::Shuffled,
            Schedule::Dynamic => Order::Dynamic { rho: plan.rho() },
        },
        batch: shard.samples,
        seed: shard.seed,
        run: run.map(|run| run.id().to_owned()).unwrap_or_default(),
        earlier: run
            .filter(|run| run.checkpoint().exists())
            .map(|_| args.out.file_name().unwrap_or_default().to_string_lossy().into_owned()),
        file: args.pool_file.clone(),
        finished: args.keep_samples.clone(),
    };
    let pool = Pool::new(teacher, walks, settings).map_err(shown)?;
    Ok(Box::new(pool.prompted(prompting.clone())))
}

/// The loss in eps, of answers that are `answers`.
fn in_eps(
    plan: &Plan<'_>,
    answers: PredictionType,
    student: &Student,
    learned: bool,
) -> Result<Objective, String> {
    let predicted = student.schedule.prediction_type();
    let objective = Dkdm::new(&plan.teacher.schedule, answers, predicted, learned);
    let objective = objective.map_err(|error| error.to_string())?;
    Ok(Objective::Dkdm(objective.weighted(plan.args.training.weighting())))
}

/// The pool on which the teacher walks a segment at a time.
fn segment_regression<'a>(
    plan: &Plan<'a>,
    shard: &Shard,
    prompting: &Option<Rc<Prompting>>,
    evaluations: usize,
) -> Result<Source<'a>, String> {
    let walk = (evaluations, plan.walk_steps);
    let settings =
        few_steps::pool(plan.args, plan.teacher, &plan.defaults, walk, (shard.batch, shard.seed));
    let pool = Segments::new(plan.teacher, settings).map_err(|error| error.to_string())?;
    Ok(Box::new(pool.prompted(prompting.clone())))
}

/// Samples of the baseline where nobody says.
const SAMPLES: u32 = 10_000;
/// Seeds of images between those of two runs.
const SEEDS_APART: u64 = 1 << 32;

/// The teacher's samples as data: images, or what a latent model makes.
fn data_free_baseline<'a>(
    plan: &Plan<'a>,
    student: &Student,
    run: Option<&RunDir>,
    prompting: &Option<Rc<Prompting>>,
) -> Result<Source<'a>, String> {
    let shown = |error: understudy_models::Error| error.to_string();
    let (args, teacher) = (plan.args, plan.teacher);
    if teacher.learned_variance() {
        return Err(
            "--method data-free-baseline: the teacher learns its variance, which images do \
                    not teach; use --method dkdm"
                .into(),
        );
    }
    let (kind, steps) = (plan.walk_sampler(), plan.walk_steps);
    let trajectory = sampler::trajectory(&teacher.schedule, kind, steps, 0.0, false);
    let seed = args.training.seed;
    if seed >= noise::SEEDS / SEEDS_APART {
        return Err(format!(
            "--seed {seed}: with --method data-free-baseline it must be below {}, so that no two see the same images",
            noise::SEEDS / SEEDS_APART
        ));
    }
    let sampling = Sampling {
        trajectory: trajectory.map_err(shown)?,
        classes: match teacher.geometry().conditioning {
            Conditioning::Classes(classes) => Classes::FromSeed(classes),
            _ => Classes::None,
        },
        captions: None,
        // Runs of different seeds are to see different images.
        first_seed: seed * SEEDS_APART,
        batch: 64,
    };
    // Not one of several shards, so this is the first rank.
    let run = run.ok_or("--method data-free-baseline: takes one process")?;
    let folder = run.path().join("teacher-samples");
    let (count, batch) = (args.samples.unwrap_or(SAMPLES) as usize, plan.batch);
    let settings = generated::Settings { sampling, count, folder, batch, seed };
    if teacher.model().makes_pixels() {
        let (network, schedule) = (student.config.clone(), student.schedule.clone());
        let pictures = Pictures::new(teacher, settings, network, schedule);
        return Ok(Box::new(pictures.map_err(shown)?));
    }
    let latents = Latents::new(teacher, prompting.clone(), settings, &student.schedule);
    Ok(Box::new(latents.map_err(shown)?))
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
fn card(plan: &Plan<'_>) -> Card {
    let teacher = plan.teacher;
    let mut defaults = match plan.evaluations {
        None => teacher.card.defaults.clone(),
        Some(evaluations) => Defaults {
            num_inference_steps: Some(evaluations),
            scheduler: Some(Kind::Ddim.name().into()),
            ..teacher.card.defaults.clone()
        },
    };
    let range = plan.prompted.as_ref().and_then(PromptArgs::range);
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
        evaluations: plan.evaluations.map(few_steps::evaluations).unwrap_or_default(),
        ..Card::default()
    }
}
