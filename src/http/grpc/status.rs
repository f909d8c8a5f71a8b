//! What went wrong, as gRPC says it: a code and a message among the headers of an answer without a body
//! (<https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md>).

use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};

pub(in crate::http) const STATUS: HeaderName = HeaderName::from_static("grpc-status");
const MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
const ACCEPT_ENCODING: HeaderName = HeaderName::from_static("grpc-accept-encoding");

/// What of a message is escaped, beside all that is not ASCII.
const ESCAPED: &AsciiSet = &CONTROLS.add(b'%');

/// gRPC's codes for the statuses of HTTP (<https://grpc.github.io/grpc/core/md_doc_statuscodes.html>).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Code {
    Unknown = 2,
    InvalidArgument = 3,
    DeadlineExceeded = 4,
    NotFound = 5,
    PermissionDenied = 7,
    ResourceExhausted = 8,
    Aborted = 10,
    Unimplemented = 12,
    Internal = 13,
    Unavailable = 14,
    Unauthenticated = 16,
}

impl Code {
    /// `code` is the problem's own.
    fn of(status: StatusCode, code: &str) -> Self {
        match status {
            StatusCode::NOT_FOUND if code == "path_not_found" => Self::Unimplemented,
            StatusCode::NOT_FOUND => Self::NotFound,
            StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED => Self::Unimplemented,
            StatusCode::UNAUTHORIZED => Self::Unauthenticated,
            StatusCode::FORBIDDEN => Self::PermissionDenied,
            StatusCode::CONFLICT => Self::Aborted,
            StatusCode::PAYLOAD_TOO_LARGE | StatusCode::TOO_MANY_REQUESTS => {
                Self::ResourceExhausted
            }
            StatusCode::REQUEST_TIMEOUT | StatusCode::GATEWAY_TIMEOUT => Self::DeadlineExceeded,
            StatusCode::SERVICE_UNAVAILABLE => Self::Unavailable,
            StatusCode::INTERNAL_SERVER_ERROR => Self::Internal,
            status if status.is_client_error() => Self::InvalidArgument,
            _ => Self::Unknown,
        }
    }
}

/// Whether a request is one of gRPC.
pub(in crate::http) fn is_asked_for(headers: &HeaderMap) -> bool {
    let media_type = headers.get(header::CONTENT_TYPE);
    media_type.is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"))
}

/// The headers that every answer has.
pub(super) fn headers() -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    headers
}

/// The headers of an answer that says what went wrong: the problem's status, its code and its message.
pub(in crate::http) fn refusal(status: StatusCode, code: &str, message: &str) -> HeaderMap {
    let mut headers = headers();
    headers.insert(STATUS, HeaderValue::from(Code::of(status, code) as u16));
    let message = utf8_percent_encode(message, ESCAPED).to_string();
    if let Ok(message) = HeaderValue::from_str(&message) {
        headers.insert(MESSAGE, message);
    }
    headers
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_escaped_where_a_header_could_not_carry_them() {
        let headers = refusal(StatusCode::BAD_REQUEST, "invalid_value", "100 % of\n\"é\"");
        assert_eq!(headers.get(STATUS).unwrap(), "3");
        assert_eq!(headers.get(MESSAGE).unwrap(), "100 %25 of%0A\"%C3%A9\"");
    }

    #[test]
    fn a_path_that_is_not_there_is_a_method_that_is_not() {
        assert_eq!(Code::of(StatusCode::NOT_FOUND, "path_not_found"), Code::Unimplemented);
        assert_eq!(Code::of(StatusCode::NOT_FOUND, "model_not_found"), Code::NotFound);
        assert_eq!(Code::of(StatusCode::BAD_GATEWAY, ""), Code::Unknown);
        assert_eq!(Code::of(StatusCode::UNSUPPORTED_MEDIA_TYPE, ""), Code::InvalidArgument);
    }
}
