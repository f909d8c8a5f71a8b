//! The Open Inference Protocol v2: one raw evaluation of a network, in JSON or binary.

use std::{sync::Arc, time::Instant};

use axum::{
    Extension, Json, Router,
    body::Bytes,
    extract::{Path, Request, State, rejection::PathRejection},
    http::{HeaderMap, HeaderName, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};

use super::{
    App, body,
    caller::Caller,
    error::{Problem, quoted},
    infer_input::{self, OUTPUT},
    models::reason,
    observe::Received,
    run_span::RunSpan,
    wire::{
        Binary, BinarySize, HealthStatus, InferOutput, InferenceError, InferenceReply,
        InferenceRequest, Live, ModelMetadata, ModelReady, ServerMetadata, ServerReady,
    },
};
use crate::{
    engine::{Event, Failure, InferRequest, Submission},
    registry::{Model, State as ModelState},
};

/// How many bytes of a body are JSON; the rest is binary.
const HEADER_LENGTH: HeaderName = HeaderName::from_static("inference-header-content-length");

/// The only version there is of a model.
pub(super) const VERSION: &str = "1";

/// The server, and which extensions of the protocol it speaks.
#[utoipa::path(get, path = "/v2", tag = "inference", responses(
    (status = 200, description = "The server", body = ServerMetadata),
))]
pub(super) async fn server() -> Json<ServerMetadata> {
    Json(server_metadata())
}

pub(super) fn server_metadata() -> ServerMetadata {
    ServerMetadata {
        name: "understudy",
        version: env!("CARGO_PKG_VERSION"),
        extensions: vec!["model_repository", "binary_tensor_data"],
    }
}

/// Whether the process is alive: it answers, and no device is lost, which only a restart cures. Load, models on their way and a
/// shutdown change nothing here.
#[utoipa::path(get, path = "/v2/health/live", tag = "inference", responses(
    (status = 200, description = "It is", body = Live),
    (status = 503, description = "A device answers nothing any more until the server is started anew", body = Live),
))]
pub(super) async fn live(State(app): State<App>) -> Response {
    let live = app.is_live();
    (code(live), Json(Live { live })).into_response()
}

/// Whether the server takes requests.
#[utoipa::path(get, path = "/v2/health/ready", tag = "inference", responses(
    (status = 200, description = "It does", body = ServerReady),
    (status = 503, description = "Models are being loaded, the server is shutting down, a device answers nothing any more, or the database of experiments is damaged", body = ServerReady),
))]
pub(super) async fn ready(State(app): State<App>) -> Response {
    let ready = app.status() == HealthStatus::Ok;
    (code(ready), Json(ServerReady { ready })).into_response()
}

/// Whether a model serves.
#[utoipa::path(get, path = "/v2/models/{model}/ready", tag = "inference",
    params(("model" = String, Path, description = "The model's id", example = "fashion-mnist-teacher")),
    responses(
        (status = 200, description = "It does", body = ModelReady),
        (status = 404, description = "No such model", body = InferenceError),
        (status = 503, description = "It does not", body = ModelReady),
))]
pub(super) async fn model_ready(
    State(app): State<App>,
    id: ModelPath,
) -> Result<Response, Problem> {
    let name = of_path(id)?;
    let ready = is_ready(&app, &name)?;
    Ok((code(ready), Json(ModelReady { name, ready })).into_response())
}

/// A network's inputs and outputs. This path and those below it also take `/versions/1` behind the model's id.
#[utoipa::path(get, path = "/v2/models/{model}", tag = "inference",
    params(("model" = String, Path, description = "The model's id", example = "fashion-mnist-teacher")),
    responses(
        (status = 200, description = "The inputs and outputs", body = ModelMetadata),
        (status = 404, description = "No such model", body = InferenceError),
        (status = 503, description = "It is not ready", body = InferenceError),
))]
pub(super) async fn metadata(
    State(app): State<App>,
    id: ModelPath,
) -> Result<Json<ModelMetadata>, Problem> {
    Ok(Json(model_metadata(&app, &of_path(id)?)?))
}

pub(super) fn model_metadata(app: &App, id: &str) -> Result<ModelMetadata, Problem> {
    let model = serving(app, id)?;
    Ok(ModelMetadata {
        name: model.id.clone(),
        versions: vec![VERSION],
        platform: "understudy_candle",
        inputs: infer_input::inputs(&model),
        outputs: infer_input::outputs(&model),
    })
}

/// The protocol's paths with a version, of which there is one. They are what the paths without it are, and not documented
/// again.
pub(super) fn versions() -> Router<App> {
    let version = "/v2/models/{model}/versions/{version}";
    Router::new()
        .route(version, get(async |app, path| metadata(app, of_version(path)?).await))
        .route(
            &format!("{version}/ready"),
            get(async |app, path| model_ready(app, of_version(path)?).await),
        )
        .route(
            &format!("{version}/infer"),
            post(async |caller, received, path, request| {
                infer(caller, received, of_version(path)?, request).await
            }),
        )
}

/// Evaluates a network once.
///
/// Inputs are `sample`, `timestep`, of a class-conditional network `class_labels`, of one that is told a prompt
/// `encoder_hidden_states`, of one that is told a pooled prompt `text_embeds` (and `time_ids`, the sizes of its image), and of one that is
/// told its guidance `guidance_scale`, which is the model card's where it is left out; the output is `noise_pred`, the network's own answer, whatever it predicts. With the header
/// `Inference-Header-Content-Length` the body is so many bytes of JSON, then the inputs' elements in
/// little-endian binary, in the order of the inputs that have a `binary_data_size`.
#[utoipa::path(post, path = "/v2/models/{model}/infer", tag = "inference",
    params(
        ("model" = String, Path, description = "The model's id", example = "fashion-mnist-teacher"),
        ("Inference-Header-Content-Length" = Option<u64>, Header, description = "Bytes of JSON before the binary part"),
    ),
    request_body(content(
        (InferenceRequest = "application/json", example = json!({"inputs": [
            {"name": "sample", "datatype": "FP32", "shape": [1, 1, 32, 32], "data": vec![0.0; 32 * 32]},
            {"name": "timestep", "datatype": "INT64", "shape": [1], "data": [500]},
            {"name": "class_labels", "datatype": "INT64", "shape": [1], "data": [0]},
        ]})),
        (Binary = "application/octet-stream"),
    )),
    responses(
        (status = 200, description = "The network's answer", content(
            (InferenceReply = "application/json"),
            (Binary = "application/octet-stream"),
        )),
        (status = 400, description = "An input that the network cannot take", body = InferenceError),
        (status = 404, description = "No such model", body = InferenceError),
        (status = 429, description = "The queue is full", body = InferenceError),
        (status = 503, description = "Not ready, or shutting down", body = InferenceError),
))]
pub(super) async fn infer(
    Caller(app): Caller,
    Extension(Received(received)): Extension<Received>,
    id: ModelPath,
    request: Request,
) -> Result<Response, Problem> {
    let model = serving(&app, &of_path(id)?)?;
    // Before tens of megabytes are read for nothing.
    app.engine.check_room(&model)?;
    let headers = request.headers().clone();
    let body = body::read(&app, request, app.settings.max_inference_bytes()).await?;
    let _in_flight = app.in_flight.token();
    let (asked, max_rows) = (Arc::clone(&model), app.settings.max_rows);
    let read = body.use_up(move |mut json| {
        let binary = json.split_off(header_length(&headers, json.len())?);
        let wire: InferenceRequest = body::parse(&json)?;
        let in_binary = binary_output(&wire)?;
        let inputs = infer_input::of_json(wire.inputs, binary)?;
        let request = infer_input::request(&asked, inputs, max_rows)?;
        Ok((request, wire.id, in_binary))
    });
    let (request, id, in_binary) = read.await?;
    let output = evaluate(&app, request, received).await?;
    let write = move || reply(&model, id, output, in_binary);
    tokio::task::spawn_blocking(write).await.map_err(Problem::internal)?
}

/// A network's answer.
pub(super) struct Output {
    /// Rows first.
    pub(super) shape: Vec<usize>,
    /// Row-major.
    pub(super) values: Vec<f32>,
}

/// Has the engine evaluate a network for a request that was received then.
pub(super) async fn evaluate(
    app: &App,
    request: InferRequest,
    received: Instant,
) -> Result<Output, Problem> {
    let (model, rows) = (Arc::clone(&request.model), request.timesteps.len());
    let asked = Instant::now();
    let submission = app.engine.infer(request)?;
    let values = finish(submission, rows, RunSpan::of_rows(&model, rows, asked)).await?;
    app.metrics
        .request_duration
        .with_label_values(&[&model.id])
        .observe(received.elapsed().as_secs_f64());
    let geometry = &model.geometry;
    let shape = vec![rows, geometry.out_channels, geometry.height, geometry.width];
    Ok(Output { shape, values })
}

/// A model's id from the path; one that is not UTF-8 names no model.
type ModelPath = Result<Path<String>, PathRejection>;

/// A model's id and its version.
type VersionPath = Result<Path<(String, String)>, PathRejection>;

/// The model, if its one version is meant.
fn of_version(version: VersionPath) -> Result<ModelPath, Problem> {
    let Ok(Path((id, version))) = version else { return Err(Problem::unknown_model("\u{fffd}")) };
    check_version(&id, &version)?;
    Ok(Ok(Path(id)))
}

/// 404 for another version than the one there is.
pub(super) fn check_version(id: &str, version: &str) -> Result<(), Problem> {
    if version == VERSION {
        return Ok(());
    }
    let message =
        format!("{} has no version {}; it has one, {VERSION}", quoted(id), quoted(version));
    Err(Problem::new(StatusCode::NOT_FOUND, "version_not_found", message))
}

fn of_path(id: ModelPath) -> Result<String, Problem> {
    id.map(|Path(id)| id).map_err(|_| Problem::unknown_model("\u{fffd}"))
}

/// Whether a model serves.
pub(super) fn is_ready(app: &App, id: &str) -> Result<bool, Problem> {
    let state = app.registry.get(id).ok_or_else(|| Problem::unknown_model(id))?;
    Ok(matches!(state, ModelState::Ready(_)) && !app.stopping.is_cancelled())
}

/// The model of that id, if it serves.
pub(super) fn serving(app: &App, id: &str) -> Result<Arc<Model>, Problem> {
    match app.registry.get(id) {
        None => Err(Problem::unknown_model(id)),
        Some(_) if app.draining.is_cancelled() => Err(Problem::draining()),
        Some(ModelState::Ready(model)) => Ok(model),
        Some(state) => {
            Err(Problem::not_ready(format!("{id} is not ready: {}", reason(id, &state))))
        }
    }
}

fn code(ready: bool) -> StatusCode {
    if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

/// Bytes of JSON at the start of a body of `length` bytes.
fn header_length(headers: &HeaderMap, length: usize) -> Result<usize, Problem> {
    let Some(value) = headers.get(HEADER_LENGTH) else { return Ok(length) };
    let text = String::from_utf8_lossy(value.as_bytes());
    let found = text.parse().ok().filter(|found| *found <= length);
    found.ok_or_else(|| {
        let remedy = format!("it takes the bytes of JSON in the body, 0 to {length}");
        Problem::value("Inference-Header-Content-Length", quoted(&text), remedy)
    })
}

/// Whether the one output is to be binary.
fn binary_output(wire: &InferenceRequest) -> Result<bool, Problem> {
    let asked = wire.outputs.as_deref().unwrap_or_default();
    check_outputs(asked.iter().map(|output| output.name.as_str()))?;
    let own = asked.iter().find_map(|output| output.parameters.as_ref()?.binary_data);
    let all = wire.parameters.as_ref().and_then(|parameters| parameters.binary_data_output);
    Ok(own.or(all).unwrap_or(false))
}

/// 400 for an output that there is not.
pub(super) fn check_outputs<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<(), Problem> {
    match names.into_iter().find(|name| *name != OUTPUT) {
        Some(other) => {
            let remedy = format!("there is one output, {OUTPUT}");
            Err(Problem::value("outputs", quoted(other), remedy))
        }
        None => Ok(()),
    }
}

/// Waits for all rows, and puts them in order.
async fn finish(
    mut submission: Submission,
    rows: usize,
    mut span: RunSpan,
) -> Result<Vec<f32>, Problem> {
    let mut outputs = vec![None; rows];
    let mut last = None;
    while let Some(event) = submission.next().await {
        if let Event::Failed { failure, .. } = &event {
            span.failed(failure);
        }
        match event {
            Event::Inferred { index, output, timings } => {
                outputs[index] = Some(output);
                last = Some((index, timings));
            }
            Event::Failed { failure: failure @ Failure::NonFinite { .. }, .. } => {
                let remedy = "send a sample and a timestep from the range that it was trained on";
                let message = format!("{failure}; {remedy}");
                return Err(Problem::new(StatusCode::BAD_REQUEST, "not_finite", message));
            }
            Event::Failed { failure, .. } => return Err(failure.into()),
            Event::Partial { .. } | Event::Completed { .. } => {}
        }
    }
    let all: Option<Vec<_>> = outputs.into_iter().collect();
    let all = all.ok_or_else(|| Problem::internal("the engine ended before the request did"))?;
    // The rows wait and run together, as a rule, and there may be hundreds.
    if let Some((index, timings)) = last {
        span.made(index, &timings);
    }
    span.completed();
    Ok(all.concat())
}

fn reply(
    model: &Model,
    id: Option<String>,
    Output { shape, values }: Output,
    in_binary: bool,
) -> Result<Response, Problem> {
    let bytes: Vec<u8> = if in_binary {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    } else {
        Vec::new()
    };
    let output = InferOutput {
        name: OUTPUT,
        datatype: "FP32",
        shape,
        parameters: in_binary.then_some(BinarySize { binary_data_size: bytes.len() }),
        data: (!in_binary).then_some(values),
    };
    let reply = InferenceReply {
        model_name: model.id.clone(),
        model_version: VERSION,
        id,
        outputs: vec![output],
    };
    if !in_binary {
        return Ok(Json(reply).into_response());
    }
    let mut body = serde_json::to_vec(&reply).map_err(Problem::internal)?;
    let length = body.len();
    body.extend_from_slice(&bytes);
    let headers = [
        (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
        (HEADER_LENGTH, length.to_string()),
    ];
    Ok((headers, Bytes::from(body)).into_response())
}
