//! Request bodies: read within limits of size, time and memory, parsed with errors that help.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use axum::{
    body::{Body, Bytes},
    extract::Request,
    http::{HeaderMap, StatusCode, header},
};
use http_body_util::BodyExt;
use serde::de::DeserializeOwned;

use super::{
    App, Settings,
    complaint::Complaint,
    error::{Problem, shown},
};

/// How much of a body that is refused is read and thrown away, so that a client that is still sending gets to read
/// the answer instead of a reset connection.
const DISCARDED_BYTES: usize = 64 << 20;

/// Most bytes of an inference's body, where the budget allows it.
const INFERENCE_BYTES: usize = 64 << 20;

/// Memory that a body may come to, in its own lengths: the text, and its numbers, which are never shorter than half of
/// what they are parsed into.
const PARSED: usize = 3;

/// Bodies of more bytes are parsed where that keeps nobody waiting.
const LARGE_BYTES: usize = 64 << 10;

/// Memory for all bodies that are being read and parsed.
#[derive(Debug)]
pub(super) struct Budget {
    all: usize,
    free: AtomicUsize,
}

/// A part of it; given back when dropped.
#[derive(Debug)]
pub(super) struct Taken {
    bytes: usize,
    budget: Arc<Budget>,
}

impl Budget {
    pub(super) fn new(bytes: usize) -> Arc<Self> {
        Arc::new(Self { all: bytes, free: AtomicUsize::new(bytes) })
    }

    /// Takes so many bytes, but never more than half of what is left: large bodies always leave room for small ones.
    pub(super) fn take(self: &Arc<Self>, bytes: usize) -> Result<Taken, Problem> {
        let left = |free: usize| (bytes <= free / 2).then(|| free - bytes);
        match self.free.fetch_update(Ordering::Relaxed, Ordering::Relaxed, left) {
            Ok(_) => Ok(Taken { bytes, budget: Arc::clone(self) }),
            Err(_) => Err(self.refusal()),
        }
    }

    fn refusal(&self) -> Problem {
        let message = format!(
            "the bodies that are being read take most of the {} bytes that there are for them (--body-budget-bytes); wait Retry-After, or send less",
            self.all
        );
        Problem::new(StatusCode::TOO_MANY_REQUESTS, "bodies_full", message)
            .retry_after(std::time::Duration::from_secs(1))
    }
}

impl Taken {
    /// Gives back all but so many bytes.
    pub(super) fn keep(&mut self, bytes: usize) {
        let rest = self.bytes.saturating_sub(bytes);
        self.budget.free.fetch_add(rest, Ordering::Relaxed);
        self.bytes -= rest;
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.budget.free.fetch_add(self.bytes, Ordering::Relaxed);
    }
}

impl Settings {
    /// Most bytes of an inference's body.
    pub(super) fn max_inference_bytes(&self) -> usize {
        INFERENCE_BYTES.min(Self::largest_body(self.body_budget_bytes))
    }

    /// Most bytes of one body under a budget for all.
    pub fn largest_body(budget: usize) -> usize {
        budget / 2 / PARSED
    }
}

/// A body that has been read, and the memory that it takes.
#[derive(Debug)]
pub(super) struct Read {
    bytes: Bytes,
    taken: Option<Taken>,
}

impl Read {
    pub(super) fn new(bytes: Bytes, taken: Taken) -> Self {
        Self { bytes, taken: Some(taken) }
    }

    /// Does something with it, off the threads that serve requests where it is large; its memory is free again then.
    pub(super) async fn use_up<T: Send + 'static>(
        self,
        with: impl FnOnce(Bytes) -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, Problem> {
        if self.bytes.len() <= LARGE_BYTES {
            return with(self.bytes);
        }
        self.use_up_apart(with).await
    }

    /// The same, of what takes long however large it is.
    pub(super) async fn use_up_apart<T: Send + 'static>(
        self,
        with: impl FnOnce(Bytes) -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, Problem> {
        let Self { bytes, taken } = self;
        let used = move || {
            let _taken = taken;
            with(bytes)
        };
        tokio::task::spawn_blocking(used).await.map_err(Problem::internal)?
    }
}

/// A JSON body whose wrong values can be explained.
pub(super) trait JsonRequest: DeserializeOwned + Send + 'static {
    /// What the field takes, as the end of the sentence "`n` is 1.5: it takes …".
    fn takes(field: &str) -> &'static str;
}

/// Reads and parses a JSON body of at most `--max-body-bytes`.
pub(super) async fn json<T: JsonRequest>(app: &App, request: Request) -> Result<T, Problem> {
    let body = read(app, request, app.settings.max_body_bytes).await?;
    body.use_up(|bytes| parse(&bytes)).await
}

/// Reads a body of at most `limit` bytes: 413 when there are more, 429 when there is no memory for them now, 408 when
/// the client stops sending, and 503 when the server shuts down meanwhile.
pub(super) async fn read(app: &App, request: Request, limit: usize) -> Result<Read, Problem> {
    unless_draining(app, read_on(app, request, limit)).await
}

/// What is read of a body, or 503 when the server shuts down meanwhile.
pub(super) async fn unless_draining(
    app: &App,
    reading: impl Future<Output = Result<Read, Problem>>,
) -> Result<Read, Problem> {
    tokio::select! {
        // Whose body is here already is not refused for the rest of it.
        biased;
        read = reading => read,
        () = app.draining.cancelled() => Err(Problem::draining()),
    }
}

/// Memory for a body of so many bytes, and what it is parsed into.
pub(super) fn take(app: &App, bytes: usize) -> Result<Taken, Problem> {
    app.bodies.take(bytes.saturating_mul(PARSED))
}

async fn read_on(app: &App, request: Request, limit: usize) -> Result<Read, Problem> {
    let (head, mut body) = request.into_parts();
    let declared = declared_length(&head.headers);
    let refusal = match declared {
        Some(length) if length > limit => Err(too_large(Some(length), limit)),
        // Of a length that is not declared it is known only that it may be all that is allowed.
        declared => take(app, declared.unwrap_or(limit)),
    };
    // Whoever waits for "100 Continue" has sent nothing yet and need not; whoever has more to send than is thrown away
    // is told at once.
    let waits = head.headers.contains_key(header::EXPECT);
    let much = declared.is_some_and(|length| length > DISCARDED_BYTES.max(limit));
    let taken = match refusal {
        Ok(taken) => taken,
        Err(problem) if waits || much => return Err(problem),
        Err(problem) => {
            discard(app, &mut body, 0, limit).await?;
            return Err(problem);
        }
    };
    let mut bytes = Vec::with_capacity(declared.unwrap_or(0));
    while let Some(data) = next(app, &mut body, bytes.len()).await? {
        if bytes.len() + data.len() > limit {
            drop(taken);
            let length = bytes.len() + data.len();
            drop(bytes);
            discard(app, &mut body, length, limit).await?;
            return Err(too_large(None, limit));
        }
        bytes.extend_from_slice(&data);
    }
    Ok(Read { bytes: bytes.into(), taken: Some(taken) })
}

fn declared_length(headers: &HeaderMap) -> Option<usize> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Reads the rest of a body that has had `length` bytes, as far as that is worth it.
async fn discard(
    app: &App,
    body: &mut Body,
    mut length: usize,
    limit: usize,
) -> Result<(), Problem> {
    while length <= DISCARDED_BYTES.max(limit)
        && let Some(data) = next(app, body, length).await?
    {
        length += data.len();
    }
    Ok(())
}

/// The next piece of a body that has had `length` bytes; `None` at its end.
pub(super) async fn next(
    app: &App,
    body: &mut Body,
    length: usize,
) -> Result<Option<Bytes>, Problem> {
    let patience = app.settings.body_timeout;
    loop {
        let Ok(frame) = tokio::time::timeout(patience, body.frame()).await else {
            let message = format!(
                "the body stopped after {length} bytes and nothing came for {} s (--body-timeout-seconds); send it in one go",
                patience.as_secs_f64()
            );
            return Err(Problem::new(StatusCode::REQUEST_TIMEOUT, "body_timeout", message));
        };
        let Some(frame) = frame else { return Ok(None) };
        let frame = frame.map_err(|error| {
            let message = format!("the body broke off after {length} bytes: {error}");
            Problem::new(StatusCode::BAD_REQUEST, "incomplete_body", message)
        })?;
        // What is no data is a trailer, the last of all.
        if let Ok(data) = frame.into_data()
            && !data.is_empty()
        {
            return Ok(Some(data));
        }
    }
}

pub(super) fn too_large(declared: Option<usize>, limit: usize) -> Problem {
    let message = format!(
        "the body has {} bytes, the limit is {limit} (--max-body-bytes; for inference 64 MiB, or a sixth of --body-budget-bytes); send less",
        declared.map_or(format!("more than {limit}"), |length| length.to_string())
    );
    Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
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
    let text = error.to_string();
    match Complaint::of(&text) {
        Some(Complaint::Unknown { field, fields }) => {
            let message = format!(
                "`{}` is not a field of this request: remove it or correct its name; the fields are {fields}",
                shown(field)
            );
            return Problem::new(StatusCode::BAD_REQUEST, "unknown_field", message)
                .at(&shown(field));
        }
        Some(Complaint::Duplicate { field }) => {
            let message = format!("`{field}` stands in the body more than once: keep one");
            return Problem::new(StatusCode::BAD_REQUEST, "duplicate_field", message).at(field);
        }
        Some(Complaint::Missing { field }) => {
            let place = if path == "." { field.to_owned() } else { format!("{path}.{field}") };
            let message = format!("`{place}` is missing: it takes {}", T::takes(field));
            return Problem::new(StatusCode::BAD_REQUEST, "missing_field", message).at(&place);
        }
        None => {}
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
