//! Request bodies: read within a limit, checked for their type, parsed with errors that help.

use axum::{
    body::{Body, Bytes},
    extract::Request,
    http::{HeaderMap, StatusCode, header},
};
use http_body_util::BodyExt;
use serde::de::DeserializeOwned;

use super::error::{Problem, quoted, shown};

/// How much of a body that is too large is read and thrown away, so that a client that is still
/// sending gets to read the answer instead of a reset connection.
const DISCARDED_BYTES: usize = 64 << 20;

/// A JSON body whose wrong values can be explained.
pub(super) trait JsonRequest: DeserializeOwned {
    /// What the field takes, as the end of the sentence "`n` is 1.5: it takes …".
    fn takes(field: &str) -> &'static str;
}

/// Reads and parses a JSON body of at most `limit` bytes.
pub(super) async fn json<T: JsonRequest>(request: Request, limit: usize) -> Result<T, Problem> {
    let (head, body) = request.into_parts();
    media_type(&head.headers, &["application/json"])?;
    parse(&read(&head.headers, body, limit).await?)
}

/// 415 unless the body's declared type is one of `allowed`. A body without a declared type is taken
/// for what it should be: the inference protocol's own client declares none.
pub(super) fn media_type(headers: &HeaderMap, allowed: &[&str]) -> Result<(), Problem> {
    let unsupported = |header: &str, value: &str, remedy: String| {
        let message = format!("`{header}` is {}: {remedy}", quoted(value));
        Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message)
            .at(header))
    };
    if let Some(encoding) = headers.get(header::CONTENT_ENCODING) {
        let encoding = String::from_utf8_lossy(encoding.as_bytes());
        if !encoding.eq_ignore_ascii_case("identity") {
            let remedy = "compressed bodies are not read; send the body as it is";
            return unsupported("content-encoding", &encoding, remedy.to_owned());
        }
    }
    let Some(value) = headers.get(header::CONTENT_TYPE) else {
        return Ok(());
    };
    let value = String::from_utf8_lossy(value.as_bytes());
    let essence = value.split(';').next().unwrap_or_default().trim();
    if allowed.iter().any(|allowed| essence.eq_ignore_ascii_case(allowed)) {
        return Ok(());
    }
    unsupported("content-type", &value, format!("send {}", allowed.join(" or ")))
}

/// Reads a body of at most `limit` bytes; 413 when there are more.
pub(super) async fn read(
    headers: &HeaderMap,
    mut body: Body,
    limit: usize,
) -> Result<Bytes, Problem> {
    let declared: Option<usize> =
        headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    let too_large = |found: usize| {
        let message = format!(
            "the body has {} bytes, the limit is {limit} (--max-body-bytes; 64 MiB for inference); send less",
            declared.map_or(format!("more than {found}"), |length| length.to_string())
        );
        Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
    };
    // Whoever waits for "100 Continue" has sent nothing yet and need not.
    let waits = headers.contains_key(header::EXPECT);
    if declared.is_some_and(|length| length > DISCARDED_BYTES.max(limit) || waits && length > limit)
    {
        return Err(too_large(limit));
    }
    let mut bytes = Vec::with_capacity(declared.unwrap_or(0).min(limit));
    let mut length = 0usize;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| {
            let message = format!("the body broke off after {length} bytes: {error}");
            Problem::new(StatusCode::BAD_REQUEST, "incomplete_body", message)
        })?;
        let Some(data) = frame.data_ref() else {
            continue;
        };
        length += data.len();
        if length <= limit {
            bytes.extend_from_slice(data);
        } else if length > DISCARDED_BYTES.max(limit) {
            break;
        }
    }
    if length > limit { Err(too_large(limit)) } else { Ok(bytes.into()) }
}

/// Parses a JSON body; an error says where it is and what belongs there.
pub(super) fn parse<T: JsonRequest>(bytes: &[u8]) -> Result<T, Problem> {
    // serde would also read a struct from an array, field by field.
    if bytes.trim_ascii_start().first() == Some(&b'[') {
        let message = "the body is a JSON array: send a JSON object";
        return Err(Problem::new(StatusCode::BAD_REQUEST, "invalid_body", message));
    }
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = error.path().to_string();
        explain::<T>(bytes, &path, error.inner())
    })?;
    deserializer.end().map_err(|error| malformed(&error))?;
    Ok(value)
}

fn malformed(error: &serde_json::Error) -> Problem {
    let message = format!("the body is not valid JSON: {error}");
    Problem::new(StatusCode::BAD_REQUEST, "malformed_json", message)
}

fn explain<T: JsonRequest>(bytes: &[u8], path: &str, error: &serde_json::Error) -> Problem {
    if !error.is_data() {
        return malformed(error);
    }
    // serde offers these two as sentences only.
    let text = error.to_string();
    let named = |start: &str| text.strip_prefix(start)?.split('`').next().map(str::to_owned);
    if let Some(field) = named("unknown field `") {
        let fields = text.split_once("expected ").map_or("none", |(_, fields)| fields);
        let fields = fields.trim_start_matches("one of ").replace('`', "");
        let fields = fields.split(" at line").next().unwrap_or_default();
        let message = format!(
            "`{}` is not a field of this request: remove it or correct its name; the fields are {fields}",
            shown(&field)
        );
        return Problem::new(StatusCode::BAD_REQUEST, "unknown_field", message).at(&shown(&field));
    }
    if let Some(field) = named("duplicate field `") {
        let message = format!("`{field}` stands in the body more than once: keep one");
        return Problem::new(StatusCode::BAD_REQUEST, "duplicate_field", message).at(&field);
    }
    if let Some(field) = named("missing field `") {
        let place = if path == "." { field.clone() } else { format!("{path}.{field}") };
        let message = format!("`{place}` is missing: it takes {}", T::takes(&field));
        return Problem::new(StatusCode::BAD_REQUEST, "missing_field", message).at(&place);
    }
    if path == "." {
        let message = format!("the body does not fit: {text}; send a JSON object");
        return Problem::new(StatusCode::BAD_REQUEST, "invalid_body", message);
    }
    let field = path.split(['.', '[']).next().unwrap_or_default();
    if path != field {
        let message = format!("`{path}` does not fit: {text}");
        return Problem::new(StatusCode::BAD_REQUEST, "invalid_value", message).at(path);
    }
    let value = serde_json::from_slice(bytes)
        .ok()
        .and_then(|body: serde_json::Value| body.get(field).map(ToString::to_string))
        .unwrap_or_else(|| "not fit".into());
    Problem::value(field, value, format!("it takes {}", T::takes(field)))
}
