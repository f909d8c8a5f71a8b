//! What is admitted and not done yet, shared between admission and the device thread: the plan, and what
//! was predicted.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::{
    batcher::{Batch, Batcher, Claim, Costs, ModelKey, SampleKey, Urgency},
    calibration::Calibration,
    forecast::finishes,
};
use crate::registry::Model;

/// Admission adds to it, the device thread takes from it.
#[derive(Debug)]
pub(super) struct Load {
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
    calibration: Calibration,
    next_key: u64,
}

/// A model, and how many samples of it there are.
#[derive(Debug)]
struct Loaded {
    model: Arc<Model>,
    samples: usize,
}

#[derive(Debug, Clone, Copy)]
struct Promise {
    admitted: f64,
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
pub(super) struct Newcomer {
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
pub(super) struct Outlook {
    /// When each newcomer is done, in seconds on the planner's clock.
    finishes: Vec<f64>,
    /// What they add to the promises that were made before.
    delays: BTreeMap<SampleKey, f64>,
    now: f64,
    margin: f64,
}

impl Default for Load {
    fn default() -> Self {
        Self { zero: Instant::now(), state: Mutex::default() }
    }
}

impl Load {
    /// Foretells what happens when these join now.
    pub(super) fn outlook(&self, newcomers: &[Newcomer]) -> Outlook {
        let now = self.seconds(Instant::now());
        let (mut batcher, running, costs, promises, next_key) = {
            let state = self.lock();
            let costs = state.costs(newcomers);
            let running = state.running.clone().map(|running| {
                let seconds = costs.seconds(running.batch.model, running.batch.rows);
                (running.batch, running.began + seconds)
            });
            let promises: Vec<SampleKey> = state.promises.keys().copied().collect();
            (state.batcher.clone(), running, costs, promises, state.next_key)
        };
        let keys: Vec<_> = (next_key..).take(newcomers.len()).map(SampleKey).collect();
        let before = finishes(batcher.clone(), running.clone(), now, &promises, &costs);
        for (newcomer, &key) in newcomers.iter().zip(&keys) {
            // Without precedence: promises are made only where they are kept in their turn.
            let claim = newcomer.claim(Urgency::Ordinary);
            batcher.join(newcomer.model.key, key, claim, newcomer.model.max_rows());
        }
        let watched: Vec<_> = promises.iter().chain(&keys).copied().collect();
        let after = finishes(batcher, running, now, &watched, &costs);
        Outlook {
            finishes: keys.iter().filter_map(|key| after.get(key).copied()).collect(),
            delays: before
                .into_iter()
                .filter_map(|(key, at)| Some((key, after.get(&key)? - at)))
                .collect(),
            now,
            margin: costs.margin,
        }
    }

    /// Whether an [`Outlook`] tells anything that admission needs.
    pub(super) fn needs_outlook(&self, newcomers: &[Newcomer]) -> bool {
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
        newcomers: &[Newcomer],
        outlook: Option<&Outlook>,
        send: impl FnOnce(&[SampleKey]) -> Result<(), E>,
    ) -> Result<(), E> {
        let admitted = self.seconds(Instant::now());
        let mut state = self.lock();
        let keys: Vec<_> = (state.next_key..).take(newcomers.len()).map(SampleKey).collect();
        send(&keys)?;
        state.next_key += newcomers.len() as u64;
        let delivery = state.calibration.delivery_seconds();
        for (i, (newcomer, &key)) in newcomers.iter().zip(&keys).enumerate() {
            let urgency = match newcomer.deadline {
                Some(deadline) => Urgency::Promised(self.seconds(deadline) - delivery),
                None if newcomer.background => Urgency::Background,
                None => Urgency::Ordinary,
            };
            let (model, claim) = (&newcomer.model, newcomer.claim(urgency));
            state.batcher.join(model.key, key, claim, model.max_rows());
            let loaded = state.models.entry(model.key);
            loaded.or_insert_with(|| Loaded { model: Arc::clone(model), samples: 0 }).samples += 1;
            let finish = outlook.and_then(|outlook| outlook.finishes.get(i)).copied();
            if let (Urgency::Promised(_), Some(finish)) = (urgency, finish) {
                state.promises.insert(key, Promise { admitted, finish });
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
        let costs = state.costs(&[]);
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
        let predicted = promise.finish - promise.admitted;
        let ratio = (predicted > 0.0).then(|| (now - promise.admitted) / predicted)?;
        state.calibration.took(ratio);
        Some(ratio)
    }

    /// A reply that was promised took so long once its images were made.
    pub(super) fn delivered(&self, after: Duration) {
        self.lock().calibration.delivered(after.as_secs_f64());
    }

    /// Whether no client waits for anything.
    pub(super) fn is_idle(&self) -> bool {
        self.lock().batcher.is_empty()
    }

    /// What admission adds to predictions: a factor, and seconds for the reply.
    pub(super) fn margins(&self) -> (f64, f64) {
        let calibration = self.lock().calibration;
        (calibration.margin(), calibration.delivery_seconds())
    }

    /// Time until everything admitted is done.
    pub(super) fn predicted_drain(&self) -> Duration {
        let state = self.lock();
        let costs = state.costs(&[]);
        let lanes = state.batcher.work().map(|(key, all, work)| {
            let rows = all.min(state.models.get(&key).map_or(1, |loaded| loaded.model.max_rows()));
            costs.seconds(key, rows.max(1)) * work as f64 / rows.max(1) as f64
        });
        seconds(lanes.sum())
    }

    fn seconds(&self, at: Instant) -> f64 {
        at.saturating_duration_since(self.zero).as_secs_f64()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn costs(&self, newcomers: &[Newcomer]) -> Known {
        let here = self.models.values().map(|loaded| &loaded.model);
        let new = newcomers.iter().map(|newcomer| &newcomer.model);
        Known {
            models: here.chain(new).map(|model| (model.key, Arc::clone(model))).collect(),
            margin: self.calibration.margin(),
        }
    }
}

/// What the models' cost models say now.
struct Known {
    models: BTreeMap<ModelKey, Arc<Model>>,
    margin: f64,
}

impl Costs for Known {
    fn seconds(&self, model: ModelKey, rows: usize) -> f64 {
        self.models.get(&model).map_or(0.0, |model| model.evaluation_seconds(rows))
    }

    fn margin(&self) -> f64 {
        self.margin
    }
}

impl Newcomer {
    fn claim(&self, urgency: Urgency) -> Claim {
        Claim { rows: self.rows, evaluations: self.evaluations, urgency }
    }
}

impl Outlook {
    /// Time until the last newcomer is done.
    pub(super) fn predicted(&self) -> Duration {
        seconds(self.padded_seconds() / self.margin)
    }

    /// Seconds until then, the margin included.
    pub(super) fn padded_seconds(&self) -> f64 {
        let last = self.finishes.iter().copied().fold(self.now, f64::max);
        (last - self.now) * self.margin
    }
}

/// Seconds that newcomers take together on an idle server, without any margin.
pub(super) fn alone_seconds(newcomers: &[Newcomer]) -> f64 {
    let mut lanes: BTreeMap<ModelKey, (&Model, usize, usize)> = BTreeMap::new();
    for newcomer in newcomers {
        let model = newcomer.model.as_ref();
        let (_, rows, evaluations) = lanes.entry(model.key).or_insert((model, 0, 0));
        *rows += newcomer.rows;
        *evaluations = newcomer.evaluations.max(*evaluations);
    }
    let lanes = lanes.values().map(|(model, all, evaluations)| {
        let rows = (*all).min(model.max_rows()).max(1);
        model.evaluation_seconds(rows) * (all.div_ceil(rows) * evaluations) as f64
    });
    lanes.sum()
}

/// As long as a clock can tell.
pub(super) fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}
