//! Traces, as a collector gets them: which spans, below which others, and what they say.

use std::{
    collections::BTreeMap,
    net::TcpListener,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::State,
    http::{Request, StatusCode},
    routing::post as on_post,
};
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::any_value::Value as Any,
    trace::v1::{Span, status::StatusCode as Code},
};
use prost::Message;
use serde_json::{Value, json};
use understudy::traces::{Settings, Traces};

use crate::{
    grpc,
    server::{CLASSES, ENDLESS, STUDENT, Server, TEXT, events, post},
};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";

/// Long enough for whatever the test's machine does beside it.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a collector was sent.
#[derive(Clone, Default)]
struct Collected(Arc<Mutex<Vec<ExportTraceServiceRequest>>>);

/// A server whose traces go to a collector in this process.
struct Traced {
    server: Server,
    traces: Traces,
    collected: Collected,
}

/// Traces that go to that address.
fn traces_to(endpoint: &str) -> Traces {
    let settings = Settings::read(|name| {
        Ok((name == "OTEL_EXPORTER_OTLP_ENDPOINT").then(|| endpoint.to_owned()))
    });
    Traces::start(&settings.unwrap().unwrap()).unwrap()
}

async fn traced(mut server: Server) -> Traced {
    let collected = Collected::default();
    let take = async |State(Collected(all)): State<Collected>, body: Bytes| {
        all.lock().unwrap().push(ExportTraceServiceRequest::decode(body).unwrap());
    };
    let router = Router::new().route("/v1/traces", on_post(take)).with_state(collected.clone());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let traces = traces_to(&format!("http://{}", listener.local_addr().unwrap()));
    tokio::spawn(axum::serve(listener, router).into_future());
    for series in traces.series() {
        server.metrics.add(series).unwrap();
    }
    server.app = server.app.traced(Some(traces.clone()));
    Traced { server, traces, collected }
}

impl Traced {
    /// Sends what waits, and gives all that the collector has got.
    async fn end(self) -> Vec<Span> {
        let Self { server, traces, collected } = self;
        let metrics = Arc::clone(&server.metrics);
        drop(server);
        tokio::task::spawn_blocking(move || traces.end(PATIENCE)).await.unwrap().unwrap();
        let metrics = metrics.encode().unwrap();
        let count = |name: &str| -> usize {
            let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.unwrap().parse().unwrap()
        };
        let made = count("understudy_spans_total");
        assert_eq!(count("understudy_spans_taken_total"), made);
        let batches = std::mem::take(&mut *collected.0.lock().unwrap());
        let resources = batches.into_iter().flat_map(|batch| batch.resource_spans);
        let scopes = resources.flat_map(|resource| {
            let mut named = resource.resource.unwrap().attributes.into_iter();
            let named = named.find(|it| it.key == "service.name").unwrap().value.unwrap().value;
            assert_eq!(named, Some(Any::StringValue("understudy".into())));
            resource.scope_spans
        });
        let spans: Vec<Span> = scopes.flat_map(|scope| scope.spans).collect();
        assert_eq!(spans.len(), made);
        spans
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What a span says, as JSON.
fn said(span: &Span) -> BTreeMap<String, Value> {
    let value = |any: &Any| match any {
        Any::StringValue(text) => json!(text),
        Any::IntValue(number) => json!(number),
        Any::DoubleValue(number) => json!(number),
        Any::BoolValue(value) => json!(value),
        other => json!(format!("{other:?}")),
    };
    let attributes = span.attributes.iter();
    attributes
        .map(|it| (it.key.clone(), value(it.value.as_ref().unwrap().value.as_ref().unwrap())))
        .collect()
}

/// The only span without a parent among the others.
fn root(spans: &[Span]) -> &Span {
    let ids: Vec<&[u8]> = spans.iter().map(|span| &span.span_id[..]).collect();
    let mut roots = spans.iter().filter(|span| !ids.contains(&&span.parent_span_id[..]));
    let found = roots.next().unwrap();
    assert!(roots.next().is_none(), "{spans:#?}");
    found
}

/// The spans right below one, in their order, all of its trace and none beyond it in time.
fn below<'a>(spans: &'a [Span], parent: &Span) -> Vec<&'a Span> {
    let mut found: Vec<&Span> =
        spans.iter().filter(|span| span.parent_span_id == parent.span_id).collect();
    found.sort_by_key(|span| span.start_time_unix_nano);
    for span in &found {
        assert_eq!(span.trace_id, parent.trace_id);
        assert!(span.start_time_unix_nano >= parent.start_time_unix_nano, "{span:#?}");
        assert!(span.start_time_unix_nano <= span.end_time_unix_nano, "{span:#?}");
        assert!(span.end_time_unix_nano <= parent.end_time_unix_nano, "{span:#?} {parent:#?}");
    }
    found
}

fn names<'a>(spans: &[&'a Span]) -> Vec<&'a str> {
    spans.iter().map(|span| span.name.as_str()).collect()
}

/// A request that is part of a trace.
fn part(path: &str, body: impl Into<Body>, flags: &str) -> Request<Body> {
    let mut request = post(path, body);
    let parent = format!("00-{TRACE}-{PARENT}-{flags}").parse().unwrap();
    request.headers_mut().insert("traceparent", parent);
    request
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_a_trace_below_the_one_that_asked() {
    let traced = traced(Server::start().await).await;
    let body = json!({"seed": 7, "num_inference_steps": 3, "scheduler": "ddim", "class_label": 1});
    let mut request = part("/v1/images/generations", body.to_string(), "01");
    request.headers_mut().insert("user-agent", "curl/8.0".parse().unwrap());
    let reply = traced.server.send(request).await;
    assert_eq!(reply.status, StatusCode::OK);

    let spans = traced.end().await;
    let root = root(&spans);
    assert_eq!(hex(&root.trace_id), TRACE);
    assert_eq!(hex(&root.parent_span_id), PARENT);
    assert_eq!(root.name, "POST /v1/images/generations");
    assert_eq!(root.kind, 2);
    let says = said(root);
    assert_eq!(says["http.request.method"], "POST");
    assert_eq!(says["http.route"], "/v1/images/generations");
    assert_eq!(says["http.response.status_code"], 200);
    assert_eq!(says["url.path"], "/v1/images/generations");
    assert_eq!(says["user_agent.original"], "curl/8.0");
    assert!(
        says["http.response.header.x-request-id"]
            .to_string()
            .contains(reply.header("x-request-id"))
    );

    let [generation] = below(&spans, root)[..] else { panic!("{spans:#?}") };
    assert_eq!(generation.name, format!("generate_content {CLASSES}"));
    let says = said(generation);
    assert_eq!(says["gen_ai.request.model"], CLASSES);
    assert_eq!(says["gen_ai.request.seed"], 7);
    assert_eq!(says["gen_ai.request.choice.count"], 1);
    assert_eq!(says["gen_ai.output.type"], "image");
    assert_eq!(says["understudy.num_inference_steps"], 3);
    assert_eq!(says["understudy.scheduler"], "ddim");
    assert_eq!(says["understudy.size"], "8x8");
    assert!(!says.contains_key("understudy.experiment.id"));

    let stages = below(&spans, generation);
    assert_eq!(names(&stages), ["queue", "denoise", "encode image"]);
    assert!(stages[0].end_time_unix_nano <= stages[1].start_time_unix_nano);
    assert!(stages[1].end_time_unix_nano <= stages[2].start_time_unix_nano);
    assert_eq!(said(stages[1])["understudy.evaluations"], 3);
    assert_eq!(said(stages[1])["understudy.mean_batch"], 1.0);
    assert_eq!(said(stages[2])["understudy.media_type"], "image/png");
    assert_eq!(spans.len(), 5);
    assert!(spans.iter().all(|span| span.status.as_ref().is_none_or(|it| it.code == 0)));
}

#[tokio::test(flavor = "multi_thread")]
async fn text_and_latents_have_spans_and_each_image_its_own() {
    let traced = traced(Server::with_text().await).await;
    let body = json!({"model": TEXT, "prompt": "a red apple", "n": 2, "seed": 1});
    assert_eq!(traced.server.generate(body.clone()).await.status, StatusCode::OK);
    // The prompt is known by now.
    assert_eq!(traced.server.generate(body).await.status, StatusCode::OK);

    let spans = traced.end().await;
    let mut traces: BTreeMap<u64, &Span> = BTreeMap::new();
    for span in spans.iter().filter(|span| span.kind == 2) {
        assert!(span.parent_span_id.is_empty());
        traces.insert(span.start_time_unix_nano, span);
    }
    let traces: Vec<&Span> = traces.into_values().collect();
    assert_eq!(traces.len(), 2);
    assert_ne!(traces[0].trace_id, traces[1].trace_id);
    for (root, encodes) in traces.into_iter().zip([true, false]) {
        let [generation] = below(&spans, root)[..] else { panic!("{spans:#?}") };
        assert_eq!(said(generation)["gen_ai.request.choice.count"], 2);
        let all = below(&spans, generation);
        for index in 0..2 {
            let of = |span: &&&Span| said(span)["understudy.index"] == index;
            let stages: Vec<&Span> = all.iter().filter(of).copied().collect();
            let expected = ["queue", "encode prompt", "denoise", "decode latent", "encode image"];
            let expected = expected.into_iter().filter(|it| encodes || *it != "encode prompt");
            assert_eq!(names(&stages), expected.collect::<Vec<_>>());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_streamed_comparison_is_one_trace_until_its_last_byte() {
    let traced = traced(Server::pair().await).await;
    let body = json!({"stream": true, "partial_images": 1, "num_inference_steps": 4});
    let reply = traced.server.send(part("/v1/compare", body.to_string(), "01")).await;
    assert_eq!(events(&reply.text()).last().unwrap().0, "compare.completed");

    let spans = traced.end().await;
    let root = root(&spans);
    assert_eq!(root.name, "POST /v1/compare");
    let mut models = BTreeMap::new();
    for generation in below(&spans, root) {
        let stages = below(&spans, generation);
        let encoded = stages.iter().filter(|span| span.name == "encode image").count();
        models.insert(said(generation)["gen_ai.request.model"].to_string(), encoded);
    }
    // A preview and the image of each.
    let expected = [CLASSES, STUDENT].map(|model| (json!(model).to_string(), 2));
    assert_eq!(models, BTreeMap::from(expected));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_arm_of_an_experiment_is_said() {
    let traced = traced(Server::pair().await).await;
    let arms = json!([{"model": CLASSES, "weight": 0}, {"model": STUDENT, "weight": 1, "num_inference_steps": 2}]);
    let experiment = json!({"id": "first", "arms": arms}).to_string();
    assert_eq!(traced.server.post("/v1/experiments", experiment).await.status, 201);
    let reply = traced.server.generate(json!({"model": "experiment:first"})).await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
    let reply = traced.server.post("/v1/experiments/first/pairs", "{}").await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());

    let spans = traced.end().await;
    let drawn = spans.iter().map(said).filter(|says| says.contains_key("gen_ai.request.model"));
    let mut arms: Vec<_> = drawn
        .map(|says| {
            assert_eq!(says["understudy.experiment.id"], "first");
            says["understudy.experiment.arm"].as_str().unwrap().to_owned()
        })
        .collect();
    arms.sort();
    let student = format!("{STUDENT}@2");
    assert_eq!(arms, [CLASSES, &student, &student]);
}

#[tokio::test(flavor = "multi_thread")]
async fn raw_evaluations_are_traced_over_http_and_grpc() {
    let traced = traced(Server::start().await).await;
    let inputs = json!({"inputs": [
        {"name": "sample", "datatype": "FP32", "shape": [2, 1, 8, 8], "data": vec![0.0; 128]},
        {"name": "timestep", "datatype": "INT64", "shape": [2], "data": [500, 400]},
        {"name": "class_labels", "datatype": "INT64", "shape": [2], "data": [0, 1]},
    ]});
    let path = format!("/v2/models/{CLASSES}/infer");
    let reply = traced.server.send(part(&path, inputs.to_string(), "01")).await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());

    let message = grpc::typed(1).encode_to_vec();
    let length = (message.len() as u32).to_be_bytes();
    let framed = [&[0][..], &length, &message].concat();
    let method = "inference.GRPCInferenceService/ModelInfer";
    let ask = |body: Vec<u8>| {
        let mut request = part(&format!("/{method}"), body, "01");
        request.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
        traced.server.send(request)
    };
    assert_eq!(ask(framed).await.status, StatusCode::OK);
    // A message that ends early.
    assert_eq!(ask(vec![0, 0, 0, 0, 9]).await.header("grpc-status"), "3");

    let spans = traced.end().await;
    let mut roots: Vec<&Span> =
        spans.iter().filter(|span| hex(&span.parent_span_id) == PARENT).collect();
    roots.sort_by_key(|span| span.start_time_unix_nano);
    let [http, grpc, refused] = roots[..] else { panic!("{spans:#?}") };
    assert_eq!(http.name, "POST /v2/models/{model}/infer");
    assert_eq!(said(http)["url.path"], path);
    assert_eq!(grpc.name, method);
    assert_eq!(said(grpc)["rpc.system.name"], "grpc");
    assert_eq!(said(grpc)["rpc.method"], method);
    assert_eq!(said(grpc)["rpc.response.status_code"], "OK");
    for (root, rows) in [(http, 2), (grpc, 1)] {
        let [infer] = below(&spans, root)[..] else { panic!("{spans:#?}") };
        assert_eq!(infer.name, format!("infer {CLASSES}"));
        assert_eq!(said(infer)["understudy.rows"], rows);
        assert_eq!(names(&below(&spans, infer)), ["queue", "denoise"]);
    }
    assert_eq!(said(refused)["rpc.response.status_code"], "INVALID_ARGUMENT");
    assert_eq!(said(refused)["understudy.problem"], "incomplete_body");
    assert!(below(&spans, refused).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_is_no_error_of_the_server_and_a_client_that_leaves_is_said() {
    let traced = traced(Server::start().await).await;
    let reply = traced.server.generate(json!({"model": "nobody"})).await;
    assert_eq!(reply.status, StatusCode::NOT_FOUND);
    let router = traced.server.router();
    let body = json!({"num_inference_steps": ENDLESS, "seed": 1}).to_string();
    let request = post("/v1/images/generations", body);
    let asked = tokio::spawn(tower::ServiceExt::oneshot(router, request));
    traced.server.until("running", |server| server.running() == 1).await;
    asked.abort();
    assert!(asked.await.unwrap_err().is_cancelled());

    let spans = traced.end().await;
    let of = |name: &str| spans.iter().filter(|it| it.name == name).collect::<Vec<_>>();
    let roots = of("POST /v1/images/generations");
    let failed =
        |span: &&&Span| span.status.as_ref().is_some_and(|it| it.code == Code::Error as i32);
    let [left] = roots.iter().filter(failed).collect::<Vec<_>>()[..] else { panic!("{spans:#?}") };
    let [refused] = roots.iter().filter(|it| !failed(it)).collect::<Vec<_>>()[..] else {
        panic!("{spans:#?}")
    };
    assert_eq!(said(refused)["understudy.problem"], "model_not_found");
    assert_eq!(said(refused)["http.response.status_code"], 404);
    assert_eq!(said(left)["error.type"], "cancelled");
    assert!(!said(left).contains_key("http.response.status_code"));
    let [generation] = below(&spans, left)[..] else { panic!("{spans:#?}") };
    assert_eq!(said(generation)["error.type"], "cancelled");
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_the_page_and_what_nobody_samples_make_no_traces() {
    let traced = traced(Server::start().await).await;
    let paths = [
        "/health",
        "/metrics",
        "/",
        "/web/page.js",
        "/docs/",
        "/openapi.json",
        "/v2/health/ready",
        "/favicon.ico",
    ];
    for path in paths {
        traced.server.get(path).await;
    }
    // Whoever asked has decided against it.
    let unsampled = part("/v1/images/generations", "{}", "00");
    assert_eq!(traced.server.send(unsampled).await.status, StatusCode::OK);
    assert!(traced.end().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parent_that_is_invalid_is_ignored() {
    let traced = traced(Server::start().await).await;
    let mut request = post("/v1/images/generations", "{}");
    let parent = format!("00-{TRACE}-{}-01", "0".repeat(16)).parse().unwrap();
    request.headers_mut().insert("traceparent", parent);
    assert_eq!(traced.server.send(request).await.status, StatusCode::OK);
    let spans = traced.end().await;
    let root = root(&spans);
    assert!(root.parent_span_id.is_empty());
    assert_ne!(hex(&root.trace_id), TRACE);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_is_not_there_costs_spans_and_nothing_else() {
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut server = Server::start().await;
    let traces = traces_to(&format!("http://{nobody}"));
    server.app = server.app.traced(Some(traces.clone()));
    for seed in 0..20 {
        assert_eq!(server.generate(json!({"seed": seed})).await.status, StatusCode::OK);
    }
    drop(server);
    // Nobody waits longer than they want to.
    let ended = tokio::task::spawn_blocking(move || traces.end(Duration::from_millis(1)));
    assert!(ended.await.unwrap().is_err());
}
