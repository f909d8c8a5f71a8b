//! `POST /v1/images/edits`: images that begin with another, as a form.

use std::sync::Arc;

use axum::{
    Extension,
    body::Bytes,
    extract::Request,
    http::{StatusCode, header},
    response::Response,
};
use multer::Multipart;
use serde_json::{Map, Value};

use super::{
    App, accept, body,
    caller::Caller,
    error::{Problem, quoted},
    images,
    observe::Received,
    picture::{self, Edit},
    route,
    wire::{Binary, EditRequest, ErrorReply, GenerationReply, GenerationRequest, Streamed},
};

/// Most fields of a form: more than there are names.
const MOST_FIELDS: usize = 64;
/// Fields whose values are text, whatever they look like; all others are read as JSON.
const TEXTS: [&str; 12] = [
    "prompt",
    "negative_prompt",
    "model",
    "size",
    "scheduler",
    "response_format",
    "user",
    "output_format",
    "quality",
    "background",
    "input_fidelity",
    "class_label",
];

/// How much is drawn anew where nobody says: diffusers' own.
const STRENGTH: f64 = 0.8;

/// Makes images of another.
///
/// The image is encoded, noise is added to it, and the last `strength` of the steps are taken from there. The reply is that of
/// `/v1/images/generations`.
#[utoipa::path(post, path = "/v1/images/edits", tag = "images",
    request_body(content = EditRequest, content_type = "multipart/form-data", example = json!(
        {"strength": 0.6, "seed": 7, "num_inference_steps": 10}
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
pub(super) async fn edit(
    Caller(app): Caller,
    Extension(Received(received)): Extension<Received>,
    request: Request,
) -> Result<Response, Problem> {
    let wanted = accept::wanted(request.headers());
    let key = route::key(request.headers());
    let wire = form(&app, request).await?;
    images::answer(app, wire, wanted, key, received).await
}

/// Reads a form of at most `--max-body-bytes`.
async fn form(app: &App, request: Request) -> Result<GenerationRequest, Problem> {
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    let boundary = kind.and_then(|kind| multer::parse_boundary(kind).ok()).ok_or_else(|| {
        let message = "`content-type` names no boundary: send multipart/form-data as an HTTP library makes it";
        Problem::new(StatusCode::BAD_REQUEST, "invalid_body", message).at("content-type")
    })?;
    let read = body::read(app, request, app.settings.max_body_bytes).await?;
    let budget = Arc::clone(&app.bodies);
    let runtime = tokio::runtime::Handle::current();
    read.use_up_apart(move |bytes| {
        let Form { fields, picture, mask } = runtime.block_on(parts(bytes, boundary))?;
        let text = Value::Object(fields).to_string();
        let request: EditRequest = body::parse(text.as_bytes())?;
        let picture = picture.ok_or_else(|| {
            let message = "`image` is missing: it takes a PNG, JPEG or WebP file";
            Problem::new(StatusCode::BAD_REQUEST, "missing_field", message).at("image")
        })?;
        let picture = picture::decoded("image", &picture, &budget)?;
        let size = picture.pixels.dimensions();
        let mask = mask.map(|mask| picture::drawn(&mask, size, &budget)).transpose()?;
        let edit = Edit {
            picture: Arc::new(picture),
            mask: mask.map(Arc::new),
            strength: request.strength.unwrap_or(STRENGTH),
        };
        Ok(GenerationRequest { edit: Some(edit), ..request.generation() })
    })
    .await
}

/// What a form holds.
struct Form {
    fields: Map<String, Value>,
    picture: Option<Bytes>,
    mask: Option<Bytes>,
}

async fn parts(bytes: Bytes, boundary: String) -> Result<Form, Problem> {
    let malformed = |error: multer::Error| {
        let message = format!("the form is malformed: {error}");
        Problem::new(StatusCode::BAD_REQUEST, "invalid_body", message)
    };
    let stream = futures_util::stream::iter([Ok::<_, std::convert::Infallible>(bytes)]);
    let mut multipart = Multipart::new(stream, boundary);
    let mut form = Form { fields: Map::new(), picture: None, mask: None };
    for count in 0.. {
        let Some(field) = multipart.next_field().await.map_err(malformed)? else { break };
        if count == MOST_FIELDS {
            let message =
                format!("the form has more than {MOST_FIELDS} fields: send those there are");
            return Err(Problem::new(StatusCode::BAD_REQUEST, "invalid_body", message));
        }
        let name = field.name().unwrap_or_default().to_owned();
        match name.as_str() {
            "image" | "image[]" if form.picture.is_some() => {
                let message =
                    "`image` stands in the form more than once: images are made of one; keep one";
                return Err(Problem::conflict("image", message));
            }
            "image" | "image[]" => form.picture = Some(field.bytes().await.map_err(malformed)?),
            "mask" if form.mask.is_some() => {
                let message = "`mask` stands in the form more than once: keep one";
                return Err(Problem::conflict("mask", message));
            }
            "mask" => form.mask = Some(field.bytes().await.map_err(malformed)?),
            _ => {
                let text = field.text().await.map_err(malformed)?;
                let value = match TEXTS.contains(&name.as_str()) {
                    true => Value::String(text),
                    false => serde_json::from_str(&text).unwrap_or(Value::String(text)),
                };
                if form.fields.insert(name.clone(), value).is_some() {
                    let message =
                        format!("{} stands in the form more than once: keep one", quoted(&name));
                    return Err(
                        Problem::new(StatusCode::BAD_REQUEST, "duplicate_field", message).at(&name)
                    );
                }
            }
        }
    }
    Ok(form)
}
