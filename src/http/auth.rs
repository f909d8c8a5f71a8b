//! Keys: who may ask, and who may change what is served.

use axum::{
    extract::{Request, State},
    http::{HeaderMap, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use subtle::{ConditionallySelectable, ConstantTimeEq};

use super::{App, Settings, caller::client, error::Problem, grpc::methods, operation::Operation};

/// 401 unless the request presents one of the keys, where there are any; 403 where it may not do what it asks.
pub(super) async fn check(State(app): State<App>, mut request: Request, next: Next) -> Response {
    let settings = &app.settings;
    let administrator = presented(request.headers(), &settings.admin_keys);
    let user = presented(request.headers(), &settings.api_keys);
    if let Some(problem) = refusal(settings, &request, administrator.is_some(), user.is_some()) {
        return problem.into_response();
    }
    let administrator = administrator.map(|number| settings.api_keys.len() + number);
    let client = client(&request, user.or(administrator));
    request.extensions_mut().insert(client);
    next.run(request).await
}

fn refusal(
    settings: &Settings,
    request: &Request,
    administrator: bool,
    user: bool,
) -> Option<Problem> {
    if Operation::of(request).is_some_and(|operation| operation.for_administrators) {
        if administrator {
            return None;
        }
        if settings.admin_keys.is_empty() && !settings.private {
            return Some(forbidden(
                "others reach this server, as its address or an --allowed-host says, and it has no --admin-key, so nobody may do this; start it with one and send `Authorization: Bearer KEY`",
            ));
        }
        if !settings.admin_keys.is_empty() && user {
            return Some(forbidden(
                "an API key is not enough for this; send the header `Authorization: Bearer KEY` with one of the server's --admin-key values",
            ));
        }
        if !settings.admin_keys.is_empty() {
            return Some(unauthorized("--admin-key"));
        }
    }
    let path = request.uri().path();
    let open = settings.api_keys.is_empty()
        || is_page(path)
        || (is_probe(path) && !settings.api_key_everywhere);
    (!open && !user && !administrator).then(|| unauthorized("--api-key"))
}

fn unauthorized(flag: &str) -> Problem {
    let (code, whose) = match flag {
        "--admin-key" => ("invalid_admin_key", "no administrator's key"),
        _ => ("invalid_api_key", "no valid API key"),
    };
    let message = format!(
        "{whose}; send the header `Authorization: Bearer KEY` with one of the server's {flag} values"
    );
    Problem::new(StatusCode::UNAUTHORIZED, code, message)
}

fn forbidden(message: &str) -> Problem {
    Problem::new(StatusCode::FORBIDDEN, "admin_key_required", message)
}

/// Pages for people, which hold nothing secret and which a browser opens without a header.
pub(super) fn is_page(path: &str) -> bool {
    matches!(path, "/" | "/openapi.json" | "/docs")
        || path.starts_with("/docs/")
        || path.starts_with("/web/")
}

/// What orchestrators and monitoring ask.
pub(super) fn is_probe(path: &str) -> bool {
    matches!(
        path,
        "/health"
            | "/metrics"
            | "/v2/health/live"
            | "/v2/health/ready"
            | methods::HEALTH
            | methods::SERVER_LIVE
            | methods::SERVER_READY
    )
}

/// The number of the key that a request presents.
fn presented(headers: &HeaderMap, keys: &[String]) -> Option<usize> {
    let (scheme, key) =
        headers.get(header::AUTHORIZATION)?.as_bytes().split_at_checked("bearer ".len())?;
    if !scheme.eq_ignore_ascii_case(b"bearer ") {
        return None;
    }
    // All keys are compared, whichever matches, so that the time tells nothing about them.
    let none = u64::MAX;
    let found = keys.iter().zip(0..).fold(none, |found, (known, number)| {
        u64::conditional_select(&found, &number, known.as_bytes().ct_eq(key.trim_ascii()))
    });
    (found != none).then_some(found as usize)
}
