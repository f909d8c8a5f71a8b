//! A request in the engine, and what comes of it.

use std::{
    future::poll_fn,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use futures_util::future::try_join_all;

use super::{
    App,
    encode::encode,
    error::Problem,
    generate::ParsedRequest,
    run_span::RunSpan,
    timings::unix_seconds,
    wire::{GeneratedImage, GenerationReply, Timings},
};
use crate::engine::{Event, Image, Routed, SampleTimings, Submission};

/// One model's request in the engine. Dropping it, as happens when the client goes away, cancels what has not finished.
pub(super) struct Run {
    plan: ParsedRequest,
    submission: Submission,
    /// By index.
    images: Vec<Option<(Image, SampleTimings)>>,
    received: Instant,
    /// From receipt to when the latest image was made.
    total: Duration,
    pub(super) span: RunSpan,
}

impl Run {
    pub(super) fn new(app: &App, plan: ParsedRequest, received: Instant) -> Result<Self, Problem> {
        let asked = Instant::now();
        let submission = app.engine.generate(plan.request.clone())?;
        Ok(Self::of(plan, submission, received, asked))
    }

    /// Of a request that was received at one moment and that the engine was asked for at another.
    pub(super) fn of(
        plan: ParsedRequest,
        submission: Submission,
        received: Instant,
        asked: Instant,
    ) -> Self {
        let images = plan.request.samples.iter().map(|_| None).collect();
        let span = RunSpan::of_images(&plan, asked);
        Self { plan, submission, images, received, total: Duration::ZERO, span }
    }

    /// One that nobody waits for.
    pub(super) fn in_background(app: &App, plan: ParsedRequest) -> Result<Self, Problem> {
        let asked = Instant::now();
        let submission = app.engine.generate_in_background(plan.request.clone())?;
        Ok(Self::of(plan, submission, asked, asked))
    }

    /// The first of several plans for the same images that is predicted to meet its deadline; its number,
    /// and what was predicted of those up to it.
    pub(super) fn first(
        app: &App,
        mut plans: Vec<ParsedRequest>,
        received: Instant,
    ) -> Result<(Self, usize, Vec<Option<Duration>>), Problem> {
        let requests: Vec<_> = plans.iter().map(|plan| plan.request.clone()).collect();
        let asked = Instant::now();
        let Routed { served, submission, predicted } = app.engine.generate_first(&requests)?;
        Ok((Self::of(plans.swap_remove(served), submission, received, asked), served, predicted))
    }

    pub(super) fn plan(&self) -> &ParsedRequest {
        &self.plan
    }

    /// The id of the model that serves.
    pub(super) fn model(&self) -> &str {
        &self.plan.request.model.id
    }

    /// From receipt to when that image was made.
    pub(super) fn since_receipt(&self, timings: &SampleTimings) -> Duration {
        timings.finished.saturating_duration_since(self.received)
    }

    /// Whether that image is finished.
    pub(super) fn has(&self, index: usize) -> bool {
        self.images[index].is_some()
    }

    /// The next event; `None` once every image is completed or failed.
    pub(super) async fn next(&mut self) -> Option<Event> {
        poll_fn(|context| self.poll_next(context)).await
    }

    /// [`Run::next`] for who waits for several.
    pub(super) fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Event>> {
        let event = self.submission.poll_next(context);
        match &event {
            Poll::Ready(Some(Event::Completed { index, image, timings })) => {
                self.images[*index] = Some((image.clone(), *timings));
                self.total = self.since_receipt(timings);
                self.span.made(*index, timings);
            }
            Poll::Ready(Some(Event::Failed { failure, .. })) => self.span.failed(failure),
            _ => {}
        }
        event
    }

    /// Waits for all images. The first failure cancels the rest.
    pub(super) async fn finish(mut self) -> Result<Finished, Problem> {
        while let Some(event) = self.next().await {
            if let Event::Failed { failure, .. } = event {
                return Err(failure.into());
            }
        }
        self.finished()
    }

    /// What has come of it, once all is over.
    pub(super) fn finished(mut self) -> Result<Finished, Problem> {
        let all: Option<Vec<_>> = self.images.into_iter().collect();
        let all = all.ok_or_else(|| Problem::internal("the engine ended before the request"))?;
        let (images, timings): (Vec<_>, Vec<_>) = all.into_iter().unzip();
        let made = timings.iter().map(|timings| timings.finished).max();
        let timings = Timings::of(&timings, self.total);
        self.span.completed();
        Ok(Finished { plan: self.plan, images, timings, made, span: self.span })
    }
}

/// How a reply goes out.
#[derive(Debug, Clone, Copy)]
pub(super) enum Delivery {
    /// When all of it is ready.
    Whole,
    /// Image by image, as fast as its client takes them, which says nothing about this server.
    Streamed,
}

/// A finished request.
pub(super) struct Finished {
    pub(super) plan: ParsedRequest,
    /// By index.
    pub(super) images: Vec<Image>,
    pub(super) timings: Timings,
    /// When its last image left the device.
    made: Option<Instant>,
    pub(super) span: RunSpan,
}

impl Finished {
    /// The id of the model that served.
    pub(super) fn model(&self) -> &str {
        &self.plan.request.model.id
    }

    /// Counts its time, now that its reply is ready.
    pub(super) fn observe(&self, app: &App, delivery: Delivery) {
        if let (Some(made), Some(deadline)) = (self.made, self.plan.request.deadline) {
            let after = match delivery {
                Delivery::Whole => Some(made.elapsed()),
                Delivery::Streamed => None,
            };
            app.engine.delivered(made + after.unwrap_or_default() <= deadline, after);
        }
        let duration = app.metrics.request_duration.with_label_values(&[self.model()]);
        duration.observe(self.timings.total_ms / 1e3);
    }

    /// The images as a reply carries them.
    pub(super) async fn data(&self) -> Result<Vec<GeneratedImage>, Problem> {
        self.encoded(|index| Some(self.plan.parameters(index))).await
    }

    /// The same without a word of what made them.
    pub(super) async fn blind_data(&self) -> Result<Vec<GeneratedImage>, Problem> {
        self.encoded(|_| None).await
    }

    async fn encoded(
        &self,
        parameters: impl Fn(usize) -> Option<String>,
    ) -> Result<Vec<GeneratedImage>, Problem> {
        let encoded = self.images.iter().enumerate().map(|(index, image)| {
            let encoding = self.plan.encoding;
            let bytes = encode(image.clone(), encoding, parameters(index));
            let bytes = self.span.encoding(index, encoding.format, bytes);
            async move {
                let bytes = BASE64_STANDARD.encode(bytes.await?);
                Ok::<_, Problem>(self.plan.describe(index, bytes))
            }
        });
        try_join_all(encoded).await
    }

    /// The reply that stands for it.
    pub(super) fn reply(&self, data: Vec<GeneratedImage>) -> GenerationReply {
        GenerationReply {
            created: unix_seconds(),
            model: self.model().to_owned(),
            data,
            output_format: self.plan.encoding.format,
            size: self.plan.size(),
            timings: self.timings,
            draft: None,
            routing: None,
        }
    }
}
