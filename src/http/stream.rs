//! Images as server-sent events: previews first, and of a pair the student's image before the teacher's.

use std::{
    collections::VecDeque,
    convert::Infallible,
    time::{Duration, Instant},
};

use axum::response::{
    IntoResponse, Response,
    sse::{self, KeepAlive, Sse},
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use futures_util::stream::unfold;
use serde::Serialize;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::{
    App,
    comparison::compared,
    encode::encode,
    error::Problem,
    observe::out_of_time,
    run::Run,
    shadow,
    timings::unix_seconds,
    wire::{CompareCompleted, Routing, StreamEvent, StreamedImage, Timings, Usage},
};
use crate::engine::{Event, Image, SampleTimings};

/// How often a silent stream says that it is alive.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// The teacher's side of a pair, or the only one: its images are `completed`.
const FINAL: usize = 0;

/// What a stream carries from one event to the next. Dropping it, as happens when the client goes
/// away, cancels the request.
struct Streaming {
    app: App,
    /// `None` once it has ended.
    run: Option<Run>,
    /// Events that have waited for others to go first.
    due: VecDeque<StreamEvent>,
    /// A teacher's images whose student's are not out yet, with their indices.
    held: Vec<(usize, StreamEvent)>,
    closing: Closing,
    routing: Option<Routing>,
    received: Instant,
    _in_flight: TaskTrackerToken,
}

/// How a stream ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Closing {
    /// With its last image.
    Image,
    /// With how the pair compares.
    Comparison,
}

/// The reply to a request for images with `stream`; a pair is a draft and its final.
pub(super) fn images(
    app: App,
    run: Run,
    routing: Option<Routing>,
    received: Instant,
    in_flight: TaskTrackerToken,
) -> Response {
    events(app, run, Closing::Image, routing, received, in_flight)
}

/// The reply to a comparison with `stream`.
pub(super) fn comparison(
    app: App,
    run: Run,
    received: Instant,
    in_flight: TaskTrackerToken,
) -> Response {
    events(app, run, Closing::Comparison, None, received, in_flight)
}

fn events(
    app: App,
    run: Run,
    closing: Closing,
    routing: Option<Routing>,
    received: Instant,
    in_flight: TaskTrackerToken,
) -> Response {
    let streaming = Streaming {
        app,
        run: Some(run),
        due: VecDeque::new(),
        held: Vec::new(),
        closing,
        routing,
        received,
        _in_flight: in_flight,
    };
    let events = unfold(Some(streaming), |streaming| async {
        let mut streaming = streaming?;
        match streaming.next().await {
            Ok(event) => Some((Ok::<_, Infallible>(event?), Some(streaming))),
            Err(problem) => {
                let cause = problem.detail.as_ref().unwrap_or(&problem.message);
                tracing::warn!(cause, "stream ended early");
                Some((Ok(written("error", &problem.body())), None))
            }
        }
    });
    Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response()
}

impl Streaming {
    /// The next event to send; `None` at the end.
    async fn next(&mut self) -> Result<Option<sse::Event>, Problem> {
        let until = self.received + self.app.settings.request_timeout;
        loop {
            if let Some(event) = self.due.pop_front() {
                return Ok(Some(written(event.name(), &event)));
            }
            let Some(run) = &mut self.run else { return Ok(None) };
            let event = tokio::time::timeout_at(until.into(), run.next()).await;
            match event.map_err(|_| out_of_time(&self.app))? {
                None => return self.close().await,
                Some((side, event)) => self.take(side, event).await?,
            }
        }
    }

    /// Turns the engine's event into one that is due, or held until its student's is out.
    async fn take(&mut self, side: usize, event: Event) -> Result<(), Problem> {
        let Some(run) = &self.run else { return Ok(()) };
        let place = (self.closing == Closing::Comparison).then_some(side);
        match event {
            Event::Partial { index, partial_index, image } => {
                self.due.push_back(StreamEvent::PartialImage {
                    image: streamed(run, side, index, image).await?,
                    partial_image_index: partial_index,
                    model: run.plan(side).request.model.id.clone(),
                    side: place,
                    draft: false,
                    timings: None,
                });
            }
            Event::Completed { index, image, timings } if side == FINAL => {
                let event = StreamEvent::Completed {
                    image: streamed(run, side, index, image).await?,
                    model: run.plan(side).request.model.id.clone(),
                    side: place,
                    timings: self.timings(timings),
                    routing: self.routing.clone(),
                    usage: Usage::default(),
                };
                if run.is_pair() && !run.has(1, index) {
                    self.held.push((index, event));
                } else {
                    self.due.push_back(event);
                }
            }
            Event::Completed { index, image, timings } => {
                self.due.push_back(StreamEvent::PartialImage {
                    image: streamed(run, side, index, image).await?,
                    partial_image_index: run.plan(side).request.partial_images,
                    model: run.plan(side).request.model.id.clone(),
                    side: place,
                    draft: true,
                    timings: Some(self.timings(timings)),
                });
                if let Some(at) = self.held.iter().position(|(held, _)| *held == index) {
                    self.due.push_back(self.held.swap_remove(at).1);
                }
            }
            Event::Failed { failure, .. } => return Err(failure.into()),
            Event::Inferred { .. } => return Err(Problem::internal("an inference among images")),
        }
        Ok(())
    }

    /// Counts what has ended, and says how it compares where that is asked for.
    async fn close(&mut self) -> Result<Option<sse::Event>, Problem> {
        let Some(run) = self.run.take() else { return Ok(None) };
        let pair = run.is_pair();
        let sides = run.finished()?;
        sides.iter().for_each(|side| side.observe(&self.app));
        if !pair {
            sides.into_iter().for_each(|side| shadow::repeat(&self.app, side));
            return Ok(None);
        }
        let (sides, comparison) = compared(&self.app.metrics, sides).await?;
        if self.closing == Closing::Image {
            return Ok(None);
        }
        let completed = CompareCompleted::Completed {
            models: sides.iter().map(|side| side.model().to_owned()).collect(),
            timings: sides.iter().map(|side| side.timings).collect(),
            comparison,
        };
        Ok(Some(written("compare.completed", &completed)))
    }

    fn timings(&self, image: SampleTimings) -> Timings {
        Timings::of(&[image], self.received.elapsed())
    }
}

async fn streamed(
    run: &Run,
    side: usize,
    index: usize,
    image: Image,
) -> Result<StreamedImage, Problem> {
    let plan = run.plan(side);
    let bytes = encode(image, plan.encoding).await?;
    Ok(StreamedImage {
        image: plan.describe(index, BASE64_STANDARD.encode(bytes)),
        created_at: unix_seconds(),
        size: plan.size(),
        quality: "auto",
        background: "opaque",
        output_format: plan.encoding.format,
    })
}

fn written(name: &str, body: &impl Serialize) -> sse::Event {
    let event = sse::Event::default().event(name);
    // Only a map with keys that are no strings cannot become JSON, and there is none.
    event.json_data(body).unwrap_or_default()
}
