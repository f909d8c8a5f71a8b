//! `POST /v1/images/generations`.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::{
    Extension, Json,
    extract::{Request, State},
    http::{HeaderName, HeaderValue, header},
    response::{IntoResponse, Response},
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use futures_util::future::try_join_all;

use super::{
    App, accept, body,
    encode::encode,
    error::Problem,
    generate::{Plan, Shape},
    observe::{DeviceTime, Received},
    stream,
    wire::{Binary, ErrorReply, GenerationReply, GenerationRequest, Streamed, Timings},
};
use crate::engine::{Event, Image, SampleTimings, Submission};

/// Makes images.
///
/// With `image/png`, `image/jpeg` or `image/webp` as the first acceptable type of `Accept` the reply
/// is the image itself; with `stream` it is a stream of events.
#[utoipa::path(post, path = "/v1/images/generations", tag = "images",
    request_body = GenerationRequest,
    responses(
        (status = 200, description = "The images; the image itself or events when asked for", content(
            (GenerationReply = "application/json"),
            (Streamed = "text/event-stream"),
            (Binary = "image/png"),
            (Binary = "image/jpeg"),
            (Binary = "image/webp"),
        )),
        (status = 400, description = "A value that cannot be honoured", body = ErrorReply),
        (status = 404, description = "No such model", body = ErrorReply),
        (status = 413, description = "The body is too large", body = ErrorReply),
        (status = 415, description = "The body is not JSON", body = ErrorReply),
        (status = 429, description = "The queue is full, or too long for the deadline", body = ErrorReply,
            headers(("retry-after" = u64, description = "Seconds until there is room"))),
        (status = 503, description = "Not ready, or shutting down", body = ErrorReply),
))]
pub(super) async fn generate(
    State(app): State<App>,
    Extension(Received(received)): Extension<Received>,
    request: Request,
) -> Result<Response, Problem> {
    let in_flight = app.in_flight.token();
    let wanted = accept::wanted(request.headers());
    let wire: GenerationRequest = body::json(request, app.settings.max_body_bytes).await?;
    let plan = Plan::new(&app, &wire, wanted, received)?;
    let submission = app.engine.generate(plan.request.clone())?;

    let labels = [
        (HeaderName::from_static("x-understudy-model"), plan.request.model.id.clone()),
        (HeaderName::from_static("x-understudy-seed"), plan.request.samples[0].seed.to_string()),
    ];
    let mut response = match plan.shape {
        Shape::Events => stream::events(app, plan, submission, received, in_flight),
        Shape::Json => {
            let finished = finish(&plan, submission).await?;
            let timings = summary(&finished, received);
            let encode = |(index, (image, _)): (usize, (Image, SampleTimings))| {
                let plan = &plan;
                async move {
                    let bytes = encode(image, plan.encoding).await?;
                    Ok::<_, Problem>(plan.describe(index, BASE64_STANDARD.encode(bytes)))
                }
            };
            let data = try_join_all(finished.into_iter().enumerate().map(encode)).await?;
            let timings = Timings { total_ms: milliseconds(received.elapsed()), ..timings };
            observe(&app, &plan, received);
            let reply = GenerationReply {
                created: unix_seconds(),
                model: plan.request.model.id.clone(),
                data,
                output_format: plan.encoding.format,
                size: plan.size(),
                timings,
            };
            timed(Json(reply).into_response(), &timings)
        }
        Shape::Image => {
            let finished = finish(&plan, submission).await?;
            let timings = summary(&finished, received);
            let image = finished.into_iter().next().ok_or_else(|| Problem::internal("no image"))?.0;
            let bytes = encode(image, plan.encoding).await?;
            observe(&app, &plan, received);
            let kind = [(header::CONTENT_TYPE, plan.encoding.format.media_type())];
            timed((kind, bytes).into_response(), &timings)
        }
    };
    for (name, value) in labels {
        if let Ok(value) = HeaderValue::from_str(&value) {
            response.headers_mut().insert(name, value);
        }
    }
    Ok(response)
}

/// Waits for all images. The first failure cancels the rest, by dropping the submission.
async fn finish(
    plan: &Plan,
    mut submission: Submission,
) -> Result<Vec<(Image, SampleTimings)>, Problem> {
    let mut finished: Vec<_> = plan.request.samples.iter().map(|_| None).collect();
    while let Some(event) = submission.next().await {
        match event {
            Event::Completed { index, image, timings } => finished[index] = Some((image, timings)),
            Event::Failed { failure, .. } => return Err(failure.into()),
            Event::Partial { .. } | Event::Inferred { .. } => {}
        }
    }
    let all: Option<Vec<_>> = finished.into_iter().collect();
    all.ok_or_else(|| Problem::internal("the engine ended before the request did"))
}

fn summary(finished: &[(Image, SampleTimings)], received: Instant) -> Timings {
    let timings: Vec<_> = finished.iter().map(|(_, timings)| *timings).collect();
    Timings::of(&timings, received.elapsed())
}

impl Timings {
    /// A request's timings from its images'.
    pub(super) fn of(images: &[SampleTimings], total: Duration) -> Self {
        let longest = images.iter().map(|timings| timings.queue).max().unwrap_or_default();
        let device: Duration = images.iter().map(|timings| timings.device).sum();
        let batch: f64 = images.iter().map(|timings| timings.mean_batch).sum();
        let evaluations = images.iter().map(|timings| timings.network_evaluations).max();
        Self {
            queue_ms: milliseconds(longest),
            device_ms: milliseconds(device),
            total_ms: milliseconds(total),
            network_evaluations: evaluations.unwrap_or(0),
            mean_batch: batch / images.len().max(1) as f64,
        }
    }
}

/// Counts a finished request's time.
pub(super) fn observe(app: &App, plan: &Plan, received: Instant) {
    let model = &plan.request.model.id;
    app.metrics
        .request_duration
        .with_label_values(&[model])
        .observe(received.elapsed().as_secs_f64());
}

fn timed(mut response: Response, timings: &Timings) -> Response {
    let Timings { queue_ms, device_ms, .. } = *timings;
    response.extensions_mut().insert(DeviceTime { queue_ms, device_ms });
    response
}

/// Milliseconds to the microsecond.
fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// Now.
pub(super) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs())
}
