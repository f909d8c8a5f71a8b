//! Bad input: the right status, and a message that names field, value, limit and remedy.

use axum::{body::Body, http::Request};
use serde_json::{Value, json};

use crate::server::{PLAIN, Server};

/// Body, status, `param`, `code`, and what the message must contain.
type Case = (Value, u16, &'static str, &'static str, &'static [&'static str]);

#[tokio::test(flavor = "multi_thread")]
async fn bad_values_are_refused_by_name() {
    let server = Server::start().await;
    let cases: &[Case] = &[
        (json!({"n": 0}), 400, "n", "invalid_value", &["`n` is 0", "1 to 4"]),
        (json!({"n": 5}), 400, "n", "invalid_value", &["`n` is 5", "1 to 4", "--max-queue"]),
        (json!({"n": "two"}), 400, "n", "invalid_value", &["`n` is \"two\"", "whole number"]),
        (json!({"n": 1.5}), 400, "n", "invalid_value", &["`n` is 1.5", "whole number"]),
        (json!({"seed": -1}), 400, "seed", "invalid_value", &["-1", "0 to 9007199254740991"]),
        (json!({"seed": 0.5}), 400, "seed", "invalid_value", &["0.5", "whole number"]),
        (json!({"seed": 9007199254740992u64}), 400, "seed", "invalid_value", &["9007199254740991"]),
        (json!({"seed": u64::MAX}), 400, "seed", "invalid_value", &["9007199254740991"]),
        (json!({"size": "64x64"}), 400, "size", "invalid_value", &["\"64x64\"", "8x8"]),
        (json!({"size": 8}), 400, "size", "invalid_value", &["`size` is 8", "string"]),
        (json!({"class_label": 4}), 400, "class_label", "invalid_value", &["0 to 3", "Ankle boot"]),
        (json!({"class_label": -1}), 400, "class_label", "invalid_value", &["-1", "0 to 3"]),
        (json!({"class_label": "dog"}), 400, "class_label", "invalid_value", &["\"dog\"", "Bag"]),
        (json!({"class_label": {}}), 400, "class_label", "invalid_value", &["number or its name"]),
        (json!({"prompt": "a dog"}), 400, "prompt", "invalid_value", &["\"a dog\"", "Bag"]),
        (
            json!({"prompt": "1", "class_label": 1}),
            400,
            "class_label",
            "conflicting_fields",
            &["one of them"],
        ),
        (
            json!({"model": PLAIN, "prompt": "1"}),
            400,
            "prompt",
            "invalid_value",
            &["unconditional"],
        ),
        (
            json!({"model": PLAIN, "class_label": 1}),
            400,
            "class_label",
            "invalid_value",
            &["unconditional"],
        ),
        (json!({"model": "nope"}), 404, "model", "model_not_found", &["\"nope\"", "/v1/models"]),
        (json!({"model": "../classes"}), 404, "model", "model_not_found", &["../classes"]),
        (
            json!({"model": "experiment:x"}),
            404,
            "model",
            "experiment_not_found",
            &["\"x\"", "/v1/experiments"],
        ),
        (
            json!({"num_inference_steps": 0}),
            400,
            "num_inference_steps",
            "invalid_value",
            &["1 to 20000"],
        ),
        (
            json!({"num_inference_steps": 100000}),
            400,
            "num_inference_steps",
            "invalid_value",
            &["100000", "1 to 20000"],
        ),
        (
            json!({"scheduler": "plms"}),
            400,
            "scheduler",
            "invalid_value",
            &["\"plms\"", "ddim, dpm++"],
        ),
        (json!({"eta": -0.5}), 400, "eta", "invalid_value", &["-0.5"]),
        (json!({"scheduler": "euler", "eta": 0.5}), 400, "eta", "invalid_value", &["euler"]),
        (
            json!({"model": PLAIN, "guidance_scale": 2}),
            400,
            "guidance_scale",
            "invalid_value",
            &["null class"],
        ),
        (json!({"output_format": "gif"}), 400, "output_format", "invalid_value", &["gif", "webp"]),
        (
            json!({"output_compression": 50}),
            400,
            "output_compression",
            "conflicting_fields",
            &["png", "jpeg"],
        ),
        (
            json!({"output_format": "jpeg", "output_compression": 101}),
            400,
            "output_compression",
            "invalid_value",
            &["0 to 100"],
        ),
        (json!({"response_format": "url"}), 400, "response_format", "invalid_value", &["b64_json"]),
        (json!({"stream": 1}), 400, "stream", "invalid_value", &["true or false"]),
        (
            json!({"stream": true, "partial_images": 4}),
            400,
            "partial_images",
            "invalid_value",
            &["0 to 3"],
        ),
        (json!({"partial_images": 1}), 400, "partial_images", "conflicting_fields", &["stream"]),
        (json!({"deadline_ms": 0}), 400, "deadline_ms", "invalid_value", &["at least 1"]),
        (
            json!({"deadline_ms": 1, "num_inference_steps": 20000}),
            504,
            "deadline_ms",
            "deadline_unreachable",
            &["idle server"],
        ),
        (json!({"steps": 4}), 400, "steps", "unknown_field", &["`steps`", "num_inference_steps"]),
    ];
    for (body, status, param, code, parts) in cases {
        let reply = server.generate(body.clone()).await;
        assert_eq!(reply.status, *status, "{body}: {}", reply.text());
        let error = &reply.json()["error"];
        assert_eq!(error["param"], *param, "{body}: {error}");
        assert_eq!(error["code"], *code, "{body}: {error}");
        for part in *parts {
            let message = error["message"].as_str().unwrap();
            assert!(message.contains(part), "{body}: {message:?} lacks {part:?}");
        }
    }
    // None of them left a trace in the engine.
    assert_eq!(server.generate(json!({})).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_that_are_no_request_are_refused() {
    let server = Server::start().await;
    let cases = [
        ("{", "malformed_json", "line 1 column 1"),
        ("", "malformed_json", "line 1 column 0"),
        ("{\"n\": 1}\n{", "malformed_json", "line 2 column 1"),
        ("{\"guidance_scale\": NaN}", "malformed_json", "column 20"),
        ("{\"guidance_scale\": 1e999}", "malformed_json", "out of range"),
        ("{\"n\": 1, \"n\": 2}", "duplicate_field", "more than once"),
        ("[null]", "invalid_body", "JSON object"),
        ("7", "invalid_body", "integer `7`"),
        ("\"\\ud800\"", "malformed_json", "hex escape"),
    ];
    for (body, code, part) in cases {
        let reply = server.post("/v1/images/generations", body).await;
        assert_eq!(reply.status, 400, "{body}");
        assert_eq!(reply.json()["error"]["code"], code, "{body}: {}", reply.text());
        assert!(reply.text().contains(part), "{body}: {}", reply.text());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_of_the_wrong_kind_or_size_are_refused() {
    let server = Server::start().await;
    let large = server.post("/v1/images/generations", vec![b' '; 10_000_000]).await;
    assert_eq!(large.status, 413);
    assert!(large.text().contains("4096"), "{}", large.text());

    let with = |name: &str, value: &str| {
        Request::post("/v1/images/generations").header(name, value).body(Body::from("{}")).unwrap()
    };
    let form = server.send(with("content-type", "application/x-www-form-urlencoded")).await;
    assert_eq!(form.status, 415);
    assert!(form.text().contains("application/json"), "{}", form.text());
    assert_eq!(server.send(with("content-encoding", "gzip")).await.status, 415);
    let charset = with("content-type", "application/JSON; charset=utf-8");
    assert_eq!(server.send(charset).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_paths_and_methods_answer_in_the_shape_of_their_api() {
    let server = Server::start().await;
    let missing = server.get("/v1/nothing").await;
    assert_eq!(
        (missing.status.as_u16(), &missing.json()["error"]["code"]),
        (404, &json!("path_not_found"))
    );
    let missing = server.get("/v2/nothing").await;
    assert_eq!(missing.status, 404);
    assert!(missing.json()["error"].as_str().unwrap().contains("/v2/nothing"));
    assert_eq!(server.get("/docs/nothing.js").await.json()["error"]["code"], "path_not_found");

    for (path, method, allow) in [
        ("/v1/images/generations", "GET", "POST"),
        ("/v1/models", "DELETE", "GET,HEAD"),
        ("/v2/models/classes/infer", "PATCH", "POST"),
        ("/health", "OPTIONS", "GET,HEAD"),
    ] {
        let request = Request::builder().method(method).uri(path).body(Body::empty()).unwrap();
        let reply = server.send(request).await;
        assert_eq!(reply.status, 405, "{method} {path}");
        assert_eq!(reply.header("allow"), allow, "{method} {path}");
        assert!(reply.json().get("error").is_some());
    }
}
