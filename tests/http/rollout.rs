//! Guardrails and ramps: arms that stop by themselves, and arms that get more traffic by themselves.

use candle_core::{Device, Tensor};
use serde_json::{Value, json};
use understudy_models::noise;

use crate::server::{CLASSES, PLAIN, STUDENT, Server, png, write_model};

/// A student of the default model whose weights are other random numbers.
const BAD: &str = "bad-student";

impl Server {
    /// A server whose default model has a student that draws the same, and one that draws something else; every
    /// student's request is repeated.
    async fn with_bad_student() -> Self {
        let models = tempfile::tempdir().unwrap();
        let card =
            json!({"role": "student", "teacher": CLASSES, "defaults": {"num_inference_steps": 2}});
        write_model(models.path(), STUDENT, 1, Some(4), card.clone());
        write_model(models.path(), BAD, 1, Some(4), card);
        let weights = models.path().join(BAD).join("unet/diffusion_pytorch_model.safetensors");
        let mut tensors = candle_core::safetensors::load(&weights, &Device::Cpu).unwrap();
        for (seed, tensor) in tensors.values_mut().enumerate() {
            let mut values = vec![0.0; tensor.elem_count()];
            noise::normal(seed as u64 + 1000, 0, &mut values);
            *tensor = Tensor::from_vec(values, tensor.shape().clone(), &Device::Cpu).unwrap();
        }
        candle_core::safetensors::save(&tensors, &weights).unwrap();
        Self::over(models, |settings| settings.shadow_rate = 1.0).await
    }

    async fn begin(&self, body: Value) {
        let reply = self.post("/v1/experiments", body.to_string()).await;
        assert_eq!(reply.status, 201, "{}", reply.text());
    }

    /// Asks until the experiment `e` is as it should be.
    async fn ask_until(&self, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
        for user in 0..500 {
            let repeated = self.repeated();
            let ask = json!({"model": "experiment:e", "user": user.to_string()});
            let reply = self.generate(ask).await;
            assert_eq!(reply.status, 200, "{}", reply.text());
            if reply.json()["model"] != CLASSES {
                self.until("repeated", |server| server.repeated() > repeated).await;
            }
            let shown = self.experiment("e").await;
            if is_so(&shown) {
                return shown;
            }
        }
        panic!("never {what}: {}", self.experiment("e").await);
    }

    /// Requests that shadow traffic has done with.
    fn repeated(&self) -> u64 {
        let of = |(model, outcome)| self.metrics.shadows.with_label_values(&[model, outcome]).get();
        let outcomes = ["compared", "busy", "late", "failed"];
        outcomes.into_iter().flat_map(|outcome| [(STUDENT, outcome), (BAD, outcome)]).map(of).sum()
    }

    /// The same models and the same database, after a restart.
    async fn restarted(self) -> Self {
        self.experiments.close().await.unwrap();
        let Self { models, .. } = self;
        let folder = models.path().to_owned();
        Self::of(models, folder, 1, None, |settings| settings.shadow_rate = 1.0).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn shadow_traffic_stops_a_bad_arm_and_a_restart_keeps_the_decision() {
    let server = Server::with_bad_student().await;
    let arms = [CLASSES, STUDENT, BAD].map(|model| json!({"model": model, "weight": 1}));
    server
        .begin(json!({"id": "e", "arms": arms, "guardrails": {"min_psnr_db": 60, "min_comparisons": 3}}))
        .await;
    let shown = server.ask_until("stopped", |shown| shown["arms"][2]["stopped"].is_object()).await;
    let bad = &shown["arms"][2];
    assert_eq!((&bad["weight"], &bad["share"]), (&json!(0.0), &json!(0.0)));
    let stopped = &bad["stopped"];
    assert_eq!((&stopped["guardrail"], &stopped["weight"]), (&json!("min_psnr_db"), &json!(1.0)));
    let (observed, count) = (stopped["observed"].as_f64().unwrap(), &stopped["count"]);
    assert!(observed < 60.0 && *count == json!(3), "{stopped}");
    let reason = stopped["reason"].as_str().unwrap();
    assert!(reason.contains("below `min_psnr_db` 60"), "{reason}");
    assert_eq!(shown["guardrails"], json!({"min_psnr_db": 60.0, "min_comparisons": 3}));
    // Nobody gets it any more, and the student that draws as its teacher does is left alone.
    let before = bad["requests"].clone();
    let good = |shown: &Value| shown["arms"][1]["watched"]["comparisons"] == json!(3);
    let shown = server.ask_until("compared", good).await;
    assert_eq!(shown["arms"][2]["requests"], before);
    assert_eq!(shown["arms"][1]["watched"]["psnr_db"], 100.0);
    assert_eq!(shown["arms"][1]["weight"], 1.0);
    assert!(shown["arms"][0].get("watched").is_none(), "the control is held against nothing");
    let text = server.get("/metrics").await.text();
    for (model, value) in [(STUDENT, 0), (BAD, 1)] {
        let line = format!(
            "understudy_experiment_arm_stopped{{experiment=\"e\",model=\"{model}\",guardrail=\"min_psnr_db\"}} {value}"
        );
        assert!(text.contains(&line), "{line} is not in\n{text}");
    }

    let server = server.restarted().await;
    let after = server.experiment("e").await;
    assert_eq!(after, shown);
    // A weight by hand overrides it, and it is judged by what it draws from then on.
    let change = json!({"arms": [{"model": BAD, "weight": 1}]});
    let changed = server.ask("PATCH", "/v1/experiments/e", change).await.json();
    assert!(changed["arms"][2].get("stopped").is_none(), "{changed}");
    assert_eq!(changed["arms"][2]["watched"]["comparisons"], 0);
    server.ask_until("stopped again", |shown| shown["arms"][2]["stopped"].is_object()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_good_arm_ramps_up_to_everything() {
    let server = Server::with_bad_student().await;
    let arms = [CLASSES, STUDENT].map(|model| json!({"model": model}));
    server
        .begin(json!({"id": "e", "arms": arms,
            "guardrails": {"min_psnr_db": 60, "min_ssim": 0.9, "min_comparisons": 2},
            "ramp": {"shares": [0.25, 0.5, 1.0], "images": 2}}))
        .await;
    let shown = server.experiment("e").await;
    assert_eq!(
        shown["ramp"],
        json!({"shares": [0.25, 0.5, 1.0], "images": 2, "votes": 0, "stage": 1, "phase": "running",
            "stage_images": 0, "stage_votes": 0})
    );
    assert_eq!(shown["arms"][1]["share"], 0.25);
    let shown = server.ask_until("half", |shown| shown["ramp"]["stage"] == 2).await;
    assert_eq!(
        (&shown["arms"][0]["share"], &shown["arms"][1]["share"]),
        (&json!(0.5), &json!(0.5))
    );
    let server = server.restarted().await;
    assert_eq!(server.experiment("e").await["ramp"]["stage"], 2);
    let shown = server.ask_until("all", |shown| shown["ramp"]["phase"] == "finished").await;
    assert_eq!(
        (&shown["arms"][0]["share"], &shown["arms"][1]["share"]),
        (&json!(0.0), &json!(1.0))
    );
    let text = server.get("/metrics").await.text();
    let line = "understudy_experiment_ramp_stage{experiment=\"e\",model=\"student\"} 3";
    assert!(text.contains(line), "{line} is not in\n{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn people_stop_an_arm_by_their_votes() {
    let server = Server::with_bad_student().await;
    let arms = [CLASSES, BAD].map(|model| json!({"model": model}));
    server
        .begin(
            json!({"id": "e", "arms": arms, "guardrails": {"votes_p_value": 0.05, "min_votes": 8},
            "ramp": {"shares": [0.5, 1.0], "images": 0, "votes": 100}}),
        )
        .await;
    for seed in 0..8 {
        let shown = server.experiment("e").await;
        assert_eq!(shown["ramp"]["phase"], "running", "{shown}");
        assert_eq!(shown["ramp"]["stage_votes"], seed);
        let pair = server
            .post("/v1/experiments/e/pairs", json!({"seed": seed, "class_label": 1}).to_string())
            .await;
        let pair = pair.json();
        let bad =
            server.generate(json!({"model": BAD, "seed": seed, "class_label": 1})).await.json();
        let of_bad = |side: usize| png(&pair["images"][side]).0 == png(&bad["data"][0]).0;
        assert_ne!(of_bad(0), of_bad(1));
        let vote = json!({"pair_id": pair["pair_id"], "choice": usize::from(of_bad(0)),
            "idempotency_key": seed.to_string()});
        let vote = server.post("/v1/experiments/e/votes", vote.to_string()).await;
        assert_eq!(vote.json()["winner"], CLASSES, "{}", vote.text());
    }
    let shown = server.experiment("e").await;
    assert_eq!(shown["ramp"]["phase"], "stopped", "{shown}");
    assert_eq!(shown["arms"][0]["share"], 1.0);
    assert_eq!(shown["arms"][1]["stopped"]["guardrail"], "votes_p_value");
    let server = server.restarted().await;
    assert_eq!(server.experiment("e").await, shown);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_watched_is_refused_by_name() {
    let server = Server::with_bad_student().await;
    let weighed = json!([{"model": CLASSES, "weight": 1}, {"model": STUDENT, "weight": 1}]);
    let plain = json!([{"model": CLASSES, "weight": 1}, {"model": PLAIN, "weight": 1}]);
    let bare = json!([{"model": CLASSES}, {"model": STUDENT}]);
    let three = json!([{"model": CLASSES}, {"model": STUDENT}, {"model": BAD}]);
    let guards = |guardrails: Value| json!({"id": "x", "arms": weighed, "guardrails": guardrails});
    let ramp = |ramp: Value| json!({"id": "x", "arms": bare, "ramp": ramp});
    let cases = [
        (guards(json!({})), "guardrails", "bound nothing"),
        (guards(json!(7)), "guardrails", "{\"min_psnr_db\": 18}"),
        (guards(json!({"min_psnr": 7})), "min_psnr", "min_psnr_db"),
        (guards(json!({"min_psnr_db": "7"})), "guardrails.min_psnr_db", "string"),
        (guards(json!({"min_psnr_db": 170})), "guardrails.min_psnr_db", "0 to 100"),
        (guards(json!({"min_ssim": 2})), "guardrails.min_ssim", "-1 to 1"),
        (
            guards(json!({"min_ssim": 0, "min_comparisons": -4})),
            "guardrails.min_comparisons",
            "is -4",
        ),
        (
            guards(json!({"min_ssim": 0, "min_comparisons": 501})),
            "guardrails.min_comparisons",
            "1 to 500",
        ),
        (
            guards(json!({"min_ssim": 0, "min_votes": 5})),
            "guardrails.min_votes",
            "without votes_p_value",
        ),
        (guards(json!({"votes_p_value": 0.7})), "guardrails.votes_p_value", "at most 0.5"),
        (guards(json!({"max_latency_ratio": 0})), "guardrails.max_latency_ratio", "above 0"),
        (
            json!({"id": "x", "arms": plain, "guardrails": {"min_ssim": 0.5}}),
            "guardrails.min_ssim",
            "\"plain\" (arms[1]) is no student",
        ),
        (
            json!({"id": "x", "arms": weighed, "ramp": {}}),
            "arms[0].weight",
            "a `ramp` sets the weights",
        ),
        (json!({"id": "x", "arms": bare}), "arms[0].weight", "a number from 0"),
        (json!({"id": "x", "arms": three, "ramp": {}}), "arms", "from the first arm to the second"),
        (ramp(json!({"shares": []})), "ramp.shares", "1 to 16"),
        (ramp(json!({"shares": [0.5, 0.1]})), "ramp.shares[1]", "above 0.5"),
        (ramp(json!({"shares": [10]})), "ramp.shares[0]", "at most 1"),
        (ramp(json!({"images": -1})), "ramp.images", "is -1"),
        (ramp(json!({"votes": 1e10 as u64})), "ramp.votes", "0 to 1000000000"),
        (ramp(json!({"stages": 3})), "stages", "shares"),
    ];
    for (body, param, part) in cases {
        let reply = server.post("/v1/experiments", body.to_string()).await;
        assert_eq!(reply.status, 400, "{body}: {}", reply.text());
        let error = &reply.json()["error"];
        assert_eq!(error["param"], param, "{body}: {error}");
        assert!(error["message"].as_str().unwrap().contains(part), "{body}: {error}");
    }
    let without_shadows = Server::pair().await;
    let reply =
        without_shadows.post("/v1/experiments", guards(json!({"min_ssim": 0.5})).to_string()).await;
    assert_eq!(reply.status, 400);
    assert!(reply.text().contains("--shadow-rate"), "{}", reply.text());
    assert_eq!(server.get("/v1/experiments").await.json()["data"], json!([]));
}
