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
/// On the CPU a run that is killed and resumed has the same losses, to the bit, as one that is not.
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
    let parameters = Parameters::new(std::mem::take(&mut task.student.weights))?;
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
    if let Some(snapshot) = Snapshot::read(&task.run.checkpoint())? {
        let unsaid = identity::check(&snapshot, &state.identity, task.run.out())?;
        state.restore(&snapshot, &mut task)?;
        watch.event(Event::Resumed { step: state.step, unsaid: &unsaid });
        if state.step >= settings.steps && is_published(task.run.out(), state.step) {
            return Ok(Outcome::Finished);
        }
    }
    if state.step < settings.steps {
        watch.event(Event::Estimated(&estimate(&mut task, &state, student.as_ref())?));
        if watch.stops() {
            return Ok(Outcome::Stopped { step: state.step });
        }
    }
    let mut journal = Journal::open(task.run.path(), state.step)?;
    let mut clock = Clock::new(state.seconds);

    let mut checkpointed = Instant::now();
    while let Some(done) = task.source.prepare()? {
        watch.event(Event::Preparing { done });
        if checkpointed.elapsed() > PREPARING || done >= 1.0 || watch.stops() {
            state.seconds = clock.seconds();
            state.save(&mut task)?;
            checkpointed = Instant::now();
        }
        if watch.stops() {
            return Ok(Outcome::Stopped { step: state.step });
        }
    }
    for step in state.step + 1..=settings.steps {
        if !student.follows() {
            student = load(&task.student.config, &state.parameters)?;
        }
        let training_batch = task.source.training_batch(step)?.to_device(&device)?;
        let learned = learn(&training_batch, student.as_ref(), &task, &state, step)?;
        check_finite("loss", learned.loss.into(), step, &training_batch)?;
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
            images_per_second: clock.lap(training_batch.rows()),
            seconds: clock.seconds(),
        };
        journal.write(&record)?;
        watch.event(Event::Step { record: &record, steps: settings.steps });
        if looked_at {
            let picture = task.run.path().join(format!("samples-{step:07}.png"));
            let weights = state.average.tensors(&state.parameters)?;
            let captions = task.source.captions(GRID_CAPTIONS)?;
            grid(&task.student, weights, &task.card, captions, &device, &picture)?;
        }
        let stops = watch.stops() && step < settings.steps;
        if step.is_multiple_of(settings.checkpoint_every) || step == settings.steps || stops {
            state.seconds = clock.seconds();
            state.check(&task)?;
            journal.sync()?;
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
    let cost = task.source.cost()?;
    let device = state.parameters.device();
    let batch = cost.sample.to_device(&device)?;
    let mut seconds = 0.0;
    // The first builds what the second has.
    for _ in 0..2 {
        let began = Instant::now();
        let learned = learn(&batch, student, task, state, 0)?;
        if let Some(matching) = &task.matching {
            matching.gradients(&learned.renoised)?;
        }
        seconds = began.elapsed().as_secs_f64();
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

/// What one training batch gave.
struct Learned {
    gradients: Gradients,
    loss: f32,
    simple: f32,
    vlb: Option<f32>,
    matching: Option<f32>,
    /// What the critic is to learn, by part.
    renoised: Vec<Renoised>,
}

/// Forward, loss, backward of iteration `step`, in as many parts of equal size as the settings say.
fn learn(
    training_batch: &TrainingBatch,
    student: &dyn Denoiser,
    task: &Task<'_>,
    state: &State,
    step: u64,
) -> Result<Learned> {
    let parts = task.settings.accumulate;
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
        let mut gradients = (&total * (1.0 / parts as f64))?.backward()?;
        let gradients = Gradients::take(&state.parameters, &mut gradients)?;
        let share = |loss: &candle_core::Tensor| -> Result<f32> {
            Ok(loss.to_dtype(DType::F32)?.to_scalar::<f32>()? / parts as f32)
        };
        let (loss, simple) = (share(&total)?, share(&losses.simple)?);
        let vlb = losses.vlb.as_ref().map(share).transpose()?;
        let matching = matched.as_ref().map(|it| share(&it.loss)).transpose()?;
        let renoised = matched.map(|it| it.renoised);
        match &mut sum {
            None => {
                let renoised = renoised.into_iter().collect();
                sum = Some(Learned { gradients, loss, simple, vlb, matching, renoised });
            }
            Some(sum) => {
                sum.gradients.add(gradients)?;
                sum.renoised.extend(renoised);
                sum.matching = sum.matching.zip(matching).map(|(sum, part)| sum + part);
                sum.loss += loss;
                sum.simple += simple;
                sum.vlb = sum.vlb.zip(vlb).map(|(sum, part)| sum + part);
            }
        }
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
        self.parameters.save(&mut snapshot)?;
        self.optimizer.save(&self.parameters, &mut snapshot)?;
        self.average.save(&self.parameters, &mut snapshot)?;
        task.source.save(&mut snapshot)?;
        task.matching.iter().try_for_each(|matching| matching.save(&mut snapshot))?;
        snapshot.write(&task.run.checkpoint())?;
        task.source.keep();
        Ok(())
    }

    /// Goes back to a checkpoint.
    fn restore(&mut self, snapshot: &Snapshot, task: &mut Task<'_>) -> Result<()> {
        self.parameters.restore(snapshot)?;
        self.optimizer.restore(&self.parameters, snapshot)?;
        self.average.restore(&self.parameters, snapshot)?;
        task.source.restore(snapshot)?;
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
    let Some((images, seeds)) = task.source.images(LOOKED_AT)? else { return Ok(None) };
    let weights = state.average.tensors(&state.parameters)?;
    let student = task.student.config.load(weights, DType::F32, &state.parameters.device())?;
    let labels: Vec<Option<u32>> = seeds.iter().map(|&seed| matching.label(seed)).collect();
    let own = matching.images(student.as_ref(), &seeds)?;
    Ok(Likeness::new(&own, &images, &labels)?)
}

/// Network evaluations of the teacher so far, in rows.
fn teacher_evaluations(task: &Task<'_>) -> u64 {
    let matching = task.matching.as_ref().map_or(0, Matching::teacher_evaluations);
    task.source.teacher_evaluations() + matching
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
    let weights = state.average.tensors(&state.parameters)?;
    publish(&task.run, &task.student, &weights, &task.card)
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
