//! Requests in the engine, one or a pair of them, and what comes of them.

use std::{
    future::poll_fn,
    sync::Arc,
    task::Poll,
    time::{Duration, Instant},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use futures_util::future::try_join_all;

use super::{
    App,
    encode::encode,
    error::Problem,
    generate::ParsedRequest,
    repetition,
    timings::unix_seconds,
    wire::{GeneratedImage, GenerationReply, GenerationRequest, Timings},
};
use crate::{
    engine::{Event, Image, Routed, SampleTimings, Submission},
    experiments::Experiment,
};

/// One admitted request.
struct Side {
    plan: ParsedRequest,
    submission: Submission,
    finished: Vec<Option<(Image, SampleTimings)>>,
    /// From receipt to the latest image.
    total: Duration,
}

/// What is in the engine for a client: one request, or a teacher's and its student's. Dropping it, as
/// happens when the client goes away, cancels what has not finished.
pub(super) struct Run {
    sides: Vec<Side>,
    received: Instant,
    /// The teacher's repetition of a student's request.
    shadow: Option<Box<ParsedRequest>>,
    /// The experiment that it is for, and which of its arms serves it.
    arm: Option<(Arc<Experiment>, usize)>,
}

impl Run {
    pub(super) fn one(app: &App, plan: ParsedRequest, received: Instant) -> Result<Self, Problem> {
        let submission = app.engine.generate(plan.request.clone())?;
        Ok(Self::of(vec![Side::new(plan, submission)], received))
    }

    fn of(sides: Vec<Side>, received: Instant) -> Self {
        Self { sides, received, shadow: None, arm: None }
    }

    /// One that nobody waits for.
    pub(super) fn in_background(app: &App, plan: ParsedRequest) -> Result<Self, Problem> {
        let submission = app.engine.generate_in_background(plan.request.clone())?;
        Ok(Self::of(vec![Side::new(plan, submission)], Instant::now()))
    }

    /// The same, to be repeated by its teacher afterwards, if it is a student's and drawn for that.
    pub(super) fn shadowed(mut self, app: &App, wire: &GenerationRequest) -> Self {
        self.shadow = repetition::of(app, self.plan(0), wire);
        self
    }

    /// The same, counted for the arm of an experiment.
    pub(super) fn for_arm(mut self, experiment: Arc<Experiment>, arm: usize) -> Self {
        self.arm = Some((experiment, arm));
        self
    }

    /// The first of several plans for the same images that is predicted to meet its deadline; its number,
    /// and what was predicted of those up to it.
    pub(super) fn first(
        app: &App,
        mut plans: Vec<ParsedRequest>,
        received: Instant,
    ) -> Result<(Self, usize, Vec<Option<Duration>>), Problem> {
        let requests: Vec<_> = plans.iter().map(|plan| plan.request.clone()).collect();
        let Routed { served, submission, predicted } = app.engine.generate_first(&requests)?;
        let sides = vec![Side::new(plans.swap_remove(served), submission)];
        Ok((Self::of(sides, received), served, predicted))
    }

    /// The teacher's and the student's, admitted together; they share the device from the start, and the
    /// student goes first where neither has a claim.
    pub(super) fn pair(
        app: &App,
        plans: [ParsedRequest; 2],
        received: Instant,
    ) -> Result<Self, Problem> {
        let [teacher, student] = plans;
        let requests = [student.request.clone(), teacher.request.clone()];
        let [students, teachers] = app.engine.generate_both(requests)?;
        let sides = vec![Side::new(teacher, teachers), Side::new(student, students)];
        Ok(Self::of(sides, received))
    }

    /// The request of a side; of a pair, side 0 is the teacher's and side 1 the student's.
    pub(super) fn plan(&self, side: usize) -> &ParsedRequest {
        &self.sides[side].plan
    }

    pub(super) fn is_pair(&self) -> bool {
        self.sides.len() == 2
    }

    /// Whether that image is finished.
    pub(super) fn has(&self, side: usize, index: usize) -> bool {
        self.sides[side].finished[index].is_some()
    }

    /// The next event and its side; `None` once every image is completed or failed.
    pub(super) async fn next(&mut self) -> Option<(usize, Event)> {
        let (side, event) = poll_fn(|context| {
            let mut open = false;
            // The student's news first: its image is to be out before the teacher's.
            for (number, side) in self.sides.iter_mut().enumerate().rev() {
                match side.submission.poll_next(context) {
                    Poll::Ready(Some(event)) => return Poll::Ready(Some((number, event))),
                    Poll::Ready(None) => {}
                    Poll::Pending => open = true,
                }
            }
            if open { Poll::Pending } else { Poll::Ready(None) }
        })
        .await?;
        if let Event::Completed { index, image, timings } = &event {
            self.sides[side].finished[*index] = Some((image.clone(), *timings));
            self.sides[side].total = self.received.elapsed();
        }
        Some((side, event))
    }

    /// Waits for all images. The first failure cancels the rest.
    pub(super) async fn finish(mut self) -> Result<Vec<Finished>, Problem> {
        while let Some((_, event)) = self.next().await {
            if let Event::Failed { failure, .. } = event {
                return Err(failure.into());
            }
        }
        self.finished()
    }

    /// What has come of every side, once all is over.
    pub(super) fn finished(mut self) -> Result<Vec<Finished>, Problem> {
        let sides = self.sides.into_iter().map(|side| {
            let all: Option<Vec<_>> = side.finished.into_iter().collect();
            let all =
                all.ok_or_else(|| Problem::internal("the engine ended before the request"))?;
            let (images, timings): (Vec<_>, Vec<_>) = all.into_iter().unzip();
            let made = timings.iter().map(|timings| timings.finished).max();
            let timings = Timings::of(&timings, side.total);
            let (shadow, arm) = (self.shadow.take(), self.arm.take());
            Ok(Finished { plan: side.plan, images, timings, made, shadow, arm })
        });
        sides.collect()
    }
}

impl Side {
    fn new(plan: ParsedRequest, submission: Submission) -> Self {
        let finished = plan.request.samples.iter().map(|_| None).collect();
        Self { plan, submission, finished, total: Duration::ZERO }
    }
}

/// A finished request.
pub(super) struct Finished {
    pub(super) plan: ParsedRequest,
    /// By index.
    pub(super) images: Vec<Image>,
    pub(super) timings: Timings,
    /// When its last image left the device.
    made: Option<Instant>,
    /// How its teacher would repeat it.
    pub(super) shadow: Option<Box<ParsedRequest>>,
    arm: Option<(Arc<Experiment>, usize)>,
}

impl Finished {
    /// The id of the model that served.
    pub(super) fn model(&self) -> &str {
        &self.plan.request.model.id
    }

    /// Counts its time, now that its reply is ready.
    pub(super) fn observe(&self, app: &App) {
        if let (Some(made), Some(deadline)) = (self.made, self.plan.request.deadline) {
            app.engine.delivered(made.elapsed(), Instant::now() <= deadline);
        }
        let duration = app.metrics.request_duration.with_label_values(&[self.model()]);
        duration.observe(self.timings.total_ms / 1e3);
        if let Some((experiment, arm)) = &self.arm {
            experiment.serve(*arm, self.images.len(), self.timings.total_ms / 1e3);
        }
    }

    /// The images as a reply carries them.
    pub(super) async fn data(&self) -> Result<Vec<GeneratedImage>, Problem> {
        let encoded = self.images.iter().enumerate().map(async |(index, image)| {
            let bytes = encode(image.clone(), self.plan.encoding).await?;
            Ok::<_, Problem>(self.plan.describe(index, BASE64_STANDARD.encode(bytes)))
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
