//! What the flags of `understudy distill` come to.

use std::{
    num::NonZeroUsize,
    path::{Path, PathBuf},
};

use serde::Serialize;
use understudy_distill::{
    student::{Candidate, Student},
    teacher::Teacher,
    walk::Walks,
};
use understudy_models::{FewerBlocks, NetworkConfig, sampler::Kind, schedule::PredictionType};

use super::{
    distill_args::{DistillArgs, Init, Method, Schedule},
    few_steps,
    preset::DistillDefaults,
    prompting::{self, PromptArgs},
    training::TrainingIdentity,
};

/// What makes the run another one than its neighbour, beside what the parts of the task say of themselves. A resumed
/// run must find the same.
#[derive(Debug, Serialize)]
pub(super) struct RunIdentity {
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
pub(super) struct Plan<'a> {
    pub(super) args: &'a DistillArgs,
    pub(super) defaults: DistillDefaults,
    pub(super) teacher: &'a Teacher,
    pub(super) method: Method,
    /// Evaluations of a student that learns the ends of segments.
    pub(super) evaluations: Option<usize>,
    /// A target cost, a config.json or a model folder.
    pub(super) student: PathBuf,
    pub(super) share: Option<f64>,
    pub(super) init: Init,
    pub(super) walk_steps: usize,
    pub(super) batch: usize,
    /// The prompts of a text-to-image teacher, and how far they guide it.
    pub(super) prompted: Option<PromptArgs>,
    /// Samples of a batch.
    pub(super) samples: usize,
    /// Parts of a batch that have a pool of their own.
    pub(super) shards: usize,
}

impl<'a> Plan<'a> {
    /// # Errors
    /// A sentence for flags that contradict each other.
    pub(super) fn new(args: &'a DistillArgs, teacher: &'a Teacher) -> Result<Self, String> {
        let defaults = defaults(args);
        let evaluations = args.evaluations.map(NonZeroUsize::get);
        let method = method(args)?;
        check_effect(args, method)?;
        prompting::check_latent(args, teacher)?;
        let prompted = PromptArgs::new(args, teacher, method)?;
        let batch = args.training.batch(&defaults.training) as usize;
        let samples = prompted.as_ref().map_or(Ok(batch), |prompted| prompted.samples(batch))?;
        if let Some(prompted) = &prompted {
            prompted.check(teacher)?;
        }
        let walk_steps = match evaluations {
            Some(evaluations) => {
                let steps = few_steps::walk_steps(args, teacher, evaluations);
                few_steps::check(args, teacher, (evaluations, steps))?;
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
        let shards = shards(args, method)?;
        let student = match (&args.student, evaluations) {
            (Some(student), _)
                if share(student).is_none() && blocks(student).is_none() && !student.exists() =>
            {
                let named = student.to_str().and_then(|name| args.models.folders().find(name));
                named.unwrap_or_else(|| student.clone())
            }
            (Some(student), _) => student.clone(),
            (None, Some(evaluations)) => {
                few_steps::usual_student(args, teacher, method, evaluations)?
            }
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
            prompted,
            samples,
            shards,
            defaults,
        })
    }

    pub(super) fn identity(&self) -> RunIdentity {
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

    pub(super) fn schedule(&self) -> Schedule {
        self.args.schedule.unwrap_or(Schedule::Dynamic)
    }

    pub(super) fn walk_sampler(&self) -> Kind {
        let usual = if self.evaluations.is_some() { Kind::Ddim } else { Kind::Ddpm };
        self.args.walk_sampler.unwrap_or(usual)
    }

    pub(super) fn rho(&self) -> f64 {
        self.args.rho.unwrap_or(self.defaults.rho)
    }

    /// The network, with an input for a guidance scale where the student is to have one.
    pub(super) fn of_guidance(&self, config: NetworkConfig) -> NetworkConfig {
        match &self.prompted {
            Some(prompted) => prompted.student(config),
            None => config,
        }
    }

    /// A student of this architecture, with the weights that came with it or random ones.
    pub(super) fn student(
        &self,
        candidate: Candidate,
    ) -> Result<Student, understudy_models::Error> {
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

/// What the preset says. A student of few steps goes on from one that has learned before: half the learning rate. Matched to
/// its teacher's distribution it is led by a critic that must keep up with it: it learns slowly, and in steps that take
/// longer.
pub(super) fn defaults(args: &DistillArgs) -> DistillDefaults {
    let mut defaults = args.preset.defaults();
    if args.evaluations.is_some() {
        defaults.training.learning_rate *= 0.5;
    }
    if args.method == Some(Method::DistributionMatching) {
        defaults.training.learning_rate = 5e-5;
        defaults.training.steps /= 5;
    }
    defaults
}

/// The method that the flags mean.
fn method(args: &DistillArgs) -> Result<Method, String> {
    match (args.method, args.evaluations) {
        (None, None) => Ok(Method::Dkdm),
        (None, Some(_)) => Ok(Method::SegmentRegression),
        (Some(method), evaluations) if method.reduces_steps() => match evaluations {
            Some(_) => Ok(method),
            None => Err(format!(
                "--method {}: say how many steps the student is to need, such as --evaluations 4",
                super::word(method)
            )),
        },
        (Some(method), None) => Ok(method),
        (Some(method), Some(evaluations)) => Err(format!(
            "--method {}: does not reduce the number of steps; leave out --evaluations {evaluations}, or use --method \
             segment-regression or distribution-matching",
            super::word(method)
        )),
    }
}

/// Refuses flags that would do nothing.
fn check_effect(args: &DistillArgs, method: Method) -> Result<(), String> {
    let refuse =
        |flag: String, of: &str| Err(format!("{flag}: counts for {of} alone; leave it out"));
    if method != Method::DataFreeBaseline
        && let Some(samples) = args.samples
    {
        return refuse(format!("--samples {samples}"), "--method data-free-baseline");
    }
    // Those of few steps say themselves what they cannot have.
    if method == Method::DataFreeBaseline
        && let Some(schedule) = args.schedule
    {
        return refuse(format!("--schedule {}", super::word(schedule)), "--method dkdm");
    }
    let pool = match method {
        Method::Dkdm => args.schedule.is_none_or(|schedule| schedule == Schedule::Dynamic),
        Method::DataFreeBaseline => false,
        Method::SegmentRegression | Method::DistributionMatching => true,
    };
    let of = "a pool (--method dkdm with --schedule dynamic, or --evaluations)";
    match (args.rho, &args.pool_file, &args.keep_samples) {
        (Some(rho), _, _) if !pool => refuse(format!("--rho {rho}"), of),
        (_, Some(file), _) if !pool => refuse(format!("--pool-file {}", file.display()), of),
        (_, _, Some(folder)) if method == Method::DataFreeBaseline => {
            refuse(format!("--keep-samples {}", folder.display()), "walks")
        }
        _ => Ok(()),
    }
}

/// The number of shards, where what is asked for can have several.
fn shards(args: &DistillArgs, method: Method) -> Result<usize, String> {
    let count = args.shards.get();
    let refuse = |flag: String| {
        Err(format!(
            "{flag}: a run of several shards cannot have it yet; leave out --shards {count}"
        ))
    };
    if count == 1 {
        return Ok(count);
    }
    if matches!(method, Method::DataFreeBaseline | Method::DistributionMatching) {
        return refuse(format!("--method {}", super::word(method)));
    }
    if let Some(prompts) = args.prompts.first() {
        return refuse(format!("--prompts {prompts}"));
    }
    if let Some(file) = &args.pool_file {
        return refuse(format!("--pool-file {}", file.display()));
    }
    Ok(count)
}

/// `base`, `small` or `tiny`.
pub(super) fn blocks(student: &Path) -> Option<FewerBlocks> {
    FewerBlocks::ALL.into_iter().find(|how| student.to_str() == Some(how.name()))
}

/// `0.5x` as a number.
fn share(student: &Path) -> Option<f64> {
    student.to_str()?.strip_suffix('x')?.parse().ok()
}
