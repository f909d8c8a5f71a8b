//! Keys, origins, and what every reply carries.

use axum::{body::Body, http::Request};
use serde_json::json;

use crate::server::Server;

fn get(path: &str, name: &str, value: &str) -> Request<Body> {
    Request::get(path).header(name, value).body(Body::empty()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_opens_what_is_not_open() {
    let keys = || vec!["one".to_owned(), "two".to_owned()];
    let server = Server::with(|settings| settings.api_keys = keys()).await;
    for (value, status) in [
        ("Bearer one", 200),
        ("bearer two", 200),
        ("Bearer three", 401),
        ("Bearer on", 401),
        ("Bearer ", 401),
        ("Basic one", 401),
        ("one", 401),
    ] {
        let reply = server.send(get("/v1/models", "authorization", value)).await;
        assert_eq!(reply.status, status, "{value}");
    }
    let refused = server.generate(json!({})).await;
    assert_eq!(refused.status, 401);
    assert_eq!(refused.header("www-authenticate"), "Bearer");
    assert_eq!(refused.json()["error"]["type"], "authentication_error");
    for path in [
        "/health",
        "/metrics",
        "/v2/health/live",
        "/v2/health/ready",
        "/docs/",
        "/",
        "/web/page.js",
        "/openapi.json",
    ] {
        assert_eq!(server.get(path).await.status, 200, "{path}");
    }
    assert_eq!(server.get("/nothing").await.status, 401);
    assert!(server.get("/v2").await.json()["error"].is_string());

    let server = Server::with(|settings| {
        settings.api_keys = keys();
        settings.api_key_everywhere = true;
    })
    .await;
    assert_eq!(server.get("/metrics").await.status, 401);
    assert_eq!(server.send(get("/metrics", "authorization", "Bearer one")).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn origins_that_are_allowed_may_read() {
    let origin = "https://a.example";
    let server = Server::with(|settings| {
        settings.cors_allow_origin = vec![origin.into()];
        settings.api_keys = vec!["key".into()];
    })
    .await;
    let preflight = |origin: &str| {
        Request::options("/v1/images/generations")
            .header("origin", origin)
            .header("access-control-request-method", "POST")
            .header("access-control-request-headers", "authorization,content-type")
            .body(Body::empty())
            .unwrap()
    };
    // Preflights carry no key.
    let reply = server.send(preflight(origin)).await;
    assert_eq!(reply.status, 200);
    assert_eq!(reply.header("access-control-allow-origin"), origin);
    assert!(reply.header("access-control-allow-headers").contains("authorization"));
    let other = server.send(preflight("https://b.example")).await;
    assert_eq!(other.header("access-control-allow-origin"), "");
    assert_eq!(
        server.send(get("/health", "origin", origin)).await.header("access-control-allow-origin"),
        origin
    );

    let closed = Server::start().await;
    assert_eq!(
        closed.send(get("/health", "origin", origin)).await.header("access-control-allow-origin"),
        ""
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn every_reply_carries_its_id_and_its_time() {
    let server = Server::start().await;
    for path in ["/health", "/nothing", "/v1/models/nope", "/metrics"] {
        let echoed = server.send(get(path, "x-request-id", "abc-1")).await;
        assert_eq!(echoed.header("x-request-id"), "abc-1", "{path}");
        assert!(echoed.header("server-timing").starts_with("total;dur="), "{path}");
    }
    for bad in ["with space", &"x".repeat(200)] {
        let replaced = server.send(get("/health", "x-request-id", bad)).await;
        assert_ne!(replaced.header("x-request-id"), bad);
        assert!(!replaced.header("x-request-id").is_empty());
    }
    let (one, two) = (server.get("/health").await, server.get("/health").await);
    assert_ne!(one.header("x-request-id"), two.header("x-request-id"));
}

#[tokio::test(flavor = "multi_thread")]
async fn metric_labels_are_bounded() {
    let server = Server::start().await;
    server.generate(json!({"model": "made-up"})).await;
    server.get("/made/up").await;
    server.get("/v1/models/made-up").await;
    server
        .send(Request::builder().method("BREW").uri("/health").body(Body::empty()).unwrap())
        .await;
    server.generate(json!({"n": 3})).await;
    let text = server.get("/metrics").await.text();
    assert!(!text.contains("made-up") && !text.contains("/made/up") && !text.contains("BREW"));
    for line in [
        "understudy_http_requests_total{code=\"404\",method=\"GET\",route=\"unmatched\"} 1",
        "understudy_http_requests_total{code=\"404\",method=\"GET\",route=\"/v1/models/{id}\"} 1",
        "understudy_http_requests_total{code=\"405\",method=\"other\",route=\"/health\"} 1",
        "understudy_rejected_total{model=\"unknown\",reason=\"unknown_model\"} 1",
        "understudy_request_duration_seconds_count{model=\"classes\"} 1",
        "understudy_images_total{model=\"classes\"} 3",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
}
