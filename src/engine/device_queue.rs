//! What one device has been given and not done yet, shared between admission and the device's thread: the
//! plan, and what was predicted.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::{
    batcher::{Batch, Batcher, Costs, ModelKey, SampleKey, ScheduledWork, Urgency},
    calibration::Calibrator,
    forecast::finishes,
};
use crate::registry::{Model, Replica};

/// Admission adds to it, the device's thread takes from it.
#[derive(Debug)]
pub(super) struct DeviceQueue {
    /// The device's number.
    device: usize,
    learned: Calibrator,
    /// Where the planner's clock begins.
    zero: Instant,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    batcher: Batcher,
    models: BTreeMap<ModelKey, Loaded>,
    /// What was promised, in seconds on the planner's clock.
    promises: BTreeMap<SampleKey, Promise>,
    running: Option<Running>,
    next_key: u64,
    /// Whether the device answers nothing any more.
    lost: bool,
}

/// A model, and how many samples of it there are.
#[derive(Debug)]
struct Loaded {
    model: Arc<Model>,
    samples: usize,
}

#[derive(Debug, Clone, Copy)]
struct Promise {
    /// When it was foretold.
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

/// A sample about to be admitted.
#[derive(Debug, Clone)]
pub(super) struct Admission {
    pub(super) model: Arc<Model>,
    /// Rows it takes in every evaluation.
    pub(super) rows: usize,
    pub(super) evaluations: usize,
    pub(super) deadline: Option<Instant>,
    /// Whether it runs only when nothing else does.
    pub(super) background: bool,
}

/// What admitting newcomers is predicted to come to.
#[derive(Debug)]
pub(super) struct Forecast {
    /// When each newcomer is done, in seconds on the planner's clock.
    finishes: Vec<f64>,
    /// What they add to the promises that were made before.
    delays: BTreeMap<SampleKey, f64>,
    now: f64,
    /// When the last newcomer is done if every evaluation takes longer by the margin.
    pub(super) late_finish: Duration,
    /// Whether an earlier promise is broken then which is kept without them.
    pub(super) breaks_promises: bool,
}

impl DeviceQueue {
    /// The load of the device of that number, on which nothing is to do yet.
    pub(super) fn new(device: usize, learned: Calibrator) -> Self {
        Self { device, learned, zero: Instant::now(), state: Mutex::default() }
    }

    /// Foretells what happens when these join now.
    pub(super) fn outlook(&self, newcomers: &[Admission]) -> Forecast {
        let now = self.seconds(Instant::now());
        let delivery = self.learned.now().delivery_seconds();
        let (before, running, costs, promises, first) = {
            let state = self.lock();
            let promises: Vec<(SampleKey, f64)> =
                state.promises.iter().map(|(&key, promise)| (key, promise.due)).collect();
            let (batcher, running) = (state.batcher.clone(), state.running.clone());
            (batcher, running, self.costs(&state, newcomers), promises, state.next_key)
        };
        let new: Vec<_> = (first..).take(newcomers.len()).map(SampleKey).collect();
        let mut after = before.clone();
        for (newcomer, &key) in newcomers.iter().zip(&new) {
            let claim = newcomer.claim(self.urgency(newcomer, now, delivery));
            after.join(newcomer.model.key, key, claim, newcomer.model.on(self.device).max_rows());
        }
        let old: Vec<_> = promises.iter().map(|(key, _)| *key).collect();
        let all: Vec<_> = old.iter().chain(&new).copied().collect();
        // Playing forward is what admission costs, so it is done only as far as somebody asks.
        let play = |batcher: &Batcher, watched: &[SampleKey], costs: &Known| {
            let running = running.clone().map(|running| {
                let seconds = costs.seconds(running.batch.model, running.batch.rows);
                (running.batch, running.began + seconds)
            });
            finishes(batcher.clone(), running, now, watched, costs)
        };
        let likely = (play(&before, &old, &costs), play(&after, &all, &costs));
        let slow = costs.padded();
        let late = (play(&before, &old, &slow), play(&after, &all, &slow));
        let by = |at: &BTreeMap<SampleKey, f64>, key: &SampleKey| {
            at.get(key).copied().unwrap_or(f64::INFINITY)
        };
        let last = new.iter().map(|key| by(&late.1, key)).fold(now, f64::max);
        Forecast {
            finishes: new.iter().map(|key| by(&likely.1, key)).collect(),
            delays: old.iter().map(|k| (*k, by(&likely.1, k) - by(&likely.0, k))).collect(),
            now,
            late_finish: seconds(last - now),
            breaks_promises: promises
                .iter()
                .any(|(key, due)| by(&late.0, key) <= *due && *due < by(&late.1, key)),
        }
    }

    /// How a newcomer that joins at `now` ranks.
    fn urgency(&self, newcomer: &Admission, now: f64, delivery: f64) -> Urgency {
        match newcomer.deadline {
            Some(deadline) => {
                let due = self.seconds(deadline) - delivery;
                Urgency::Promised { due, from: now + (due - now) * ALONE_FROM }
            }
            None if newcomer.background => Urgency::Background,
            None => Urgency::Ordinary(now),
        }
    }

    /// Whether an [`Forecast`] tells anything that admission needs.
    pub(super) fn needs_outlook(&self, newcomers: &[Admission]) -> bool {
        newcomers.iter().any(|newcomer| newcomer.deadline.is_some())
            || !self.lock().promises.is_empty()
    }

    /// Takes newcomers in, oldest first, and tells their keys. `send` hands the samples to the device
    /// thread, which may be told to run them as soon as this returns.
    ///
    /// # Errors
    /// What `send` says; nothing is taken in then.
    pub(super) fn admit<E>(
        &self,
        newcomers: &[Admission],
        outlook: Option<&Forecast>,
        send: impl FnOnce(&[SampleKey]) -> Result<(), E>,
    ) -> Result<(), E> {
        let admitted = self.seconds(Instant::now());
        let mut state = self.lock();
        let keys: Vec<_> = (state.next_key..).take(newcomers.len()).map(SampleKey).collect();
        send(&keys)?;
        state.next_key += newcomers.len() as u64;
        let delivery = self.learned.now().delivery_seconds();
        for (i, (newcomer, &key)) in newcomers.iter().zip(&keys).enumerate() {
            let urgency = self.urgency(newcomer, admitted, delivery);
            let (model, claim) = (&newcomer.model, newcomer.claim(urgency));
            state.batcher.join(model.key, key, claim, model.on(self.device).max_rows());
            let loaded = state.models.entry(model.key);
            loaded.or_insert_with(|| Loaded { model: Arc::clone(model), samples: 0 }).samples += 1;
            let told = outlook.and_then(|told| Some((told.now, *told.finishes.get(i)?)));
            if let (Urgency::Promised { due, .. }, Some((asked, finish))) = (urgency, told) {
                state.promises.insert(key, Promise { asked, due, finish });
            }
        }
        for (key, delay) in outlook.iter().flat_map(|outlook| &outlook.delays) {
            if let Some(promise) = state.promises.get_mut(key) {
                promise.finish += delay;
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
        let seconds = self.costs(&state, &[]).seconds(batch.model, batch.rows);
        state.running = None;
        state.batcher.ran(batch, seconds);
    }

    /// From now on the model's evaluations have at most so many rows.
    pub(super) fn limit(&self, model: ModelKey, max_rows: usize) {
        self.lock().batcher.limit(model, max_rows);
    }

    /// A sample is gone. Where it was promised and is done or late, the answer is how many times as long
    /// as predicted it took.
    pub(super) fn left(
        &self,
        model: ModelKey,
        sample: SampleKey,
        done_or_late: bool,
    ) -> Option<f64> {
        let now = self.seconds(Instant::now());
        let mut state = self.lock();
        state.batcher.leave(model, sample);
        if let Some(loaded) = state.models.get_mut(&model) {
            loaded.samples -= 1;
            if loaded.samples == 0 {
                state.models.remove(&model);
            }
        }
        let promise = state.promises.remove(&sample).filter(|_| done_or_late)?;
        let predicted = promise.finish - promise.asked;
        (predicted > 0.0).then(|| (now - promise.asked) / predicted)
    }

    /// The device answers nothing any more.
    pub(super) fn lose(&self) {
        self.lock().lost = true;
    }

    /// The device's thread has ended, and with it all that was to be done.
    pub(super) fn end(&self) {
        let mut state = self.lock();
        let next_key = state.next_key;
        *state = State { lost: true, next_key, ..State::default() };
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
        let lanes = state.batcher.work().map(|(key, all, work)| {
            let most = |loaded: &Loaded| loaded.model.on(self.device).max_rows();
            let rows = all.min(state.models.get(&key).map_or(1, most));
            costs.seconds(key, rows.max(1)) * work as f64 / rows.max(1) as f64
        });
        seconds(lanes.sum())
    }

    fn seconds(&self, at: Instant) -> f64 {
        at.saturating_duration_since(self.zero).as_secs_f64()
    }

    /// What evaluations of the models here, and of the newcomers', cost.
    fn costs(&self, state: &State, newcomers: &[Admission]) -> Known {
        let here = state.models.values().map(|loaded| &loaded.model);
        let new = newcomers.iter().map(|newcomer| &newcomer.model);
        Known {
            device: self.device,
            models: here.chain(new).map(|model| (model.key, Arc::clone(model))).collect(),
            margin: self.learned.now().margin(),
            factor: 1.0,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Promises take precedence once this part of their time has passed: what is left to the last moment has
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
    fn seconds(&self, model: ModelKey, rows: usize) -> f64 {
        let model = self.models.get(&model);
        model.map_or(0.0, |model| model.on(self.device).evaluation_seconds(rows)) * self.factor
    }

    fn margin(&self) -> f64 {
        self.margin
    }
}

impl Admission {
    fn claim(&self, urgency: Urgency) -> ScheduledWork {
        ScheduledWork { rows: self.rows, evaluations: self.evaluations, urgency }
    }
}

impl Forecast {
    /// Time until the last newcomer is done.
    pub(super) fn predicted(&self) -> Duration {
        seconds(self.finishes.iter().copied().fold(self.now, f64::max) - self.now)
    }
}

/// Seconds that newcomers take together on an idle device of that number, without any margin.
pub(super) fn alone_seconds(device: usize, newcomers: &[Admission]) -> f64 {
    let mut lanes: BTreeMap<ModelKey, (&Replica, usize, usize)> = BTreeMap::new();
    for newcomer in newcomers {
        let model = newcomer.model.as_ref();
        let lane = lanes.entry(model.key).or_insert((model.on(device), 0, 0));
        let (_, rows, evaluations) = lane;
        *rows += newcomer.rows;
        *evaluations = newcomer.evaluations.max(*evaluations);
    }
    let lanes = lanes.values().map(|(replica, all, evaluations)| {
        let rows = (*all).min(replica.max_rows()).max(1);
        replica.evaluation_seconds(rows) * (all.div_ceil(rows) * evaluations) as f64
    });
    lanes.sum()
}

/// As long as a clock can tell.
pub(super) fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}
