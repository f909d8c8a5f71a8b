//! Who shares the next network evaluation: a pure planner.
//!
//! It knows neither tensors nor threads nor clocks: samples are numbers, time and costs are arguments.
//! A copy of it, asked again and again, foretells the future (`forecast.rs`). Four rules decide.
//!
//! *Within a model, oldest first.* The batch is the longest prefix of the model's samples at one stage, in order
//! of arrival, that fits the stage's row limit. What is to be decoded goes before what is to be denoised, since it ends a
//! sample, and so do prompts that are to be read, since newcomers join the next evaluation then. A sample thus takes part
//! in every evaluation from its first to its last, and nothing overtakes it. A decode may be in parts, of one sample each,
//! between which other models and deadlines have their turns; one that has begun goes on before another begins.
//!
//! *Between models, by device time.* Every model has a virtual time, the seconds of device it has
//! used; the one that has used least goes next (start-time fair queueing). A model that was idle
//! starts no earlier than the least of the busy ones, so idleness saves up no credit, and it keeps
//! what it owes, so leaving and coming back pays no debt. A student's request therefore waits for
//! one evaluation of the teacher, not for its fifty steps, and a model that waits is served after
//! finitely many evaluations of the others.
//!
//! *A deadline goes first when it must.* Some samples were accepted with a deadline. When half of the time to it has
//! passed, or another evaluation by the first two rules would leave too little for those with deadlines, earliest first,
//! those alone share the next one. Nobody starves: while a sample without a deadline has been there for long, deadlines
//! go in their turn.
//!
//! *Background work runs when nothing else does.*

use std::collections::BTreeMap;

use super::stage::{PerStage, Stage};

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
    /// Of which of its networks.
    pub stage: Stage,
    /// Oldest first.
    pub samples: Vec<SampleKey>,
    /// Rows of the network's input, at least one per sample.
    pub rows: usize,
}

/// What a sample is still to have done at a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Part {
    /// Rows it takes in every evaluation: of denoising 2 with guidance, else 1.
    pub rows: usize,
    /// Evaluations still to do.
    pub evaluations: usize,
}

/// What a sample is still to have done.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScheduledWork {
    /// By stage, which it goes through in their order.
    pub parts: PerStage<Part>,
    /// When it must be done.
    pub urgency: Urgency,
}

/// When a sample must be done; seconds on the clock of whoever asks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Urgency {
    /// By `due`; it passes those without a deadline at the latest when `from` has come.
    Deadline {
        /// When it must be done.
        due: f64,
        /// When it takes precedence.
        from: f64,
    },
    /// In its turn; it arrived then.
    Ordinary(f64),
    /// Whenever nothing else is to do.
    Background,
}

#[derive(Debug, Clone)]
struct Lane {
    samples: Waiting,
    /// Background samples are apart.
    background: Waiting,
    max_rows: PerStage<usize>,
    /// Seconds of device used, on the scale all lanes share.
    virtual_seconds: f64,
}

/// The planner's whole state.
#[derive(Debug, Clone, Default)]
pub struct Batcher {
    lanes: BTreeMap<ModelKey, Lane>,
}

/// Ordinary samples let deadlines pass for so many seconds after they arrived.
const PATIENCE_SECONDS: f64 = 30.0;

/// Samples of a model.
#[derive(Debug, Clone, Default)]
struct Waiting {
    /// In order of arrival.
    works: BTreeMap<SampleKey, ScheduledWork>,
    /// How many are at each stage.
    standing: PerStage<usize>,
}

/// What the planner must know of the future: seconds of an evaluation of so many rows.
pub trait Costs {
    /// Predicted seconds.
    fn seconds(&self, model: ModelKey, stage: Stage, rows: usize) -> f64;

    /// By how much predictions are taken to be too short, at least 1, where a deadline depends on them.
    fn margin(&self) -> f64;
}

impl Batcher {
    /// A sample arrives. `max_rows` are its model's row limits per evaluation.
    pub fn join(
        &mut self,
        model: ModelKey,
        sample: SampleKey,
        work: ScheduledWork,
        max_rows: PerStage<usize>,
    ) {
        let start = self.least_busy_seconds().unwrap_or(0.0);
        let lane = self.lanes.entry(model).or_insert_with(|| Lane {
            samples: Waiting::default(),
            background: Waiting::default(),
            max_rows,
            virtual_seconds: start,
        });
        lane.max_rows = max_rows;
        if work.urgency == Urgency::Background {
            lane.background.insert(sample, work);
            return;
        }
        if !lane.busy() {
            lane.virtual_seconds = lane.virtual_seconds.max(start);
        }
        lane.samples.insert(sample, work);
    }

    /// From now on the model's evaluations at a stage have at most so many rows.
    pub fn limit(&mut self, model: ModelKey, stage: Stage, max_rows: usize) {
        if let Some(lane) = self.lanes.get_mut(&model) {
            lane.max_rows[stage] = max_rows;
        }
    }

    /// A sample finished, failed or was cancelled.
    pub fn leave(&mut self, model: ModelKey, sample: SampleKey) {
        if let Some(lane) = self.lanes.get_mut(&model) {
            lane.samples.remove(sample);
            lane.background.remove(sample);
        }
        // An idle model is remembered only as long as it owes the busy ones device time.
        let least = self.least_busy_seconds();
        self.lanes.retain(|_, lane| {
            if least.is_none() {
                lane.virtual_seconds = 0.0;
            }
            let owes = least.is_some_and(|least| lane.virtual_seconds > least);
            lane.busy() || !lane.background.works.is_empty() || owes
        });
    }

    /// The next evaluation, or `None` when nothing waits. `now` is on the clock of the deadlines.
    ///
    /// A batch has at most the stage's `max_rows` rows, unless its oldest sample alone has more.
    pub fn next(&self, now: f64, costs: &impl Costs) -> Option<Batch> {
        match self.fair() {
            Some(fair) => Some(self.urgent(now, &fair, costs).unwrap_or(fair)),
            None => self.idle(),
        }
    }

    /// An evaluation of this batch took so many seconds of device.
    pub fn ran(&mut self, batch: &Batch, seconds: f64) {
        let Some(lane) = self.lanes.get_mut(&batch.model) else { return };
        let mut billed = false;
        for &sample in &batch.samples {
            if lane.samples.ran(sample, batch.stage) {
                billed = true;
            } else {
                lane.background.ran(sample, batch.stage);
            }
        }
        // What ran because nothing else did is nobody's debt.
        if billed {
            lane.virtual_seconds += seconds.max(0.0);
        }
    }

    /// Whether nothing waits or runs, background work apart.
    pub fn is_empty(&self) -> bool {
        self.lanes.values().all(|lane| !lane.busy())
    }

    /// What each busy model has to do at each stage, background work apart: rows of one evaluation, if all samples took
    /// part in it; and the sum over samples of rows × evaluations.
    pub fn work(&self) -> impl Iterator<Item = (ModelKey, Stage, usize, usize)> {
        let busy = self.lanes.iter().filter(|(_, lane)| lane.busy());
        busy.flat_map(|(&model, lane)| {
            Stage::ALL.into_iter().map(move |stage| {
                let parts = lane.samples.works.values().map(|work| work.parts[stage]);
                let left = parts.filter(|part| part.evaluations > 0);
                let (rows, work) = left.fold((0, 0), |(rows, work), part| {
                    (rows + part.rows, work + part.rows * part.evaluations)
                });
                (model, stage, rows, work)
            })
        })
    }

    /// What is left of a sample, if it is there.
    pub fn scheduled(&self, model: ModelKey, sample: SampleKey) -> Option<ScheduledWork> {
        let lane = self.lanes.get(&model)?;
        let works = [&lane.samples.works, &lane.background.works];
        works.iter().find_map(|works| works.get(&sample)).copied()
    }

    /// The first two rules.
    fn fair(&self) -> Option<Batch> {
        let busy = self.lanes.iter().filter(|(_, lane)| lane.busy());
        let (&model, lane) = busy.min_by(|(_, a), (_, b)| {
            a.virtual_seconds
                .total_cmp(&b.virtual_seconds)
                .then_with(|| a.samples.oldest().cmp(&b.samples.oldest()))
        })?;
        Some(lane.samples.prefix(model, lane.max_rows))
    }

    /// The third rule: the deadlines that `fair` would leave too little time for.
    fn urgent(&self, now: f64, fair: &Batch, costs: &impl Costs) -> Option<Batch> {
        if self.oldest_ordinary().is_some_and(|since| since + PATIENCE_SECONDS < now) {
            return None;
        }
        let margin = costs.margin();
        let after = now + margin * costs.seconds(fair.model, fair.stage, fair.rows);
        let (due, from) = self.earliest_deadline()?;
        if after <= from && after + margin * self.deadline_seconds(costs) <= due {
            return None;
        }
        // Those that cannot be kept any more hold nobody up.
        let in_time = |model, work: &ScheduledWork, due| {
            now + work.seconds(|stage, rows| costs.seconds(model, stage, rows)) <= due
        };
        let mut urgent: Vec<(f64, ModelKey, SampleKey, ScheduledWork)> = Vec::new();
        for (&model, lane) in &self.lanes {
            for (&sample, work) in &lane.samples.works {
                if let Some(due) = work.due().filter(|&due| in_time(model, work, due)) {
                    urgent.push((due, model, sample, *work));
                }
            }
        }
        urgent.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.2.cmp(&b.2)));
        let per_row: BTreeMap<ModelKey, PerStage<f64>> = self
            .lanes
            .iter()
            .map(|(&model, lane)| (model, lane.seconds_per_deadline_row(model, costs)))
            .collect();
        let mut need = 0.0;
        let mut needs = urgent.iter().map(|(due, model, sample, work)| {
            let mut left = *work;
            if fair.samples.contains(sample) {
                left.ran(fair.stage);
            }
            let per_row = per_row.get(model).copied().unwrap_or_default();
            need += margin * left.seconds(|stage, rows| rows as f64 * per_row[stage]);
            (due, need)
        });
        if after <= from && needs.all(|(due, need)| after + need <= *due) {
            return None;
        }

        // Earliest first, with as many of those that follow as leave all that share it time.
        let (_, model, first, work) = *urgent.first()?;
        let stage = work.stage();
        let (mut samples, mut rows) = (vec![first], work.parts[stage].rows);
        let max_rows = self.lanes.get(&model)?.max_rows[stage];
        for (i, (_, of, sample, other)) in urgent.iter().enumerate().skip(1) {
            let all = rows + other.parts[stage].rows;
            if *of != model || other.stage() != stage || all > max_rows {
                break;
            }
            let shared = costs.seconds(model, stage, all);
            let all_in_time = urgent[..=i].iter().all(|(due, _, _, work)| {
                let seconds = work.seconds(|at, rows| match at == stage {
                    true => shared,
                    false => costs.seconds(model, at, rows),
                });
                now + margin * seconds <= *due
            });
            if !all_in_time {
                break;
            }
            samples.push(*sample);
            rows = all;
        }
        samples.sort_unstable();
        Some(Batch { model, stage, samples, rows })
    }

    /// All that has a deadline, in seconds of device.
    fn deadline_seconds(&self, costs: &impl Costs) -> f64 {
        let lanes = self.lanes.iter().map(|(&model, lane)| {
            if lane.with_deadlines().next().is_none() {
                return 0.0;
            }
            let per_row = lane.seconds_per_deadline_row(model, costs);
            let seconds =
                |work: &ScheduledWork| work.seconds(|stage, rows| rows as f64 * per_row[stage]);
            lane.with_deadlines().map(seconds).sum()
        });
        lanes.sum()
    }

    fn oldest_ordinary(&self) -> Option<f64> {
        let oldest = |lane: &Lane| {
            lane.samples.works.values().find_map(|work| match work.urgency {
                Urgency::Ordinary(since) => Some(since),
                Urgency::Deadline { .. } | Urgency::Background => None,
            })
        };
        self.lanes.values().filter_map(oldest).min_by(f64::total_cmp)
    }

    /// The earliest time that anything is due, and that anything takes precedence.
    fn earliest_deadline(&self) -> Option<(f64, f64)> {
        let deadlines = self.lanes.values().flat_map(Lane::with_deadlines).filter_map(|work| {
            match work.urgency {
                Urgency::Deadline { due, from } => Some((due, from)),
                Urgency::Ordinary(_) | Urgency::Background => None,
            }
        });
        deadlines.reduce(|(due, from), (d, f)| (due.min(d), from.min(f)))
    }

    /// The fourth rule.
    fn idle(&self) -> Option<Batch> {
        let mut lanes = self.lanes.iter().filter(|(_, lane)| !lane.background.works.is_empty());
        let (&model, lane) = lanes.next()?;
        Some(lane.background.prefix(model, lane.max_rows))
    }

    fn least_busy_seconds(&self) -> Option<f64> {
        self.lanes
            .values()
            .filter(|lane| lane.busy())
            .map(|lane| lane.virtual_seconds)
            .min_by(f64::total_cmp)
    }
}

impl Waiting {
    fn insert(&mut self, sample: SampleKey, work: ScheduledWork) {
        self.remove(sample);
        self.standing[work.stage()] += 1;
        self.works.insert(sample, work);
    }

    fn remove(&mut self, sample: SampleKey) {
        if let Some(work) = self.works.remove(&sample) {
            self.standing[work.stage()] -= 1;
        }
    }

    /// A sample took part in an evaluation; false where it is none of these.
    fn ran(&mut self, sample: SampleKey, stage: Stage) -> bool {
        let Some(work) = self.works.get_mut(&sample) else { return false };
        self.standing[work.stage()] -= 1;
        work.ran(stage);
        self.standing[work.stage()] += 1;
        true
    }

    fn oldest(&self) -> Option<&SampleKey> {
        self.works.keys().next()
    }

    /// The stage whose turn it is.
    fn stage(&self) -> Stage {
        let first = [Stage::Decode, Stage::Encode, Stage::Embed];
        first.into_iter().find(|&stage| self.standing[stage] > 0).unwrap_or(Stage::Denoise)
    }

    /// The oldest samples at the stage whose turn it is, as many as fit.
    fn prefix(&self, model: ModelKey, max_rows: PerStage<usize>) -> Batch {
        let stage = self.stage();
        let most = max_rows[stage];
        let mut samples = Vec::with_capacity(most.min(self.standing[stage]));
        let mut total = 0;
        let standing = || self.works.iter().filter(|(_, work)| work.stage() == stage);
        // Of decodes in parts the one that has begun has the least to do.
        let least = match stage {
            Stage::Decode => standing().map(|(_, work)| work.parts[stage].evaluations).min(),
            Stage::Encode | Stage::Embed | Stage::Denoise => None,
        };
        let next =
            |work: &ScheduledWork| least.is_none_or(|least| work.parts[stage].evaluations == least);
        for (&sample, work) in standing().filter(|(_, work)| next(work)) {
            let rows = work.parts[stage].rows;
            if !samples.is_empty() && total + rows > most {
                break;
            }
            samples.push(sample);
            total += rows;
        }
        Batch { model, stage, samples, rows: total }
    }
}

impl ScheduledWork {
    /// So many evaluations of denoising and nothing else.
    pub fn denoising(rows: usize, evaluations: usize, urgency: Urgency) -> Self {
        let mut parts = PerStage::default();
        parts[Stage::Denoise] = Part { rows, evaluations };
        Self { parts, urgency }
    }

    /// The stage it is at.
    pub fn stage(&self) -> Stage {
        let mut left = self.parts.iter().filter(|(_, part)| part.evaluations > 0);
        left.next().map_or(Stage::Denoise, |(stage, _)| stage)
    }

    /// Whether nothing is left to do.
    pub fn is_done(&self) -> bool {
        self.parts.iter().all(|(_, part)| part.evaluations == 0)
    }

    /// Seconds of all that is left, of evaluations that take what `seconds` says of a stage and its rows.
    fn seconds(&self, seconds: impl Fn(Stage, usize) -> f64) -> f64 {
        let left = self.parts.iter().filter(|(_, part)| part.evaluations > 0);
        left.map(|(stage, part)| part.evaluations as f64 * seconds(stage, part.rows)).sum()
    }

    fn ran(&mut self, stage: Stage) {
        let part = &mut self.parts[stage];
        part.evaluations = part.evaluations.saturating_sub(1);
    }

    fn due(&self) -> Option<f64> {
        match self.urgency {
            Urgency::Deadline { due, .. } => Some(due),
            Urgency::Ordinary(_) | Urgency::Background => None,
        }
    }
}

impl Lane {
    fn busy(&self) -> bool {
        !self.samples.works.is_empty()
    }

    fn with_deadlines(&self) -> impl Iterator<Item = &ScheduledWork> {
        self.samples.works.values().filter(|work| work.due().is_some())
    }

    /// What a row costs of an evaluation that the samples with deadlines share, by stage.
    fn seconds_per_deadline_row(&self, model: ModelKey, costs: &impl Costs) -> PerStage<f64> {
        PerStage::new(|stage| {
            let parts = self.with_deadlines().map(|work| work.parts[stage]);
            let all =
                parts.filter(|part| part.evaluations > 0).map(|part| part.rows).sum::<usize>();
            if all == 0 {
                return 0.0;
            }
            let rows = all.min(self.max_rows[stage]).max(1);
            costs.seconds(model, stage, rows) / rows as f64
        })
    }
}

#[cfg(test)]
#[path = "batcher_tests.rs"]
mod tests;
