//! What `distill --evaluations` asks for: a student that needs few steps.

use std::path::PathBuf;

use understudy_distill::{
    objective::Weighting,
    pool::{Order, segments},
    teacher::Teacher,
};
use understudy_models::{
    checkpoint::{ModelFolder, card::Card},
    sampler::Kind,
    schedule::PredictionType,
};

use super::{
    distill_args::{DistillArgs, Method, Schedule},
    preset::DistillDefaults,
};

/// Steps of the teacher's walk where nobody says: 40 of 1000 timesteps contain those of 20, 10, 8, 5, 4, 2 and 1.
const WALK_STEPS: usize = 40;

/// The part of DKDM's pool that is enough: its samples give ten rows and more a round.
const SHARE_OF_RHO: f64 = 0.2;

/// Steps of the teacher's walk for a student of so many evaluations.
pub(super) fn walk_steps(args: &DistillArgs, teacher: &Teacher, evaluations: usize) -> usize {
    // A teacher that needs few steps itself walks those.
    let wanted = teacher.card.evaluations.first().copied().unwrap_or(WALK_STEPS);
    let timesteps = teacher.schedule.train_timesteps();
    let fits = |steps: &usize| {
        timesteps.is_multiple_of(*steps)
            && steps.is_multiple_of(evaluations)
            && *steps > evaluations
    };
    let nearest = (1..=timesteps).filter(fits).min_by_key(|steps| steps.abs_diff(wanted));
    args.walk_steps.or(nearest).unwrap_or(wanted)
}

/// Refuses what such a student cannot be made with.
///
/// # Errors
/// A sentence naming the flag and the remedy.
pub(super) fn check(
    args: &DistillArgs,
    teacher: &Teacher,
    (evaluations, walk_steps): (usize, usize),
) -> Result<(), String> {
    if let Some(schedule) = args.schedule.filter(|schedule| *schedule != Schedule::Dynamic) {
        return Err(format!(
            "--schedule {}: students of few steps learn from a pool; leave the flag out",
            super::word(schedule)
        ));
    }
    if let Some(sampler) = args.walk_sampler.filter(|sampler| *sampler != Kind::Ddim) {
        return Err(format!(
            "--walk-sampler {sampler}: adds noise, so that a sample does not decide where its segment ends; with \
             --evaluations the walk is ddim's, leave the flag out"
        ));
    }
    if let Some(prediction) = args.prediction.filter(|it| *it != PredictionType::Velocity) {
        return Err(format!(
            "--prediction {}: a student of few steps must predict v_prediction; leave the flag out",
            prediction.name()
        ));
    }
    if let Some(file) = &args.pool_file {
        return Err(format!(
            "--pool-file {}: holds the pool of another walk; with --evaluations the pool stays in memory, leave the flag \
             out and take a smaller --rho where it is too large",
            file.display()
        ));
    }
    if let Some(folder) = &args.keep_samples {
        return Err(format!(
            "--keep-samples {}: does nothing with --evaluations; leave the flag out",
            folder.display()
        ));
    }
    if args.training.weighting() != Weighting::Uniform {
        return Err("--weighting velocity: with --evaluations errors count in v already; leave the flag out".into());
    }
    if let Some(rho) = args.rho.filter(|rho| !(rho.is_finite() && *rho > 0.0)) {
        return Err(format!("--rho {rho}: must be above 0, such as 0.02"));
    }
    segments::check(&teacher.schedule, evaluations, walk_steps)
        .map_err(|error| error.to_string())?;
    let Some(&most) = teacher.card.evaluations.first() else { return Ok(()) };
    if evaluations >= most || walk_steps > most {
        return Err(format!(
            "--evaluations {evaluations}: {} itself is made for {most} evaluations, and would walk {walk_steps}; name the \
             teacher that it was distilled from{}, or ask for fewer",
            teacher.name,
            teacher.card.teacher.as_ref().map_or(String::new(), |name| format!(", {name}"))
        ));
    }
    Ok(())
}

/// The settings of the pool.
pub(super) fn pool(
    args: &DistillArgs,
    teacher: &Teacher,
    defaults: &DistillDefaults,
    (evaluations, walk_steps): (usize, usize),
    (batch, seed): (usize, u64),
) -> segments::Settings {
    let rho = args.rho.unwrap_or(SHARE_OF_RHO * defaults.rho);
    segments::Settings {
        evaluations,
        walk_steps,
        samples: Order::Dynamic { rho }.slots(batch, teacher.schedule.train_timesteps()),
        batch,
        seed,
    }
}

/// The student to go on from where nobody names one: one of this teacher that predicts v; for distribution matching one that
/// needs so few steps already.
///
/// # Errors
/// A sentence with the remedy where there is none.
pub(super) fn usual_student(
    args: &DistillArgs,
    teacher: &Teacher,
    method: Method,
    evaluations: usize,
) -> Result<PathBuf, String> {
    let folders = args.models.folders();
    let matched = method == Method::DistributionMatching;
    let begins = |card: &Card| match matched {
        // One that was matched already is where another such run ends, not where it begins.
        true => {
            card.evaluations.contains(&evaluations)
                && card.recipe.get("method") != Some(&super::word(method).into())
        }
        false => card.evaluations.is_empty(),
    };
    let fits = |folder: &PathBuf| {
        ModelFolder::open(folder).is_ok_and(|model| {
            model.card.teacher.as_ref() == Some(&teacher.name)
                && begins(&model.card)
                && model.schedule.prediction_type() == PredictionType::Velocity
        })
    };
    let names = folders.names()?;
    names.iter().filter_map(|name| folders.find(name)).find(fits).ok_or_else(|| {
        if matched {
            return format!(
                "--student: no student of {name} of {evaluations} evaluations is among the models; make one first \
                 (`understudy distill --teacher {name} --evaluations {evaluations} --out DIR`) and give it as --student DIR",
                name = teacher.name
            );
        }
        format!(
            "--student: no student of {name} that predicts v is among the models; distil one first (`understudy distill \
             --teacher {name} --out DIR`) and give it as --student DIR, or --student 0.5x to begin from the teacher's \
             channels",
            name = teacher.name
        )
    })
}

/// What the student's card says it can be asked for: its own number, and what is left by halving that.
pub(super) fn evaluations(asked: usize) -> Vec<usize> {
    std::iter::successors(Some(asked), |steps| steps.is_multiple_of(2).then_some(steps / 2))
        .collect()
}
