//! `POST /v1/images/generations`.

use axum::{
    Extension, Json,
    extract::Request,
    http::header,
    response::{AppendHeaders, IntoResponse, Response},
};

use super::{
    accept, body,
    caller::Caller,
    comparison::compared,
    encode::encode,
    error::Problem,
    generate::{ParsedRequest, Shape},
    observe::{DeviceTime, Received},
    route,
    run::Finished,
    shadow, stream,
    timings::milliseconds,
    wire::{Binary, DraftReply, ErrorReply, GenerationReply, GenerationRequest, Streamed, Timings},
};
use crate::engine::GenerateRequest;

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
        (status = 404, description = "No such model or experiment", body = ErrorReply),
        (status = 413, description = "The body is too large", body = ErrorReply),
        (status = 415, description = "The body is not JSON", body = ErrorReply),
        (status = 429, description = "The queue is full, or too long for the deadline", body = ErrorReply,
            headers(("retry-after" = u64, description = "Seconds until there is room"))),
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
    let in_flight = app.in_flight.token();
    let (run, routing) = route::admit(&app, &wire, wanted, key, received)?;
    let labels = labels(run.plan(0));
    let response = match run.plan(0).shape {
        Shape::Events => stream::images(app, run, routing, received, in_flight),
        Shape::Json => {
            let mut sides = run.finish().await?;
            let draft = match sides.len() {
                2 => {
                    let (pair, _) = compared(&app.metrics, sides).await?;
                    let [teacher, student] = pair;
                    sides = vec![teacher];
                    student.observe(&app);
                    let (model, timings) = (student.model().to_owned(), student.timings);
                    Some(DraftReply { model, data: student.data().await?, timings })
                }
                _ => None,
            };
            let mut finished = only(sides)?;
            let data = finished.data().await?;
            finished.timings.total_ms = milliseconds(received.elapsed());
            finished.observe(&app);
            let reply = GenerationReply { draft, routing, ..finished.reply(data) };
            let timings = finished.timings;
            shadow::repeat(&app, finished);
            timed(Json(reply).into_response(), &timings)
        }
        Shape::Image => {
            let mut finished = only(run.finish().await?)?;
            let image = finished.images.first().ok_or_else(|| Problem::internal("no image"))?;
            let encoding = finished.plan.encoding;
            let bytes = encode(image.clone(), encoding).await?;
            finished.timings.total_ms = milliseconds(received.elapsed());
            finished.observe(&app);
            let kind = [(header::CONTENT_TYPE, encoding.format.media_type())];
            let timings = finished.timings;
            shadow::repeat(&app, finished);
            timed((kind, bytes).into_response(), &timings)
        }
    };
    Ok((AppendHeaders(labels), response).into_response())
}

/// What the headers say of a request: the model that serves, and the first image's seed.
fn labels(plan: &ParsedRequest) -> [(&'static str, String); 2] {
    let GenerateRequest { model, samples, .. } = &plan.request;
    let seed = samples[0].seed.to_string();
    [("x-understudy-model", model.id.clone()), ("x-understudy-seed", seed)]
}

fn only(mut sides: Vec<Finished>) -> Result<Finished, Problem> {
    sides.pop().ok_or_else(|| Problem::internal("nothing finished"))
}

fn timed(mut response: Response, timings: &Timings) -> Response {
    let Timings { queue_ms, device_ms, .. } = *timings;
    response.extensions_mut().insert(DeviceTime { queue_ms, device_ms });
    response
}
