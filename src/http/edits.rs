//! `POST /v1/images/edits`: images that begin with another, as a form.

use std::{io::Cursor, sync::Arc};

use axum::{
    Extension,
    body::Bytes,
    extract::Request,
    http::{StatusCode, header},
    response::Response,
};
use image::{DynamicImage, GrayImage, ImageDecoder, ImageFormat, ImageReader, Limits, RgbImage};
use multer::Multipart;
use serde_json::{Map, Value};

use super::{
    App, accept,
    body::{self, Budget, Taken},
    caller::Caller,
    error::{Problem, quoted},
    images,
    observe::Received,
    route,
    wire::{Binary, EditRequest, ErrorReply, GenerationReply, GenerationRequest, Streamed},
};

/// Longest side of a picture that is read, in pixels.
const LONGEST_SIDE: u32 = 16_384;
/// Most pixels of a picture that is read: a square of 4096.
const MOST_PIXELS: u64 = 1 << 24;
/// Most bytes that a decoder may take: 16 bits of four channels.
const DECODER_BYTES: u64 = 8 * MOST_PIXELS;
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

/// What images begin with, beside the request for them.
#[derive(Debug, Clone)]
pub(super) struct Edit {
    /// The image, upright.
    pub(super) picture: Arc<Picture>,
    /// Of its size: 255 where it is drawn anew. All of it is where there is none.
    pub(super) mask: Option<Arc<GrayImage>>,
    /// Of the steps the last part that is taken, above 0 to 1.
    pub(super) strength: f64,
}

/// A picture and the memory that it takes of what there is for bodies.
#[derive(Debug)]
pub(super) struct Picture {
    pub(super) pixels: RgbImage,
    _memory: Taken,
}

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
        let picture = decoded("image", &picture, &budget)?;
        let size = picture.pixels.dimensions();
        let mask = mask.map(|mask| drawn(&mask, size, &budget)).transpose()?;
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

/// The picture in a field, turned as its EXIF data says, without transparency, as Pillow's `convert("RGB")` has it.
pub(super) fn decoded(field: &str, bytes: &[u8], budget: &Arc<Budget>) -> Result<Picture, Problem> {
    let (picture, mut memory) = read(field, bytes, budget)?;
    let pixels = picture.into_rgb8();
    memory.keep(pixels.as_raw().len());
    Ok(Picture { pixels, _memory: memory })
}

/// Where a picture of this size is drawn anew: 255 where a mask is transparent, as OpenAI has it.
fn drawn(
    bytes: &[u8],
    (width, height): (u32, u32),
    budget: &Arc<Budget>,
) -> Result<GrayImage, Problem> {
    let (mask, _memory) = read("mask", bytes, budget)?;
    if !mask.color().has_alpha() {
        let message = "`mask` has no transparency: send a PNG with an alpha channel that is 0 where the image is drawn anew";
        return Err(Problem::new(StatusCode::BAD_REQUEST, "invalid_value", message).at("mask"));
    }
    if (mask.width(), mask.height()) != (width, height) {
        let remedy = format!("it must be as large as the image, {width}x{height}");
        let size = format!("{}x{}", mask.width(), mask.height());
        return Err(Problem::value("mask", size, remedy));
    }
    let alpha = mask.into_rgba8().into_raw().into_iter().skip(3).step_by(4);
    let drawn = alpha.map(|alpha| if alpha == 0 { 255 } else { 0 }).collect();
    GrayImage::from_raw(width, height, drawn).ok_or_else(|| Problem::internal("a mask's size"))
}

/// A picture in a field, upright, and the memory that it takes while it is turned into another kind.
fn read(field: &str, bytes: &[u8], budget: &Arc<Budget>) -> Result<(DynamicImage, Taken), Problem> {
    let refuse = |problem: &dyn std::fmt::Display| {
        let message =
            format!("`{field}` cannot be read ({problem}): send a PNG, JPEG or WebP file");
        Problem::new(StatusCode::BAD_REQUEST, "invalid_value", message).at(field)
    };
    let reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format();
    let mut reader = reader.map_err(|error| refuse(&error))?;
    let known = [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP];
    if !reader.format().is_some_and(|format| known.contains(&format)) {
        return Err(refuse(&"it begins like none of these"));
    }
    let mut limits = Limits::default();
    limits.max_image_width = Some(LONGEST_SIDE);
    limits.max_image_height = Some(LONGEST_SIDE);
    limits.max_alloc = Some(DECODER_BYTES);
    reader.limits(limits);
    let mut decoder = reader.into_decoder().map_err(|error| refuse(&error))?;
    let (width, height) = decoder.dimensions();
    if u64::from(width) * u64::from(height) > MOST_PIXELS {
        let remedy = format!("at most {MOST_PIXELS} pixels are read; send a smaller one");
        return Err(Problem::value(field, format!("{width}x{height}"), remedy));
    }
    // What it is decoded to, and what is made of that: four bytes a pixel at most.
    let bytes = decoder.total_bytes() + 4 * u64::from(width) * u64::from(height);
    let memory = budget.take(bytes as usize)?;
    let orientation = decoder.orientation().map_err(|error| refuse(&error))?;
    let mut picture = DynamicImage::from_decoder(decoder).map_err(|error| refuse(&error))?;
    picture.apply_orientation(orientation);
    Ok((picture, memory))
}

#[cfg(test)]
mod tests;
