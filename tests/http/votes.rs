//! Blind pairs, and votes on them.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::server::{CLASSES, PLAIN, Reply, STUDENT, Server, png};

impl Server {
    async fn pair_of(&self, experiment: &str, body: Value) -> Reply {
        self.post(&format!("/v1/experiments/{experiment}/pairs"), body.to_string()).await
    }

    async fn vote(&self, experiment: &str, body: Value) -> Reply {
        self.post(&format!("/v1/experiments/{experiment}/votes"), body.to_string()).await
    }

    /// Votes for a model's image, or for neither; the student's is known by drawing it again.
    async fn vote_for(&self, winner: Option<&str>, seed: u64) -> Value {
        let pair = self.pair_of("e", json!({"seed": seed, "class_label": 1})).await.json();
        let student =
            self.generate(json!({"model": STUDENT, "seed": seed, "class_label": 1})).await.json();
        let of_student = |side: usize| png(&pair["images"][side]).0 == png(&student["data"][0]).0;
        assert_ne!(of_student(0), of_student(1));
        let choice = match winner {
            Some(model) => json!(usize::from(of_student(0) != (model == STUDENT))),
            None => json!("tie"),
        };
        let vote = json!({"pair_id": pair["pair_id"], "choice": choice, "idempotency_key": seed.to_string()});
        self.vote("e", vote).await.json()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pair_tells_nothing_but_its_images_and_a_vote_tells_the_rest() {
    let server = Server::with_experiment([1.0, 0.0]).await;
    let mut orders = BTreeSet::new();
    for number in 0..24 {
        let reply = server.pair_of("e", json!({"prompt": "bag"})).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        let names: BTreeSet<_> = reply.headers.keys().map(|name| name.as_str()).collect();
        let expected = ["content-length", "content-type", "server-timing", "x-request-id"];
        assert!(names.is_subset(&expected.into()), "{names:?}");
        assert!(reply.header("server-timing").starts_with("total;dur="));
        let mut body = reply.json();
        let pair_id = body["pair_id"].as_str().unwrap().to_owned();
        let images = body["images"].take();
        for image in images.as_array().unwrap() {
            assert_eq!(png(image).1, [], "no word of what made it");
        }
        assert_eq!(
            body,
            json!({"pair_id": pair_id, "images": null, "class_label": 2, "class_name": "Bag"})
        );

        let vote = json!({"pair_id": pair_id, "choice": 0, "idempotency_key": number.to_string()});
        let vote = server.vote("e", vote).await;
        assert_eq!(vote.status, 201, "{}", vote.text());
        let vote = vote.json();
        let models: Vec<_> =
            vote["models"].as_array().unwrap().iter().map(|m| m.as_str()).collect();
        assert_eq!(BTreeSet::from_iter(models.iter().flatten()), [&CLASSES, &STUDENT].into());
        assert_eq!(vote["winner"], vote["models"][0]);
        orders.insert(vote["models"].to_string());
        // Both are what their models make of that seed.
        for (side, model) in models.into_iter().enumerate() {
            let alone = json!({"model": model, "seed": vote["seed"], "prompt": "bag"});
            let alone = server.generate(alone).await.json();
            assert_eq!(png(&images[side]).0, png(&alone["data"][0]).0);
        }
    }
    assert_eq!(orders.len(), 2, "the order is drawn");
    let arm = server.experiment("e").await["arms"][0].clone();
    assert_eq!(arm["requests"], 0, "pairs are not the experiment's traffic");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vote_counts_once_whatever_is_sent_again() {
    let server = Server::with_experiment([1.0, 1.0]).await;
    let pair = async || server.pair_of("e", json!({"seed": 5})).await.json()["pair_id"].clone();
    let (first, second) = (pair().await, pair().await);
    let vote = json!({"pair_id": first, "choice": 1, "idempotency_key": "k"});
    let counted = server.vote("e", vote.clone()).await;
    assert_eq!(counted.status, 201);
    assert_eq!(counted.json()["winner"], counted.json()["models"][1]);
    assert_eq!(counted.json()["seed"], 5);
    let again = server.vote("e", vote.clone()).await;
    assert_eq!((again.status.as_u16(), again.json()), (200, counted.json()));
    let cases = [
        (json!({"pair_id": first, "choice": 0, "idempotency_key": "k"}), 409, "idempotency_key"),
        (
            json!({"pair_id": first, "choice": "tie", "idempotency_key": "k"}),
            409,
            "idempotency_key",
        ),
        (json!({"pair_id": second, "choice": 1, "idempotency_key": "k"}), 409, "idempotency_key"),
        (json!({"pair_id": first, "choice": 1, "idempotency_key": "l"}), 409, "pair_id"),
        (json!({"pair_id": "made-up", "choice": 1, "idempotency_key": "l"}), 404, "pair_id"),
        (json!({"pair_id": "", "choice": 1, "idempotency_key": "l"}), 404, "pair_id"),
        (json!({"pair_id": second, "choice": 2, "idempotency_key": "l"}), 400, "choice"),
        (json!({"pair_id": second, "choice": -1, "idempotency_key": "l"}), 400, "choice"),
        (json!({"pair_id": second, "choice": 0.5, "idempotency_key": "l"}), 400, "choice"),
        (json!({"pair_id": second, "choice": "left", "idempotency_key": "l"}), 400, "choice"),
        (json!({"pair_id": second, "choice": null, "idempotency_key": "l"}), 400, "choice"),
        (json!({"pair_id": second, "choice": 1, "idempotency_key": ""}), 400, "idempotency_key"),
        (
            json!({"pair_id": second, "choice": 1, "idempotency_key": "x".repeat(65)}),
            400,
            "idempotency_key",
        ),
        (json!({"pair_id": second, "choice": 1}), 400, "idempotency_key"),
        (json!({"choice": 1, "idempotency_key": "l"}), 400, "pair_id"),
        (json!({"pair_id": second, "choice": 1, "idempotency_key": "l", "who": 1}), 400, "who"),
    ];
    for (body, status, param) in cases {
        let reply = server.vote("e", body.clone()).await;
        assert_eq!(reply.status, status, "{body}: {}", reply.text());
        assert_eq!(reply.json()["error"]["param"], param, "{body}: {}", reply.text());
    }
    let counts = |shown: &Value| [0, 1].map(|arm| shown["arms"][arm]["wins"].as_u64().unwrap());
    assert_eq!(counts(&server.experiment("e").await).iter().sum::<u64>(), 1);
    let tie = json!({"pair_id": second, "choice": "tie", "idempotency_key": "l"});
    let tie = server.vote("e", tie).await;
    assert_eq!((tie.status.as_u16(), &tie.json()["winner"]), (201, &Value::Null));
    assert_eq!(server.vote("nope", vote).await.json()["error"]["code"], "experiment_not_found");
}

#[tokio::test(flavor = "multi_thread")]
async fn votes_become_results_and_series() {
    let server = Server::with_experiment([1.0, 1.0]).await;
    // The student wins six, loses two, and two are ties.
    for seed in 0..10 {
        let winner = match seed {
            0..6 => Some(STUDENT),
            6..8 => Some(CLASSES),
            _ => None,
        };
        let vote = server.vote_for(winner, seed).await;
        assert_eq!(vote["winner"], json!(winner));
    }
    let shown = server.experiment("e").await;
    let student = &shown["arms"][1];
    let counts = |arm: &Value| json!([arm["wins"], arm["losses"], arm["ties"]]);
    assert_eq!(counts(student), json!([6, 2, 2]));
    assert_eq!(counts(&shown["arms"][0]), json!([2, 6, 2]));
    assert_eq!(student["win_rate"], 0.75);
    let near = |value: &Value, expected: f64| (value.as_f64().unwrap() - expected).abs() < 1e-9;
    // statsmodels: proportion_confint(6, 8, method="wilson").
    assert!(near(&student["wilson_interval"][0], 0.409_275_430_310_168_83), "{student}");
    assert!(near(&student["wilson_interval"][1], 0.928_520_787_247_890_9), "{student}");
    let p_value = student["p_value"].as_f64().unwrap();
    assert!(0.0 < p_value && p_value <= 1.0, "{student}");
    assert_eq!(shown["arms"][0]["p_value"], student["p_value"]);
    let compared = &shown["comparisons"];
    assert_eq!(compared.as_array().unwrap().len(), 1);
    assert_eq!(counts(&compared[0]), json!([2, 6, 2]));
    let text = server.get("/metrics").await.text();
    for line in [
        "understudy_experiment_votes_total{experiment=\"e\",model=\"student\",outcome=\"win\"} 6",
        "understudy_experiment_votes_total{experiment=\"e\",model=\"classes\",outcome=\"tie\"} 2",
        "understudy_experiment_win_ratio{experiment=\"e\",model=\"student\"} 0.75",
        "understudy_experiment_win_interval_ratio{experiment=\"e\",model=\"student\",end=\"low\"} 0.409275",
        &format!(
            "understudy_experiment_p_value_ratio{{experiment=\"e\",model=\"student\"}} {p_value}"
        ),
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_more_arms_every_two_are_shown() {
    let server = Server::pair().await;
    let arms: Vec<_> =
        [CLASSES, STUDENT, PLAIN].iter().map(|m| json!({"model": m, "weight": 1})).collect();
    let body = json!({"id": "three", "arms": arms});
    assert_eq!(server.post("/v1/experiments", body.to_string()).await.status, 201);
    let mut statuses = BTreeSet::new();
    while statuses.len() < 2 {
        let reply = server.pair_of("three", json!({})).await;
        statuses.insert(reply.status.as_u16());
        if reply.status == 409 {
            // The plain model makes RGB, the others gray.
            assert_eq!(reply.json()["error"]["code"], "different_shapes");
        }
    }
    assert_eq!(statuses, [200, 409].into());
    let shown = server.experiment("three").await;
    let models: Vec<_> =
        shown["comparisons"].as_array().unwrap().iter().map(|c| c["models"].clone()).collect();
    assert_eq!(json!(models), json!([[CLASSES, STUDENT], [CLASSES, PLAIN], [STUDENT, PLAIN]]));
}

#[tokio::test(flavor = "multi_thread")]
async fn pairs_that_cannot_be_made_are_refused() {
    let server = Server::with_experiment([1.0, 1.0]).await;
    let cases = [
        (json!({"n": 2}), "n"),
        (json!({"stream": true}), "stream"),
        (json!({"model": CLASSES}), "model"),
        (json!({"class_label": 9}), "class_label"),
        (json!({"num_inference_steps": 0}), "num_inference_steps"),
        (json!({"deadline_ms": 0}), "deadline_ms"),
        (json!({"seed": -1}), "seed"),
    ];
    for (body, param) in cases {
        let reply = server.pair_of("e", body.clone()).await;
        assert_eq!(reply.status, 400, "{body}: {}", reply.text());
        assert_eq!(reply.json()["error"]["param"], param, "{body}: {}", reply.text());
    }
    assert_eq!(server.pair_of("nope", json!({})).await.status, 404);
    let jpeg = server.pair_of("e", json!({"output_format": "jpeg"})).await.json();
    for side in 0..2 {
        assert!(jpeg["images"][side]["b64_json"].as_str().unwrap().starts_with("/9j/"), "both");
    }
}
