//! `model: "draft"`: the student's image, then the teacher's.

use serde_json::json;

use crate::server::{CLASSES, STUDENT, Server, events, post};

#[tokio::test(flavor = "multi_thread")]
async fn a_reply_holds_the_final_and_the_draft() {
    let server = Server::pair().await;
    let request = json!({"model": "draft", "n": 2, "seed": 5, "class_label": 1});
    let reply = server.generate(request).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert_eq!(reply.header("x-understudy-model"), CLASSES);
    let body = reply.json();
    for (model, part) in [(CLASSES, &body), (STUDENT, &body["draft"])] {
        assert_eq!(part["model"], model);
        assert!(part["timings"]["device_ms"].as_f64().unwrap() > 0.0);
        let alone = json!({"model": model, "n": 2, "seed": 5, "class_label": 1});
        let alone = server.generate(alone).await.json();
        assert_eq!(part["data"], alone["data"], "{model}");
        assert!(alone.get("draft").is_none());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_gives_the_draft_as_a_partial_image() {
    let server = Server::pair().await;
    let request = json!({"model": "draft", "seed": 5, "class_label": 1, "stream": true});
    let reply = server.generate(request).await;
    let events = events(&reply.text());
    let names: Vec<_> = events.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["image_generation.partial_image", "image_generation.completed"]);
    for ((_, event), model) in events.iter().zip([STUDENT, CLASSES]) {
        assert_eq!(event["model"], model);
        let alone = server.generate(json!({"model": model, "seed": 5, "class_label": 1})).await;
        assert_eq!(event["b64_json"], alone.json()["data"][0]["b64_json"]);
    }
    assert_eq!(
        (&events[0].1["partial_image_index"], &events[0].1["draft"]),
        (&json!(0), &json!(true))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draft_takes_a_student_and_two_bodies() {
    let server = Server::start().await;
    let reply = server.generate(json!({"model": "draft"})).await;
    assert_eq!((reply.status.as_u16(), &reply.json()["error"]["param"]), (404, &json!("model")));
    let mut request = post("/v1/images/generations", json!({"model": "draft"}).to_string());
    request.headers_mut().insert("accept", "image/png".parse().unwrap());
    let reply = server.send(request).await;
    assert_eq!(
        (reply.status.as_u16(), &reply.json()["error"]["code"]),
        (400, &json!("conflicting_fields"))
    );
}
