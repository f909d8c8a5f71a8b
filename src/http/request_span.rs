//! What a trace shows of a request as a whole, from its head to the last byte of its answer, as OpenTelemetry's conventions
//! for HTTP and gRPC have it (<https://opentelemetry.io/docs/specs/semconv/http/http-spans/>,
//! <https://opentelemetry.io/docs/specs/semconv/rpc/grpc/>).

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Instant,
};

use axum::{
    body::{Body, Bytes, HttpBody},
    extract::Request,
    http::{HeaderValue, Version, header},
    response::Response,
};
use hyper::body::{Frame, SizeHint};
use opentelemetry::{Array, KeyValue, StringValue, Value};

use super::{App, auth, error::Problem, grpc::status};
use crate::{metrics::UNMATCHED_ROUTE, traces::Span};

/// The names of gRPC's codes, from 0 on (<https://grpc.github.io/grpc/core/md_doc_statuscodes.html>).
const GRPC_CODES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

/// A request's span; it ends when dropped. Where that is before the answer, the client went away.
pub(super) struct RequestSpan {
    span: Span,
    for_grpc: bool,
    answered: bool,
}

impl RequestSpan {
    /// Of a request that was received at that moment, where there are traces and they are for such requests: neither for
    /// what machines ask every few seconds, nor for the page and what it is made of, nor for what is not there.
    pub(super) fn of(app: &App, request: &Request, route: &str, received: Instant) -> Option<Self> {
        let traces = app.traces.as_ref()?;
        if auth::is_probe(route) || auth::is_page(request.uri().path()) || route == UNMATCHED_ROUTE
        {
            return None;
        }
        let for_grpc = status::is_asked_for(request.headers());
        let method = request.method().as_str();
        let version = match request.version() {
            Version::HTTP_2 => "2",
            Version::HTTP_10 => "1.0",
            _ => "1.1",
        };
        let mut attributes = vec![
            KeyValue::new("http.request.method", method.to_owned()),
            KeyValue::new("http.route", route.to_owned()),
            KeyValue::new("url.path", request.uri().path().to_owned()),
            KeyValue::new("url.scheme", "http"),
            KeyValue::new("network.protocol.version", version),
        ];
        let agent = request.headers().get(header::USER_AGENT);
        if let Some(agent) = agent.and_then(|agent| agent.to_str().ok()) {
            attributes.push(KeyValue::new("user_agent.original", agent.to_owned()));
        }
        let mut name = format!("{method} {route}");
        if for_grpc {
            name = route.trim_start_matches('/').to_owned();
            attributes.push(KeyValue::new("rpc.system.name", "grpc"));
            attributes.push(KeyValue::new("rpc.method", name.clone()));
        }
        let span = Span::of_request(traces, request.headers(), name, received, attributes)?;
        Some(Self { span, for_grpc, answered: false })
    }

    /// By which the log knows the trace.
    pub(super) fn trace_id(&self) -> String {
        self.span.ids().0.to_string()
    }

    /// The answer, whose last byte ends the span.
    pub(super) async fn around(mut self, answer: impl Future<Output = Response>) -> Response {
        let response = self.span.around(answer).await;
        self.answers(&response);
        response.map(|body| Body::new(Answer { body, _span: self }))
    }

    fn answers(&mut self, response: &Response) {
        self.answered = true;
        let (span, status) = (&self.span, response.status());
        span.set(KeyValue::new("http.response.status_code", i64::from(status.as_u16())));
        if let Some(id) = response.headers().get(super::observe::REQUEST_ID) {
            let id = StringValue::from(id.to_str().unwrap_or_default().to_owned());
            let id = Value::Array(Array::String(vec![id]));
            span.set(KeyValue::new("http.response.header.x-request-id", id));
        }
        if self.for_grpc {
            let code = response.headers().get(status::STATUS).map(HeaderValue::as_bytes);
            let code = code.map_or(Some(0), |code| str::from_utf8(code).ok()?.parse().ok());
            let name = code.and_then(|code: usize| GRPC_CODES.get(code)).unwrap_or(&"UNKNOWN");
            span.set(KeyValue::new("rpc.response.status_code", *name));
        }
        if let Some(problem) = response.extensions().get::<Problem>() {
            span.set(KeyValue::new("understudy.problem", problem.code));
            if problem.status.is_server_error() {
                let why = problem.detail.as_ref().unwrap_or(&problem.message);
                span.fail(problem.code, why.clone());
            }
        }
    }
}

impl Drop for RequestSpan {
    fn drop(&mut self) {
        if !self.answered {
            self.span.fail("cancelled", "the client went away before the answer");
        }
        self.span.end(Instant::now());
    }
}

/// An answer's body, with the span that ends when it does.
struct Answer {
    body: Body,
    _span: RequestSpan,
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
