//! The one place where something that went wrong becomes HTTP.
//!
//! A handler returns a [`Problem`]; [`render`] gives it the shape of the API it was asked under:
//! OpenAI's under `/v1` and everywhere else, the Open Inference Protocol's under `/v2`, A1111's under `/sdapi`, gRPC's
//! where gRPC asks.

use std::{fmt::Display, time::Duration};

use axum::{
    Json,
    body::Body,
    extract::Request,
    http::{HeaderValue, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};

use super::grpc::status;
use super::wire::{ErrorBody, ErrorReply, InferenceError, WebuiError};
use crate::{
    engine::{Failure, Rejected},
    experiments,
};

/// Longest value of a client that a message repeats, in characters.
const SHOWN_CHARACTERS: usize = 80;

/// What the client must change goes out as `message`; what happened goes to the log as `detail`.
#[derive(Debug, Clone)]
pub(super) struct Problem {
    pub(super) status: StatusCode,
    pub(super) code: &'static str,
    pub(super) param: Option<String>,
    pub(super) message: String,
    pub(super) detail: Option<String>,
    retry_after: Option<Duration>,
}

impl Problem {
    pub(super) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { status, code, param: None, message, detail: None, retry_after: None }
    }

    /// 400: `field` has a value that cannot be honoured; `remedy` names the limit and the way out.
    pub(super) fn value(field: &str, value: impl Display, remedy: impl Display) -> Self {
        let message = format!("`{field}` is {}: {remedy}", shown(value));
        Self::new(StatusCode::BAD_REQUEST, "invalid_value", message).at(field)
    }

    /// 400: fields that are fine alone contradict each other.
    pub(super) fn conflict(field: &str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "conflicting_fields", message).at(field)
    }

    /// 404: no model of that name.
    pub(super) fn unknown_model(id: &str) -> Self {
        let message = format!(
            "`model` is {}: there is no such model here; GET /v1/models lists them",
            quoted(id)
        );
        Self::new(StatusCode::NOT_FOUND, "model_not_found", message).at("model")
    }

    /// 404: `field` asks for a pair, and the default model has no student.
    pub(super) fn no_student(field: &str, value: &str, teacher: &str) -> Self {
        let message = format!(
            "`{field}` is {value}, but {} has no student that is ready here; name the models, GET /v1/models lists them",
            quoted(teacher)
        );
        Self::new(StatusCode::NOT_FOUND, "model_not_found", message).at(field)
    }

    /// 503: try again later.
    pub(super) fn not_ready(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", message)
    }

    /// 503: the server is shutting down.
    pub(super) fn draining() -> Self {
        let message = "the server is shutting down; send the request to another one";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "draining", message)
    }

    /// 500: our fault; the client learns no more than that, the log everything.
    pub(super) fn internal(detail: impl Display) -> Self {
        let message = "something went wrong on the server; its log has the cause under this request's x-request-id";
        let problem = Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", message);
        Self { detail: Some(detail.to_string()), ..problem }
    }

    /// The field at fault.
    pub(super) fn at(mut self, field: &str) -> Self {
        self.param = Some(field.to_owned());
        self
    }

    pub(super) fn retry_after(mut self, duration: Duration) -> Self {
        self.retry_after = Some(duration);
        self
    }

    /// OpenAI's error body.
    pub(super) fn body(&self) -> ErrorReply {
        let kind = match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        ErrorReply {
            error: ErrorBody {
                message: self.message.clone(),
                kind: kind.to_owned(),
                param: self.param.clone(),
                code: self.code.to_owned(),
            },
        }
    }
}

/// A value as a message repeats it: cut where it is long.
pub(super) fn shown(value: impl Display) -> String {
    let text = value.to_string();
    match text.char_indices().nth(SHOWN_CHARACTERS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// A text as a message repeats it: quoted, escaped, and cut where it is long.
pub(super) fn quoted(text: &str) -> String {
    format!("\"{}\"", shown(text.escape_debug()))
}

impl From<Rejected> for Problem {
    fn from(rejected: Rejected) -> Self {
        let late = |predicted: Duration, deadline: Duration, remedy: &str| {
            let (predicted, deadline) = (predicted.as_millis(), deadline.as_millis());
            format!(
                "`deadline_ms` leaves {deadline} ms, the predicted time is {predicted} ms{remedy}"
            )
        };
        match rejected {
            Rejected::QueueFull { retry_after, .. } => {
                let message =
                    format!("{rejected} (--max-queue); ask for less, or wait Retry-After");
                Self::new(StatusCode::TOO_MANY_REQUESTS, "queue_full", message)
                    .retry_after(retry_after)
            }
            Rejected::QueueShare { retry_after, .. } => {
                let message =
                    format!("{rejected} (--max-queue); ask for less, or wait Retry-After");
                Self::new(StatusCode::TOO_MANY_REQUESTS, "queue_share", message)
                    .retry_after(retry_after)
            }
            Rejected::DeadlineQueue { predicted, deadline, retry_after } => {
                let remedy = " because of the queue; raise it, or wait Retry-After";
                let message = late(predicted, deadline, remedy);
                Self::new(StatusCode::TOO_MANY_REQUESTS, "deadline_unreachable", message)
                    .at("deadline_ms")
                    .retry_after(retry_after)
            }
            Rejected::DeadlineOthers { retry_after } => {
                let message = format!(
                    "`deadline_ms` is too short now: {rejected}; raise it, or wait Retry-After"
                );
                Self::new(StatusCode::TOO_MANY_REQUESTS, "deadline_unreachable", message)
                    .at("deadline_ms")
                    .retry_after(retry_after)
            }
            Rejected::DeadlineImpossible { predicted, deadline } => {
                let remedy = " even on an idle server; raise it, ask for fewer images or steps, or use a faster model";
                let message = late(predicted, deadline, remedy);
                Self::new(StatusCode::GATEWAY_TIMEOUT, "deadline_unreachable", message)
                    .at("deadline_ms")
            }
            Rejected::Draining => Self::draining(),
            Rejected::DeviceLost => {
                let message = format!("{rejected}; start the server anew");
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "device_lost", message)
            }
        }
    }
}

impl From<Failure> for Problem {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Deadline { .. } => Self::new(
                StatusCode::GATEWAY_TIMEOUT,
                "deadline_passed",
                format!("{failure}; raise `deadline_ms` or lower `num_inference_steps`"),
            )
            .at("deadline_ms"),
            Failure::OutOfMemory { limit, .. } => Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "out_of_memory",
                if limit > 1 {
                    format!("{failure}; send the request again")
                } else {
                    format!("{failure}; use a smaller model, or a device with more free memory")
                },
            ),
            Failure::NonFinite { .. } | Failure::Evaluation(_) => Self::internal(failure),
        }
    }
}

impl From<experiments::Error> for Problem {
    fn from(error: experiments::Error) -> Self {
        use experiments::Error;
        let message = error.to_string();
        match error {
            Error::Value { field, value, remedy } => Self::value(&field, value, remedy),
            Error::Unknown(_) => Self::new(StatusCode::NOT_FOUND, "experiment_not_found", message),
            Error::UnknownPair(_) => {
                Self::new(StatusCode::NOT_FOUND, "pair_not_found", message).at("pair_id")
            }
            Error::Exists(_) => {
                Self::new(StatusCode::CONFLICT, "experiment_exists", message).at("id")
            }
            Error::TooMany => Self::new(StatusCode::CONFLICT, "too_many_experiments", message),
            Error::Voted(_) => Self::new(StatusCode::CONFLICT, "pair_voted", message).at("pair_id"),
            Error::KeyUsed(_) => Self::new(StatusCode::CONFLICT, "idempotency_key_used", message)
                .at("idempotency_key"),
            Error::Unavailable(_) => {
                let message = format!("experiments cannot be kept here: {message}");
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "experiments_unavailable", message)
            }
            Error::Full(_) => Self::new(StatusCode::SERVICE_UNAVAILABLE, "storage_full", message),
            Error::Damaged(_) => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "experiments_damaged", message)
            }
            Error::Removed(_) => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "experiments_removed", message)
            }
            Error::Unreachable(_) => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "experiments_unreachable", message)
                    .retry_after(Duration::from_secs(1))
            }
            Error::Storage(_) => Self::internal(message),
        }
    }
}

impl From<understudy_models::Error> for Problem {
    fn from(error: understudy_models::Error) -> Self {
        match error {
            understudy_models::Error::Value { field, value, remedy } => {
                Self::value(&field, value, remedy)
            }
            error => Self::internal(error),
        }
    }
}

impl IntoResponse for Problem {
    /// Without a body: [`render`] writes it.
    fn into_response(self) -> Response {
        let mut response = self.status.into_response();
        let headers = response.headers_mut();
        if let Some(after) = self.retry_after {
            let seconds = after.as_millis().div_ceil(1000).max(1) as u64;
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response.extensions_mut().insert(self);
        response
    }
}

/// Middleware: writes a [`Problem`] as the body that the API of the path asks for.
pub(super) async fn render(request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let inference = path == "/v2" || path.starts_with("/v2/");
    let webui = path.starts_with("/sdapi/");
    let grpc = status::is_asked_for(request.headers());
    let place = path.to_owned();
    let mut response = next.run(request).await;
    if response.status() == StatusCode::NOT_FOUND
        && response.extensions().get::<Problem>().is_none()
    {
        // A file that Swagger UI does not have.
        response = nothing_at(&place).into_response();
    }
    let Some(problem) = response.extensions().get::<Problem>() else {
        return response;
    };
    if grpc {
        let headers = status::refusal(problem.status, problem.code, &problem.message);
        *response.status_mut() = StatusCode::OK;
        *response.body_mut() = Body::empty();
        response.headers_mut().extend(headers);
        return response;
    }
    let body = if inference {
        Json(InferenceError { error: problem.message.clone() }).into_response()
    } else if webui {
        Json(WebuiError::of(problem.code, &problem.message)).into_response()
    } else {
        Json(problem.body()).into_response()
    };
    let (head, body) = body.into_parts();
    response.headers_mut().extend(head.headers);
    *response.body_mut() = Body::new(body);
    response
}

/// 404 for a path that nothing is at.
pub(super) async fn not_found(request: Request) -> Problem {
    nothing_at(request.uri().path())
}

fn nothing_at(path: &str) -> Problem {
    let message = format!(
        "there is nothing at {}; GET /openapi.json lists what is here, GET /docs shows it",
        quoted(path)
    );
    Problem::new(StatusCode::NOT_FOUND, "path_not_found", message)
}

/// 405; axum adds `Allow`.
pub(super) async fn method_not_allowed(request: Request) -> Problem {
    let message = format!(
        "{} is not possible on {}; the Allow header names the methods that are",
        shown(request.method()),
        quoted(request.uri().path())
    );
    Problem::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
}
