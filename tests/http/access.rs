//! Keys, hosts, origins, declared types, and what every reply carries.

use axum::{body::Body, http::Request};
use serde_json::{Value, json};
use understudy::http;

use crate::server::{CLASSES, Reply, Server};

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

/// Every operation of the API's description with these methods, at paths of things that are there.
fn operations(methods: &[&str]) -> Vec<(String, String)> {
    let document: Value = serde_json::from_str(http::openapi_json()).unwrap();
    let paths = document["paths"].as_object().unwrap().clone().into_iter();
    let all = paths.flat_map(|(path, item)| {
        let path = path.replace("{model}", CLASSES).replace("{id}", "e");
        let named = item.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        named.into_iter().map(move |method| (method.to_uppercase(), path.clone()))
    });
    all.filter(|(method, _)| methods.contains(&method.as_str())).collect()
}

const CHANGES: [&str; 4] = ["POST", "PUT", "PATCH", "DELETE"];

async fn ask(
    server: &Server,
    (method, path): &(String, String),
    headers: &[(&str, &str)],
) -> Reply {
    let mut request = Request::builder().method(method.as_str()).uri(path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    server.send(request.body(Body::from("{}")).unwrap()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_from_elsewhere_change_nothing_and_read_nothing() {
    let server = Server::start().await;
    let arms = json!({"id": "e", "arms": [{"model": CLASSES, "weight": 1}, {"model": "plain", "weight": 1}]});
    assert_eq!(server.post("/v1/experiments", arms.to_string()).await.status, 201);
    let changes = operations(&CHANGES);
    assert!(changes.len() >= 11, "{changes:?}");
    let foreign: [&[(&str, &str)]; 6] = [
        &[("origin", "https://evil.example")],
        &[("origin", "null")],
        &[("origin", "http://localhost:3000")],
        &[("sec-fetch-site", "cross-site")],
        &[("host", "evil.example")],
        // After DNS rebinding a browser takes the page for the server's own.
        &[
            ("host", "evil.example"),
            ("origin", "http://evil.example"),
            ("sec-fetch-site", "same-origin"),
        ],
    ];
    let types = [
        None,
        Some("text/plain"),
        Some("application/x-www-form-urlencoded"),
        Some("application/json"),
    ];
    for operation in &changes {
        for headers in foreign {
            for declared in types {
                let declared = declared.map(|kind| ("content-type", kind));
                let headers: Vec<_> = headers.iter().copied().chain(declared).collect();
                let reply = ask(&server, operation, &headers).await;
                assert_eq!(reply.status, 403, "{operation:?} {headers:?}: {}", reply.text());
            }
        }
    }
    for operation in operations(&["GET"]) {
        for headers in foreign {
            assert_eq!(ask(&server, &operation, headers).await.status, 403, "{operation:?}");
        }
    }
    for method in ["OPTIONS", "HEAD", "GET"] {
        for path in ["/v1/models", "/web/page.js", "/docs/", "/nothing"] {
            let operation = (method.to_owned(), path.to_owned());
            let reply = ask(&server, &operation, &[("origin", "https://evil.example")]).await;
            assert_eq!(reply.status, 403, "{operation:?}");
        }
    }
    let refused = ask(&server, &("POST".into(), "/v2/repository/index".into()), foreign[0]).await;
    assert!(refused.json()["error"].as_str().unwrap().contains("--cors-allow-origin"));
    let refused = ask(&server, &("POST".into(), "/v1/compare".into()), foreign[4]).await;
    assert_eq!(refused.json()["error"]["code"], "host_not_allowed");
    assert!(refused.text().contains("--allowed-host"), "{}", refused.text());
    // Nothing has happened.
    assert_eq!(server.generate(json!({})).await.status, 200);
    assert_eq!(server.get("/v1/experiments/e").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_servers_own_page_and_links_to_it_work() {
    let server = Server::start().await;
    for (host, origin) in [
        ("localhost:8080", "http://localhost:8080"),
        ("127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("[::1]:8080", "http://[::1]:8080"),
    ] {
        let headers = [
            ("host", host),
            ("origin", origin),
            ("sec-fetch-site", "same-origin"),
            ("content-type", "application/json"),
        ];
        let images = ("POST".to_owned(), "/v1/images/generations".to_owned());
        let reply = ask(&server, &images, &headers).await;
        assert_eq!(reply.status, 200, "{host}: {}", reply.text());
        // Swagger UI sends a load without a body, and without a type.
        let load = Request::post("/v2/repository/models/classes/load");
        let load = load.header("host", host).header("origin", origin);
        let reply = server.send(load.body(Body::empty()).unwrap()).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
    }
    let link = [
        ("sec-fetch-site", "cross-site"),
        ("sec-fetch-mode", "navigate"),
        ("sec-fetch-dest", "document"),
    ];
    for path in ["/", "/docs/", "/v1/models", "/metrics"] {
        let reply = ask(&server, &("GET".into(), path.into()), &link).await;
        assert_eq!(reply.status, 200, "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn named_origins_use_the_server_and_read_its_refusals() {
    let named = "https://a.example";
    let origins = |list: &[&str]| list.iter().map(|origin| (*origin).to_owned()).collect();
    let server = Server::with(|settings| settings.cors_allow_origin = origins(&[named])).await;
    let images = ("POST".to_owned(), "/v1/images/generations".to_owned());
    let from = |origin| {
        [("origin", origin), ("sec-fetch-site", "cross-site"), ("content-type", "application/json")]
    };
    let reply = ask(&server, &images, &from(named)).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert_eq!(reply.header("access-control-allow-origin"), named);
    assert_eq!(ask(&server, &images, &from("https://b.example")).await.status, 403);
    let text = [("origin", named), ("content-type", "text/plain")];
    let refused = ask(&server, &images, &text).await;
    assert_eq!(refused.status, 415);
    assert_eq!(refused.header("access-control-allow-origin"), named);

    let any = Server::with(|settings| settings.cors_allow_origin = origins(&["*"])).await;
    for origin in [named, "null", "https://b.example"] {
        let reply = ask(&any, &images, &from(origin)).await;
        assert_eq!(reply.status, 200, "{origin}: {}", reply.text());
        assert_eq!(reply.header("access-control-allow-origin"), "*");
    }
    let rebound = [("host", "evil.example"), ("origin", "http://evil.example")];
    assert_eq!(ask(&any, &images, &rebound).await.status, 403);
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_are_what_the_operation_takes() {
    let server = Server::start().await;
    for operation in operations(&CHANGES) {
        let binary = operation.1.ends_with("/infer");
        let form = operation.1.ends_with("/edits");
        for (declared, taken) in [
            ("application/json", !form),
            ("APPLICATION/JSON; charset=utf-8", !form),
            ("application/octet-stream", binary),
            ("text/plain", false),
            ("text/plain;charset=UTF-8", false),
            ("application/x-www-form-urlencoded", false),
            ("multipart/form-data; boundary=x", form),
            ("application/json, text/plain", false),
            ("", false),
        ] {
            let reply = ask(&server, &operation, &[("content-type", declared)]).await;
            assert_eq!(reply.status != 415, taken, "{operation:?} {declared:?}");
        }
        let twice = [("content-type", "application/json"), ("content-type", "text/plain")];
        assert_eq!(ask(&server, &operation, &twice).await.status, 415, "{operation:?}");
        // Programs need not say; pages must.
        assert_ne!(ask(&server, &operation, &[]).await.status, 415, "{operation:?}");
        for own in [("origin", "http://localhost:8080"), ("sec-fetch-site", "same-origin")] {
            let reply = ask(&server, &operation, &[own]).await;
            assert_eq!(reply.status, 415, "{operation:?} {own:?}");
            assert!(reply.text().contains("content-type"), "{}", reply.text());
        }
        let compressed = [("content-type", "application/json"), ("content-encoding", "gzip")];
        assert_eq!(ask(&server, &operation, &compressed).await.status, 415, "{operation:?}");
    }
}

/// Loading, unloading and deleting experiments, of things that are not there.
fn administration() -> [(String, String); 3] {
    [
        ("POST".into(), "/v2/repository/models/nope/load".into()),
        ("POST".into(), "/v2/repository/models/nope/unload".into()),
        ("DELETE".into(), "/v1/experiments/nope".into()),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn administration_wants_its_own_key() {
    let server = Server::with(|settings| {
        settings.api_keys = vec!["user".into()];
        settings.admin_keys = vec!["admin".into()];
    })
    .await;
    let with = |key| ("authorization", key);
    for operation in administration() {
        let user = ask(&server, &operation, &[with("Bearer user")]).await;
        assert_eq!(user.status, 403, "{operation:?}");
        assert!(user.text().contains("--admin-key"), "{}", user.text());
        for wrong in ["Bearer nobody", "Bearer ", "Basic admin"] {
            let reply = ask(&server, &operation, &[with(wrong)]).await;
            assert_eq!(reply.status, 401, "{operation:?} {wrong}");
            assert_eq!(reply.header("www-authenticate"), "Bearer");
        }
        assert_eq!(ask(&server, &operation, &[]).await.status, 401, "{operation:?}");
        assert_eq!(ask(&server, &operation, &[with("Bearer admin")]).await.status, 404);
    }
    // It opens the rest as well.
    let models = ("GET".to_owned(), "/v1/models".to_owned());
    assert_eq!(ask(&server, &models, &[with("bearer admin")]).await.status, 200);
    assert_eq!(ask(&server, &models, &[]).await.status, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn administration_without_a_key_is_for_this_machine_alone() {
    for (private, keys, expected) in [(true, &[][..], 404), (false, &[], 403), (false, &["a"], 404)]
    {
        let server = Server::with(|settings| {
            settings.private = private;
            settings.admin_keys = keys.iter().map(|key| (*key).to_owned()).collect();
        })
        .await;
        for operation in administration() {
            let reply = ask(&server, &operation, &[("authorization", "Bearer a")]).await;
            assert_eq!(reply.status, expected, "{operation:?} {private} {keys:?}");
        }
        // Everybody else's business goes on.
        assert_eq!(server.generate(json!({})).await.status, 200);
        let index = server.post("/v2/repository/index", "").await;
        assert_eq!(index.status, 200);
    }
}
