//! `model: "auto"`: the teacher if it meets the deadline, else the student, else a refusal.

use serde_json::json;
use tower::ServiceExt;

use crate::server::{ENDLESS, SLOW_TEACHER, STUDENT, Server, post};

#[tokio::test(flavor = "multi_thread")]
async fn without_a_deadline_the_teacher_serves() {
    let server = Server::slow_pair().await;
    let request = json!({"model": "auto", "seed": 5, "num_inference_steps": 2});
    let reply = server.generate(request).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert_eq!(reply.header("x-understudy-model"), SLOW_TEACHER);
    let body = reply.json();
    assert_eq!(body["model"], SLOW_TEACHER);
    assert_eq!(body["routing"], json!({"reason": "no_deadline"}));
    let alone = json!({"model": SLOW_TEACHER, "seed": 5, "num_inference_steps": 2});
    let alone = server.generate(alone).await.json();
    assert_eq!(body["data"], alone["data"]);
    assert!(alone.get("routing").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_deadline_decides_who_serves() {
    let server = Server::slow_pair().await;
    let request = json!({"model": "auto", "deadline_ms": 60_000, "num_inference_steps": 2});
    let body = server.generate(request).await.json();
    assert_eq!(body["model"], SLOW_TEACHER);
    assert_eq!(body["routing"]["reason"], "teacher_in_time");
    assert!(body["routing"]["teacher_predicted_ms"].as_f64().unwrap() < 60_000.0);

    // By its card the teacher takes 20,000 steps.
    let request = json!({"model": "auto", "deadline_ms": 500, "seed": 3, "class_label": 1});
    let body = server.generate(request).await.json();
    assert_eq!(body["model"], STUDENT);
    assert_eq!(body["routing"]["reason"], "teacher_too_late");
    assert!(body["routing"]["teacher_predicted_ms"].as_f64().unwrap() > 500.0);
    assert!(body["routing"]["student_predicted_ms"].as_f64().unwrap() < 500.0);
    let alone = json!({"model": STUDENT, "seed": 3, "class_label": 1});
    assert_eq!(body["data"], server.generate(alone).await.json()["data"]);
    let text = server.get("/metrics").await.text();
    assert!(text.contains("understudy_prediction_ratio_count{model=\"student\"} 1"), "{text}");

    // A stream tells it with the image.
    let request = json!({"model": "auto", "deadline_ms": 500, "stream": true});
    let reply = server.generate(request).await;
    assert!(reply.text().contains("\"reason\":\"teacher_too_late\""), "{}", reply.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_can_do_in_time_is_refused() {
    let server = Server::slow_pair().await;
    let rejected = |reason| server.metrics.rejected.with_label_values(&[STUDENT, reason]).get();
    let request = json!({"model": "auto", "deadline_ms": 1, "num_inference_steps": ENDLESS});
    let reply = server.generate(request).await;
    let error = &reply.json()["error"];
    assert_eq!((reply.status.as_u16(), &error["code"]), (504, &json!("deadline_unreachable")));
    assert!(reply.header("retry-after").is_empty());
    assert_eq!(rejected("deadline_impossible"), 1);

    // Nobody waits longer than it takes, but there are only so many places.
    let endless = json!({"model": STUDENT, "n": 4, "num_inference_steps": ENDLESS, "stream": true});
    let endless = || server.router().oneshot(post("/v1/images/generations", endless.to_string()));
    let busy = endless().await.unwrap();
    let reply = server.generate(json!({"model": "auto", "deadline_ms": 500})).await;
    assert_eq!(
        reply.json()["model"],
        STUDENT,
        "it goes before those who have time: {}",
        reply.text()
    );
    let full = endless().await.unwrap();
    let reply = server.generate(json!({"model": "auto", "deadline_ms": 500})).await;
    assert_eq!(
        (reply.status.as_u16(), &reply.json()["error"]["code"]),
        (429, &json!("queue_full"))
    );
    assert!(reply.header("retry-after").parse::<u64>().unwrap() >= 1);
    assert_eq!(rejected("queue_full"), 1);
    drop((busy, full));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_student_the_teacher_serves_or_nobody() {
    let server = Server::start().await;
    let body = server.generate(json!({"model": "auto", "deadline_ms": 60_000})).await.json();
    assert_eq!(body["routing"]["reason"], "teacher_in_time");
    let request = json!({"model": "auto", "deadline_ms": 1, "num_inference_steps": ENDLESS});
    assert_eq!(server.generate(request).await.status, 504);
}
