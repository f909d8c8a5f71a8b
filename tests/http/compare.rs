//! A teacher and its student on the same noise.

use serde_json::{Value, json};
use tower::ServiceExt;

use crate::server::{CLASSES, ENDLESS, PLAIN, STUDENT, Server, events, png, post};

const PARTIAL: &str = "image_generation.partial_image";
const COMPLETED: &str = "image_generation.completed";

#[tokio::test(flavor = "multi_thread")]
async fn both_models_answer_and_are_compared() {
    let server = Server::pair().await;
    let reply = server.compare(json!({"n": 2, "seed": 7, "prompt": "bag"})).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    let body = reply.json();
    assert_eq!(body["pair"][0]["model"], CLASSES);
    assert_eq!(body["pair"][1]["model"], STUDENT);
    assert_eq!(body["shared_noise"], true);
    for (side, steps) in [(0, 2), (1, 3)] {
        let side = &body["pair"][side];
        assert_eq!(side["timings"]["network_evaluations"], steps);
        for (index, image) in side["data"].as_array().unwrap().iter().enumerate() {
            assert_eq!((&image["index"], &image["seed"]), (&json!(index), &json!(7 + index)));
            assert_eq!(image["class_name"], "Bag");
        }
        // The image that the model makes alone.
        let alone = json!({"model": side["model"], "seed": 8, "prompt": "bag"});
        let alone = server.generate(alone).await.json();
        assert_eq!(alone["data"][0]["b64_json"], side["data"][1]["b64_json"]);
    }
    for (kind, field) in [("device", "device_ms"), ("end_to_end", "total_ms")] {
        let time = |side: usize| body["pair"][side]["timings"][field].as_f64().unwrap();
        let ratio = body["speedup"][kind].as_f64().unwrap();
        assert!((ratio - time(0) / time(1)).abs() < 1e-9, "{kind}");
    }
    for field in ["psnr_db", "ssim"] {
        assert_eq!(body[field].as_array().unwrap().len(), 2);
        assert!(body[field][0].is_number(), "{body}");
    }
    let text = server.get("/metrics").await.text();
    for line in [
        "understudy_pair_speedup_ratio_count{student=\"student\",teacher=\"classes\"} 1",
        "understudy_pair_psnr_db_count{student=\"student\",teacher=\"classes\"} 2",
        "understudy_pair_ssim_count{student=\"student\",teacher=\"classes\"} 2",
    ] {
        assert!(text.contains(line), "{line}");
    }
}

/// The two networks are equal, so images can only be equal when all their noise is.
#[tokio::test(flavor = "multi_thread")]
async fn noise_is_shared_at_the_start_and_at_every_step() {
    let server = Server::pair().await;
    let stochastic = [
        json!({"scheduler": "ddpm", "num_inference_steps": 6}),
        json!({"scheduler": "ddim", "eta": 1.0, "num_inference_steps": [6, 6]}),
        json!({"scheduler": ["ddim", "ddim"], "num_inference_steps": 6}),
    ];
    for mut body in stochastic {
        // The class is drawn, and the student draws the teacher's.
        body["n"] = json!(2);
        let reply = server.compare(body.clone()).await;
        let reply = reply.json();
        assert_eq!(reply["psnr_db"], json!([100.0, 100.0]), "{body}");
        assert_eq!(reply["ssim"], json!([1.0, 1.0]), "{body}");
        let images = |side: usize| [0, 1].map(|i| png(&reply["pair"][side]["data"][i]).0);
        assert_eq!(images(0), images(1));
    }
    let other = json!({"scheduler": ["ddim", "euler"], "num_inference_steps": [6, 2], "seed": 1});
    let other = server.compare(other).await.json();
    assert!(other["psnr_db"][0].as_f64().unwrap() < 100.0);
    assert_eq!(other["pair"][1]["timings"]["network_evaluations"], 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn models_of_different_shape_are_compared_by_time_alone() {
    let server = Server::pair().await;
    let reply = server.compare(json!({"models": [CLASSES, PLAIN], "seed": 3})).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    let body = reply.json();
    assert_eq!(body["shared_noise"], false);
    assert_eq!((&body["psnr_db"], &body["ssim"]), (&json!([null]), &json!([null])));
    assert!(body["speedup"]["device"].as_f64().unwrap() > 0.0);
    assert!(body["pair"][1]["data"][0].get("class_label").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_is_compared_with_itself_at_other_steps() {
    let server = Server::start().await;
    let body = json!({"models": [CLASSES, CLASSES], "num_inference_steps": [8, 2], "seed": 3});
    let body = server.compare(body).await.json();
    let evaluations = |side: usize| body["pair"][side]["timings"]["network_evaluations"].clone();
    assert_eq!([evaluations(0), evaluations(1)], [8, 2]);
    assert_eq!(body["shared_noise"], true);

    // One id names both sides of a stream, so each event says whose it is.
    let body = json!({"models": [CLASSES, CLASSES], "num_inference_steps": [8, 2], "seed": 3,
        "stream": true, "partial_images": 1});
    let events = events(&server.compare(body).await.text());
    let sides: Vec<_> = events
        .iter()
        .filter(|(name, _)| name.starts_with("image_generation"))
        .map(|(name, event)| (name.as_str(), event["side"].as_u64(), event["draft"] == true))
        .collect();
    assert_eq!(sides.len(), 4, "{events:?}");
    for expected in [
        (PARTIAL, Some(1), false),
        (PARTIAL, Some(1), true),
        (PARTIAL, Some(0), false),
        (COMPLETED, Some(0), false),
    ] {
        assert!(sides.contains(&expected), "{expected:?} in {sides:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_gives_the_students_image_then_the_teachers_then_the_comparison() {
    let server = Server::pair().await;
    let body = json!({"n": 2, "seed": 7, "class_label": 0, "num_inference_steps": [8, 4]});
    let whole = server.compare(body.clone()).await.json();
    for previews in [0, 2] {
        let mut body = body.clone();
        body["stream"] = json!(true);
        body["partial_images"] = json!(previews);
        let reply = server.compare(body).await;
        assert_eq!(reply.header("content-type"), "text/event-stream");
        let events = events(&reply.text());
        assert_eq!(events.len(), 4 * previews + 5, "{}", reply.text());
        let (name, last) = events.last().unwrap();
        assert_eq!(
            (name.as_str(), &last["type"]),
            ("compare.completed", &json!("compare.completed"))
        );
        for field in ["psnr_db", "ssim", "shared_noise"] {
            assert_eq!(last[field], whole[field]);
        }
        assert_eq!(last["models"], json!([CLASSES, STUDENT]));
        assert_eq!(last["timings"][1]["network_evaluations"], 4);
        assert!(last["speedup"]["device"].is_number());
        for index in 0..2 {
            let find = |wanted: &dyn Fn(&str, &Value) -> bool| {
                events
                    .iter()
                    .position(|(name, event)| event["index"] == index && wanted(name, event))
            };
            let draft = find(&|name, event| name == PARTIAL && event["draft"] == true).unwrap();
            let last = find(&|name, _| name == COMPLETED).unwrap();
            assert!(draft < last);
            assert_eq!(events[draft].1["model"], STUDENT);
            assert_eq!(events[draft].1["partial_image_index"], previews);
            assert_eq!(events[last].1["model"], CLASSES);
            for (side, at) in [(0, last), (1, draft)] {
                let image = &whole["pair"][side]["data"][index];
                assert_eq!(events[at].1["b64_json"], image["b64_json"]);
            }
        }
    }
}

/// The teacher is done long before its student, and waits.
#[tokio::test(flavor = "multi_thread")]
async fn a_draft_comes_first_even_where_it_takes_longer() {
    let server = Server::pair().await;
    let body = json!({"stream": true, "num_inference_steps": [1, 40]});
    let reply = server.compare(body).await;
    let names: Vec<_> = events(&reply.text()).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, [PARTIAL, COMPLETED, "compare.completed"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_comparisons_are_refused_by_name() {
    let server = Server::pair().await;
    let cases = [
        (json!({"models": [CLASSES]}), 400, "models", "list of 1"),
        (json!({"models": [CLASSES, STUDENT, PLAIN]}), 400, "models", "list of 3"),
        (json!({"models": "classes"}), 400, "models", "list of two model ids"),
        (json!({"models": [CLASSES, "nope"]}), 404, "model", "nope"),
        (json!({"models": [CLASSES, "auto"]}), 400, "model", "auto"),
        (json!({"model": CLASSES}), 400, "model", "models"),
        (json!({"num_inference_steps": [1, 2, 3]}), 400, "num_inference_steps", "list of 3"),
        (json!({"num_inference_steps": [1, 0]}), 400, "num_inference_steps", "1 to 20000"),
        (json!({"num_inference_steps": 1.5}), 400, "num_inference_steps", "list of two"),
        (json!({"scheduler": ["ddim"]}), 400, "scheduler", "list of 1"),
        (json!({"scheduler": ["ddim", "plms"]}), 400, "scheduler", "plms"),
        (json!({"n": 5}), 400, "n", "1 to 4"),
        (
            json!({"models": [CLASSES, PLAIN], "class_label": 1}),
            400,
            "class_label",
            "unconditional",
        ),
        (json!({"guidance_scale": 2}), 400, "guidance_scale", "student"),
        (json!({"quality": "high"}), 400, "quality", "not a field"),
        (json!({"deadline_ms": 0}), 400, "deadline_ms", "at least 1"),
        (json!({"deadline_ms": 1, "num_inference_steps": ENDLESS}), 504, "deadline_ms", "idle"),
    ];
    for (body, status, param, part) in cases {
        let reply = server.compare(body.clone()).await;
        assert_eq!(reply.status, status, "{body}: {}", reply.text());
        let error = &reply.json()["error"];
        assert_eq!(error["param"], param, "{body}: {error}");
        assert!(error["message"].as_str().unwrap().contains(part), "{body}: {error}");
    }
    assert_eq!(server.compare(json!({})).await.status, 200);

    let alone = Server::start().await;
    let reply = alone.compare(json!({})).await;
    assert_eq!(reply.status, 404);
    assert!(reply.text().contains("no student"), "{}", reply.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn both_sides_count_against_the_queue_and_leave_with_their_client() {
    let server = Server::pair().await;
    let body = json!({"n": 3, "num_inference_steps": ENDLESS, "stream": true}).to_string();
    let first = server.router().oneshot(post("/v1/compare", body)).await.unwrap();
    // Six of eight places are taken, which leaves room for one pair and not for two.
    let full = server.compare(json!({"n": 2})).await;
    assert_eq!(full.status, 429, "{}", full.text());
    assert!(full.header("retry-after").parse::<u64>().unwrap() >= 1);
    for model in [CLASSES, STUDENT] {
        let rejected = &server.metrics.rejected;
        assert_eq!(rejected.with_label_values(&[model, "queue_full"]).get(), 2, "{model}");
    }
    drop(first);
    let cancelled = |server: &Server, model| {
        server.metrics.cancelled.with_label_values(&[model, "disconnect"]).get()
    };
    server
        .until("all six gone", |s| cancelled(s, CLASSES) == 3 && cancelled(s, STUDENT) == 3)
        .await;
    server.until("room", |server| server.running() == 0).await;
    assert_eq!(server.compare(json!({"n": 4})).await.status, 200);

    let small =
        Server::pair_with(|settings| (settings.max_images, settings.max_rows) = (4, 5)).await;
    let reply = small.compare(json!({"n": 3})).await;
    assert!(reply.status == 400 && reply.text().contains("1 to 2"), "{}", reply.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_stops_reading_holds_no_place() {
    let server = Server::pair().await;
    let body = json!({"n": 4, "num_inference_steps": 3, "stream": true}).to_string();
    let unread = server.router().oneshot(post("/v1/compare", body)).await.unwrap();
    let images = |server: &Server, model| server.metrics.images.with_label_values(&[model]).get();
    server.until("made", |s| images(s, CLASSES) == 4 && images(s, STUDENT) == 4).await;
    // All eight places are free although nobody has read a byte.
    assert_eq!(server.compare(json!({"n": 4})).await.status, 200);
    drop(unread);
}
