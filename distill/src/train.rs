//! The loop: training batch, answer, loss, step, average, and now and then a checkpoint.

use std::time::{Duration, Instant};

use candle_core::DType;
use serde_json::{Map, Value};
use understudy_models::checkpoint::ModelFolder;
use understudy_models::{Denoiser, Error, NetworkConfig, Result};

use crate::checkpoint::Snapshot;
use crate::estimate::{Estimate, peak_memory};
use crate::guard::{check_answers, check_finite, check_weights};
use crate::identity;
use crate::matching::{ANCHOR, Matching, Renoised};
use crate::optimizer::{AdamW, Gradients};
use crate::parameters::{Average, Parameters};
use crate::publish::{is_published, publish};
use crate::ranks::{Shards, TreeSum};
pub use crate::task::{Settings, Task};
use crate::training_batch::TrainingBatch;
use crate::watch::{Event, GRID_CAPTIONS, Journal, Likeness, Record, Watch, grid};

/// Between checkpoints while the first training batch is prepared.
const PREPARING: Duration = Duration::from_secs(60);

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The model folder is there.
    Finished,
    /// It was to stop after so many steps, and goes on from there another time.
    Stopped {
        /// Steps done.
        step: u64,
    },
}

/// Trains until `settings.steps` are done, going on from the last checkpoint in the run's folder, and leaves a
/// model folder. A run that is done, and whose model is there, is left as it is. Between steps the watch may stop it.
///
/// On the CPU a run that is killed and resumed has the same losses, to the bit, as one that is not, and so has a run of several
/// ranks, whatever their number ([`crate::ranks`]). Every rank calls this; after an error the others wait for it, until
/// whoever called ends them.
///
/// # Errors
/// [`Error::Value`] when the folder holds another run, and when a loss, a weight or the finished network's
/// answer is not finite (naming the step); [`Error::Format`] when the model could not be loaded;
/// [`Error::Io`] when the disk is full. The last checkpoint stays good.
pub fn train(mut task: Task<'_>, watch: &mut dyn Watch) -> Result<Outcome> {
    // What could not be loaded in the end is not begun.
    ModelFolder::check(&task.student.config, &task.student.schedule, &task.card)?;
    let identity = identity::of(&task);
    let settings = task.settings.clone();
    identity::check_ranks(&task.shards, &identity, &settings)?;
    let parameters = Parameters::new(std::mem::take(&mut task.student.weights))?;
    task.shards.spread(&parameters)?;
    let device = parameters.device();
    let load = |config: &NetworkConfig, parameters: &Parameters| {
        config.load(parameters.tensors(), settings.dtype, &device)
    };
    let mut student = load(&task.student.config, &parameters)?;
    let mut state = State {
        optimizer: AdamW::new(&parameters, settings.optimizer)?,
        average: Average::new(&parameters, settings.average)?,
        parameters,
        step: 0,
        seconds: 0.0,
        identity,
    };
    watch.event(Event::Begun { identity: &state.identity });
    let found = task.run.as_ref().map(|run| Snapshot::read(&run.checkpoint())).transpose()?;
    if let Some(snapshot) = task.shards.of_first(found.flatten())? {
        let unsaid = match &task.run {
            Some(run) => identity::check(&snapshot, &state.identity, run.out())?,
            // It is the first rank's, and the first rank looks.
            None => Vec::new(),
        };
        state.restore(&snapshot, &mut task)?;
        watch.event(Event::Resumed { step: state.step, unsaid: &unsaid });
        if state.step >= settings.steps {
            let published =
                task.run.as_ref().is_some_and(|run| is_published(run.out(), state.step));
            if task.shards.any(published) {
                return Ok(Outcome::Finished);
            }
        }
    }
    if state.step < settings.steps {
        watch.event(Event::Estimated(&estimate(&mut task, &state, student.as_ref())?));
        if task.shards.any(watch.stops()) {
            return Ok(Outcome::Stopped { step: state.step });
        }
    }
    let journal = task.run.as_ref().map(|run| Journal::open(run.path(), state.step));
    let mut journal = journal.transpose()?;
    let mut clock = Clock::new(state.seconds);

    let mut checkpointed = Instant::now();
    while let Some(done) = task.shards.prepare()? {
        watch.event(Event::Preparing { done });
        let stops = task.shards.any(watch.stops());
        if done >= 1.0 || stops || task.shards.any(checkpointed.elapsed() > PREPARING) {
            state.seconds = clock.seconds();
            state.save(&mut task)?;
            checkpointed = Instant::now();
        }
        if stops {
            return Ok(Outcome::Stopped { step: state.step });
        }
    }
    let mut sent_bytes = task.shards.sent_bytes();
    for step in state.step + 1..=settings.steps {
        if !student.follows() {
            student = load(&task.student.config, &state.parameters)?;
        }
        let (learned, training_batch) = learn_shards(student.as_ref(), &mut task, &state, step)?;
        let learning_rate = state.optimizer.learning_rate();
        let norm = state.optimizer.step(&state.parameters, &learned.gradients)?;
        check_finite("gradient", norm, step, &training_batch)?;
        state.average.update(&state.parameters)?;
        let critic = match &mut task.matching {
            None => None,
            Some(matching) => {
                let (loss, norm) = matching.learn(&learned.renoised)?;
                check_finite("critic's loss", loss.into(), step, &training_batch)?;
                check_finite("critic's gradient", norm, step, &training_batch)?;
                Some(loss)
            }
        };
        state.step = step;

        let looked_at = settings.sample_every > 0 && step.is_multiple_of(settings.sample_every);
        let before = std::mem::replace(&mut sent_bytes, task.shards.sent_bytes());
        let record = Record {
            step,
            loss: learned.loss,
            simple: learned.simple,
            vlb: learned.vlb,
            matching: learned.matching,
            critic,
            likeness: if looked_at { likeness(&task, &state)? } else { None },
            gradient_norm: norm,
            learning_rate,
            teacher_evaluations: teacher_evaluations(&task),
            sent_bytes: Some(sent_bytes - before).filter(|_| task.shards.world().size() > 1),
            images_per_second: clock.lap(training_batch.rows() * task.shards.count()),
            seconds: clock.seconds(),
        };
        journal.iter_mut().try_for_each(|journal| journal.write(&record))?;
        watch.event(Event::Step { record: &record, steps: settings.steps });
        if let Some(run) = task.run.as_ref().filter(|_| looked_at) {
            let picture = run.path().join(format!("samples-{step:07}.png"));
            let weights = state.average.tensors(&state.parameters)?;
            let captions = task.shards.source().captions(GRID_CAPTIONS)?;
            grid(&task.student, weights, &task.card, captions, &device, &picture)?;
        }
        let stops = task.shards.any(watch.stops()) && step < settings.steps;
        if step.is_multiple_of(settings.checkpoint_every) || step == settings.steps || stops {
            state.seconds = clock.seconds();
            if let Some(journal) = &mut journal {
                state.check(&task)?;
                journal.sync()?;
            }
            state.save(&mut task)?;
            watch.event(Event::Checkpoint { step });
        }
        if stops {
            return Ok(Outcome::Stopped { step });
        }
    }
    finish(&state, task, clock.rate)?;
    Ok(Outcome::Finished)
}

/// What is left of the run: a step that is thrown away is measured.
fn estimate(task: &mut Task<'_>, state: &State, student: &dyn Denoiser) -> Result<Estimate> {
    let cost = task.shards.cost()?;
    let device = state.parameters.device();
    let batch = cost.sample.to_device(&device)?;
    let (mut seconds, own) = (0.0, task.shards.own() as f64);
    // The first builds what the second has.
    for _ in 0..2 {
        let began = Instant::now();
        let learned = learn(&batch, student, task, state, 0)?;
        if let Some(matching) = &task.matching {
            matching.gradients(&learned.renoised)?;
        }
        seconds = own * began.elapsed().as_secs_f64();
    }
    let weights: usize = state.parameters.iter().map(|(_, weight)| weight.elem_count()).sum();
    let bytes = (weights * size_of::<f32>()) as u64;
    // Weights, the optimizer's two moments, and the average; while a checkpoint is replaced there are two.
    let critic = task.matching.as_ref().map_or(0, Matching::checkpoint_bytes);
    let checkpoint = 4 * bytes + cost.checkpoint_bytes + critic;
    Ok(Estimate {
        prepare_rows: cost.prepare_rows,
        prepare_seconds: cost.prepare_seconds,
        steps: task.settings.steps - state.step,
        step_seconds: cost.batch_seconds + seconds,
        memory_bytes: peak_memory(&device).map(|peak| peak + cost.memory_bytes + checkpoint),
        disk_bytes: 2 * checkpoint + bytes + cost.disk_bytes,
    })
}

/// What changes while a run goes on, beside the source.
struct State {
    parameters: Parameters,
    optimizer: AdamW,
    average: Average,
    /// Steps done.
    step: u64,
    /// Time spent, in all sessions up to the last checkpoint.
    seconds: f64,
    /// What makes the run this one.
    identity: Map<String, Value>,
}

/// What one training batch gave, or several together.
struct Learned {
    gradients: Gradients,
    loss: f32,
    simple: f32,
    vlb: Option<f32>,
    matching: Option<f32>,
    /// What the critic is to learn, by part.
    renoised: Vec<Renoised>,
}

impl Learned {
    /// Takes what another part of the batch, or another shard, gave.
    fn add(mut self, other: Self) -> Result<Self> {
        self.gradients.add(other.gradients)?;
        self.renoised.extend(other.renoised);
        self.loss += other.loss;
        self.simple += other.simple;
        self.vlb = self.vlb.zip(other.vlb).map(|(sum, part)| sum + part);
        self.matching = self.matching.zip(other.matching).map(|(sum, part)| sum + part);
        Ok(self)
    }

    /// What all ranks' shards gave together.
    fn over_ranks(mut self, parameters: &Parameters, shards: &Shards<'_>) -> Result<Self> {
        if shards.world().size() == 1 {
            return Ok(self);
        }
        let losses = [self.loss, self.simple, self.vlb.unwrap_or_default()];
        let sums = shards.sum(&self.gradients.values(parameters, &losses)?)?;
        let weights = sums.dim(0)? - losses.len();
        let losses: Vec<f32> = sums.narrow(0, weights, losses.len())?.to_vec1()?;
        (self.loss, self.simple) = (losses[0], losses[1]);
        self.vlb = self.vlb.map(|_| losses[2]);
        self.gradients = self.gradients.with_values(parameters, &sums.narrow(0, 0, weights)?)?;
        Ok(self)
    }
}

/// Iteration `step` of all shards: of this rank's one after the other, then of all ranks; and the first training batch of this
/// rank.
fn learn_shards(
    student: &dyn Denoiser,
    task: &mut Task<'_>,
    state: &State,
    step: u64,
) -> Result<(Learned, TrainingBatch)> {
    let device = state.parameters.device();
    let (mut sum, mut first) = (TreeSum::new(), None);
    for own in 0..task.shards.own() {
        let training_batch = task.shards.training_batch(own, step)?.to_device(&device)?;
        let learned = learn(&training_batch, student, task, state, step)?;
        check_finite("loss", learned.loss.into(), step, &training_batch)?;
        sum.push(learned, Learned::add)?;
        first.get_or_insert(training_batch);
    }
    match (sum.finish(), first) {
        (Some(learned), Some(first)) => {
            Ok((learned.over_ranks(&state.parameters, &task.shards)?, first))
        }
        _ => Err(Error::value("shards", task.shards.own(), "must be a power of two on each rank")),
    }
}

/// Forward, loss, backward of a shard's training batch of iteration `step`, in as many parts of equal size as the settings say;
/// of the mean over all shards, what is this one's.
fn learn(
    training_batch: &TrainingBatch,
    student: &dyn Denoiser,
    task: &Task<'_>,
    state: &State,
    step: u64,
) -> Result<Learned> {
    let parts = task.settings.accumulate;
    // Of powers of two the share is exact.
    let shares = parts * task.shards.count();
    let mut sum: Option<Learned> = None;
    for index in 0..parts {
        let training_batch = training_batch.part(index, parts)?;
        let answer = training_batch.ask(student)?.to_dtype(DType::F32)?;
        let losses = task.objective.losses(&training_batch, &answer)?;
        let rows = index * training_batch.rows()..(index + 1) * training_batch.rows();
        let matched =
            task.matching.as_ref().map(|it| it.matched(student, step, rows)).transpose()?;
        let total = match &matched {
            Some(matched) => ((&losses.total * ANCHOR)? + &matched.loss)?,
            None => losses.total,
        };
        let mut gradients = (&total * (1.0 / shares as f64))?.backward()?;
        let gradients = Gradients::take(&state.parameters, &mut gradients)?;
        let share = |loss: &candle_core::Tensor| -> Result<f32> {
            Ok(loss.to_dtype(DType::F32)?.to_scalar::<f32>()? / shares as f32)
        };
        let (loss, simple) = (share(&total)?, share(&losses.simple)?);
        let vlb = losses.vlb.as_ref().map(share).transpose()?;
        let matching = matched.as_ref().map(|it| share(&it.loss)).transpose()?;
        let renoised = matched.map(|it| it.renoised).into_iter().collect();
        let part = Learned { gradients, loss, simple, vlb, matching, renoised };
        sum = Some(match sum {
            None => part,
            Some(sum) => sum.add(part)?,
        });
    }
    sum.ok_or_else(|| Error::value("accumulate", 0, "must be at least 1"))
}

impl State {
    /// Refuses a state that is not worth keeping: at the end, one that is not worth publishing.
    fn check(&self, task: &Task<'_>) -> Result<()> {
        let weights = self.parameters.iter().map(|(name, var)| (name, var.as_tensor()));
        check_weights("weight", weights, Some(self.step))?;
        let average = self.average.tensors(&self.parameters)?;
        check_weights("averaged weight", average.iter(), Some(self.step))?;
        task.matching.iter().try_for_each(|matching| matching.check(self.step))?;
        if self.step == task.settings.steps {
            check_answers(&task.student, average, self.step)?;
        }
        Ok(())
    }

    /// Writes the checkpoint.
    fn save(&mut self, task: &mut Task<'_>) -> Result<()> {
        let mut state = Map::new();
        identity::put(&mut state, &self.identity);
        state.insert("step".into(), self.step.into());
        state.insert("seconds".into(), self.seconds.into());
        let mut snapshot = Snapshot::new(state.into());
        task.shards.save(&mut snapshot)?;
        if let Some(run) = &task.run {
            self.parameters.save(&mut snapshot)?;
            self.optimizer.save(&self.parameters, &mut snapshot)?;
            self.average.save(&self.parameters, &mut snapshot)?;
            task.matching.iter().try_for_each(|matching| matching.save(&mut snapshot))?;
            snapshot.write(&run.checkpoint())?;
        }
        task.shards.keep();
        Ok(())
    }

    /// Goes back to a checkpoint.
    fn restore(&mut self, snapshot: &Snapshot, task: &mut Task<'_>) -> Result<()> {
        self.parameters.restore(snapshot)?;
        self.optimizer.restore(&self.parameters, snapshot)?;
        self.average.restore(&self.parameters, snapshot)?;
        task.shards.restore(snapshot)?;
        task.matching.iter_mut().try_for_each(|matching| matching.restore(snapshot))?;
        let step = snapshot.state["step"].as_u64();
        self.step = step.ok_or_else(|| snapshot.malformed("`step` is not in it"))?;
        self.seconds = snapshot.state["seconds"].as_f64().unwrap_or_default();
        Ok(())
    }
}

/// Images that are looked at beside the teacher's.
const LOOKED_AT: usize = 256;

/// How like the images of the averaged weights are to those that the teacher drew of late from the same seeds, where a
/// distribution is matched.
fn likeness(task: &Task<'_>, state: &State) -> Result<Option<Likeness>> {
    let Some(matching) = &task.matching else { return Ok(None) };
    let Some((images, seeds)) = task.shards.source().images(LOOKED_AT)? else { return Ok(None) };
    let weights = state.average.tensors(&state.parameters)?;
    let student = task.student.config.load(weights, DType::F32, &state.parameters.device())?;
    let labels: Vec<Option<u32>> = seeds.iter().map(|&seed| matching.label(seed)).collect();
    let own = matching.images(student.as_ref(), &seeds)?;
    Ok(Likeness::new(&own, &images, &labels)?)
}

/// Network evaluations of the teacher so far, in rows.
fn teacher_evaluations(task: &Task<'_>) -> u64 {
    let matching = task.matching.as_ref().map_or(0, Matching::teacher_evaluations);
    task.shards.teacher_evaluations() + matching
}

/// The averaged weights become the model.
fn finish(state: &State, mut task: Task<'_>, rate: Option<f64>) -> Result<()> {
    let evaluations = teacher_evaluations(&task);
    let recipe = &mut task.card.recipe;
    for (name, value) in &state.identity {
        // These stand in files or fields of their own.
        let elsewhere =
            ["student_network", "noise_schedule", "role", "teacher", "class_names", "null_class"];
        if !elsewhere.contains(&name.as_str()) && !value.is_null() {
            recipe.entry(name.clone()).or_insert_with(|| value.clone());
        }
    }
    if let Some(rate) = rate {
        recipe.insert("images_per_second".into(), rate.round().into());
    }
    recipe.insert("student_steps".into(), state.step.into());
    recipe.insert("teacher_evaluations".into(), evaluations.into());
    recipe.insert("seconds".into(), state.seconds.round().into());
    let Some(run) = &task.run else { return Ok(()) };
    let weights = state.average.tensors(&state.parameters)?;
    publish(run, &task.student, &weights, &task.card)
}

/// Time spent over all sessions, and the rate of late.
struct Clock {
    before: f64,
    began: Instant,
    last: Instant,
    rate: Option<f64>,
}

impl Clock {
    fn new(before: f64) -> Self {
        Self { before, began: Instant::now(), last: Instant::now(), rate: None }
    }

    fn seconds(&self) -> f64 {
        self.before + self.began.elapsed().as_secs_f64()
    }

    /// Images per second, averaged over about the last twenty laps.
    fn lap(&mut self, images: usize) -> f64 {
        let rate = images as f64 / self.last.elapsed().as_secs_f64().max(1e-9);
        self.last = Instant::now();
        let smooth = self.rate.map_or(rate, |before| before + 0.05 * (rate - before));
        *self.rate.insert(smooth)
    }
}
