//! Images as server-sent events, previews first.

use std::{
    convert::Infallible,
    time::{Duration, Instant},
};

use axum::response::{
    IntoResponse, Response,
    sse::{self, KeepAlive, Sse},
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use futures_util::stream::unfold;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::{
    App,
    encode::encode,
    error::Problem,
    generate::Plan,
    images::{observe, unix_seconds},
    observe::out_of_time,
    wire::{StreamEvent, Streamed, StreamedImage, Timings, Usage},
};
use crate::engine::{Event, Image, Submission};

/// How often a silent stream says that it is alive.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// What a stream carries from one event to the next. Dropping it, as happens when the client goes
/// away, cancels the request.
struct Streaming {
    app: App,
    plan: Plan,
    submission: Submission,
    received: Instant,
    _in_flight: TaskTrackerToken,
}

/// The reply to a request with `stream`.
pub(super) fn events(
    app: App,
    plan: Plan,
    submission: Submission,
    received: Instant,
    in_flight: TaskTrackerToken,
) -> Response {
    let streaming = Streaming { app, plan, submission, received, _in_flight: in_flight };
    let events = unfold(Some(streaming), |streaming| async {
        let mut streaming = streaming?;
        match streaming.next().await {
            Ok(Some(event)) => {
                Some((written(event.name(), &Streamed::Image(event)), Some(streaming)))
            }
            Ok(None) => {
                observe(&streaming.app, &streaming.plan, streaming.received);
                None
            }
            Err(problem) => {
                let cause = problem.detail.as_ref().unwrap_or(&problem.message);
                tracing::warn!(cause, "stream ended early");
                Some((written("error", &Streamed::Error(problem.body())), None))
            }
        }
    });
    Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response()
}

impl Streaming {
    /// The next event to send; `None` once all images are sent.
    async fn next(&mut self) -> Result<Option<StreamEvent>, Problem> {
        let until = self.received + self.app.settings.request_timeout;
        let event = tokio::time::timeout_at(until.into(), self.submission.next()).await;
        let Some(event) = event.map_err(|_| out_of_time(&self.app))? else {
            return Ok(None);
        };
        Ok(Some(match event {
            Event::Partial { index, partial_index, image } => StreamEvent::PartialImage {
                image: self.image(index, image).await?,
                partial_image_index: partial_index,
            },
            Event::Completed { index, image, timings } => StreamEvent::Completed {
                image: self.image(index, image).await?,
                model: self.plan.request.model.id.clone(),
                timings: Timings::of(&[timings], self.received.elapsed()),
                usage: Usage::default(),
            },
            Event::Failed { failure, .. } => return Err(failure.into()),
            Event::Inferred { .. } => return Err(Problem::internal("an inference among images")),
        }))
    }

    async fn image(&self, index: usize, image: Image) -> Result<StreamedImage, Problem> {
        let bytes = encode(image, self.plan.encoding).await?;
        Ok(StreamedImage {
            image: self.plan.describe(index, BASE64_STANDARD.encode(bytes)),
            created_at: unix_seconds(),
            size: self.plan.size(),
            quality: "auto",
            background: "opaque",
            output_format: self.plan.encoding.format,
        })
    }
}

fn written(name: &str, body: &Streamed) -> Result<sse::Event, Infallible> {
    let event = sse::Event::default().event(name);
    // Only a map with keys that are no strings cannot become JSON, and there is none.
    Ok(event.json_data(body).unwrap_or_default())
}
