//! What is admitted and not done yet, and when it is predicted to be done.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use super::batcher::ModelKey;
use crate::registry::Model;

/// Remaining work by model. Admission adds to it, the worker takes from it.
#[derive(Debug, Default)]
pub(super) struct Load {
    lanes: Mutex<BTreeMap<ModelKey, Lane>>,
}

#[derive(Debug)]
struct Lane {
    model: Arc<Model>,
    /// Rows of one evaluation, if all samples took part in it.
    rows: usize,
    /// Σ over samples of rows × evaluations still to do.
    row_evaluations: usize,
}

/// A request's own work.
#[derive(Debug, Clone, Copy)]
pub(super) struct Work {
    /// Rows of one evaluation.
    pub(super) rows: usize,
    /// Evaluations of each sample.
    pub(super) evaluations: usize,
}

impl Load {
    pub(super) fn admit(&self, model: &Arc<Model>, work: Work) {
        let mut lanes = self.lock();
        let lane = lanes.entry(model.key).or_insert_with(|| Lane {
            model: Arc::clone(model),
            rows: 0,
            row_evaluations: 0,
        });
        lane.rows += work.rows;
        lane.row_evaluations += work.rows * work.evaluations;
    }

    /// Rows took part in one evaluation.
    pub(super) fn ran(&self, model: ModelKey, rows: usize) {
        if let Some(lane) = self.lock().get_mut(&model) {
            lane.row_evaluations = lane.row_evaluations.saturating_sub(rows);
        }
    }

    /// A sample left with so much of its work undone.
    pub(super) fn left(&self, model: ModelKey, undone: Work) {
        let mut lanes = self.lock();
        if let Some(lane) = lanes.get_mut(&model) {
            lane.rows = lane.rows.saturating_sub(undone.rows);
            lane.row_evaluations =
                lane.row_evaluations.saturating_sub(undone.rows * undone.evaluations);
            if lane.rows == 0 {
                lanes.remove(&model);
            }
        }
    }

    /// Time until everything admitted is done.
    pub(super) fn predicted_drain(&self) -> Duration {
        seconds(self.lock().values().map(Lane::drain_seconds).sum())
    }

    /// Time until a request arriving now is done: it joins its model's running batch where there is
    /// room, else waits for it; the other models take as much of the device as it does, while they
    /// have work.
    pub(super) fn predicted_finish(&self, model: &Model, work: Work) -> Duration {
        let lanes = self.lock();
        let alone = alone_seconds(model, work);
        let own = match lanes.get(&model.key) {
            None => alone,
            Some(lane) if lane.rows + work.rows <= model.max_rows() => {
                model.evaluation_seconds(lane.rows + work.rows) * work.evaluations as f64
            }
            Some(lane) => lane.drain_seconds() + alone,
        };
        let others = lanes.iter().filter(|(key, _)| **key != model.key);
        seconds(own + others.map(|(_, lane)| lane.drain_seconds().min(own)).sum::<f64>())
    }

    /// Time the request takes on an idle server.
    pub(super) fn predicted_alone(model: &Model, work: Work) -> Duration {
        seconds(alone_seconds(model, work))
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ModelKey, Lane>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lane {
    fn drain_seconds(&self) -> f64 {
        let rows = self.rows.min(self.model.max_rows()).max(1);
        self.model.evaluation_seconds(rows) * self.row_evaluations as f64 / rows as f64
    }
}

fn alone_seconds(model: &Model, work: Work) -> f64 {
    let rows = work.rows.min(model.max_rows()).max(1);
    let rounds = work.rows.div_ceil(rows);
    model.evaluation_seconds(rows) * (rounds * work.evaluations) as f64
}

fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}
