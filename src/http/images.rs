//! `POST /v1/images/generations`.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::{
    Extension, Json,
    extract::{Request, State},
    http::header,
    response::{AppendHeaders, IntoResponse, Response},
};
use futures_util::future::try_join;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::{
    App,
    accept::{self, Wanted},
    body,
    compare::compared,
    encode::encode,
    error::Problem,
    generate::{Plan, Shape},
    observe::{DeviceTime, Received},
    run::{Finished, Run},
    stream,
    wire::{
        Binary, DraftReply, ErrorReply, GenerationReply, GenerationRequest, Streamed, Timings,
    },
};
use crate::engine::{GenerateRequest, SampleTimings};

/// The `model` that gives the student's image first and the teacher's then.
const DRAFT: &str = "draft";

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
    if wire.model.as_deref() == Some(DRAFT) {
        return draft(app, wire, wanted, received, in_flight).await;
    }
    let model = app.model(wire.model.as_deref())?;
    let plan = Plan::new(&app.settings, model, &wire, wanted, received)?;
    let shape = plan.shape;
    let labels = labels(&plan);
    let run = Run::one(&app, plan, received)?;
    let response = match shape {
        Shape::Events => stream::images(app, run, None, received, in_flight),
        Shape::Json => {
            let mut finished = only(run.finish().await?)?;
            let data = finished.data().await?;
            finished.timings.total_ms = milliseconds(received.elapsed());
            finished.observe(&app);
            timed(Json(finished.reply(data)).into_response(), &finished.timings)
        }
        Shape::Image => {
            let mut finished = only(run.finish().await?)?;
            let image = finished.images.pop().ok_or_else(|| Problem::internal("no image"))?;
            let encoding = finished.plan.encoding;
            let bytes = encode(image, encoding).await?;
            finished.timings.total_ms = milliseconds(received.elapsed());
            finished.observe(&app);
            let kind = [(header::CONTENT_TYPE, encoding.format.media_type())];
            timed((kind, bytes).into_response(), &finished.timings)
        }
    };
    Ok((AppendHeaders(labels), response).into_response())
}

/// The student's images, then the teacher's.
async fn draft(
    app: App,
    wire: GenerationRequest,
    wanted: Wanted,
    received: Instant,
    in_flight: TaskTrackerToken,
) -> Result<Response, Problem> {
    if let Wanted::Image(_) = wanted {
        let message = "`model` is \"draft\" with an image type in Accept: a draft and its final are two images; accept application/json or text/event-stream, or name a model";
        return Err(Problem::conflict("model", message));
    }
    let models = app.pair("model", "\"draft\"")?;
    let plans = Plan::pair(&app.settings, models, [wire.clone(), wire], wanted, received)?;
    let labels = labels(&plans[0]);
    let shape = plans[0].shape;
    let run = Run::pair(&app, plans, received)?;
    let response = if shape == Shape::Events {
        stream::images(app, run, None, received, in_flight)
    } else {
        let ([teacher, student], _) = compared(&app.metrics, run.finish().await?).await?;
        let (teachers, students) = try_join(teacher.data(), student.data()).await?;
        [&teacher, &student].iter().for_each(|side| side.observe(&app));
        let (model, timings) = (student.model().to_owned(), student.timings);
        let draft = Some(DraftReply { model, data: students, timings });
        let reply = GenerationReply { draft, ..teacher.reply(teachers) };
        timed(Json(reply).into_response(), &teacher.timings)
    };
    Ok((AppendHeaders(labels), response).into_response())
}

/// What the headers say of a request: the model that serves, and the first image's seed.
fn labels(plan: &Plan) -> [(&'static str, String); 2] {
    let GenerateRequest { model, samples, .. } = &plan.request;
    let seed = samples[0].seed.to_string();
    [("x-understudy-model", model.id.clone()), ("x-understudy-seed", seed)]
}

fn only(mut sides: Vec<Finished>) -> Result<Finished, Problem> {
    sides.pop().ok_or_else(|| Problem::internal("nothing finished"))
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
