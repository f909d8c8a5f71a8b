//! Shadow traffic: a student's requests repeated by its teacher, when nothing else is to do.

use serde_json::json;
use tower::ServiceExt;

use crate::server::{CLASSES, ENDLESS, PLAIN, STUDENT, Server, TEXT, post, with};

fn outcomes(server: &Server, outcome: &str) -> u64 {
    server.metrics.shadows.with_label_values(&[STUDENT, outcome]).get()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_students_request_is_repeated_by_its_teacher() {
    let server = Server::pair_with(|settings| settings.shadow_rate = 1.0).await;
    // The networks are equal: only equal noise, class and steps give equal images.
    for (count, extra) in [(1, json!(false)), (2, json!(true))] {
        let request = json!({"model": STUDENT, "n": 2, "scheduler": "ddpm",
            "num_inference_steps": 5, "stream": extra});
        let reply = server.generate(request).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        server.until("compared", |server| outcomes(server, "compared") == count).await;
    }
    let labels = &[CLASSES, STUDENT];
    let psnr = server.metrics.pair_psnr_db.with_label_values(labels);
    assert_eq!((psnr.get_sample_count(), psnr.get_sample_sum()), (4, 400.0));
    assert_eq!(server.metrics.pair_ssim.with_label_values(labels).get_sample_sum(), 4.0);
    assert_eq!(server.metrics.pair_speedup_ratio.with_label_values(labels).get_sample_count(), 2);
    // No client asked the teacher for anything.
    assert_eq!(server.metrics.images.with_label_values(&[CLASSES]).get(), 0);
    assert_eq!(server.metrics.queue_duration.with_label_values(&[CLASSES]).get_sample_count(), 0);
    assert_eq!(server.metrics.samples_waiting.with_label_values(&[CLASSES]).get(), 0);
    assert_eq!(server.metrics.samples_running.with_label_values(&[CLASSES]).get(), 0);
}

/// After the same prompts, long ones too, and at the same size.
#[tokio::test(flavor = "multi_thread")]
async fn a_teacher_repeats_what_was_drawn_after_a_text() {
    let server = Server::with_text_and(|settings| settings.shadow_rate = 1.0).await;
    let long = ["a"; 40].join(" ");
    let asks = [
        json!({"prompt": "red apple"}),
        json!({"prompt": "red apple", "negative_prompt": "cat", "guidance_scale": 5.0}),
        json!({"prompt": long, "size": "24x16"}),
        json!({"prompt": long, "size": "24x16", "stream": true}),
    ];
    for (count, ask) in asks.iter().enumerate() {
        let body = with(json!({"model": STUDENT, "num_inference_steps": 3}), ask);
        let reply = server.generate(body).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        server.until("compared", |server| outcomes(server, "compared") == count as u64 + 1).await;
    }
    // The networks are equal: only equal noise, prompts, guidance and size give equal images.
    let psnr = server.metrics.pair_psnr_db.with_label_values(&[TEXT, STUDENT]);
    assert_eq!((psnr.get_sample_count(), psnr.get_sample_sum()), (4, 400.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn it_waits_for_clients_and_takes_none_of_their_places() {
    let server = Server::pair_with(|settings| settings.shadow_rate = 1.0).await;
    let endless = json!({"model": PLAIN, "n": 4, "num_inference_steps": ENDLESS, "stream": true});
    let endless = || server.router().oneshot(post("/v1/images/generations", endless.to_string()));
    // Nobody waits but for the request itself: it begins; then the queue fills to the last place.
    let begun = json!({"model": STUDENT, "num_inference_steps": 1}).to_string();
    let reply = server.send(post("/v1/images/generations", begun)).await;
    assert_eq!(reply.status, 200);
    let (one, two) = (endless().await.unwrap(), endless().await.unwrap());
    assert!(one.status().is_success() && two.status().is_success());
    assert_eq!(server.generate(json!({})).await.status, 429, "eight places, eight taken");
    drop((one, two));
    server.until("compared", |server| outcomes(server, "compared") == 1).await;

    let left = |server: &Server| {
        let of = |gauge: &prometheus::IntGaugeVec| gauge.with_label_values(&[PLAIN]).get();
        of(&server.metrics.samples_running) + of(&server.metrics.samples_waiting)
    };
    server.until("gone", |server| left(server) == 0).await;

    // While clients have the device none begins.
    let busy = endless().await.unwrap();
    assert!(busy.status().is_success());
    let reply = server.generate(json!({"model": STUDENT, "num_inference_steps": 1})).await;
    assert_eq!(reply.status, 200);
    server.until("busy", |server| outcomes(server, "busy") == 1).await;
    drop(busy);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_rate_or_a_student_nothing_is_repeated() {
    let server = Server::pair().await;
    server.generate(json!({"model": STUDENT})).await;
    let shadowing = Server::pair_with(|settings| settings.shadow_rate = 1.0).await;
    shadowing.generate(json!({})).await;
    for server in [&server, &shadowing] {
        assert!(!server.get("/metrics").await.text().contains("understudy_shadow_requests_total{"));
    }
}
