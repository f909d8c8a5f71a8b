//! What one device has been given and not done yet, shared between admission and the device's thread: the
//! plan, and what was predicted.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::{
    admission::Admission,
    batcher::{Batch, Batcher, Costs, ModelKey, Part, SampleKey, Urgency},
    calibration::Calibrator,
    forecast::finishes,
    stage::{PerStage, Stage},
};
use crate::registry::{Model, Replica};

/// Admission adds to it, the device's thread takes from it.
#[derive(Debug)]
pub(super) struct DeviceQueue {
    /// The device's number.
    device: usize,
    calibrator: Calibrator,
    /// Where the planner's clock begins.
    zero: Instant,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    batcher: Batcher,
    models: BTreeMap<ModelKey, Loaded>,
    /// Deadlines that were accepted.
    deadlines: BTreeMap<SampleKey, Accepted>,
    running: Option<Running>,
    /// When a warm-up's evaluation that is under way is expected to end, on the planner's clock.
    warming: Option<f64>,
    /// Whether the device answers nothing any more.
    lost: bool,
}

/// A model, and how many samples of it there are.
#[derive(Debug)]
struct Loaded {
    model: Arc<Model>,
    samples: usize,
}

/// A deadline that was accepted; in seconds on the planner's clock.
#[derive(Debug, Clone, Copy)]
struct Accepted {
    /// When it was predicted.
    asked: f64,
    /// When its pixels must be there.
    due: f64,
    /// When it was predicted to be done; later arrivals move it by what they are predicted to add.
    finish: f64,
}

/// The evaluation under way.
#[derive(Debug, Clone)]
struct Running {
    batch: Batch,
    began: f64,
}

/// What admitting samples is predicted to come to.
#[derive(Debug)]
pub(super) struct Forecast {
    /// When each arrival is done, in seconds on the planner's clock.
    finishes: BTreeMap<SampleKey, f64>,
    /// What they add to the finishes of deadlines that were accepted before.
    delays: BTreeMap<SampleKey, f64>,
    now: f64,
    /// When the last arrival is done if every evaluation takes longer by the margin.
    pub(super) late_finish: Duration,
    /// Whether an earlier deadline is missed then which is met without them.
    pub(super) misses_others: bool,
}

impl DeviceQueue {
    /// The load of the device of that number, on which nothing is to do yet.
    pub(super) fn new(device: usize, calibrator: Calibrator) -> Self {
        Self { device, calibrator, zero: Instant::now(), state: Mutex::default() }
    }

    /// Predicts what happens when these join now.
    pub(super) fn forecast(&self, arrivals: &[Arc<Admission>]) -> Forecast {
        let now = self.seconds(Instant::now());
        let delivery = self.calibrator.now().delivery_seconds();
        let (before, running, costs, deadlines, free) = {
            let state = self.lock();
            let deadlines: Vec<(SampleKey, f64)> =
                state.deadlines.iter().map(|(&key, accepted)| (key, accepted.due)).collect();
            let (batcher, running) = (state.batcher.clone(), state.running.clone());
            let free = state.warming.unwrap_or(now).max(now);
            (batcher, running, self.costs(&state, arrivals), deadlines, free)
        };
        let mut after = before.clone();
        for arrival in arrivals {
            self.join(&mut after, arrival, self.urgency(arrival, now, delivery));
        }
        let old: Vec<_> = deadlines.iter().map(|(key, _)| *key).collect();
        let new: Vec<_> = arrivals.iter().map(|arrival| arrival.key).collect();
        let all: Vec<_> = old.iter().chain(&new).copied().collect();
        // Playing forward is what admission costs, so it is done only as far as somebody asks.
        let play = |batcher: &Batcher, watched: &[SampleKey], costs: &Known| {
            let running = running.clone().map(|running| {
                let seconds =
                    costs.seconds(running.batch.model, running.batch.stage, running.batch.rows);
                (running.batch, running.began + seconds)
            });
            finishes(batcher.clone(), running, free, watched, costs)
        };
        let likely = (play(&before, &old, &costs), play(&after, &all, &costs));
        let slow = costs.padded();
        let late = (play(&before, &old, &slow), play(&after, &all, &slow));
        let by = |at: &BTreeMap<SampleKey, f64>, key: &SampleKey| {
            at.get(key).copied().unwrap_or(f64::INFINITY)
        };
        let last = new.iter().map(|key| by(&late.1, key)).fold(now, f64::max);
        Forecast {
            finishes: new.iter().map(|key| (*key, by(&likely.1, key))).collect(),
            delays: old.iter().map(|k| (*k, by(&likely.1, k) - by(&likely.0, k))).collect(),
            now,
            late_finish: seconds(last - now),
            misses_others: deadlines
                .iter()
                .any(|(key, due)| by(&late.0, key) <= *due && *due < by(&late.1, key)),
        }
    }

    /// How a sample that arrives at `now` ranks.
    fn urgency(&self, arrival: &Admission, now: f64, delivery: f64) -> Urgency {
        match arrival.deadline {
            Some(deadline) => {
                let due = self.seconds(deadline) - delivery;
                Urgency::Deadline { due, from: now + (due - now) * ALONE_FROM }
            }
            None if arrival.background => Urgency::Background,
            None => Urgency::Ordinary(now),
        }
    }

    fn join(&self, batcher: &mut Batcher, arrival: &Admission, urgency: Urgency) {
        let Admission { key, model, .. } = arrival;
        batcher.join(model.key, *key, arrival.work(urgency), model.on(self.device).max_rows());
    }

    /// Whether a [`Forecast`] tells anything that admission needs.
    pub(super) fn needs_forecast(&self, arrivals: &[Arc<Admission>]) -> bool {
        arrivals.iter().any(|arrival| arrival.deadline.is_some()) || self.has_deadlines()
    }

    /// Takes samples in, oldest first. `send` hands them to the device's thread, which may be told to run them as soon
    /// as this returns.
    ///
    /// # Errors
    /// What `send` says; nothing is taken in then.
    pub(super) fn admit<E>(
        &self,
        arrivals: &[Arc<Admission>],
        forecast: Option<&Forecast>,
        send: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        let admitted = self.seconds(Instant::now());
        let mut state = self.lock();
        send()?;
        let delivery = self.calibrator.now().delivery_seconds();
        for arrival in arrivals {
            let urgency = self.urgency(arrival, admitted, delivery);
            self.join(&mut state.batcher, arrival, urgency);
            let model = &arrival.model;
            let loaded = state.models.entry(model.key);
            loaded.or_insert_with(|| Loaded { model: Arc::clone(model), samples: 0 }).samples += 1;
            let predicted = forecast.and_then(|f| Some((f.now, *f.finishes.get(&arrival.key)?)));
            if let (Urgency::Deadline { due, .. }, Some((asked, finish))) = (urgency, predicted) {
                state.deadlines.insert(arrival.key, Accepted { asked, due, finish });
            }
        }
        for (key, delay) in forecast.iter().flat_map(|forecast| &forecast.delays) {
            if let Some(accepted) = state.deadlines.get_mut(key) {
                accepted.finish += delay;
            }
        }
        Ok(())
    }

    /// The evaluation that begins now, if there is one.
    pub(super) fn begin(&self) -> Option<Batch> {
        let began = self.seconds(Instant::now());
        let mut state = self.lock();
        let costs = self.costs(&state, &[]);
        let batch = state.batcher.next(began, &costs)?;
        state.running = Some(Running { batch: batch.clone(), began });
        Some(batch)
    }

    /// The evaluation under way took so many seconds.
    pub(super) fn ran(&self, batch: &Batch, seconds: f64) {
        let mut state = self.lock();
        state.running = None;
        state.batcher.ran(batch, seconds);
    }

    /// The device has been asked for the evaluation, which will take what it usually takes, and may be asked for the
    /// next.
    pub(super) fn asked(&self, batch: &Batch) {
        let mut state = self.lock();
        let seconds = self.costs(&state, &[]).seconds(batch.model, batch.stage, batch.rows);
        state.running = None;
        state.batcher.ran(batch, seconds);
    }

    /// A warm-up's evaluation begins, which is expected to take so many seconds.
    pub(super) fn warms(&self, seconds: f64) {
        let ends = self.seconds(Instant::now()) + seconds;
        self.lock().warming = Some(ends);
    }

    /// It has ended.
    pub(super) fn warmed(&self) {
        self.lock().warming = None;
    }

    /// Whether a deadline that was accepted is still to be met.
    pub(super) fn has_deadlines(&self) -> bool {
        !self.lock().deadlines.is_empty()
    }

    /// From now on the model's evaluations at a stage have at most so many rows.
    pub(super) fn limit(&self, model: ModelKey, stage: Stage, max_rows: usize) {
        self.lock().batcher.limit(model, stage, max_rows);
    }

    /// A sample is gone. Where it had a deadline and is done or late, the answer is how many times as long
    /// as predicted it took.
    pub(super) fn left(&self, sample: &Admission, done_or_late: bool) -> Option<f64> {
        let now = self.seconds(Instant::now());
        let mut state = self.lock();
        let model = sample.model.key;
        state.batcher.leave(model, sample.key);
        if let Some(loaded) = state.models.get_mut(&model) {
            loaded.samples -= 1;
            if loaded.samples == 0 {
                state.models.remove(&model);
            }
        }
        let accepted = state.deadlines.remove(&sample.key).filter(|_| done_or_late)?;
        let predicted = accepted.finish - accepted.asked;
        (predicted > 0.0).then(|| (now - accepted.asked) / predicted)
    }

    /// The device answers nothing any more.
    pub(super) fn lose(&self) {
        self.lock().lost = true;
    }

    /// The device's thread has ended, and with it all that was to be done.
    pub(super) fn end(&self) {
        *self.lock() = State { lost: true, ..State::default() };
    }

    /// Whether that has happened.
    pub(super) fn is_lost(&self) -> bool {
        self.lock().lost
    }

    /// Whether no client waits for anything.
    pub(super) fn is_idle(&self) -> bool {
        self.lock().batcher.is_empty()
    }

    /// Time until everything admitted is done.
    pub(super) fn predicted_drain(&self) -> Duration {
        let state = self.lock();
        let costs = self.costs(&state, &[]);
        let lanes = state.batcher.work().filter(|(_, _, all, _)| *all > 0).map(
            |(key, stage, all, work)| {
                let most = |loaded: &Loaded| loaded.model.on(self.device).max_rows()[stage];
                let rows = all.min(state.models.get(&key).map_or(1, most)).max(1);
                costs.seconds(key, stage, rows) * work as f64 / rows as f64
            },
        );
        seconds(lanes.sum())
    }

    fn seconds(&self, at: Instant) -> f64 {
        at.saturating_duration_since(self.zero).as_secs_f64()
    }

    /// What evaluations of the models here, and of the arrivals', cost.
    fn costs(&self, state: &State, arrivals: &[Arc<Admission>]) -> Known {
        let here = state.models.values().map(|loaded| &loaded.model);
        let new = arrivals.iter().map(|arrival| &arrival.model);
        Known {
            device: self.device,
            models: here.chain(new).map(|model| (model.key, Arc::clone(model))).collect(),
            margin: self.calibrator.now().margin(),
            factor: 1.0,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Deadlines take precedence once this part of their time has passed: what is left to the last moment has
/// nothing to make up for a hiccup with.
const ALONE_FROM: f64 = 0.5;

/// What the models' cost models say now.
#[derive(Clone)]
struct Known {
    device: usize,
    models: BTreeMap<ModelKey, Arc<Model>>,
    margin: f64,
    /// What every cost is multiplied by.
    factor: f64,
}

impl Known {
    /// The costs when every evaluation takes longer by the margin.
    fn padded(&self) -> Self {
        Self { margin: 1.0, factor: self.factor * self.margin, ..self.clone() }
    }
}

impl Costs for Known {
    fn seconds(&self, model: ModelKey, stage: Stage, rows: usize) -> f64 {
        let model = self.models.get(&model);
        let seconds = model.map(|model| model.on(self.device).evaluation_seconds(stage, rows));
        seconds.unwrap_or(0.0) * self.factor
    }

    fn margin(&self) -> f64 {
        self.margin
    }
}

impl Forecast {
    /// Time until the last arrival is done.
    pub(super) fn predicted(&self) -> Duration {
        seconds(self.finishes.values().copied().fold(self.now, f64::max) - self.now)
    }
}

/// Seconds that arrivals take together on an idle device of that number, without any margin.
pub(super) fn alone_seconds(device: usize, arrivals: &[Arc<Admission>]) -> f64 {
    let mut lanes: BTreeMap<ModelKey, (&Replica, PerStage<Part>)> = BTreeMap::new();
    for arrival in arrivals {
        let model = arrival.model.as_ref();
        let (_, all) = lanes.entry(model.key).or_insert((model.on(device), PerStage::default()));
        for (stage, part) in arrival.parts.iter().filter(|(_, part)| part.evaluations > 0) {
            all[stage].rows += part.rows;
            all[stage].evaluations = part.evaluations.max(all[stage].evaluations);
        }
    }
    let lanes = lanes.values().map(|(replica, all)| {
        let stages = all.iter().filter(|(_, all)| all.rows > 0).map(|(stage, all)| {
            let rows = all.rows.min(replica.max_rows()[stage]).max(1);
            let evaluations = all.rows.div_ceil(rows) * all.evaluations;
            replica.evaluation_seconds(stage, rows) * evaluations as f64
        });
        stages.sum::<f64>()
    });
    lanes.sum()
}

/// As long as a clock can tell.
pub(super) fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}
