//! Connections: waiting is bounded, there are not too many, and half-closed ones get their answers.

use std::{net::SocketAddr, time::Duration};

use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tower::ServiceExt;
use understudy::http::Settings;

use crate::{
    lifecycle::{Running, run, talk},
    server::{CLASSES, ENDLESS, Server, post},
};

const GENERATE: &str = "/v1/images/generations";
const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(100);
/// Longer than anything here takes, shorter than [`LONG`].
const PATIENCE: Duration = Duration::from_secs(30);

/// A server that listens.
async fn listening(change: impl FnOnce(&mut Settings)) -> (Server, SocketAddr, Running) {
    let server = Server::with(change).await;
    let running = run(&server, LONG).await;
    (server, running.address, running)
}

/// A connection over which something was sent.
async fn sent(address: SocketAddr, bytes: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(bytes.as_bytes()).await.unwrap();
    stream
}

/// All that the server sends until it closes the connection.
async fn rest(stream: &mut TcpStream) -> String {
    let mut reply = Vec::new();
    tokio::time::timeout(PATIENCE, stream.read_to_end(&mut reply)).await.unwrap().unwrap();
    String::from_utf8_lossy(&reply).into_owned()
}

/// A request with a body, over a connection that stays open unless it says otherwise.
fn request(path: &str, headers: &str, body: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n{headers}content-length: {}\r\n\r\n{body}",
        body.len()
    )
}

const HEALTH: &str = "GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_head_is_given_up_and_an_idle_connection_is_not() {
    let (_server, address, _running) = listening(|settings| {
        (settings.head_timeout, settings.idle_timeout) = (SHORT, LONG);
    })
    .await;
    let mut idle = TcpStream::connect(address).await.unwrap();
    let mut slow = sent(address, "GET /health HTTP/1.1\r\nhost: local").await;
    assert_eq!(rest(&mut slow).await, "");
    // A second head counts as the first.
    let mut second = sent(address, HEALTH).await;
    second.read_exact(&mut [0; 12]).await.unwrap();
    second.write_all(b"GET /hea").await.unwrap();
    rest(&mut second).await;
    let close = HEALTH.replace("\r\n\r\n", "\r\nconnection: close\r\n\r\n");
    idle.write_all(close.as_bytes()).await.unwrap();
    assert!(rest(&mut idle).await.starts_with("HTTP/1.1 200"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_connection_is_closed_and_a_head_has_its_own_time() {
    let (_server, address, _running) = listening(|settings| {
        (settings.head_timeout, settings.idle_timeout) = (LONG, SHORT);
    })
    .await;
    let close = HEALTH.replace("\r\n\r\n", "\r\nconnection: close\r\n\r\n");
    let (begin, end) = close.split_at(9);
    let mut slow = sent(address, begin).await;
    let mut silent = TcpStream::connect(address).await.unwrap();
    assert_eq!(rest(&mut silent).await, "");
    let mut kept = sent(address, HEALTH).await;
    assert!(rest(&mut kept).await.starts_with("HTTP/1.1 200"), "answered, then closed");
    slow.write_all(end.as_bytes()).await.unwrap();
    assert!(rest(&mut slow).await.starts_with("HTTP/1.1 200"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_stops_is_given_up() {
    let (server, address, _running) = listening(|settings| settings.body_timeout = SHORT).await;
    for path in [GENERATE, "/v2/models/classes/infer", "/v2/repository/index"] {
        let whole = request(path, "", "{\"n\": 1, \"seed\": 1}");
        let mut half = sent(address, &whole[..whole.len() - 5]).await;
        let reply = rest(&mut half).await;
        assert!(reply.starts_with("HTTP/1.1 408"), "{path}: {reply}");
        assert!(reply.contains("--body-timeout-seconds"), "{path}: {reply}");
        let chunked = format!(
            "POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{{\"n\":"
        );
        let mut half = sent(address, &chunked).await;
        let reply = rest(&mut half).await;
        assert!(reply.starts_with("HTTP/1.1 408"), "{path}: {reply}");
    }
    assert_eq!(server.running(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_takes_nothing_of_its_answers_is_given_up() {
    let (_server, address, _running) = listening(|settings| {
        settings.idle_timeout = SHORT;
    })
    .await;
    let mut unread = TcpStream::connect(address).await.unwrap();
    let asked = "GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n".repeat(100);
    // The server reads on only as it gets rid of answers.
    let refused = async { while unread.write_all(asked.as_bytes()).await.is_ok() {} };
    tokio::time::timeout(PATIENCE, refused).await.unwrap();
}

/// Answers that are larger than any buffer, and a client that takes longer for them than a connection may be idle.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_takes_its_answers_slowly_gets_all_of_them() {
    let idle = Duration::from_millis(300);
    let (_server, address, _running) = listening(|settings| {
        (settings.idle_timeout, settings.max_connections) = (idle, 1);
    })
    .await;
    let bundle = "/docs/swagger-ui-bundle.js";
    let length = talk(address, "GET", bundle, "").await.len();
    let more = format!("GET {bundle} HTTP/1.1\r\nhost: localhost\r\n\r\n").repeat(9);
    let last = format!("GET {bundle} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    let mut slow = sent(address, &format!("{more}{last}")).await;
    let began = tokio::time::Instant::now();
    let mut taken = 0;
    while began.elapsed() < 3 * idle {
        taken += slow.read(&mut [0; 1024]).await.unwrap();
        // Others come meanwhile, and none of them takes its place.
        assert!(talk(address, "GET", "/health", "").await.starts_with("HTTP/1.1 200"));
    }
    assert!(taken < 9 * length, "{taken} of {length}");
    let mut rest = Vec::new();
    slow.read_to_end(&mut rest).await.unwrap();
    assert!(taken + rest.len() > 10 * (length - 100), "{} of {length}", taken + rest.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_has_said_all_gets_the_answer() {
    let (server, address, _running) = listening(|_| {}).await;
    let streamed = "{\"num_inference_steps\": 300, \"stream\": true}";
    let cases = [
        (request(GENERATE, "", "{\"num_inference_steps\": 300}"), "b64_json"),
        (request(GENERATE, "connection: close\r\n", "{\"num_inference_steps\": 300}"), "b64_json"),
        (
            request(GENERATE, "expect: 100-continue\r\n", "{\"num_inference_steps\": 300}"),
            "b64_json",
        ),
        (request(GENERATE, "", streamed), "image_generation.completed"),
        (HEALTH.to_owned(), "models_ready"),
        ("GET /health HTTP/1.0\r\nhost: localhost\r\n\r\n".to_owned(), "models_ready"),
        // HAProxy's health check, where nobody tells it more.
        ("GET /health HTTP/1.0\r\n\r\n".to_owned(), "models_ready"),
        // Two requests at once, the second of which waits for the first.
        (format!("{}{HEALTH}", request(GENERATE, "", "{}")), "models_ready"),
    ];
    for (asked, expected) in cases {
        let mut stream = sent(address, &asked).await;
        stream.shutdown().await.unwrap();
        let reply = rest(&mut stream).await;
        let answers =
            reply.matches("HTTP/1.1 200 OK").count() + reply.matches("HTTP/1.0 200 OK").count();
        assert!(reply.starts_with("HTTP/1.") && answers >= 1, "{asked}\n{reply}");
        assert!(reply.contains(expected), "{asked}\n{reply}");
    }
    // Half a body is all that there will be.
    let whole = request(GENERATE, "", "{\"n\": 1}");
    let mut half = sent(address, &whole[..whole.len() - 3]).await;
    half.shutdown().await.unwrap();
    let reply = rest(&mut half).await;
    assert!(reply.is_empty() || reply.starts_with("HTTP/1.1 400"), "{reply}");
    assert_eq!(server.running(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_goes_away_after_saying_all_is_noticed() {
    let (server, address, _running) = listening(|_| {}).await;
    let endless = format!("{{\"num_inference_steps\": {ENDLESS}}}");
    for headers in ["", "connection: close\r\n", "expect: 100-continue\r\n"] {
        let mut stream = sent(address, &request(GENERATE, headers, &endless)).await;
        stream.shutdown().await.unwrap();
        server.until("running", |server| server.running() == 1).await;
        drop(stream);
        server.until("gone", |server| server.running() == 0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_make_room_for_new_ones() {
    let (_server, address, _running) = listening(|settings| settings.max_connections = 3).await;
    let mut idle = Vec::new();
    for number in 0..40 {
        let begun = if number % 2 == 0 { "" } else { "GET /hea" };
        idle.push(sent(address, begun).await);
        if number % 10 == 9 {
            assert!(talk(address, "GET", "/health", "").await.starts_with("HTTP/1.1 200"));
        }
    }
    // The oldest went first.
    let mut first = idle.remove(0);
    let _ = tokio::time::timeout(PATIENCE, first.read(&mut [0])).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn busy_connections_leave_room_for_probes_alone() {
    let (server, address, _running) = listening(|settings| settings.max_connections = 2).await;
    let endless = format!("{{\"num_inference_steps\": {ENDLESS}}}");
    let mut busy = Vec::new();
    for _ in 0..2 {
        busy.push(sent(address, &request(GENERATE, "", &endless)).await);
    }
    server.until("running", |server| server.running() == 2).await;
    for _ in 0..20 {
        for probe in ["/health", "/metrics", "/v2/health/live", "/v2/health/ready"] {
            assert!(talk(address, "GET", probe, "").await.starts_with("HTTP/1.1 200"), "{probe}");
        }
        let refused = talk(address, "GET", "/v1/models", "").await;
        assert!(refused.starts_with("HTTP/1.1 503"), "{refused}");
        assert!(refused.contains("retry-after: 1") && refused.contains("--max-connections"));
    }
    drop(busy);
    server.until("gone", |server| server.running() == 0).await;
    let mut reply = talk(address, "GET", "/v1/models", "").await;
    while !reply.starts_with("HTTP/1.1 200") {
        reply = talk(address, "GET", "/v1/models", "").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_share_a_budget_and_large_ones_leave_room_for_small_ones() {
    // Of 24,000 bytes a body of 4,000 takes 12,000, and no other of that size fits beside it.
    let (_server, address, _running) =
        listening(|settings| settings.body_budget_bytes = 24_000).await;
    let body = format!("{{\"n\": 1}}{}", " ".repeat(4000 - 8));
    let whole = request(GENERATE, "connection: close\r\n", &body);
    let (begin, end) = whole.split_at(whole.len() - 10);
    // The server asks for a body once it has taken the memory for it.
    let expecting =
        begin.replace("connection: close\r\n", "connection: close\r\nexpect: 100-continue\r\n");
    let mut half = sent(address, &expecting).await;
    let mut asked = [0; 25];
    tokio::time::timeout(PATIENCE, half.read_exact(&mut asked)).await.unwrap().unwrap();
    assert_eq!(&asked, b"HTTP/1.1 100 Continue\r\n\r\n");
    let refused = talk(address, "POST", GENERATE, &body).await;
    assert!(refused.starts_with("HTTP/1.1 429") && refused.contains("retry-after: 1"), "{refused}");
    assert!(refused.contains("bodies_full") && refused.contains("--body-budget-bytes"));
    assert!(talk(address, "POST", GENERATE, "{}").await.starts_with("HTTP/1.1 200"));
    // A length that is not declared may be all that is allowed.
    let chunked = format!(
        "POST {GENERATE} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{{}}\r\n0\r\n\r\n"
    );
    assert!(rest(&mut sent(address, &chunked).await).await.starts_with("HTTP/1.1 429"));
    half.write_all(end.as_bytes()).await.unwrap();
    assert!(rest(&mut half).await.starts_with("HTTP/1.1 200"));
    assert!(talk(address, "POST", GENERATE, &body).await.starts_with("HTTP/1.1 200"));
    // Whoever breaks off gives back what was taken.
    for _ in 0..10 {
        drop(sent(address, begin).await);
    }
    while !talk(address, "POST", GENERATE, &body).await.starts_with("HTTP/1.1 200") {}
}

/// On one thread, whoever parses keeps everybody waiting.
#[tokio::test(flavor = "current_thread")]
async fn large_bodies_are_parsed_elsewhere() {
    let server = Server::with(|settings| settings.max_body_bytes = 16 << 20).await;
    let large = format!("{{\"n\": 1}}{}x", " ".repeat(15 << 20));
    let first = std::cell::OnceCell::new();
    let posted = async {
        let reply = server.post(GENERATE, large).await;
        assert_eq!(reply.status, 400, "{}", reply.text());
        let _ = first.set("large");
    };
    let asked = async {
        assert_eq!(server.get("/health").await.status, 200);
        let _ = first.set("health");
    };
    tokio::join!(posted, asked);
    assert_eq!(first.get(), Some(&"health"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_fills_the_queue_makes_room_for_others() {
    let server = Server::with(|settings| {
        settings.api_keys = vec!["greedy".into(), "modest".into()];
    })
    .await;
    let ask = |key: &str| {
        let mut request = post(GENERATE, json!({"num_inference_steps": ENDLESS}).to_string());
        let key = format!("Bearer {key}").parse().unwrap();
        request.headers_mut().insert("authorization", key);
        request
    };
    let begin = |key: &str| tokio::spawn(server.router().oneshot(ask(key)));
    let under_way = |server: &Server| {
        server.running() + server.metrics.samples_waiting.with_label_values(&[CLASSES]).get()
    };
    let mut greedy: Vec<_> = (0..8).map(|_| begin("greedy")).collect();
    server.until("full", |server| under_way(server) == 8).await;
    let full = server.send(ask("modest")).await;
    assert_eq!((full.status.as_u16(), &full.json()["error"]["code"]), (429, &json!("queue_full")));
    greedy.pop().unwrap().abort();
    server.until("a place is free", |server| under_way(server) == 7).await;
    let over = server.send(ask("greedy")).await;
    assert_eq!((over.status.as_u16(), &over.json()["error"]["code"]), (429, &json!("queue_share")));
    assert!(!over.header("retry-after").is_empty());
    let modest = begin("modest");
    server.until("full again", |server| under_way(server) == 8).await;
    // Nobody waits any more, so what is free is anybody's.
    greedy.pop().unwrap().abort();
    server.until("a place is free", |server| under_way(server) == 7).await;
    greedy.push(begin("greedy"));
    server.until("full once more", |server| under_way(server) == 8).await;
    let metrics = server.get("/metrics").await;
    assert_eq!(metrics.status, 200);
    assert!(metrics.text().contains("reason=\"queue_share\"} 1"), "{}", metrics.text());
    greedy.iter().chain([&modest]).for_each(tokio::task::JoinHandle::abort);
}
