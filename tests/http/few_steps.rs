//! Students of few steps: a model in so many evaluations is served, compared, chosen and voted on as what it is.

use serde_json::{Value, json};

use crate::server::{CLASSES, ENDLESS, SLOW_TEACHER, STUDENT, Server, png, write_model};

impl Server {
    /// A slow teacher and a student whose usual steps are slow as well, but whose card lists 2 and 1.
    async fn few_steps() -> Self {
        let models = tempfile::tempdir().unwrap();
        let slow = json!({"defaults": {"num_inference_steps": ENDLESS}});
        write_model(models.path(), SLOW_TEACHER, 1, Some(4), slow);
        let few = json!({"role": "student", "teacher": SLOW_TEACHER, "evaluations": [ENDLESS, 2, 1],
            "defaults": {"num_inference_steps": ENDLESS}});
        write_model(models.path(), STUDENT, 1, Some(4), few);
        Self::over(models, |_| {}).await
    }

    /// The student's image of a seed in so many steps.
    async fn image(&self, seed: u64, steps: usize) -> Value {
        let body =
            json!({"model": STUDENT, "seed": seed, "class_label": 1, "num_inference_steps": steps});
        let reply = self.generate(body).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        reply.json()["data"][0]["b64_json"].clone()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_card_tells_its_evaluations_and_other_steps_are_served() {
    let server = Server::few_steps().await;
    let card = server.get(&format!("/v1/models/{STUDENT}")).await.json();
    assert_eq!(card["evaluations"], json!([ENDLESS, 2, 1]));
    let teacher = server.get(&format!("/v1/models/{SLOW_TEACHER}")).await.json();
    assert!(teacher.get("evaluations").is_none(), "{teacher}");
    let images = [server.image(5, 1).await, server.image(5, 3).await, server.image(5, 7).await];
    assert!(images[0] != images[1] && images[1] != images[2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn auto_meets_a_deadline_with_fewer_steps_of_the_student() {
    let server = Server::few_steps().await;
    let request = json!({"model": "auto", "deadline_ms": 500, "seed": 3, "class_label": 1});
    let reply = server.generate(request.clone()).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    let body = reply.json();
    assert_eq!(body["model"], STUDENT);
    let routing = &body["routing"];
    assert_eq!(routing["reason"], "teacher_too_late");
    assert_eq!(routing["num_inference_steps"], 2, "the most that there is time for: {routing}");
    assert!(routing["student_predicted_ms"].as_f64().unwrap() < 500.0, "{routing}");
    assert_eq!(body["data"][0]["b64_json"], server.image(3, 2).await);

    // Steps that a request names are those it gets.
    let mut named = request.clone();
    named["num_inference_steps"] = json!(ENDLESS);
    assert_eq!(server.generate(named.clone()).await.status, 504);
    named["num_inference_steps"] = json!(3);
    let body = server.generate(named).await.json();
    assert_eq!(body["model"], SLOW_TEACHER);
    assert!(body["routing"].get("num_inference_steps").is_none(), "{}", body["routing"]);

    // A stream tells it with the image.
    let mut streamed = request;
    streamed["stream"] = json!(true);
    let reply = server.generate(streamed).await;
    assert!(reply.text().contains("\"num_inference_steps\":2"), "{}", reply.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_comparison_takes_each_model_in_its_own_steps() {
    let models = tempfile::tempdir().unwrap();
    let few = json!({"role": "student", "teacher": CLASSES, "evaluations": [3, 1],
        "defaults": {"num_inference_steps": 3}});
    write_model(models.path(), STUDENT, 1, Some(4), few);
    let server = Server::over(models, |_| {}).await;
    let usual = server.get(&format!("/v1/models/{CLASSES}")).await.json();
    let usual = usual["defaults"]["num_inference_steps"].as_u64().unwrap();
    assert_ne!(usual, 3);
    let reply = server.post("/v1/compare", json!({"seed": 4, "class_label": 1}).to_string()).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    let pair = reply.json()["pair"].clone();
    assert_eq!(pair[1]["data"][0]["b64_json"], server.image(4, 3).await);
    let teachers = json!({"seed": 4, "class_label": 1, "num_inference_steps": usual});
    let teachers = server.generate(teachers).await.json();
    assert_eq!(pair[0]["data"][0]["b64_json"], teachers["data"][0]["b64_json"]);
}

/// The networks are equal, so equal steps give equal images: 100 dB.
#[tokio::test(flavor = "multi_thread")]
async fn shadows_are_drawn_in_the_teachers_own_steps() {
    let models = tempfile::tempdir().unwrap();
    let few = json!({"role": "student", "teacher": CLASSES, "evaluations": [3, 1],
        "defaults": {"num_inference_steps": 3}});
    write_model(models.path(), STUDENT, 1, Some(4), few);
    let server = Server::over(models, |settings| settings.shadow_rate = 1.0).await;
    let card = server.get(&format!("/v1/models/{CLASSES}")).await.json();
    let usual = card["defaults"]["num_inference_steps"].as_u64().unwrap();
    for (count, steps) in [(1, 1), (2, usual)] {
        let request = json!({"model": STUDENT, "class_label": 1, "num_inference_steps": steps});
        assert_eq!(server.generate(request).await.status, 200);
        let compared = |server: &Server| {
            server.metrics.shadows.with_label_values(&[STUDENT, "compared"]).get() == count
        };
        server.until("compared", compared).await;
        let psnr = server.metrics.pair_psnr_db.with_label_values(&[CLASSES, STUDENT]);
        let equal = psnr.get_sample_sum() >= 100.0;
        assert_eq!(equal, steps == usual, "{steps} steps: {}", psnr.get_sample_sum());
    }
}

/// The networks are equal here, too.
#[tokio::test(flavor = "multi_thread")]
async fn shadows_of_an_arm_are_drawn_in_its_steps() {
    let models = tempfile::tempdir().unwrap();
    let card = json!({"role": "student", "teacher": CLASSES});
    write_model(models.path(), STUDENT, 1, Some(4), card);
    let server = Server::over(models, |settings| settings.shadow_rate = 1.0).await;
    let arms = json!([{"model": CLASSES, "weight": 0}, {"model": STUDENT, "num_inference_steps": 3, "weight": 1}]);
    let reply = server.post("/v1/experiments", json!({"id": "e", "arms": arms}).to_string()).await;
    assert_eq!(reply.status, 201, "{}", reply.text());
    let reply = server.generate(json!({"model": "experiment:e", "class_label": 1})).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    let compared = |server: &Server| {
        server.metrics.shadows.with_label_values(&[STUDENT, "compared"]).get() == 1
    };
    server.until("compared", compared).await;
    let psnr = server.metrics.pair_psnr_db.with_label_values(&[CLASSES, STUDENT]);
    assert_eq!(psnr.get_sample_sum(), 100.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn arms_may_be_one_model_in_different_steps() {
    let server = Server::pair().await;
    let arms = json!([
        {"model": CLASSES, "weight": 0},
        {"model": STUDENT, "num_inference_steps": 4, "weight": 1},
        {"model": STUDENT, "num_inference_steps": 1, "weight": 1},
    ]);
    let create = json!({"id": "e", "arms": arms}).to_string();
    let reply = server.post("/v1/experiments", create.clone()).await;
    assert_eq!(reply.status, 201, "{}", reply.text());
    let shown = server.experiment("e").await;
    let steps = |at: usize| shown["arms"][at].get("num_inference_steps").cloned();
    assert_eq!([steps(0), steps(1), steps(2)], [None, Some(json!(4)), Some(json!(1))]);
    let names = ["student@4", "student@1"];
    assert_eq!(shown["comparisons"][2]["models"], json!(names));

    // Requests get the steps of the arm that their key falls to.
    let (four, one) = (server.image(6, 4).await, server.image(6, 1).await);
    let mut seen = [0, 0];
    for user in 0..20 {
        let body =
            json!({"model": "experiment:e", "user": user.to_string(), "seed": 6, "class_label": 1});
        let image = server.generate(body).await.json()["data"][0]["b64_json"].clone();
        assert!(image == four || image == one);
        seen[usize::from(image == one)] += 1;
    }
    assert!(seen[0] > 0 && seen[1] > 0, "{seen:?}");
    let shown = server.experiment("e").await;
    assert_eq!(
        [&shown["arms"][1]["requests"], &shown["arms"][2]["requests"]],
        [&json!(seen[0]), &json!(seen[1])]
    );
    let text = server.get("/metrics").await.text();
    let line = format!(
        "understudy_experiment_images_total{{experiment=\"e\",model=\"student@1\"}} {}",
        seen[1]
    );
    assert!(text.contains(&line), "{text}");

    // A change names an arm as it was created.
    let change = |steps: Value| json!({"arms": [{"model": STUDENT, "num_inference_steps": steps, "weight": 0}]});
    let changed = server.ask("PATCH", "/v1/experiments/e", change(json!(4))).await;
    assert_eq!(changed.json()["arms"][1]["weight"], 0.0, "{}", changed.text());
    assert_eq!(changed.json()["arms"][2]["weight"], 1.0);
    for steps in [json!(2), Value::Null] {
        let reply = server.ask("PATCH", "/v1/experiments/e", change(steps.clone())).await;
        assert_eq!(reply.status, 400, "{steps}");
        assert!(reply.text().contains("student@4, student@1"), "{}", reply.text());
    }

    // By place it needs no names.
    let weights = json!({"arms": [{"weight": 0}, {"weight": 2}]});
    let changed = server.ask("PATCH", "/v1/experiments/e", weights).await;
    assert_eq!(changed.json()["arms"][1]["weight"], 2.0, "{}", changed.text());
    let negative = server.ask("PATCH", "/v1/experiments/e", change(json!(-4))).await;
    assert_eq!(negative.json()["error"]["param"], "arms[0].num_inference_steps");

    // Blind pairs show the steps of two arms, and a vote tells which.
    for number in 0..12 {
        let pair = json!({"seed": 6, "class_label": 1}).to_string();
        let pair = server.post("/v1/experiments/e/pairs", pair).await.json();
        let vote =
            json!({"pair_id": pair["pair_id"], "choice": 0, "idempotency_key": number.to_string()});
        let vote = server.post("/v1/experiments/e/votes", vote.to_string()).await.json();
        for side in 0..2 {
            let pixels = |image: &Value| png(&json!({"b64_json": image})).0;
            let image = pixels(&pair["images"][side]["b64_json"]);
            match vote["models"][side].as_str().unwrap() {
                "student@4" => assert_eq!(image, pixels(&four)),
                "student@1" => assert_eq!(image, pixels(&one)),
                other => assert_eq!(other, CLASSES),
            }
        }
        assert_eq!(vote["winner"], vote["models"][0]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn arms_whose_steps_make_no_sense_are_refused() {
    let server = Server::pair().await;
    let create = |arms: Value| json!({"id": "e", "arms": arms}).to_string();
    let arm = |steps: Value| json!({"model": STUDENT, "num_inference_steps": steps, "weight": 1});
    for (arms, param, part) in [
        (json!([arm(json!(1)), arm(json!(0))]), "arms[1].num_inference_steps", "1 step or more"),
        (
            json!([arm(json!(ENDLESS + 1)), arm(json!(1))]),
            "arms[0].num_inference_steps",
            "takes 1 to",
        ),
        (json!([arm(json!(1)), arm(json!("2"))]), "arms[1].num_inference_steps", "does not fit"),
        (json!([arm(json!(1)), arm(json!(1))]), "arms[1].model", "once"),
    ] {
        let reply = server.post("/v1/experiments", create(arms.clone())).await;
        assert_eq!(reply.status, 400, "{arms}: {}", reply.text());
        let error = &reply.json()["error"];
        assert_eq!(error["param"], param, "{error}");
        assert!(error["message"].as_str().unwrap().contains(part), "{error}");
    }
    let reply =
        server.post("/v1/experiments", create(json!([arm(json!(1)), arm(Value::Null)]))).await;
    assert_eq!(reply.status, 201, "{}", reply.text());
    // Whichever arm it falls to.
    for user in 0..8 {
        let body =
            json!({"model": "experiment:e", "user": user.to_string(), "num_inference_steps": 2});
        let reply = server.generate(body).await;
        assert_eq!(reply.status, 400, "{}", reply.text());
        assert_eq!(reply.json()["error"]["param"], "num_inference_steps");
    }
    let pair =
        server.post("/v1/experiments/e/pairs", json!({"num_inference_steps": 2}).to_string()).await;
    assert_eq!(pair.status, 400, "{}", pair.text());
}
