//! Server-sent events: previews, finished images, errors in the middle, clients that go away.

use axum::body::Body;
use serde_json::{Value, json};
use tower::ServiceExt;

use crate::server::{CLASSES, ENDLESS, PLAIN, Server, events, post};

fn streamed(body: Value) -> axum::http::Request<Body> {
    post("/v1/images/generations", body.to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn previews_come_before_their_image() {
    let server = Server::start().await;
    let body =
        json!({"stream": true, "partial_images": 2, "n": 2, "seed": 4, "num_inference_steps": 6});
    let reply = server.generate(body).await;
    assert_eq!(reply.header("content-type"), "text/event-stream");
    let events = events(&reply.text());
    assert_eq!(events.len(), 6, "{}", reply.text());
    for index in 0..2 {
        let own: Vec<_> = events.iter().filter(|(_, event)| event["index"] == index).collect();
        let names: Vec<_> = own.iter().map(|(name, _)| name.as_str()).collect();
        let (partial, completed) = ("image_generation.partial_image", "image_generation.completed");
        assert_eq!(names, [partial, partial, completed]);
        for (name, event) in &own {
            assert_eq!(&event["type"], name);
            assert_eq!((&event["size"], &event["output_format"]), (&json!("8x8"), &json!("png")));
            assert_eq!(event["seed"], 4 + index);
            for field in ["b64_json", "created_at", "quality", "background"] {
                assert!(!event[field].is_null(), "{name} lacks {field}");
            }
        }
        assert_eq!(own[0].1["partial_image_index"], 0);
        assert_eq!(own[1].1["partial_image_index"], 1);
        assert_eq!(own[2].1["usage"]["total_tokens"], 0);
    }
    // The stream's image is the plain reply's image.
    let plain = server.generate(json!({"seed": 4, "num_inference_steps": 6})).await.json();
    let last = events.iter().rfind(|(_, event)| event["index"] == 0).unwrap();
    assert_eq!(plain["data"][0]["b64_json"], last.1["b64_json"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_timeout_in_the_middle_is_one_event_and_the_end() {
    let server = Server::with(|settings| {
        settings.request_timeout = std::time::Duration::from_millis(300);
    })
    .await;
    let body = json!({"stream": true, "num_inference_steps": ENDLESS});
    let reply = server.generate(body.clone()).await;
    assert_eq!(reply.status, 200);
    let events = events(&reply.text());
    assert_eq!(events.len(), 1, "{}", reply.text());
    assert_eq!(events[0].0, "error");
    assert_eq!(events[0].1["error"]["code"], "request_timeout");
    // Without a stream the same is a 504.
    let reply = server.generate(json!({"num_inference_steps": ENDLESS})).await;
    assert_eq!(
        (reply.status.as_u16(), &reply.json()["error"]["code"]),
        (504, &json!("request_timeout"))
    );
    server.until("both gone", |server| server.running() == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_frees_its_slots() {
    let server = Server::start().await;
    let endless = json!({"n": 4, "num_inference_steps": ENDLESS});
    let cancelled = |server: &Server| {
        server.metrics.cancelled.with_label_values(&[CLASSES, "disconnect"]).get()
    };

    // While it waits for its reply …
    let waiting = tokio::spawn(server.router().oneshot(streamed(endless.clone())));
    server.until("running", |server| server.running() == 4).await;
    waiting.abort();
    server.until("cancelled", |server| cancelled(server) == 4 && server.running() == 0).await;

    // … and in the middle of its stream.
    let mut body = endless;
    body["stream"] = json!(true);
    let response = server.router().oneshot(streamed(body)).await.unwrap();
    server.until("running", |server| server.running() == 4).await;
    drop(response);
    server.until("cancelled", |server| cancelled(server) == 8 && server.running() == 0).await;
    let text = server.get("/metrics").await.text();
    assert!(text.contains("code=\"499\""), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_says_when_to_come_back() {
    let server = Server::start().await;
    let endless = json!({"n": 4, "stream": true, "num_inference_steps": ENDLESS});
    let first = server.router().oneshot(streamed(endless.clone())).await.unwrap();
    let second = server.router().oneshot(streamed(endless)).await.unwrap();
    let reply = server.generate(json!({})).await;
    assert_eq!(
        (reply.status.as_u16(), &reply.json()["error"]["code"]),
        (429, &json!("queue_full"))
    );
    assert!(reply.header("retry-after").parse::<u64>().unwrap() >= 1);
    drop(second);
    // Another model's, because the first request fills this one's evaluations.
    let other = json!({"model": PLAIN});
    let room = async { while server.generate(other.clone()).await.status != 200 {} };
    tokio::time::timeout(std::time::Duration::from_secs(30), room).await.unwrap();
    drop(first);
}
