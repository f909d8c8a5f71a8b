//! Who may ask: API keys, and origins of pages in browsers.

use axum::{
    extract::{Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use subtle::{Choice, ConstantTimeEq};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use super::{App, Settings, error::Problem};

/// 401 unless the request presents one of the keys, where there are any.
pub(super) async fn check(State(app): State<App>, request: Request, next: Next) -> Response {
    let settings = &app.settings;
    let open = settings.api_keys.is_empty()
        || is_page(request.uri().path())
        || (is_probe(request.uri().path()) && !settings.api_key_everywhere);
    if open || presents_key(request.headers(), &settings.api_keys) {
        return next.run(request).await;
    }
    let message = "no valid API key; send the header `Authorization: Bearer KEY` with one of the server's --api-key values";
    Problem::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message).into_response()
}

/// Pages for people, which hold nothing secret and which a browser opens without a header.
fn is_page(path: &str) -> bool {
    matches!(path, "/" | "/openapi.json" | "/docs")
        || path.starts_with("/docs/")
        || path.starts_with("/web/")
}

/// What orchestrators and monitoring ask.
fn is_probe(path: &str) -> bool {
    matches!(path, "/health" | "/metrics" | "/v2/health/live" | "/v2/health/ready")
}

fn presents_key(headers: &HeaderMap, keys: &[String]) -> bool {
    let presented = headers.get(header::AUTHORIZATION).and_then(|value| {
        let (scheme, key) = value.as_bytes().split_at_checked("bearer ".len())?;
        scheme.eq_ignore_ascii_case(b"bearer ").then_some(key)
    });
    let Some(presented) = presented else {
        return false;
    };
    // All keys are compared, whichever matches, so that the time tells nothing about them.
    keys.iter().fold(Choice::from(0), |found, key| found | key.as_bytes().ct_eq(presented)).into()
}

/// Cross-origin headers for the origins allowed; none without any.
pub(super) fn cors(settings: &Settings) -> Option<CorsLayer> {
    let origins = &settings.cors_allow_origin;
    if origins.is_empty() {
        return None;
    }
    let origin = if origins.iter().any(|origin| origin == "*") {
        AllowOrigin::any()
    } else {
        AllowOrigin::list(origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok()))
    };
    let layer = CorsLayer::new()
        .allow_origin(origin)
        .allow_methods([Method::GET, Method::POST, Method::PATCH, Method::DELETE])
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers(
            [
                "x-request-id",
                "server-timing",
                "retry-after",
                "x-understudy-seed",
                "x-understudy-model",
            ]
            .map(HeaderName::from_static),
        );
    Some(layer)
}
