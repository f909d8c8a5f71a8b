//! `POST /v1/images/generations`.

use std::time::Instant;

use axum::{
    Extension, Json,
    extract::Request,
    http::header,
    response::{AppendHeaders, IntoResponse, Response},
};
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::{
    App,
    accept::{self, Wanted},
    body,
    caller::Caller,
    comparison::compared,
    encode::encode,
    error::Problem,
    generate::{ParsedRequest, Shape},
    observe::{DeviceTime, Received},
    pair::Pair,
    route::{self, Admitted},
    run::{Delivery, Finished},
    shadow,
    single::{Served, Single},
    stream,
    timings::milliseconds,
    wire::{Binary, DraftReply, ErrorReply, GenerationReply, GenerationRequest, Streamed, Timings},
};
use crate::engine::GenerateRequest;

/// Makes images.
///
/// With `image/png`, `image/jpeg` or `image/webp` as the first acceptable type of `Accept` the reply
/// is the image itself; with `stream` it is a stream of events.
#[utoipa::path(post, path = "/v1/images/generations", tag = "images",
    request_body(content = GenerationRequest, example = json!(
        {"n": 1, "seed": 7, "num_inference_steps": 10, "scheduler": "ddim", "output_format": "png"}
    )),
    responses(
        (status = 200, description = "The images; the image itself or events when asked for", content(
            (GenerationReply = "application/json"),
            (Streamed = "text/event-stream"),
            (Binary = "image/png"),
            (Binary = "image/jpeg"),
            (Binary = "image/webp"),
        )),
        (status = 404, description = "No such model or experiment", body = ErrorReply),
        (status = 429, description = "The queue is full, or too long for the deadline", body = ErrorReply),
        (status = 503, description = "Not ready, or shutting down", body = ErrorReply),
))]
pub(super) async fn generate(
    Caller(app): Caller,
    Extension(Received(received)): Extension<Received>,
    request: Request,
) -> Result<Response, Problem> {
    let wanted = accept::wanted(request.headers());
    let key = route::key(request.headers());
    let wire: GenerationRequest = body::json(&app, request).await?;
    answer(app, wire, wanted, key, received).await
}

/// The reply to a request for images.
pub(super) async fn answer(
    app: App,
    wire: GenerationRequest,
    wanted: Wanted,
    key: Option<Vec<u8>>,
    received: Instant,
) -> Result<Response, Problem> {
    let in_flight = app.in_flight.token();
    match route::admit(&app, &wire, wanted, key, received).await? {
        Admitted::Single(single) => one(app, single, received, in_flight).await,
        Admitted::Draft(pair) => draft(app, pair, received, in_flight).await,
    }
}

/// The reply of one model.
async fn one(
    app: App,
    single: Single,
    received: Instant,
    in_flight: TaskTrackerToken,
) -> Result<Response, Problem> {
    let labels = labels(single.run.plan());
    let response = match single.run.plan().shape {
        Shape::Events => stream::single(app, single, received, in_flight),
        Shape::Json => {
            let mut served = single.finish().await?;
            let data = served.finished.data().await?;
            let timings = ready(&app, &mut served, received);
            let routing = served.beside.routing.take();
            let reply = GenerationReply { routing, ..served.finished.reply(data) };
            shadow::repeat(&app, served);
            timed(Json(reply).into_response(), &timings)
        }
        Shape::Image => {
            let mut served = single.finish().await?;
            let Finished { images, plan, .. } = &served.finished;
            let image = images.first().ok_or_else(|| Problem::internal("no image"))?;
            let kind = [(header::CONTENT_TYPE, plan.encoding.format.media_type())];
            let parameters = Some(plan.parameters(0));
            let bytes = encode(image.clone(), plan.encoding, parameters);
            let bytes = served.finished.span.encoding(0, plan.encoding.format, bytes).await?;
            let timings = ready(&app, &mut served, received);
            shadow::repeat(&app, served);
            timed((kind, bytes).into_response(), &timings)
        }
    };
    Ok((AppendHeaders(labels), response).into_response())
}

/// The student's images, and then its teacher's.
async fn draft(
    app: App,
    pair: Pair,
    received: Instant,
    in_flight: TaskTrackerToken,
) -> Result<Response, Problem> {
    let labels = labels(pair.teacher.plan());
    let response = if pair.teacher.plan().shape == Shape::Events {
        stream::draft(app, pair, received, in_flight)
    } else {
        let sides = pair.finish().await?;
        let ([mut teacher, student], _) = compared(&app.metrics, sides).await?;
        student.observe(&app, Delivery::Whole);
        let (model, timings) = (student.model().to_owned(), student.timings);
        let draft = Some(DraftReply { model, data: student.data().await?, timings });
        let data = teacher.data().await?;
        teacher.timings.total_ms = milliseconds(received.elapsed());
        teacher.observe(&app, Delivery::Whole);
        let reply = GenerationReply { draft, ..teacher.reply(data) };
        timed(Json(reply).into_response(), &teacher.timings)
    };
    Ok((AppendHeaders(labels), response).into_response())
}

/// Counts a request whose reply is ready now.
pub(super) fn ready(app: &App, served: &mut Served, received: Instant) -> Timings {
    served.finished.timings.total_ms = milliseconds(received.elapsed());
    served.observe(app, Delivery::Whole);
    served.finished.timings
}

/// What the headers say of a request: the model that serves, and the first image's seed.
fn labels(plan: &ParsedRequest) -> [(&'static str, String); 2] {
    let GenerateRequest { model, samples, .. } = &plan.request;
    let seed = samples[0].seed.to_string();
    [("x-understudy-model", model.id.clone()), ("x-understudy-seed", seed)]
}

fn timed(mut response: Response, timings: &Timings) -> Response {
    let Timings { queue_ms, device_ms, .. } = *timings;
    response.extensions_mut().insert(DeviceTime { queue_ms, device_ms });
    response
}
