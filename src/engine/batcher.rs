//! Who shares the next network evaluation: a pure planner.
//!
//! It knows neither tensors nor threads nor clocks: samples are numbers, time is an argument. Two
//! rules decide.
//!
//! *Within a model, oldest first.* The batch is the longest prefix of the model's samples, in order
//! of arrival, that fits its row limit. A sample thus takes part in every evaluation from its first
//! to its last, and nothing overtakes it.
//!
//! *Between models, by device time.* Every model has a virtual time, the seconds of device it has
//! used; the one that has used least goes next (start-time fair queueing). A model that was idle
//! starts no earlier than the least of the busy ones, so idleness saves up no claim, and it keeps
//! what it owes, so leaving and coming back pays no debt. A student's request therefore waits for
//! one evaluation of the teacher, not for its fifty steps, and a model that waits is served after
//! finitely many evaluations of the others.

use std::collections::BTreeMap;

/// Identifies a loaded model: two loads of one folder are two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModelKey(pub u64);

/// Identifies a sample; later arrivals have larger numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SampleKey(pub u64);

/// The samples that share the next evaluation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Whose evaluation it is.
    pub model: ModelKey,
    /// Oldest first.
    pub samples: Vec<SampleKey>,
    /// Rows of the network's input, at least one per sample.
    pub rows: usize,
}

#[derive(Debug)]
struct Lane {
    /// Sample → rows it takes in an evaluation, in order of arrival.
    samples: BTreeMap<SampleKey, usize>,
    max_rows: usize,
    /// Seconds of device used, on the scale all lanes share.
    virtual_seconds: f64,
}

/// The planner's whole state.
#[derive(Debug, Default)]
pub struct Batcher {
    lanes: BTreeMap<ModelKey, Lane>,
}

impl Batcher {
    /// A sample arrives and takes `rows` rows of every evaluation (2 with guidance, else 1).
    /// `max_rows` is its model's row limit per evaluation.
    pub fn join(&mut self, model: ModelKey, sample: SampleKey, rows: usize, max_rows: usize) {
        let start = self.least_busy_seconds().unwrap_or(0.0);
        let lane = self.lanes.entry(model).or_insert_with(|| Lane {
            samples: BTreeMap::new(),
            max_rows,
            virtual_seconds: start,
        });
        if lane.samples.is_empty() {
            lane.virtual_seconds = lane.virtual_seconds.max(start);
        }
        lane.max_rows = max_rows;
        lane.samples.insert(sample, rows);
    }

    /// A sample finished, failed or was cancelled.
    pub fn leave(&mut self, model: ModelKey, sample: SampleKey) {
        if let Some(lane) = self.lanes.get_mut(&model) {
            lane.samples.remove(&sample);
        }
        // An idle model is remembered only as long as it owes the busy ones device time.
        match self.least_busy_seconds() {
            Some(least) => self.lanes.retain(|_, l| l.busy() || l.virtual_seconds > least),
            None => self.lanes.clear(),
        }
    }

    /// The next evaluation, or `None` when nothing waits.
    ///
    /// A batch has at most the model's `max_rows` rows, unless its oldest sample alone has more.
    pub fn next(&self) -> Option<Batch> {
        let busy = self.lanes.iter().filter(|(_, lane)| lane.busy());
        let (&model, lane) = busy.min_by(|(_, a), (_, b)| {
            a.virtual_seconds
                .total_cmp(&b.virtual_seconds)
                .then_with(|| a.samples.keys().next().cmp(&b.samples.keys().next()))
        })?;
        let mut samples = Vec::with_capacity(lane.max_rows.min(lane.samples.len()));
        let mut total = 0;
        for (&sample, &rows) in &lane.samples {
            if !samples.is_empty() && total + rows > lane.max_rows {
                break;
            }
            samples.push(sample);
            total += rows;
        }
        Some(Batch { model, samples, rows: total })
    }

    /// An evaluation of this model took so many seconds of device.
    pub fn ran(&mut self, model: ModelKey, seconds: f64) {
        if let Some(lane) = self.lanes.get_mut(&model) {
            lane.virtual_seconds += seconds.max(0.0);
        }
    }

    /// Whether nothing waits or runs.
    pub fn is_empty(&self) -> bool {
        self.lanes.values().all(|lane| !lane.busy())
    }

    fn least_busy_seconds(&self) -> Option<f64> {
        self.lanes
            .values()
            .filter(|lane| lane.busy())
            .map(|lane| lane.virtual_seconds)
            .min_by(f64::total_cmp)
    }
}

impl Lane {
    fn busy(&self) -> bool {
        !self.samples.is_empty()
    }
}

#[cfg(test)]
#[path = "batcher_tests.rs"]
mod tests;
