//! The Open Inference Protocol over gRPC: other messages than over HTTP, the same way to the engine.

use axum::{
    Extension,
    body::Bytes,
    extract::{Request, State},
    response::Response,
};

use super::{
    super::{
        App,
        caller::Caller,
        error::Problem,
        infer_input::{self, Contents, Input, OUTPUT},
        inference::{
            VERSION, check_outputs, check_version, evaluate, is_ready, model_metadata,
            server_metadata, serving,
        },
        observe::Received,
        wire::{ArrayMetadata, Elements, HealthStatus},
    },
    call::{self, reply, small},
    weight,
    wire::open_inference::{
        InferTensorContents, ModelInferRequest, ModelInferResponse, ModelMetadataRequest,
        ModelMetadataResponse, ModelReadyRequest, ModelReadyResponse, ServerLiveRequest,
        ServerLiveResponse, ServerMetadataRequest, ServerMetadataResponse, ServerReadyRequest,
        ServerReadyResponse, model_infer_request::InferInputTensor,
        model_infer_response::InferOutputTensor, model_metadata_response::TensorMetadata,
    },
};
use crate::engine::InferRequest;

pub(super) async fn server_live(
    State(app): State<App>,
    request: Request,
) -> Result<Response, Problem> {
    let ServerLiveRequest {} = small(&app, request).await?;
    Ok(reply(&ServerLiveResponse { live: app.is_live() }))
}

pub(super) async fn server_ready(
    State(app): State<App>,
    request: Request,
) -> Result<Response, Problem> {
    let ServerReadyRequest {} = small(&app, request).await?;
    Ok(reply(&ServerReadyResponse { ready: app.status() == HealthStatus::Ok }))
}

pub(super) async fn metadata(
    State(app): State<App>,
    request: Request,
) -> Result<Response, Problem> {
    let ServerMetadataRequest {} = small(&app, request).await?;
    let server = server_metadata();
    // Over gRPC binary is of the protocol itself.
    let extensions = server.extensions.into_iter().filter(|it| *it != "binary_tensor_data");
    Ok(reply(&ServerMetadataResponse {
        name: server.name.into(),
        version: server.version.into(),
        extensions: extensions.map(str::to_owned).collect(),
    }))
}

pub(super) async fn model_ready(
    State(app): State<App>,
    request: Request,
) -> Result<Response, Problem> {
    let ModelReadyRequest { name, version } = small(&app, request).await?;
    check_given_version(&name, &version)?;
    Ok(reply(&ModelReadyResponse { ready: is_ready(&app, &name)? }))
}

pub(super) async fn metadata_of_model(
    State(app): State<App>,
    request: Request,
) -> Result<Response, Problem> {
    let ModelMetadataRequest { name, version } = small(&app, request).await?;
    check_given_version(&name, &version)?;
    let model = model_metadata(&app, &name)?;
    let tensors = |arrays: Vec<ArrayMetadata>| {
        let tensor = |ArrayMetadata { name, datatype, shape }| TensorMetadata {
            name: String::from(name),
            datatype: String::from(datatype),
            shape,
        };
        arrays.into_iter().map(tensor).collect()
    };
    Ok(reply(&ModelMetadataResponse {
        name: model.name,
        versions: model.versions.into_iter().map(str::to_owned).collect(),
        platform: model.platform.into(),
        inputs: tensors(model.inputs),
        outputs: tensors(model.outputs),
    }))
}

/// Evaluates a network once; the answer has the form of the inputs, binary or not.
pub(super) async fn infer(
    Caller(app): Caller,
    Extension(Received(received)): Extension<Received>,
    request: Request,
) -> Result<Response, Problem> {
    let body = call::read(&app, request, app.settings.max_inference_bytes()).await?;
    let _in_flight = app.in_flight.token();
    let asked = app.clone();
    let Asked { request, id, in_binary } = body.use_up(move |bytes| parse(&asked, bytes)).await?;
    let model_name = request.model.id.clone();
    let output = evaluate(&app, request, received).await?;
    let write = move || {
        let shape = output.shape.iter().map(|count| *count as i64).collect();
        let (contents, raw) = if in_binary {
            let bytes: Vec<u8> = output.values.iter().flat_map(|it| it.to_le_bytes()).collect();
            (None, vec![Bytes::from(bytes)])
        } else {
            let fp32_contents = output.values;
            (Some(InferTensorContents { fp32_contents, ..Default::default() }), Vec::new())
        };
        reply(&ModelInferResponse {
            model_name,
            model_version: VERSION.into(),
            id,
            outputs: vec![InferOutputTensor {
                name: OUTPUT.into(),
                datatype: "FP32".into(),
                shape,
                contents,
                ..Default::default()
            }],
            raw_output_contents: raw,
            ..Default::default()
        })
    };
    tokio::task::spawn_blocking(write).await.map_err(Problem::internal)
}

/// What is asked of the engine, and how the answer is written.
struct Asked {
    request: InferRequest,
    id: String,
    in_binary: bool,
}

fn parse(app: &App, bytes: Bytes) -> Result<Asked, Problem> {
    weight::check(&bytes)?;
    let message: ModelInferRequest = call::parse(bytes)?;
    check_given_version(&message.model_name, &message.model_version)?;
    let model = serving(app, &message.model_name)?;
    app.engine.check_room(&model)?;
    check_outputs(message.outputs.iter().map(|output| output.name.as_str()))?;
    let in_binary = !message.raw_input_contents.is_empty();
    let inputs = if in_binary {
        of_binary(message.inputs, message.raw_input_contents)?
    } else {
        message.inputs.into_iter().map(of_numbers).collect::<Result<_, _>>()?
    };
    let request = infer_input::request(&model, inputs, app.settings.max_rows)?;
    Ok(Asked { request, id: message.id, in_binary })
}

fn check_given_version(name: &str, version: &str) -> Result<(), Problem> {
    if version.is_empty() { Ok(()) } else { check_version(name, version) }
}

/// Inputs whose elements are all in `raw_input_contents`.
fn of_binary(inputs: Vec<InferInputTensor>, raw: Vec<Bytes>) -> Result<Vec<Input>, Problem> {
    if inputs.len() != raw.len() {
        let remedy = format!("there are {} inputs; send one for each, or none", inputs.len());
        let count = format!("{} pieces", raw.len());
        return Err(Problem::value("raw_input_contents", count, remedy));
    }
    let inputs = inputs.into_iter().zip(raw).map(|(input, bytes)| {
        if input.contents.is_some_and(|contents| contents != InferTensorContents::default()) {
            let message = format!(
                "`{}` has `contents`, and there are `raw_input_contents`: send either",
                input.name
            );
            return Err(Problem::conflict(&input.name, message));
        }
        let InferInputTensor { name, datatype, shape, .. } = input;
        Ok(Input { name, datatype, shape, contents: Contents::Binary(bytes) })
    });
    inputs.collect()
}

/// An input whose elements are in the field of its type.
fn of_numbers(input: InferInputTensor) -> Result<Input, Problem> {
    let InferInputTensor { name, datatype, shape, contents, .. } = input;
    let mut contents = contents.unwrap_or_default();
    let (field, values) = match datatype.as_str() {
        "FP32" => ("fp32_contents", std::mem::take(&mut contents.fp32_contents)),
        "INT64" => {
            let numbers = std::mem::take(&mut contents.int64_contents);
            ("int64_contents", numbers.into_iter().map(|number| number as f32).collect())
        }
        // No network takes it, as will be said.
        _ => ("", std::mem::take(&mut contents).fp32_contents),
    };
    if contents != InferTensorContents::default() {
        let remedy = format!("elements of {datatype} go to {field} and nowhere else");
        return Err(Problem::value(&format!("{name}.contents"), "of another type", remedy));
    }
    let contents = Contents::Numbers(Elements { values, broken: None });
    Ok(Input { name, datatype, shape, contents })
}
