//! A network with less of everything, out of a larger one's weights.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use understudy_models::repair::{self, Shown};
use understudy_models::sampler::Kind;
use understudy_models::{Error, NetworkConfig, Result};

use crate::importance::{Importance, in_v};
use crate::pool::{self, Order, Pool};
use crate::reduce::{self, Reduced};
use crate::teacher::Teacher;
use crate::training_batch::{BatchSource, TrainingBatch};
use crate::walk::Walks;

/// Weights for `student` out of `teacher`'s, chosen by what matters on the samples of `training batches`. What a student
/// does with a guidance scale that its teacher does not take begins as nothing.
///
/// # Errors
/// [`Error::Value`] for a student of another topology, or wider than its teacher anywhere.
pub fn weights(
    teacher: &Teacher,
    student: &NetworkConfig,
    batches: &mut dyn BatchSource,
    seed: u64,
) -> Result<BTreeMap<String, Tensor>> {
    let refuse = |problem: String| Err(Error::value("init", "pruned", problem));
    let alike = "give the student the teacher's blocks and layers, only narrower (such as --student \
                 0.5x), or begin from random weights";
    // The input for a guidance scale is the student's own.
    let plain = student.with_guidance(teacher.geometry().guidance);
    let plain = plain.as_ref().unwrap_or(student);
    let (Some(from), Some(to)) = (teacher.config.channels(), plain.channels()) else {
        let [theirs, ours] = [&teacher.config, student].map(NetworkConfig::class_name);
        return refuse(format!(
            "no channels can be left out from a {theirs} to a {ours}; begin from random weights \
             (--init random)"
        ));
    };
    if from.weights != to.weights {
        return refuse(format!("teacher and student have different layers; {alike}"));
    }
    if from.sets.iter().zip(&to.sets).any(|(from, to)| to.width > from.width) {
        return refuse(format!("the student is wider than its teacher; {alike}"));
    }
    let weights = teacher.weights()?;
    let importance = Importance::new(teacher, &weights, batches, seed)?;
    let Some(kept) = importance.and_then(|importance| importance.kept(plain)) else {
        return refuse(format!("teacher and student have different layers; {alike}"));
    };
    let mut narrowed = kept.narrow(&weights, &plain.weight_shapes())?;
    for (name, shape) in student.weight_shapes() {
        narrowed.entry(name).or_insert(Tensor::zeros(shape, DType::F32, &Device::Cpu)?);
    }
    Ok(narrowed)
}

/// How a network is pruned.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Its part of the larger one's time per evaluation; above 0 and below 1.
    pub share: f64,
    /// Samples on which layers are fitted.
    pub rows: usize,
    /// Seed of these, and of those on which importance is measured.
    pub seed: u64,
}

/// A pruned network.
pub struct Pruned {
    /// Its architecture, and what was measured of it.
    pub reduced: Reduced,
    /// Its weights.
    pub fitted: Fitted,
}

/// The weights of a smaller network.
pub struct Fitted {
    /// By name, f32.
    pub weights: BTreeMap<String, Tensor>,
    /// Samples on which layers were fitted.
    pub rows: usize,
    /// The mean square of the error in v, on samples that it was not fitted to: with the larger network's weights as they were,
    /// and fitted. The weights are those that err less.
    pub errors: [f64; 2],
}

/// What is told of a pruning while it lasts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Stage {
    /// The smallest networks are timed.
    Floor,
    /// Samples are walked, the share that is done.
    Walking(f64),
    /// Smaller networks are timed.
    Choosing,
    /// One was found that takes that part of the time; its layers are fitted.
    Fitting(f64),
}

/// Steps of the walk from which samples are taken: every timestep is visited whatever their number.
const WALK_STEPS: usize = 50;
/// Samples of an evaluation.
const BATCH: usize = 32;
/// Samples on which what came of it is measured.
const HELD_OUT: usize = 64;

/// Finds the network that keeps most of what matters within a share of the time of `model`, and fits what it keeps.
///
/// # Errors
/// [`Error::Value`] for a share that no network reaches, telling the least, and for a model that is not made smaller so, by its
/// kind; whatever its schedule or the device says.
pub fn prune(model: &Teacher, settings: &Settings, mut tell: impl FnMut(Stage)) -> Result<Pruned> {
    let refuse = |value: String, remedy: &str| Error::value("model", value, remedy);
    if model.config.smaller().is_empty() {
        let remedy = "only the widths, middle and attention of U-Nets that see no prompt are chosen; distil a student that is \
                      narrower or has fewer blocks instead (understudy distill --student)";
        return Err(refuse(format!("a {}", model.config.class_name()), remedy));
    }
    let whole = || {
        let remedy = "its time comes as random frequencies, or its condition as a vector, of which nothing can be left out; \
                      distil a student of another config.json instead (understudy distill --student)";
        refuse("a network whose channels stand or fall together".into(), remedy)
    };
    if model.config.channels().is_none() {
        return Err(whole());
    }
    tell(Stage::Floor);
    reduce::check(model, settings.share)?;

    let weights = model.weights()?;
    let mut pool = pool(model, settings.rows, settings.seed)?;
    while let Some(done) = pool.prepare()? {
        tell(Stage::Walking(done));
    }
    let importance = Importance::new(model, &weights, &mut pool, settings.seed)?;
    let importance = importance.ok_or_else(whole)?;
    tell(Stage::Choosing);
    let reduced = reduce::reduce(model, settings.share, &importance)?;
    tell(Stage::Fitting(reduced.share));

    let fitted = fit(model, &reduced.config, &importance, &mut pool, settings)?;
    Ok(Pruned { reduced, fitted: fitted.ok_or_else(whole)? })
}

/// The weights of a smaller network, out of the most important ones of `model`, fitted on samples of `pool`, which is filled;
/// nothing for a network that is not made of its channels.
///
/// # Errors
/// What the pool or the device says.
pub fn fit(
    model: &Teacher,
    config: &NetworkConfig,
    importance: &Importance,
    pool: &mut Pool<'_>,
    settings: &Settings,
) -> Result<Option<Fitted>> {
    let Some(kept) = importance.kept(config) else { return Ok(None) };
    let weights = model.weights()?;
    let narrow = kept.narrow(&weights, &config.weight_shapes())?;
    let batches = settings.rows.div_ceil(BATCH);
    let shown: Vec<Shown> = (0..batches)
        // Other batches than those on which importance was measured.
        .map(|batch| shown(&pool.training_batch(u64::from(u32::MAX) + batch as u64)?))
        .collect::<Result<_>>()?;
    let fitted = repair::repair((&model.config, &weights), (config, &narrow), &kept, &shown)?;
    let mut others = self::pool(model, HELD_OUT, settings.seed ^ (1 << 62))?;
    while others.prepare()?.is_some() {}
    let others: Vec<TrainingBatch> = (0..(HELD_OUT / BATCH) as u64)
        .map(|batch| others.training_batch(batch))
        .collect::<Result<_>>()?;
    let error = |weights| error_in_v(model, config, weights, &others);
    let errors = [error(&narrow)?, error(&fitted)?];
    // Where next to nothing was left out there is little to mend, and few rows disturb more than that.
    let weights = if errors[1] < errors[0] { fitted } else { narrow };
    Ok(Some(Fitted { weights, rows: batches * BATCH, errors }))
}

/// Samples of the model's own walk, at least `rows`, each at a time of its own.
///
/// # Errors
/// Those of [`Pool::new`].
pub fn pool(model: &Teacher, rows: usize, seed: u64) -> Result<Pool<'_>> {
    let timesteps = model.schedule.train_timesteps();
    let steps = Walks::nearest_steps(timesteps, WALK_STEPS);
    let walks = Walks::new(&model.schedule, Kind::Ddpm, steps, model.learned_variance())?;
    let rho = rows.div_ceil(BATCH) as f64 / timesteps as f64;
    let settings = pool::Settings {
        order: Order::Dynamic { rho },
        batch: BATCH,
        seed,
        run: String::new(),
        earlier: None,
        file: None,
        finished: None,
    };
    Pool::new(model, walks, settings)
}

/// A batch as both networks are shown it.
fn shown(batch: &TrainingBatch) -> Result<Shown> {
    Ok(Shown {
        x: batch.x.to_device(&Device::Cpu)?.to_dtype(DType::F32)?,
        timesteps: batch.times(&Device::Cpu)?,
        condition: batch.condition(&Device::Cpu)?,
    })
}

/// The mean square of a network's error in v.
fn error_in_v(
    model: &Teacher,
    config: &NetworkConfig,
    weights: &BTreeMap<String, Tensor>,
    batches: &[TrainingBatch],
) -> Result<f64> {
    let weights = weights.iter().map(|(name, weight)| (name.clone(), weight.clone())).collect();
    let network = config.load(weights, DType::F32, &Device::Cpu)?;
    let in_v = in_v(model)?;
    let (mut sum, mut rows) = (0.0, 0);
    for batch in batches {
        let batch = batch.to_device(&Device::Cpu)?;
        let channels = batch.x.dim(1)?;
        let part = |answer: &Tensor| answer.to_dtype(DType::F32)?.narrow(1, 0, channels);
        let apart = (part(&batch.ask(network.as_ref())?)? - part(&batch.answer)?)?;
        let squares: Vec<f32> = apart.sqr()?.flatten_from(1)?.mean(1)?.to_vec1()?;
        for (square, &t) in squares.iter().zip(&batch.timesteps) {
            sum += f64::from(square * in_v[t] * in_v[t]);
            rows += 1;
        }
    }
    Ok(sum / f64::from(rows))
}
