//! What the API's description says of the operation that a request asks for: which bodies it takes, and who may
//! ask. The description is the table, so no operation can be forgotten.

use std::{collections::HashMap, sync::LazyLock};

use axum::{
    body::HttpBody,
    extract::{MatchedPath, Request},
    http::{HeaderMap, HeaderName, Method, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use serde_json::Value;

use super::{
    docs,
    error::{Problem, quoted},
    grpc::methods,
};

/// The security requirement of an operation that wants an administrator's key.
pub(super) const ADMIN_KEY: &str = "admin_key";

const FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// What a body may be declared as where none is described: clients declare it whether they send one or not.
const NO_BODY: &[&str] = &["application/json"];

/// An operation that changes something, or has something computed.
#[derive(Debug)]
pub(super) struct Operation {
    media_types: Vec<String>,
    /// Whether it wants an administrator's key.
    pub(super) for_administrators: bool,
}

impl Operation {
    /// The operation that a routed request asks for, if it is one that takes a body or could.
    pub(super) fn of(request: &Request) -> Option<&'static Self> {
        let path = request.extensions().get::<MatchedPath>()?;
        OPERATIONS.get(path.as_str())?.iter().find(|(of, _)| of == request.method()).map(|(_, o)| o)
    }
}

/// By path.
static OPERATIONS: LazyLock<HashMap<String, Vec<(Method, Operation)>>> = LazyLock::new(|| {
    let document: Value = serde_json::from_str(docs::openapi_json()).unwrap_or_default();
    let paths = document["paths"].as_object().into_iter().flatten();
    let described = paths.map(|(path, item)| (path.clone(), operations(item)));
    described.chain(methods::ALL.iter().map(|path| (String::from(*path), of_grpc(path)))).collect()
});

/// gRPC's methods are described by their protocol files.
fn of_grpc(path: &str) -> Vec<(Method, Operation)> {
    let media_types = methods::MEDIA_TYPES.map(String::from).into();
    let for_administrators = methods::FOR_ADMINISTRATORS.contains(&path);
    vec![(Method::POST, Operation { media_types, for_administrators })]
}

fn operations(item: &Value) -> Vec<(Method, Operation)> {
    let methods = [Method::POST, Method::PUT, Method::PATCH, Method::DELETE];
    let described = methods.into_iter().filter_map(|method| {
        let operation = item.get(method.as_str().to_ascii_lowercase())?;
        let described = operation["requestBody"]["content"].as_object();
        let media_types = match described {
            Some(content) => content.keys().cloned().collect(),
            None => NO_BODY.iter().map(|name| (*name).to_owned()).collect(),
        };
        let required = operation["security"].as_array();
        let for_administrators =
            required.is_some_and(|all| all.iter().any(|one| one.get(ADMIN_KEY).is_some()));
        Some((method, Operation { media_types, for_administrators }))
    });
    described.collect()
}

/// Middleware: 415 unless the body is declared as something that the operation takes.
///
/// A form or a text is what a page may send anywhere without asking first. A body that is not declared at all is
/// taken from programs alone: the inference protocol's own client declares none.
pub(super) async fn check_media_type(request: Request, next: Next) -> Response {
    let operation = Operation::of(&request);
    let has_body = !request.body().is_end_stream();
    match operation.map(|operation| operation.takes(request.headers(), has_body)) {
        Some(Err(problem)) => problem.into_response(),
        Some(Ok(())) | None => next.run(request).await,
    }
}

impl Operation {
    fn takes(&self, headers: &HeaderMap, has_body: bool) -> Result<(), Problem> {
        let send = || format!("send {}", self.media_types.join(" or "));
        if let Some(encoding) = headers.get(header::CONTENT_ENCODING) {
            let encoding = String::from_utf8_lossy(encoding.as_bytes());
            if !encoding.eq_ignore_ascii_case("identity") {
                let remedy = "compressed bodies are not read; send the body as it is";
                return unsupported(header::CONTENT_ENCODING.as_str(), &encoding, remedy);
            }
        }
        for value in headers.get_all(header::CONTENT_TYPE) {
            let value = String::from_utf8_lossy(value.as_bytes());
            let essence = value.split(';').next().unwrap_or_default().trim();
            if !self.media_types.iter().any(|allowed| essence.eq_ignore_ascii_case(allowed)) {
                return unsupported(header::CONTENT_TYPE.as_str(), &value, &send());
            }
        }
        let from_a_page = headers.contains_key(header::ORIGIN) || headers.contains_key(FETCH_SITE);
        if has_body && from_a_page && !headers.contains_key(header::CONTENT_TYPE) {
            let message = format!("`content-type` is missing: {}", send());
            return Err(problem(header::CONTENT_TYPE.as_str(), message));
        }
        Ok(())
    }
}

fn unsupported(header: &str, value: &str, remedy: &str) -> Result<(), Problem> {
    Err(problem(header, format!("`{header}` is {}: {remedy}", quoted(value))))
}

fn problem(header: &str, message: String) -> Problem {
    Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message).at(header)
}
