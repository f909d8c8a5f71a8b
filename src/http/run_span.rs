//! What a trace shows of one model's work on a request: what was asked of it, and for each image when it waited, when it
//! was in each stage, when it was encoded. The engine says so when an image is done; until then there is nothing to do.
//!
//! Names are those of OpenTelemetry's conventions for generative AI where these have one
//! (<https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/>).

use std::{future::Future, time::Instant};

use opentelemetry::KeyValue;

use super::{generate::ParsedRequest, wire::OutputFormat};
use crate::{
    engine::{Failure, SampleTimings, Stage},
    experiments::Experiment,
    registry::Model,
    traces::Span,
};

/// The span of one model's work; it ends when dropped. There is none where the request has none.
pub(super) struct RunSpan {
    span: Option<Span>,
    /// Whether it is known how the work ended.
    concluded: bool,
}

impl RunSpan {
    /// Of images that were asked for at that moment.
    pub(super) fn of_images(plan: &ParsedRequest, asked: Instant) -> Self {
        Self::begin(asked, || {
            let (request, recipe) = (&plan.request, plan.recipe());
            let model = &request.model.id;
            let number = |number: usize| number as i64;
            let mut attributes = vec![
                KeyValue::new("gen_ai.operation.name", "generate_content"),
                KeyValue::new("gen_ai.provider.name", "understudy"),
                KeyValue::new("gen_ai.output.type", "image"),
                KeyValue::new("gen_ai.request.model", model.clone()),
                KeyValue::new("gen_ai.request.choice.count", number(request.samples.len())),
                KeyValue::new("understudy.num_inference_steps", number(recipe.steps)),
                KeyValue::new("understudy.scheduler", recipe.sampler.to_string()),
                KeyValue::new("understudy.guidance_scale", request.guidance_scale),
                KeyValue::new("understudy.size", plan.size()),
            ];
            // A greater one is no number that OpenTelemetry has.
            let seed = request.samples.first().and_then(|first| i64::try_from(first.seed).ok());
            attributes.extend(seed.map(|seed| KeyValue::new("gen_ai.request.seed", seed)));
            (format!("generate_content {model}"), attributes)
        })
    }

    /// Of rows of a raw evaluation that were asked for at that moment.
    pub(super) fn of_rows(model: &Model, rows: usize, asked: Instant) -> Self {
        Self::begin(asked, || {
            let model = &model.id;
            let attributes = vec![
                KeyValue::new("gen_ai.request.model", model.clone()),
                KeyValue::new("understudy.rows", rows as i64),
            ];
            (format!("infer {model}"), attributes)
        })
    }

    fn begin(asked: Instant, described: impl FnOnce() -> (String, Vec<KeyValue>)) -> Self {
        let span = Span::current().map(|request| {
            let (name, attributes) = described();
            request.begin(name, asked, attributes)
        });
        Self { span, concluded: false }
    }

    /// The experiment that it is for, and which of its arms does the work.
    pub(super) fn for_experiment(&self, experiment: &Experiment, arm: usize) {
        if let Some(span) = &self.span {
            span.set(KeyValue::new("understudy.experiment.id", experiment.id.clone()));
            span.set(KeyValue::new("understudy.experiment.arm", experiment.arms[arm].name()));
        }
    }

    /// Where the time of an image, or of a row, went.
    pub(super) fn made(&self, index: usize, timings: &SampleTimings) {
        let Some(span) = &self.span else { return };
        let of = || KeyValue::new("understudy.index", index as i64);
        let admitted = timings.finished - timings.total;
        span.record("queue", [admitted, admitted + timings.queue], vec![of()]);
        for (stage, time) in timings.stages.iter() {
            let Some(time) = time else { continue };
            let evaluations = KeyValue::new("understudy.evaluations", time.evaluations as i64);
            let mut attributes = vec![of(), evaluations];
            if stage == Stage::Denoise {
                attributes.push(KeyValue::new("understudy.mean_batch", timings.mean_batch));
            }
            span.record(name(stage), [time.began, time.ended], attributes);
        }
    }

    /// Waits for an image's bytes.
    pub(super) async fn encoding<T>(
        &self,
        index: usize,
        format: OutputFormat,
        bytes: impl Future<Output = T>,
    ) -> T {
        let Some(span) = &self.span else { return bytes.await };
        let began = Instant::now();
        let bytes = bytes.await;
        let attributes = vec![
            KeyValue::new("understudy.index", index as i64),
            KeyValue::new("understudy.media_type", format.media_type()),
        ];
        span.record("encode image", [began, Instant::now()], attributes);
        bytes
    }

    /// All that was asked for is there.
    pub(super) fn completed(&mut self) {
        self.concluded = true;
    }

    /// An image, or a row, failed.
    pub(super) fn failed(&mut self, failure: &Failure) {
        if let Some(span) = &self.span {
            span.fail(failure.reason(), failure.to_string());
        }
        self.concluded = true;
    }

    /// It is over before it is dropped.
    pub(super) fn end(&mut self) {
        if let Some(span) = self.span.take() {
            if !self.concluded {
                span.fail("cancelled", "nobody waits for it any more");
            }
            span.end(Instant::now());
        }
    }
}

impl Drop for RunSpan {
    fn drop(&mut self) {
        self.end();
    }
}

fn name(stage: Stage) -> &'static str {
    match stage {
        Stage::Encode => "encode prompt",
        Stage::Embed => "encode latent",
        Stage::Denoise => "denoise",
        Stage::Decode => "decode latent",
    }
}
