//! Traffic split between models: by weight, by key, while weights change and models come and go.

use std::collections::BTreeSet;

use axum::{body::Body, http::Request};
use serde_json::{Value, json};

use crate::server::{CLASSES, PLAIN, Reply, STUDENT, Server, post};

impl Server {
    /// A server with an experiment `e` between the default model and its student.
    pub(crate) async fn with_experiment(weights: [f64; 2]) -> Self {
        let server = Self::pair().await;
        let arms = json!([{"model": CLASSES, "weight": weights[0]}, {"model": STUDENT, "weight": weights[1]}]);
        let reply =
            server.post("/v1/experiments", json!({"id": "e", "arms": arms}).to_string()).await;
        assert_eq!(reply.status, 201, "{}", reply.text());
        server
    }

    pub(crate) async fn experiment(&self, id: &str) -> Value {
        self.get(&format!("/v1/experiments/{id}")).await.json()
    }

    pub(crate) async fn ask(&self, method: &str, path: &str, body: Value) -> Reply {
        let request = Request::builder().method(method).uri(path);
        let request = request.header("content-type", "application/json");
        self.send(request.body(Body::from(body.to_string())).unwrap()).await
    }

    async fn served(&self, user: &str) -> String {
        let body = json!({"model": "experiment:e", "user": user, "num_inference_steps": 1});
        let reply = self.generate(body).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        let model = reply.json()["model"].as_str().unwrap().to_owned();
        assert_eq!(reply.header("x-understudy-model"), model);
        model
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_experiment_is_created_shown_changed_and_removed() {
    let server = Server::with_experiment([1.0, 3.0]).await;
    let shown = server.experiment("e").await;
    assert_eq!(shown["id"], "e");
    assert!(shown["created"].as_u64().unwrap() > 1_700_000_000);
    let arm = |model: &str, weight: f64, share: f64| {
        json!({"model": model, "weight": weight, "share": share, "requests": 0, "images": 0,
            "latency_ms": null, "wins": 0, "losses": 0, "ties": 0, "win_rate": null,
            "wilson_interval": null, "p_value": 1.0})
    };
    assert_eq!(shown["arms"], json!([arm(CLASSES, 1.0, 0.25), arm(STUDENT, 3.0, 0.75)]));
    assert_eq!(shown["comparisons"][0]["models"], json!([CLASSES, STUDENT]));
    let list = server.get("/v1/experiments").await.json();
    assert_eq!(list, json!({"object": "list", "data": [shown]}));

    let change = json!({"arms": [{"model": STUDENT, "weight": 1}]});
    let changed = server.ask("PATCH", "/v1/experiments/e", change).await;
    assert_eq!(changed.status, 200, "{}", changed.text());
    assert_eq!(changed.json()["arms"], json!([arm(CLASSES, 1.0, 0.5), arm(STUDENT, 1.0, 0.5)]));
    assert_eq!(server.experiment("e").await, changed.json());

    let gone = server.ask("DELETE", "/v1/experiments/e", json!({})).await;
    assert_eq!((gone.status.as_u16(), gone.body.len()), (204, 0));
    for (method, path) in [("GET", "e"), ("DELETE", "e"), ("GET", "%ff")] {
        let path = format!("/v1/experiments/{path}");
        let reply =
            server.send(Request::builder().method(method).uri(path).body(Body::empty()).unwrap());
        let reply = reply.await;
        assert_eq!(reply.status, 404);
        assert_eq!(reply.json()["error"]["code"], "experiment_not_found");
    }
    assert_eq!(server.get("/v1/experiments").await.json()["data"], json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_stays_with_its_arm_and_weights_move_as_few_as_they_can() {
    let server = Server::with_experiment([1.0, 1.0]).await;
    let mut before = Vec::new();
    for user in 0..40 {
        let model = server.served(&user.to_string()).await;
        assert_eq!(server.served(&user.to_string()).await, model);
        before.push(model);
    }
    let students = before.iter().filter(|model| *model == STUDENT).count();
    assert!((8..=32).contains(&students), "{students} of 40");
    let more = json!({"arms": [{"model": STUDENT, "weight": 3}]});
    assert_eq!(server.ask("PATCH", "/v1/experiments/e", more).await.status, 200);
    for (user, before) in before.iter().enumerate() {
        let after = server.served(&user.to_string()).await;
        assert!(after == *before || after == STUDENT, "nobody leaves the arm that grows");
    }
    let all = json!({"arms": [{"model": CLASSES, "weight": 0}]});
    assert_eq!(server.ask("PATCH", "/v1/experiments/e", all).await.status, 200);
    for user in 0..10 {
        assert_eq!(server.served(&user.to_string()).await, STUDENT);
    }
    let arms = server.experiment("e").await["arms"].clone();
    let requests = |arm: usize| arms[arm]["requests"].as_u64().unwrap();
    assert_eq!(requests(0) + requests(1), 130);
    assert_eq!(arms[0]["images"], requests(0));
    let latency = &arms[1]["latency_ms"];
    assert!(latency["mean"].as_f64().unwrap() > 0.0, "{latency}");
    assert!(latency["p50"].as_f64().unwrap() <= latency["p95"].as_f64().unwrap(), "{latency}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_header_wins_over_the_user_and_without_either_chance_decides() {
    let server = Server::with_experiment([1.0, 1.0]).await;
    let keyed = async |key: Option<&str>, user: Option<&str>| {
        let body = json!({"model": "experiment:e", "user": user, "num_inference_steps": 1});
        let mut request = post("/v1/images/generations", body.to_string());
        if let Some(key) = key {
            request.headers_mut().insert("x-understudy-key", key.parse().unwrap());
        }
        server.send(request).await.json()["model"].as_str().unwrap().to_owned()
    };
    let by_user = keyed(None, Some("0")).await;
    let mut other = 1;
    while server.served(&other.to_string()).await == by_user {
        other += 1;
    }
    let other = other.to_string();
    assert_ne!(keyed(Some(&other), Some("0")).await, by_user);
    assert_eq!(keyed(Some(""), Some("0")).await, by_user, "an empty header is none");
    let mut chance = BTreeSet::new();
    while chance.len() < 2 {
        chance.insert(keyed(None, None).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_and_bare_images_count_and_the_series_go_with_the_experiment() {
    let server = Server::with_experiment([0.0, 2.0]).await;
    let streamed =
        json!({"model": "experiment:e", "n": 2, "stream": true, "num_inference_steps": 1});
    let streamed = server.generate(streamed).await.text();
    assert!(streamed.contains(&format!("\"model\":\"{STUDENT}\"")), "{streamed}");
    let mut bare = post("/v1/images/generations", json!({"model": "experiment:e"}).to_string());
    bare.headers_mut().insert("accept", "image/png".parse().unwrap());
    assert_eq!(server.send(bare).await.header("x-understudy-model"), STUDENT);
    let arm = server.experiment("e").await["arms"][1].clone();
    assert_eq!((&arm["requests"], &arm["images"]), (&json!(2), &json!(3)));

    let text = server.get("/metrics").await.text();
    for line in [
        "understudy_experiment_share_ratio{experiment=\"e\",model=\"classes\"} 0",
        "understudy_experiment_share_ratio{experiment=\"e\",model=\"student\"} 1",
        "understudy_experiment_images_total{experiment=\"e\",model=\"student\"} 3",
        "understudy_experiment_request_duration_seconds_count{experiment=\"e\",model=\"student\"} 2",
        "understudy_experiment_request_duration_seconds_bucket{experiment=\"e\",model=\"student\",le=\"+Inf\"} 2",
        "understudy_experiment_votes_total{experiment=\"e\",model=\"student\",outcome=\"win\"} 0",
        "understudy_experiment_p_value_ratio{experiment=\"e\",model=\"classes\"} 1",
        "# TYPE understudy_experiment_votes_total counter",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
    assert!(!text.contains("understudy_experiment_win_ratio"), "no rate without votes");
    server.ask("DELETE", "/v1/experiments/e", json!({})).await;
    let text = server.get("/metrics").await.text();
    assert!(!text.contains("understudy_experiment_"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn experiments_that_make_no_sense_are_refused_by_name() {
    let server = Server::with_experiment([1.0, 1.0]).await;
    let arm = |model: &str, weight: f64| json!({"model": model, "weight": weight});
    let two = json!([arm(CLASSES, 1.0), arm(STUDENT, 1.0)]);
    let cases = [
        (json!({"id": "x"}), 400, "arms", "missing_field", "list of"),
        (json!({"arms": two}), 400, "id", "missing_field", "a string"),
        (json!({"id": 7, "arms": two}), 400, "id", "invalid_value", "a string"),
        (json!({"id": "", "arms": two}), 400, "id", "invalid_value", "1 to 64"),
        (json!({"id": "a b", "arms": two}), 400, "id", "invalid_value", "letters, digits"),
        (json!({"id": "..", "arms": two}), 400, "id", "invalid_value", "reserved"),
        (json!({"id": "auto", "arms": two}), 400, "id", "invalid_value", "reserved"),
        (json!({"id": "x".repeat(65), "arms": two}), 400, "id", "invalid_value", "1 to 64"),
        (json!({"id": "e", "arms": two}), 409, "id", "experiment_exists", "PATCH"),
        (json!({"id": "x", "arms": two, "salt": 1}), 400, "salt", "unknown_field", "id"),
        (json!({"id": "x", "arms": [arm(CLASSES, 1.0)]}), 400, "arms", "invalid_value", "2 to 6"),
        (json!({"id": "x", "arms": []}), 400, "arms", "invalid_value", "2 to 6"),
        (json!({"id": "x", "arms": {}}), 400, "arms", "invalid_value", "list of"),
        (
            json!({"id": "x", "arms": [arm(CLASSES, 1.0), arm(CLASSES, 2.0)]}),
            400,
            "arms[1].model",
            "invalid_value",
            "once",
        ),
        (
            json!({"id": "x", "arms": [arm(CLASSES, 1.0), arm("nope", 2.0)]}),
            404,
            "arms[1].model",
            "model_not_found",
            "`arms[1].model` is \"nope\"",
        ),
        (
            json!({"id": "x", "arms": [arm("auto", 1.0), arm(CLASSES, 2.0)]}),
            400,
            "arms[0].model",
            "invalid_value",
            "no model's",
        ),
        (
            json!({"id": "x", "arms": [arm(CLASSES, 0.0), arm(STUDENT, 0.0)]}),
            400,
            "arms",
            "invalid_value",
            "sum to zero",
        ),
        (
            json!({"id": "x", "arms": [arm(CLASSES, 1.0), arm(STUDENT, -1.0)]}),
            400,
            "arms[1].weight",
            "invalid_value",
            "0 to 1000000",
        ),
        (
            json!({"id": "x", "arms": [arm(CLASSES, 1.0), arm(STUDENT, 1e7)]}),
            400,
            "arms[1].weight",
            "invalid_value",
            "0 to 1000000",
        ),
        (
            json!({"id": "x", "arms": [arm(CLASSES, 1.0), {"model": STUDENT}]}),
            400,
            "arms[1].weight",
            "missing_field",
            "a number",
        ),
        (
            json!({"id": "x", "arms": [arm(CLASSES, 1.0), {"model": STUDENT, "weight": "1"}]}),
            400,
            "arms[1].weight",
            "invalid_value",
            "string",
        ),
        (
            json!({"id": "x", "arms": [arm(CLASSES, 1.0), {"model": STUDENT, "weight": 1, "w": 1}]}),
            400,
            "w",
            "unknown_field",
            "weight",
        ),
    ];
    for (body, status, param, code, part) in cases {
        let reply = server.post("/v1/experiments", body.to_string()).await;
        assert_eq!(reply.status, status, "{body}: {}", reply.text());
        let error = &reply.json()["error"];
        assert_eq!(
            (&error["param"], &error["code"]),
            (&json!(param), &json!(code)),
            "{body}: {error}"
        );
        assert!(error["message"].as_str().unwrap().contains(part), "{body}: {error}");
    }
    for body in
        ["{\"id\": \"x\", \"arms\": [{\"model\": \"classes\", \"weight\": 1e999}]}", "[]", ""]
    {
        assert_eq!(server.post("/v1/experiments", body).await.status, 400, "{body}");
    }
    let changes = [
        (json!({}), "arms"),
        (json!({"arms": [arm(PLAIN, 1.0)]}), "arms[0].model"),
        (json!({"arms": [arm(CLASSES, 1.0), arm(CLASSES, 1.0)]}), "arms[1].model"),
        (json!({"arms": [arm(CLASSES, -0.5)]}), "arms[0].weight"),
        (json!({"arms": [arm(CLASSES, 0.0), arm(STUDENT, 0.0)]}), "arms"),
        (json!({"id": "f", "arms": [arm(CLASSES, 1.0)]}), "id"),
    ];
    for (body, param) in changes {
        let reply = server.ask("PATCH", "/v1/experiments/e", body.clone()).await;
        assert_eq!(reply.status, 400, "{body}: {}", reply.text());
        assert_eq!(reply.json()["error"]["param"], param, "{body}: {}", reply.text());
    }
    let unknown = server.ask("PATCH", "/v1/experiments/f", json!({"arms": []})).await;
    assert_eq!(unknown.status, 404);
    let put = server.ask("PUT", "/v1/experiments/e", json!({})).await;
    assert_eq!(put.status, 405);
    for method in ["GET", "PATCH", "DELETE"] {
        assert!(put.header("allow").contains(method), "{}", put.header("allow"));
    }
    let only = server.experiment("e").await;
    assert_eq!(only["arms"][1]["weight"], 1.0);
    for number in 1..16 {
        let body = json!({"id": number.to_string(), "arms": two});
        assert_eq!(server.post("/v1/experiments", body.to_string()).await.status, 201);
    }
    let full = server.post("/v1/experiments", json!({"id": "x", "arms": two}).to_string()).await;
    assert_eq!(full.status, 409);
    assert!(full.text().contains("16 experiments"), "{}", full.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_arm_that_was_unloaded_is_told() {
    let server = Server::with_experiment([0.0, 1.0]).await;
    let unload = format!("/v2/repository/models/{STUDENT}/unload");
    assert_eq!(server.post(&unload, "").await.status, 200);
    let reply = server.generate(json!({"model": "experiment:e"})).await;
    assert_eq!(reply.status, 503, "{}", reply.text());
    for part in ["\"e\"", "\"student\"", "/load", "PATCH /v1/experiments/e"] {
        let message = reply.json()["error"]["message"].as_str().unwrap().to_owned();
        assert!(message.contains(part), "{message}");
    }
    let pair = server.post("/v1/experiments/e/pairs", "{}").await;
    assert_eq!(pair.status, 503);
    let late = json!({"id": "f", "arms": [{"model": CLASSES, "weight": 1}, {"model": STUDENT, "weight": 1}]});
    assert_eq!(server.post("/v1/experiments", late.to_string()).await.status, 503);
    // The experiment itself goes on.
    let change =
        json!({"arms": [{"model": CLASSES, "weight": 1}, {"model": STUDENT, "weight": 0}]});
    assert_eq!(server.ask("PATCH", "/v1/experiments/e", change).await.status, 200);
    assert_eq!(server.served("anybody").await, CLASSES);
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_of_other_origins_may_change_and_remove() {
    let server = Server::with(|settings| settings.cors_allow_origin = vec!["*".into()]).await;
    for method in ["PATCH", "DELETE"] {
        let preflight = Request::options("/v1/experiments/e")
            .header("origin", "https://a.example")
            .header("access-control-request-method", method)
            .header("access-control-request-headers", "x-understudy-key")
            .body(Body::empty())
            .unwrap();
        let reply = server.send(preflight).await;
        assert!(reply.header("access-control-allow-methods").contains(method), "{method}");
        assert!(reply.header("access-control-allow-headers").contains("x-understudy-key"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_folder_that_is_gone_is_told_by_replies_health_and_metrics() {
    let server = Server::start().await;
    let arms = [CLASSES, PLAIN].map(|model| json!({"model": model, "weight": 1}));
    let create = |id: &str| json!({"id": id, "arms": arms}).to_string();
    assert_eq!(server.post("/v1/experiments", create("first")).await.status, 201);
    assert!(server.get("/health").await.json().get("experiments").is_none());
    std::fs::remove_dir_all(server.models.path().join("data")).unwrap();
    let refused = server.post("/v1/experiments", create("second")).await;
    assert_eq!(refused.status, 503, "{}", refused.text());
    assert_eq!(refused.json()["error"]["code"], "experiments_removed");
    let health = server.get("/health").await;
    // Images are made as before.
    assert_eq!(health.status, 200);
    assert!(
        health.json()["experiments"].as_str().unwrap().contains("removed"),
        "{}",
        health.text()
    );
    assert!(server.get("/metrics").await.text().contains("understudy_experiments_failing 1"));
}

#[tokio::test(flavor = "multi_thread")]
async fn arms_that_name_no_model_are_the_default_pair() {
    let server = Server::pair().await;
    let arms = |weights: &[u64]| {
        let arms: Vec<_> = weights.iter().map(|weight| json!({"weight": weight})).collect();
        json!({"id": "e", "arms": arms})
    };
    let created = server.post("/v1/experiments", arms(&[1, 1]).to_string()).await;
    assert_eq!(created.status, 201, "{}", created.text());
    let change = |weights: &[u64]| json!({"arms": arms(weights)["arms"]});
    let changed = server.ask("PATCH", "/v1/experiments/e", change(&[9, 1])).await.json();
    let weights = |reply: &Value| {
        let arms = reply["arms"].as_array().unwrap();
        arms.iter().map(|arm| (arm["model"].clone(), arm["share"].clone())).collect::<Vec<_>>()
    };
    assert_eq!(weights(&changed), [(json!(CLASSES), json!(0.9)), (json!(STUDENT), json!(0.1))]);

    for reply in [
        server.ask("PATCH", "/v1/experiments/e", change(&[1, 1, 1])).await,
        server.post("/v1/experiments", arms(&[1, 1, 1]).to_string()).await,
    ] {
        assert_eq!(reply.status, 400, "{}", reply.text());
        assert_eq!(reply.json()["error"]["param"], "arms[2].model");
    }
    // A teacher alone has no student to be an arm.
    let alone = Server::start().await;
    let reply = alone.post("/v1/experiments", arms(&[1, 1]).to_string()).await;
    assert_eq!(
        (reply.status.as_u16(), &reply.json()["error"]["param"]),
        (404, &json!("arms[1].model"))
    );
}
