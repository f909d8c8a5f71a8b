//! The web page at `/` and what it is made of, all of it in the binary.

use axum::{
    Router,
    http::header,
    response::{IntoResponse, Response},
    routing::get,
};

use super::App;

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const JAVASCRIPT: &str = "text/javascript; charset=utf-8";

/// What the page loads: path, media type, text.
const PARTS: [(&str, &str, &str); 15] = [
    ("/web/style.css", CSS, include_str!("../web/style.css")),
    ("/web/address.js", JAVASCRIPT, include_str!("../web/address.js")),
    ("/web/api.js", JAVASCRIPT, include_str!("../web/api.js")),
    ("/web/cards.js", JAVASCRIPT, include_str!("../web/cards.js")),
    ("/web/chart.js", JAVASCRIPT, include_str!("../web/chart.js")),
    ("/web/condition.js", JAVASCRIPT, include_str!("../web/condition.js")),
    ("/web/exposition.js", JAVASCRIPT, include_str!("../web/exposition.js")),
    ("/web/live.js", JAVASCRIPT, include_str!("../web/live.js")),
    ("/web/models.js", JAVASCRIPT, include_str!("../web/models.js")),
    ("/web/page.js", JAVASCRIPT, include_str!("../web/page.js")),
    ("/web/reproduce.js", JAVASCRIPT, include_str!("../web/reproduce.js")),
    ("/web/result.js", JAVASCRIPT, include_str!("../web/result.js")),
    ("/web/session.js", JAVASCRIPT, include_str!("../web/session.js")),
    ("/web/side.js", JAVASCRIPT, include_str!("../web/side.js")),
    ("/web/vote.js", JAVASCRIPT, include_str!("../web/vote.js")),
];

/// The browser refuses whatever is not this server's own; images arrive inside of replies.
const POLICY: &str = "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; \
    form-action 'none'; frame-ancestors 'none'";

/// The page that shows teacher and student side by side.
#[utoipa::path(get, path = "/", tag = "operations", operation_id = "start_page", responses(
    (status = 200, description = "A page", content_type = "text/html", body = String),
))]
pub(super) async fn index() -> Response {
    let policy = [(header::CONTENT_SECURITY_POLICY, POLICY)];
    (policy, part(HTML, include_str!("../web/index.html"))).into_response()
}

/// The page's style sheet and scripts.
pub(super) fn parts() -> Router<App> {
    PARTS.into_iter().fold(Router::new(), |router, (path, media_type, text)| {
        router.route(path, get(async move || part(media_type, text)))
    })
}

/// Asked for again every time, so that a page is never of two versions of the server.
fn part(media_type: &'static str, text: &'static str) -> Response {
    let headers = [(header::CONTENT_TYPE, media_type), (header::CACHE_CONTROL, "no-cache")];
    (headers, text).into_response()
}
