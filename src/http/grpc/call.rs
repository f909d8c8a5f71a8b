//! A call with one message in each direction: how it is framed, and that its message is read within the limits of every
//! other body.

use axum::{
    body::{Body, Bytes},
    extract::Request,
    http::{HeaderMap, HeaderValue, StatusCode},
    response::{IntoResponse, Response},
};
use http_body_util::{BodyExt, Full};
use prost::Message;

use super::{
    super::{
        App,
        body::{self, Read},
        error::Problem,
    },
    status, weight,
};

/// A flag, whether the message is compressed, and its length.
const PREFIX_BYTES: usize = 5;

/// Most bytes of a message that only names something.
const SMALL_BYTES: usize = 64 << 10;

/// Reads a request that only names something, also while the server shuts down: probes go on asking.
pub(super) async fn small<M: Message + Default + 'static>(
    app: &App,
    request: Request,
) -> Result<M, Problem> {
    read_on(app, request, SMALL_BYTES).await?.use_up(parse).await
}

/// Reads a request's message of at most `limit` bytes.
pub(super) async fn read(app: &App, request: Request, limit: usize) -> Result<Read, Problem> {
    body::unless_draining(app, read_on(app, request, limit)).await
}

async fn read_on(app: &App, request: Request, limit: usize) -> Result<Read, Problem> {
    let mut body = request.into_body();
    let mut begun = Vec::new();
    while begun.len() < PREFIX_BYTES
        && let Some(data) = body::next(app, &mut body, begun.len()).await?
    {
        begun.extend_from_slice(&data);
    }
    let Some(([compressed, length @ ..], _)) = begun.split_first_chunk::<PREFIX_BYTES>() else {
        return Err(incomplete(begun.len(), PREFIX_BYTES));
    };
    if *compressed != 0 {
        let message = "compressed messages are not read; send them with grpc-encoding: identity";
        return Err(Problem::new(StatusCode::NOT_IMPLEMENTED, "compressed_message", message));
    }
    let length = u32::from_be_bytes(*length) as usize;
    if length > limit {
        return Err(body::too_large(Some(length), limit));
    }
    // Clients declare no length of the body; its message does.
    let whole = PREFIX_BYTES + length;
    let taken = body::take(app, whole)?;
    let mut bytes = Vec::with_capacity(whole);
    bytes.append(&mut begun);
    while bytes.len() <= whole
        && let Some(data) = body::next(app, &mut body, bytes.len()).await?
    {
        bytes.extend_from_slice(&data);
    }
    if bytes.len() != whole {
        return Err(incomplete(bytes.len(), whole));
    }
    Ok(Read::new(Bytes::from(bytes).split_off(PREFIX_BYTES), taken))
}

fn incomplete(length: usize, whole: usize) -> Problem {
    let message = format!(
        "the body has {length} bytes, or more, and its one message takes {whole}; send one message, and all of it"
    );
    Problem::new(StatusCode::BAD_REQUEST, "incomplete_body", message)
}

/// A message of these bytes.
pub(super) fn parse<M: Message + Default>(bytes: Bytes) -> Result<M, Problem> {
    M::decode(bytes).map_err(|error| weight::malformed(&error))
}

/// The answer that all went well with.
pub(super) fn reply(message: &impl Message) -> Response {
    let length = message.encoded_len();
    let mut bytes = Vec::with_capacity(PREFIX_BYTES + length);
    bytes.push(0);
    bytes.extend_from_slice(&(length as u32).to_be_bytes());
    message.encode_raw(&mut bytes);
    let mut trailers = HeaderMap::new();
    trailers.insert(status::STATUS, HeaderValue::from_static("0"));
    let body = Full::new(Bytes::from(bytes)).with_trailers(async { Some(Ok(trailers)) });
    (status::headers(), Body::new(body)).into_response()
}
