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
    pair::{Pair, Side},
    run::{Delivery, Run},
    shadow,
    single::Single,
    timings::unix_seconds,
    wire::{CompareCompleted, StreamEvent, StreamedImage, Timings, Usage},
};
use crate::engine::{Event, Image};

/// How often a silent stream says that it is alive. A client that is gone is only known by what it refuses, so this is also how long it
/// keeps its images from being cancelled.
const KEEP_ALIVE: Duration = Duration::from_secs(1);

/// The events of a reply, one after the other. Dropping it, as happens when the client goes away, cancels the request.
trait Events: Send + 'static {
    /// The next event to send; `None` at the end.
    fn next(&mut self) -> impl Future<Output = Result<Option<sse::Event>, Problem>> + Send;
}

/// One model's images.
struct SingleEvents {
    app: App,
    /// `None` once it has ended.
    single: Option<Single>,
    received: Instant,
    _in_flight: TaskTrackerToken,
}

/// A student's images, each before its teacher's.
struct PairEvents {
    app: App,
    /// `None` once it has ended.
    pair: Option<Pair>,
    /// Events that have waited for others to go first.
    due: VecDeque<StreamEvent>,
    /// A teacher's images whose student's are not out yet, with their indices.
    held: Vec<(usize, StreamEvent)>,
    closing: Closing,
    received: Instant,
    _in_flight: TaskTrackerToken,
}

/// How a pair's stream ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Closing {
    /// With its last image.
    Image,
    /// With how the pair compares.
    Comparison,
}

/// One model's reply to a request for images with `stream`.
pub(super) fn single(
    app: App,
    single: Single,
    received: Instant,
    in_flight: TaskTrackerToken,
) -> Response {
    respond(SingleEvents { app, single: Some(single), received, _in_flight: in_flight })
}

/// The reply to a request for a draft with `stream`.
pub(super) fn draft(
    app: App,
    pair: Pair,
    received: Instant,
    in_flight: TaskTrackerToken,
) -> Response {
    respond(PairEvents::new(app, pair, Closing::Image, received, in_flight))
}

/// The reply to a comparison with `stream`.
pub(super) fn comparison(
    app: App,
    pair: Pair,
    received: Instant,
    in_flight: TaskTrackerToken,
) -> Response {
    respond(PairEvents::new(app, pair, Closing::Comparison, received, in_flight))
}

fn respond(events: impl Events) -> Response {
    let events = unfold(Some(events), |events| async {
        let mut events = events?;
        match events.next().await {
            Ok(event) => Some((Ok::<_, Infallible>(event?), Some(events))),
            Err(problem) => {
                let cause = problem.detail.as_ref().unwrap_or(&problem.message);
                tracing::warn!(cause, "stream ended early");
                Some((Ok(written("error", &problem.body())), None))
            }
        }
    });
    Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response()
}

impl Events for SingleEvents {
    async fn next(&mut self) -> Result<Option<sse::Event>, Problem> {
        let Some(single) = &mut self.single else { return Ok(None) };
        let Some(event) = in_time(&self.app, self.received, single.run.next()).await? else {
            if let Some(single) = self.single.take() {
                let served = single.finished()?;
                served.observe(&self.app, Delivery::Streamed);
                shadow::repeat(&self.app, served);
            }
            return Ok(None);
        };
        let Single { run, beside } = single;
        let event = match event {
            Event::Partial { index, partial_index, image } => {
                preview(run, index, partial_index, image, None).await?
            }
            Event::Completed { index, image, timings } => StreamEvent::Completed {
                image: finished(run, index, image).await?,
                model: run.model().to_owned(),
                side: None,
                timings: Timings::of(&[timings], run.since_receipt(&timings)),
                routing: beside.routing.clone(),
                usage: Usage::default(),
            },
            Event::Failed { failure, .. } => return Err(failure.into()),
            Event::Inferred { .. } => return Err(no_image()),
        };
        Ok(Some(written(event.name(), &event)))
    }
}

impl Events for PairEvents {
    async fn next(&mut self) -> Result<Option<sse::Event>, Problem> {
        loop {
            if let Some(event) = self.due.pop_front() {
                return Ok(Some(written(event.name(), &event)));
            }
            let Some(pair) = &mut self.pair else { return Ok(None) };
            match in_time(&self.app, self.received, pair.next()).await? {
                None => return self.close().await,
                Some((side, event)) => self.take(side, event).await?,
            }
        }
    }
}

impl PairEvents {
    fn new(
        app: App,
        pair: Pair,
        closing: Closing,
        received: Instant,
        in_flight: TaskTrackerToken,
    ) -> Self {
        let (due, held) = (VecDeque::new(), Vec::new());
        Self { app, pair: Some(pair), due, held, closing, received, _in_flight: in_flight }
    }

    /// Turns the engine's event into one that is due, or held until its student's is out.
    async fn take(&mut self, side: Side, event: Event) -> Result<(), Problem> {
        let Some(pair) = &self.pair else { return Ok(()) };
        let run = pair.side(side);
        let place = (self.closing == Closing::Comparison).then_some(side as usize);
        match (side, event) {
            (_, Event::Partial { index, partial_index, image }) => {
                self.due.push_back(preview(run, index, partial_index, image, place).await?);
            }
            (Side::Teacher, Event::Completed { index, image, timings }) => {
                let event = StreamEvent::Completed {
                    image: finished(run, index, image).await?,
                    model: run.model().to_owned(),
                    side: place,
                    timings: Timings::of(&[timings], run.since_receipt(&timings)),
                    routing: None,
                    usage: Usage::default(),
                };
                if pair.student.has(index) {
                    self.due.push_back(event);
                } else {
                    self.held.push((index, event));
                }
            }
            (Side::Student, Event::Completed { index, image, timings }) => {
                self.due.push_back(StreamEvent::PartialImage {
                    image: finished(run, index, image).await?,
                    partial_image_index: run.plan().request.partial_images,
                    model: run.model().to_owned(),
                    side: place,
                    draft: true,
                    timings: Some(Timings::of(&[timings], run.since_receipt(&timings))),
                });
                if let Some(at) = self.held.iter().position(|(held, _)| *held == index) {
                    self.due.push_back(self.held.swap_remove(at).1);
                }
            }
            (_, Event::Failed { failure, .. }) => return Err(failure.into()),
            (_, Event::Inferred { .. }) => return Err(no_image()),
        }
        Ok(())
    }

    /// Counts what has ended, and says how it compares where that is asked for.
    async fn close(&mut self) -> Result<Option<sse::Event>, Problem> {
        let Some(pair) = self.pair.take() else { return Ok(None) };
        let sides = pair.finished()?;
        sides.iter().for_each(|side| side.observe(&self.app, Delivery::Streamed));
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
}

/// What the engine says next, unless `--request-timeout-seconds` end before.
async fn in_time<T>(
    app: &App,
    received: Instant,
    next: impl Future<Output = T>,
) -> Result<T, Problem> {
    let until = received + app.settings.request_timeout;
    tokio::time::timeout_at(until.into(), next).await.map_err(|_| out_of_time(app))
}

fn no_image() -> Problem {
    Problem::internal("an inference among images")
}

async fn preview(
    run: &Run,
    index: usize,
    partial_image_index: usize,
    image: Image,
    side: Option<usize>,
) -> Result<StreamEvent, Problem> {
    Ok(StreamEvent::PartialImage {
        image: streamed(run, index, image, None).await?,
        partial_image_index,
        model: run.model().to_owned(),
        side,
        draft: false,
        timings: None,
    })
}

async fn finished(run: &Run, index: usize, image: Image) -> Result<StreamedImage, Problem> {
    streamed(run, index, image, Some(run.plan().parameters(index))).await
}

async fn streamed(
    run: &Run,
    index: usize,
    image: Image,
    parameters: Option<String>,
) -> Result<StreamedImage, Problem> {
    let plan = run.plan();
    let bytes = encode(image, plan.encoding, parameters);
    let bytes = run.span.encoding(index, plan.encoding.format, bytes).await?;
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
