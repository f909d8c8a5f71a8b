//! gRPC, by tonic's client over a real socket: the same answers as over HTTP, and the same refusals.

use std::{convert::Infallible, time::Duration};

use axum::{
    body::Body,
    http::{Request, uri::PathAndQuery},
};
use futures_util::{StreamExt, future::try_join_all, stream};
use prost::{Message, bytes::Bytes};
use serde_json::{Value, json};
use tonic::{Code, Status, client::Grpc, transport::Channel};
use tonic_prost::ProstCodec;

use crate::{
    lifecycle::{Running, run},
    server::{CLASSES, ENDLESS, PLAIN, Server, post},
};

#[path = "../../src/http/grpc/wire/mod.rs"]
#[allow(dead_code)]
mod wire;

use wire::{
    health::{HealthCheckRequest, HealthCheckResponse},
    open_inference::{
        InferParameter, InferTensorContents, ModelInferRequest, ModelInferResponse,
        ModelMetadataRequest, ModelMetadataResponse, ModelReadyRequest, ModelReadyResponse,
        ModelRepositoryParameter, RepositoryIndexRequest, RepositoryIndexResponse,
        RepositoryModelLoadRequest, RepositoryModelLoadResponse, RepositoryModelUnloadRequest,
        RepositoryModelUnloadResponse, ServerLiveRequest, ServerLiveResponse,
        ServerMetadataRequest, ServerMetadataResponse, ServerReadyRequest, ServerReadyResponse,
        model_infer_request::{InferInputTensor, InferRequestedOutputTensor},
    },
};

const INFERENCE: &str = "inference.GRPCInferenceService";
const HEALTH: &str = "grpc.health.v1.Health";
const ELEMENTS: usize = 64;

/// A client, which may present a key.
struct Client {
    channel: Channel,
    key: Option<&'static str>,
}

impl Client {
    async fn of(server: &Server) -> (Self, Running) {
        let running = run(server, Duration::from_secs(60)).await;
        let address = format!("http://{}", running.address);
        let channel = Channel::from_shared(address).unwrap().connect().await.unwrap();
        (Self { channel, key: None }, running)
    }

    async fn ask<M, R>(&self, method: &str, message: M) -> Result<R, Status>
    where
        M: Message + 'static,
        R: Message + Default + 'static,
    {
        self.ask_service(INFERENCE, method, message).await
    }

    async fn ask_service<M, R>(&self, service: &str, method: &str, message: M) -> Result<R, Status>
    where
        M: Message + 'static,
        R: Message + Default + 'static,
    {
        let mut client = Grpc::new(self.channel.clone());
        client.ready().await.unwrap();
        let mut request = tonic::Request::new(message);
        if let Some(key) = self.key {
            let key = format!("Bearer {key}").parse().unwrap();
            request.metadata_mut().insert("authorization", key);
        }
        let path: PathAndQuery = format!("/{service}/{method}").parse().unwrap();
        let reply = client.unary(request, path, ProstCodec::<M, R>::default()).await;
        reply.map(tonic::Response::into_inner)
    }

    async fn infer(&self, request: ModelInferRequest) -> Result<ModelInferResponse, Status> {
        self.ask("ModelInfer", request).await
    }
}

fn sample(rows: usize) -> Vec<f32> {
    (0..rows * ELEMENTS).map(|i| (i as f32 * 0.37).sin() * 1.7).collect()
}

/// One evaluation, its elements in the fields of their types.
pub(crate) fn typed(rows: usize) -> ModelInferRequest {
    let input = |name: &str, datatype: &str, shape: Vec<i64>, contents| InferInputTensor {
        name: name.into(),
        datatype: datatype.into(),
        shape,
        contents: Some(contents),
        ..Default::default()
    };
    let numbers = |number: i64| InferTensorContents {
        int64_contents: vec![number; rows],
        ..Default::default()
    };
    let floats = InferTensorContents { fp32_contents: sample(rows), ..Default::default() };
    let count = rows as i64;
    ModelInferRequest {
        model_name: CLASSES.into(),
        id: "7".into(),
        inputs: vec![
            input("sample", "FP32", vec![count, 1, 8, 8], floats),
            input("timestep", "INT64", vec![count], numbers(500)),
            input("class_labels", "INT64", vec![count], numbers(1)),
        ],
        ..Default::default()
    }
}

/// The same in binary.
fn raw(rows: usize) -> ModelInferRequest {
    let mut request = typed(rows);
    for input in &mut request.inputs {
        let contents = input.contents.take().unwrap();
        let floats = contents.fp32_contents.iter().flat_map(|it| it.to_le_bytes());
        let numbers = contents.int64_contents.iter().flat_map(|it| it.to_le_bytes());
        request.raw_input_contents.push(floats.chain(numbers).collect::<Vec<u8>>().into());
    }
    request
}

/// The same over HTTP.
fn in_json(rows: usize) -> Value {
    json!({"id": "7", "inputs": [
        {"name": "sample", "datatype": "FP32", "shape": [rows, 1, 8, 8], "data": sample(rows)},
        {"name": "timestep", "datatype": "INT64", "shape": [rows], "data": vec![500; rows]},
        {"name": "class_labels", "datatype": "INT64", "shape": [rows], "data": vec![1; rows]},
    ]})
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|it| f32::from_le_bytes(it.try_into().unwrap())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_those_of_http_to_the_bit() {
    let server = Server::start().await;
    let (client, _running) = Client::of(&server).await;
    let over_http =
        server.post(&format!("/v2/models/{CLASSES}/infer"), in_json(3).to_string()).await.json();
    let expected: Vec<f32> =
        serde_json::from_value(over_http["outputs"][0]["data"].clone()).unwrap();
    assert_eq!(expected.len(), 3 * ELEMENTS);

    let reply = client.infer(typed(3)).await.unwrap();
    assert_eq!((reply.model_name.as_str(), reply.model_version.as_str()), (CLASSES, "1"));
    assert_eq!((reply.id.as_str(), reply.outputs.len()), ("7", 1));
    let output = &reply.outputs[0];
    assert_eq!((output.name.as_str(), output.datatype.as_str()), ("noise_pred", "FP32"));
    assert_eq!(output.shape, [3, 1, 8, 8]);
    assert_eq!(output.contents.as_ref().unwrap().fp32_contents, expected);
    assert!(reply.raw_output_contents.is_empty());

    let reply = client.infer(raw(3)).await.unwrap();
    assert_eq!(reply.raw_output_contents.len(), 1);
    assert!(reply.outputs[0].contents.is_none());
    assert_eq!(floats(&reply.raw_output_contents[0]), expected);

    let asked = InferRequestedOutputTensor { name: "noise_pred".into(), ..Default::default() };
    let versioned = ModelInferRequest { model_version: "1".into(), outputs: vec![asked], ..raw(3) };
    assert_eq!(client.infer(versioned).await.unwrap(), reply);

    // The timestep as FP32, and unpacked numbers, which a parser must read too.
    let mut other = typed(3);
    other.inputs[1].datatype = "FP32".into();
    other.inputs[1].contents =
        Some(InferTensorContents { fp32_contents: vec![500.0; 3], ..Default::default() });
    let reply = client.infer(other).await.unwrap();
    assert_eq!(reply.outputs[0].contents.as_ref().unwrap().fp32_contents, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_calls_share_a_connection() {
    let server = Server::start().await;
    let (client, _running) = Client::of(&server).await;
    let all = (0..8).map(|_| client.infer(raw(1)));
    let replies = try_join_all(all).await.unwrap();
    assert!(replies.iter().all(|reply| reply == &replies[0]));
}

#[tokio::test(flavor = "multi_thread")]
async fn server_and_models_describe_themselves_as_over_http() {
    let server = Server::start().await;
    let (client, _running) = Client::of(&server).await;
    let live: ServerLiveResponse = client.ask("ServerLive", ServerLiveRequest {}).await.unwrap();
    let ready: ServerReadyResponse =
        client.ask("ServerReady", ServerReadyRequest {}).await.unwrap();
    assert!(live.live && ready.ready);
    let about: ServerMetadataResponse =
        client.ask("ServerMetadata", ServerMetadataRequest {}).await.unwrap();
    let over_http = server.get("/v2").await.json();
    assert_eq!(
        (json!(about.name), json!(about.version)),
        (over_http["name"].clone(), over_http["version"].clone())
    );
    assert_eq!(about.extensions, ["model_repository"]);

    for model in [CLASSES, PLAIN] {
        let asked = ModelMetadataRequest { name: model.into(), version: String::new() };
        let about: ModelMetadataResponse = client.ask("ModelMetadata", asked).await.unwrap();
        let over_http = server.get(&format!("/v2/models/{model}")).await.json();
        let tensors = |all: &[wire::open_inference::model_metadata_response::TensorMetadata]| {
            let all = all.iter();
            let all =
                all.map(|it| json!({"name": it.name, "datatype": it.datatype, "shape": it.shape}));
            all.collect::<Vec<_>>()
        };
        let about = json!({"name": about.name, "versions": about.versions, "platform": about.platform,
            "inputs": tensors(&about.inputs), "outputs": tensors(&about.outputs)});
        assert_eq!(about, over_http);
        let asked = ModelReadyRequest { name: model.into(), version: "1".into() };
        let ready: ModelReadyResponse = client.ask("ModelReady", asked).await.unwrap();
        assert!(ready.ready);
    }
    for (service, expected) in [("", 1), (INFERENCE, 1), (HEALTH, 1)] {
        let asked = HealthCheckRequest { service: service.into() };
        let health: HealthCheckResponse = client.ask_service(HEALTH, "Check", asked).await.unwrap();
        assert_eq!(health.status, expected, "{service}");
    }
    let asked = HealthCheckRequest { service: "other".into() };
    let unknown = client.ask_service::<_, HealthCheckResponse>(HEALTH, "Check", asked).await;
    assert_eq!(unknown.unwrap_err().code(), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_inputs_are_refused_by_name() {
    let server = Server::start().await;
    let (client, _running) = Client::of(&server).await;
    type Change = fn(&mut ModelInferRequest);
    let cases: &[(Change, &str)] = &[
        (|it| it.inputs[0].name = "latent".into(), "latent"),
        (|it| it.inputs[1].name = "sample".into(), "sample"),
        (|it| it.inputs[0].shape = vec![1, 1, 8, 9], "sample.shape"),
        (|it| it.inputs[0].shape = vec![i64::MAX, 1, 8, 8], "1 to 8"),
        (|it| it.inputs[1].shape = vec![2], "1 rows"),
        (|it| it.inputs[0].datatype = "FP64".into(), "FP32"),
        (|it| it.inputs[2].contents.as_mut().unwrap().int64_contents = vec![4], "0 to 3"),
        (|it| it.inputs[0].contents.as_mut().unwrap().fp32_contents[5] = f32::NAN, "finite"),
        (|it| it.inputs[0].contents.as_mut().unwrap().int64_contents = vec![1], "fp32_contents"),
        (|it| it.inputs[0].contents = None, "asks for 64"),
        (|it| drop(it.inputs.pop()), "class_labels"),
        (|it| it.inputs.clear(), "missing"),
        (|it| it.raw_input_contents.push(Bytes::new()), "one for each"),
        (
            |it| it.raw_input_contents = vec![Bytes::new(), Bytes::new(), Bytes::new()],
            "send either",
        ),
        (
            |it| {
                *it = raw(1);
                it.raw_input_contents[0] = Bytes::from_static(b"1234");
            },
            "256",
        ),
        (
            |it| {
                it.outputs
                    .push(InferRequestedOutputTensor { name: "other".into(), ..Default::default() })
            },
            "noise_pred",
        ),
    ];
    for (number, (change, part)) in cases.iter().enumerate() {
        let mut request = typed(1);
        change(&mut request);
        let status = client.infer(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{number}: {status}");
        assert!(status.message().contains(part), "{number}: {:?} lacks {part:?}", status.message());
    }
    let unknown = ModelInferRequest { model_name: "nope é".into(), ..typed(1) };
    let status = client.infer(unknown).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    assert!(status.message().contains("\"nope é\""), "{status}");
    let version = ModelInferRequest { model_version: "2".into(), ..typed(1) };
    assert_eq!(client.infer(version).await.unwrap_err().code(), Code::NotFound);
    // What is not known is ignored, as the protocol says.
    let mut extended = typed(1);
    extended.parameters.insert("priority".into(), InferParameter::default());
    client.infer(extended).await.unwrap();
    let metrics = server.get("/metrics").await.text();
    let counted = format!("route=\"/{INFERENCE}/ModelInfer\"");
    let bad = metrics.lines().find(|line| line.contains(&counted) && line.contains("code=\"400\""));
    assert!(bad.is_some_and(|line| line.ends_with(&format!(" {}", cases.len()))), "{bad:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_offered_is_unimplemented() {
    let server = Server::start().await;
    let (client, _running) = Client::of(&server).await;
    for (service, method) in [
        (INFERENCE, "ModelStreamInfer"),
        (INFERENCE, "ModelStatistics"),
        (HEALTH, "Watch"),
        ("grpc.reflection.v1.ServerReflection", "ServerReflectionInfo"),
    ] {
        let asked =
            client.ask_service::<_, ServerLiveResponse>(service, method, ServerLiveRequest {});
        assert_eq!(asked.await.unwrap_err().code(), Code::Unimplemented, "{service}/{method}");
    }
}

/// A call by hand, as no client makes it.
async fn by_hand(
    server: &Server,
    method: &str,
    headers: &[(&str, &str)],
    body: impl Into<Body>,
) -> (u16, String) {
    let mut request = Request::post(format!("/{INFERENCE}/{method}"));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let reply = server.send(request.body(body.into()).unwrap()).await;
    let message = reply.header("grpc-message");
    assert!(message.is_empty() || reply.body.is_empty(), "{message}");
    (reply.status.as_u16(), reply.header("grpc-status").to_owned())
}

fn framed(message: &impl Message) -> Vec<u8> {
    let bytes = message.encode_to_vec();
    [&[0][..], &(bytes.len() as u32).to_be_bytes(), &bytes].concat()
}

const GRPC: (&str, &str) = ("content-type", "application/grpc");

#[tokio::test(flavor = "multi_thread")]
async fn broken_messages_are_refused() {
    let server = Server::with(|settings| settings.body_budget_bytes = 6 << 20).await;
    let whole = framed(&raw(1));
    let flagged = [&[1][..], &whole[1..]].concat();
    let garbage = [&[0, 0, 0, 0, 4][..], &[0xff; 4]].concat();
    // A message that says that it has a thousand million bytes takes no memory for them.
    let huge = [&[0][..], &(1u32 << 30).to_be_bytes(), b"more"].concat();
    for (body, expected) in [
        (Vec::new(), "3"),
        (whole[..4].to_vec(), "3"),
        (whole[..whole.len() - 1].to_vec(), "3"),
        ([&whole[..], &whole].concat(), "3"),
        (garbage, "3"),
        (flagged, "12"),
        (huge, "8"),
    ] {
        let (status, grpc) = by_hand(&server, "ModelInfer", &[GRPC], body).await;
        assert_eq!((status, grpc.as_str()), (200, expected));
    }
    // Two bytes each, and hundreds of bytes in memory.
    let inputs = [0x2a, 0].repeat(100_000);
    let many = [&[0][..], &(inputs.len() as u32).to_be_bytes(), &inputs].concat();
    assert_eq!(by_hand(&server, "ModelInfer", &[GRPC], many).await.1, "3");
    let with = |value| [("content-type", value)];
    assert_eq!(by_hand(&server, "ModelInfer", &with("text/plain"), whole.clone()).await.0, 415);
    let proto = with("application/grpc+proto");
    assert_eq!(by_hand(&server, "ModelInfer", &proto, whole.clone()).await.0, 200);
    for wrong in ["soon", "1", "123456789m", "-1S"] {
        let headers = [GRPC, ("grpc-timeout", wrong)];
        assert_eq!(by_hand(&server, "ModelInfer", &headers, whole.clone()).await.1, "3", "{wrong}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_of_megabytes_pass_and_larger_ones_do_not() {
    let server = Server::with(|settings| settings.body_budget_bytes = 12 << 20).await;
    let (client, _running) = Client::of(&server).await;
    // The id is as good as anything that is large.
    let id = "x".repeat(1 << 20);
    let reply = client.infer(ModelInferRequest { id: id.clone(), ..raw(1) }).await.unwrap();
    assert_eq!(reply.id, id);
    let id = "x".repeat((2 << 20) + 1);
    let status = client.infer(ModelInferRequest { id, ..raw(1) }).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    assert!(status.message().contains("2097152"), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn models_are_listed_loaded_and_unloaded() {
    let server = Server::start().await;
    let (client, _running) = Client::of(&server).await;
    let index = async |ready| {
        let asked = RepositoryIndexRequest { ready, ..Default::default() };
        let reply: RepositoryIndexResponse = client.ask("RepositoryIndex", asked).await.unwrap();
        reply.models.into_iter().map(|it| (it.name, it.state)).collect::<Vec<_>>()
    };
    let entry = |name: &str, state: &str| (name.to_owned(), state.to_owned());
    assert_eq!(index(false).await, [entry(CLASSES, "READY"), entry(PLAIN, "READY")]);
    let asked = RepositoryModelUnloadRequest { model_name: PLAIN.into(), ..Default::default() };
    let reply: RepositoryModelUnloadResponse =
        client.ask("RepositoryModelUnload", asked).await.unwrap();
    assert!(reply.is_unloaded && reply.model_name == PLAIN);
    assert_eq!(index(true).await, [entry(CLASSES, "READY")]);
    assert_eq!(index(false).await[1], entry(PLAIN, "UNAVAILABLE"));
    let asked = ModelReadyRequest { name: PLAIN.into(), ..Default::default() };
    let ready: ModelReadyResponse = client.ask("ModelReady", asked).await.unwrap();
    assert!(!ready.ready);
    let unloaded = ModelInferRequest { model_name: PLAIN.into(), ..typed(1) };
    assert_eq!(client.infer(unloaded).await.unwrap_err().code(), Code::Unavailable);

    // KServe's clients name the model in the first field.
    let asked = RepositoryModelLoadRequest { repository_name: PLAIN.into(), ..Default::default() };
    let reply: RepositoryModelLoadResponse =
        client.ask("RepositoryModelLoad", asked).await.unwrap();
    assert!(reply.is_loaded);
    assert_eq!(index(true).await.len(), 2);

    let load =
        |model: &str| RepositoryModelLoadRequest { model_name: model.into(), ..Default::default() };
    let refused = async |asked: RepositoryModelLoadRequest| {
        let reply = client.ask::<_, RepositoryModelLoadResponse>("RepositoryModelLoad", asked);
        reply.await.unwrap_err().code()
    };
    assert_eq!(refused(load("nope")).await, Code::NotFound);
    let mut overridden = load(PLAIN);
    overridden.parameters.insert("config".into(), ModelRepositoryParameter::default());
    assert_eq!(refused(overridden).await, Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_asked_for() {
    let server = Server::with(|settings| {
        settings.api_keys = vec!["user".into()];
        settings.admin_keys = vec!["administrator".into()];
    })
    .await;
    let (mut client, _running) = Client::of(&server).await;
    let unload = || RepositoryModelUnloadRequest { model_name: PLAIN.into(), ..Default::default() };
    let code = |result: Result<RepositoryModelUnloadResponse, Status>| {
        result.map_or_else(|status| status.code(), |_| Code::Ok)
    };
    let unloads = async |client: &Client| code(client.ask("RepositoryModelUnload", unload()).await);
    assert_eq!(client.infer(raw(1)).await.unwrap_err().code(), Code::Unauthenticated);
    assert_eq!(unloads(&client).await, Code::Unauthenticated);
    // Probes have no key.
    let asked = HealthCheckRequest::default();
    let health: HealthCheckResponse = client.ask_service(HEALTH, "Check", asked).await.unwrap();
    assert_eq!(health.status, 1);
    client.ask::<_, ServerReadyResponse>("ServerReady", ServerReadyRequest {}).await.unwrap();
    client.key = Some("wrong");
    assert_eq!(client.infer(raw(1)).await.unwrap_err().code(), Code::Unauthenticated);
    client.key = Some("user");
    client.infer(raw(1)).await.unwrap();
    assert_eq!(unloads(&client).await, Code::PermissionDenied);
    client.key = Some("administrator");
    assert_eq!(unloads(&client).await, Code::Ok);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_server_and_one_that_stops_say_so() {
    let server = Server::start().await;
    let (client, running) = Client::of(&server).await;
    let endless = json!({"num_inference_steps": ENDLESS, "n": 4}).to_string();
    let begin = || {
        let (router, asked) = (server.router(), post("/v1/images/generations", endless.clone()));
        tokio::spawn(tower::ServiceExt::oneshot(router, asked))
    };
    let busy = [begin(), begin()];
    let waiting = &server.metrics.samples_waiting;
    let under_way =
        |server: &Server| server.running() + waiting.with_label_values(&[CLASSES]).get();
    server.until("full", |server| under_way(server) == 8).await;
    let status = client.infer(raw(1)).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    assert!(status.message().contains("--max-queue"), "{status}");
    assert!(status.metadata().contains_key("retry-after"));
    busy.iter().for_each(tokio::task::JoinHandle::abort);
    server.until("free", |server| under_way(server) == 0).await;

    let in_flight = begin();
    server.until("running", |server| server.running() == 4).await;
    running.stop.send(()).unwrap();
    while server.get("/health").await.status == 200 {}
    let health: HealthCheckResponse =
        client.ask_service(HEALTH, "Check", HealthCheckRequest::default()).await.unwrap();
    assert_eq!(health.status, 2);
    let ready: ServerReadyResponse =
        client.ask("ServerReady", ServerReadyRequest {}).await.unwrap();
    assert!(!ready.ready);
    let status = client.infer(raw(1)).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    in_flight.abort();
    running.ended.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_waits_no_longer_is_told() {
    let never_ends = || {
        let begun = framed(&raw(1))[..9].to_vec();
        let begun = stream::iter([Ok::<_, Infallible>(begun)]);
        Body::from_stream(begun.chain(stream::pending()))
    };
    let server = Server::start().await;
    let (status, grpc) =
        by_hand(&server, "ModelInfer", &[GRPC, ("grpc-timeout", "10m")], never_ends()).await;
    assert_eq!((status, grpc.as_str()), (200, "4"));
    let patient = [GRPC, ("grpc-timeout", "1H")];
    assert_eq!(by_hand(&server, "ModelInfer", &patient, framed(&raw(1))).await.1, "");
    // The server's own limit holds where it is shorter.
    let brief = Server::with(|settings| settings.request_timeout = Duration::from_millis(10)).await;
    assert_eq!(by_hand(&brief, "ModelInfer", &patient, never_ends()).await.1, "4");
}
