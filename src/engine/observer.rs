//! What becomes of requests and samples, as metrics count it. Nothing but evaluations is counted of background work.

use std::{sync::Arc, time::Duration};

use super::{
    Rejected, SampleTimings,
    admission::Admission,
    batcher::Batch,
    job::Failure,
    sample::{Prompt, Sample, Task},
    stage::Stage,
};
use crate::{metrics::Metrics, registry::Model};

#[derive(Debug, Clone)]
pub(super) struct Observer(Arc<Metrics>);

impl Observer {
    pub(super) fn new(metrics: Arc<Metrics>) -> Self {
        Self(metrics)
    }

    /// A request for so many samples of each model was refused.
    pub(super) fn rejected<'a>(
        &self,
        rejected: &Rejected,
        asked: impl IntoIterator<Item = (&'a Arc<Model>, usize)>,
    ) {
        for (model, samples) in asked {
            let counter = &self.0.rejected;
            counter.with_label_values(&[&model.id, rejected.reason()]).inc_by(samples as u64);
        }
    }

    /// A request came with these prompts, whose hidden states were known or not.
    pub(super) fn prompted(&self, model: &Model, prompts: &[Prompt]) {
        for prompt in prompts {
            let outcome = if prompt.states.is_some() { "hit" } else { "miss" };
            self.0.prompts.with_label_values(&[model.id.as_str(), outcome]).inc();
        }
    }

    /// A sample waits for its first evaluation.
    pub(super) fn entered(&self, sample: &Admission) {
        if !sample.background {
            self.0.samples_waiting.with_label_values(&[&sample.model.id]).inc();
        }
    }

    /// Its first evaluation begins.
    pub(super) fn began(&self, sample: &Admission) {
        if !sample.background {
            self.0.samples_waiting.with_label_values(&[&sample.model.id]).dec();
            self.0.samples_running.with_label_values(&[&sample.model.id]).inc();
        }
    }

    /// An evaluation ended.
    pub(super) fn evaluated(&self, model: &Model, batch: &Batch, seconds: f64) {
        let label = &[model.id.as_str()];
        if batch.stage != Stage::Denoise {
            let labels = &[model.id.as_str(), batch.stage.name()];
            self.0.transcoding_duration.with_label_values(labels).observe(seconds);
            return;
        }
        self.0.evaluation_duration.with_label_values(label).observe(seconds);
        self.0.batch_samples.with_label_values(label).observe(batch.samples.len() as f64);
    }

    /// A sample is gone, whatever the reason; whether its first evaluation had begun.
    pub(super) fn gone(&self, sample: &Admission, began: bool) {
        if !sample.background {
            let gauge = if began { &self.0.samples_running } else { &self.0.samples_waiting };
            gauge.with_label_values(&[&sample.model.id]).dec();
        }
    }

    /// A sample took so many times as long as predicted.
    pub(super) fn compared(&self, sample: &Admission, ratio: f64) {
        self.0.prediction_ratio.with_label_values(&[&sample.model.id]).observe(ratio);
    }

    /// A sample is finished.
    pub(super) fn finished(&self, sample: &Sample, timings: &SampleTimings) {
        if sample.admission.background {
            return;
        }
        let label = &[sample.admission.model.id.as_str()];
        let seconds = |duration: Duration| duration.as_secs_f64();
        self.0.queue_duration.with_label_values(label).observe(seconds(timings.queue));
        self.0.device_duration.with_label_values(label).observe(seconds(timings.device));
        if let Task::Generate(_) = sample.task {
            self.0.images.with_label_values(label).inc();
        }
    }

    /// A sample failed, or its client went away, for which there is no failure.
    pub(super) fn unfinished(&self, sample: &Admission, failure: Option<&Failure>) {
        if !sample.background {
            let reason = failure.map_or("disconnect", Failure::reason);
            self.0.cancelled.with_label_values(&[sample.model.id.as_str(), reason]).inc();
        }
    }

    /// What was asked of a device panicked: an evaluation, or the device's whole thread.
    pub(super) fn panicked(&self, what: &str) {
        self.0.panics.with_label_values(&[what]).inc();
    }

    /// Predictions are taken to be too short by this factor.
    pub(super) fn margin(&self, margin: f64) {
        self.0.prediction_margin.set(margin);
    }
}
