//! What surrounds every request: its id, its time, its log line, its count, its last resort.

use std::{any::Any, time::Instant};

use axum::{
    extract::{MatchedPath, Request, State},
    http::{HeaderName, HeaderValue, Method, StatusCode},
    middleware::Next,
    response::{IntoResponse, Response},
};
use tracing::Instrument;

use super::{App, auth, error::Problem, grpc, request_span::RequestSpan};
use crate::metrics::{Metrics, UNMATCHED_ROUTE};

pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");

/// Longest request id that is taken from a client.
const REQUEST_ID_BYTES: usize = 128;

/// nginx's status for a client that went away before its answer; it is never sent, only counted.
const CLIENT_CLOSED_REQUEST: u16 = 499;

/// When a request was received; an extension of every request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Received(pub(super) Instant);

/// Where a generation's time went, in milliseconds; an extension of its response.
#[derive(Debug, Clone, Copy)]
pub(super) struct DeviceTime {
    pub(super) queue_ms: f64,
    pub(super) device_ms: f64,
}

/// Gives the request its id and its span, and reports it once when it is answered or abandoned.
pub(super) async fn observe(State(app): State<App>, mut request: Request, next: Next) -> Response {
    let received = Instant::now();
    request.extensions_mut().insert(Received(received));
    let id = request_id(&request);
    let route = request.extensions().get::<MatchedPath>();
    let report = Report {
        metrics: &app.metrics,
        route: route.map_or(UNMATCHED_ROUTE, MatchedPath::as_str).to_owned(),
        method: method_label(request.method()),
        path: request.uri().path().to_owned(),
        received,
        outcome: None,
    };
    let span = tracing::info_span!(
        "request",
        id = id.to_str().unwrap_or_default(),
        trace_id = tracing::field::Empty
    );
    let traced = RequestSpan::of(&app, &request, &report.route, received);
    if let Some(traced) = &traced {
        span.record("trace_id", traced.trace_id());
    }
    let answer = async {
        let mut report = report;
        let mut response = next.run(request).await;
        response.headers_mut().insert(REQUEST_ID, id);
        if let Some(timing) = server_timing(&response, received) {
            response.headers_mut().insert(SERVER_TIMING, timing);
        }
        let problem = response.extensions().get::<Problem>().cloned();
        // What went wrong over gRPC is answered with 200.
        let status = problem.as_ref().map_or(response.status(), |problem| problem.status);
        report.outcome = Some((status, problem));
        response
    }
    .instrument(span);
    match traced {
        Some(traced) => traced.around(answer).await,
        None => answer.await,
    }
}

/// One request's line in the log and its count; written when dropped, so that a client which goes
/// away is reported too.
struct Report<'a> {
    metrics: &'a Metrics,
    route: String,
    method: &'static str,
    path: String,
    received: Instant,
    outcome: Option<(StatusCode, Option<Problem>)>,
}

impl Drop for Report<'_> {
    fn drop(&mut self) {
        let milliseconds = self.received.elapsed().as_secs_f64() * 1e3;
        let code = self.outcome.as_ref().map_or(CLIENT_CLOSED_REQUEST, |(code, _)| code.as_u16());
        let problem = self.outcome.as_ref().and_then(|(_, problem)| problem.as_ref());
        let error = problem.map(|problem| problem.detail.as_ref().unwrap_or(&problem.message));
        let (method, path) = (self.method, &self.path);
        if code == 500 {
            tracing::error!(method, path, code, milliseconds, error, "answered");
        } else if auth::is_probe(&self.route) {
            // Asked every few seconds by machines, whatever the answer: whoever wants to see it asks for `debug`.
            tracing::debug!(method, path, code, milliseconds, error, "answered");
        } else {
            tracing::info!(method, path, code, milliseconds, error, "answered");
        }
        self.metrics
            .http_requests
            .with_label_values(&[&self.route, method, code.to_string().as_str()])
            .inc();
    }
}

/// The client's id where it is short and printable, else a new one.
fn request_id(request: &Request) -> HeaderValue {
    let sent = request.headers().get(REQUEST_ID).filter(|id| {
        (1..=REQUEST_ID_BYTES).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic)
    });
    sent.cloned().unwrap_or_else(|| {
        let number = getrandom::u64().unwrap_or_default();
        HeaderValue::from_str(&format!("{number:016x}"))
            .unwrap_or(HeaderValue::from_static("unknown"))
    })
}

fn method_label(method: &Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "HEAD" => "HEAD",
        "POST" => "POST",
        "PUT" => "PUT",
        "PATCH" => "PATCH",
        "DELETE" => "DELETE",
        "OPTIONS" => "OPTIONS",
        _ => "other",
    }
}

fn server_timing(response: &Response, received: Instant) -> Option<HeaderValue> {
    let total = received.elapsed().as_secs_f64() * 1e3;
    let text = match response.extensions().get::<DeviceTime>() {
        Some(DeviceTime { queue_ms, device_ms }) => {
            format!("queue;dur={queue_ms:.3}, device;dur={device_ms:.3}, total;dur={total:.3}")
        }
        None => format!("total;dur={total:.3}"),
    };
    HeaderValue::from_str(&text).ok()
}

/// 504 for a request that takes longer than the operator allows, or than its client waits where gRPC says it.
pub(super) async fn timeout(State(app): State<App>, request: Request, next: Next) -> Response {
    let allowed = app.settings.request_timeout;
    let waits = match grpc::timeout::asked(request.headers()) {
        Ok(waits) => waits.filter(|waits| *waits < allowed),
        Err(problem) => return problem.into_response(),
    };
    match (tokio::time::timeout(waits.unwrap_or(allowed), next.run(request)).await, waits) {
        (Ok(response), _) => response,
        (Err(_), None) => out_of_time(&app).into_response(),
        (Err(_), Some(waits)) => grpc::timeout::passed(waits).into_response(),
    }
}

/// The problem of a request that ran into `--request-timeout-seconds`.
pub(super) fn out_of_time(app: &App) -> Problem {
    let message = format!(
        "the request was not done within {} s (--request-timeout-seconds); ask for fewer images or steps, or try when the server is less busy",
        app.settings.request_timeout.as_secs_f64()
    );
    Problem::new(StatusCode::GATEWAY_TIMEOUT, "request_timeout", message)
}

/// 500 for a handler that panicked.
pub(super) fn panicked(metrics: &Metrics, panic: Box<dyn Any + Send>) -> Response {
    metrics.panics.with_label_values(&["request"]).inc();
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message");
    Problem::internal(format!("panic: {text}")).into_response()
}
