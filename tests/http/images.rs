//! Images: their formats, their seeds, their classes.

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Value, json};

use crate::server::{PLAIN, Server, png, post};

fn image(entry: &Value) -> Vec<u8> {
    BASE64_STANDARD.decode(entry["b64_json"].as_str().unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reply_tells_how_it_came_about() {
    let server = Server::start().await;
    let reply = server.generate(json!({"n": 2, "seed": 7, "prompt": "ankle_BOOT"})).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert_eq!(reply.header("x-understudy-seed"), "7");
    assert_eq!(reply.header("x-understudy-model"), "classes");
    let timing = reply.header("server-timing");
    assert!(["queue;dur=", "device;dur=", "total;dur="].iter().all(|part| timing.contains(part)));

    let body = reply.json();
    assert_eq!(body["model"], "classes");
    assert_eq!((&body["size"], &body["output_format"]), (&json!("8x8"), &json!("png")));
    assert_eq!(body["timings"]["network_evaluations"], 2);
    for (index, entry) in body["data"].as_array().unwrap().iter().enumerate() {
        assert_eq!(entry["index"], index);
        assert_eq!(entry["seed"], 7 + index);
        assert_eq!(
            (&entry["class_label"], &entry["class_name"]),
            (&json!(1), &json!("Ankle boot"))
        );
        let decoded = image::load_from_memory(&image(entry)).unwrap();
        assert_eq!((decoded.width(), decoded.height()), (8, 8));
        assert_eq!(decoded.color(), image::ColorType::L8);
    }
}

/// In the form that A1111's `parse_generation_parameters` reads.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_says_what_it_was_made_with() {
    let server = Server::start().await;
    let version = concat!("understudy ", env!("CARGO_PKG_VERSION"));
    let body =
        json!({"n": 2, "seed": 7, "prompt": "ankle-boot", "guidance_scale": 2.5, "eta": 0.5});
    let reply = server.generate(body).await.json();
    for (index, entry) in reply["data"].as_array().unwrap().iter().enumerate() {
        let seed = 7 + index;
        let text = format!(
            "Steps: 2, Sampler: ddim, CFG scale: 2.5, Seed: {seed}, Size: 8x8, Model: classes, Class: Ankle boot, Eta: 0.5, Version: {version}"
        );
        assert_eq!(png(entry).1, [("parameters".to_owned(), text)]);
    }
    let body = json!({"model": "plain", "seed": 1, "num_inference_steps": 3, "scheduler": "dpm++"});
    let reply = server.generate(body).await.json();
    let text = format!(
        "Steps: 3, Sampler: dpm++, CFG scale: 1, Seed: 1, Size: 8x8, Model: plain, Version: {version}"
    );
    assert_eq!(png(&reply["data"][0]).1, [("parameters".to_owned(), text)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_devices_draw_the_images_of_one() {
    let (one, two) = (Server::start().await, Server::with_two_devices().await);
    let ask = |seed: u64| json!({"n": 2, "seed": seed, "num_inference_steps": 20});
    let replies = tokio::join!(two.generate(ask(10)), two.generate(ask(20)), two.generate(ask(30)));
    for (seed, reply) in [(10, replies.0), (20, replies.1), (30, replies.2)] {
        assert_eq!(reply.status, 200, "{}", reply.text());
        let alone = one.generate(ask(seed)).await.json();
        for i in 0..2 {
            assert_eq!(reply.json()["data"][i]["b64_json"], alone["data"][i]["b64_json"]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seed_gives_its_image_again() {
    let server = Server::start().await;
    let last = (1u64 << 53) - 1;
    let body = server.generate(json!({"n": 4, "seed": last - 1})).await.json();
    let seeds: Vec<u64> = body["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| entry["seed"].as_u64().unwrap())
        .collect();
    assert_eq!(seeds, [last - 1, last, 0, 1]);
    for entry in body["data"].as_array().unwrap() {
        let again = server.generate(json!({"seed": entry["seed"]})).await.json();
        let again = &again["data"][0];
        assert_eq!(again["class_label"], entry["class_label"]);
        assert_eq!(again["b64_json"], entry["b64_json"]);
        assert_ne!(entry["class_label"], 3, "the class that means none is never drawn");
    }
    // Without a seed one is drawn, and it is the one that was used.
    let drawn = server.generate(json!({})).await.json();
    let again = server.generate(json!({"seed": drawn["data"][0]["seed"]})).await.json();
    assert_eq!(again["data"][0]["b64_json"], drawn["data"][0]["b64_json"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn classes_go_by_number_and_name() {
    let server = Server::start().await;
    for label in
        [json!(1), json!("1"), json!("Ankle boot"), json!("ankle-BOOT"), json!("ANKLE_boot")]
    {
        let reply = server.generate(json!({"class_label": label, "seed": 1})).await;
        assert_eq!(reply.json()["data"][0]["class_label"], 1, "{label}");
    }
    let unconditional = server.generate(json!({"model": PLAIN, "prompt": ""})).await.json();
    assert!(unconditional["data"][0].get("class_label").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn accept_chooses_the_image_itself() {
    let server = Server::start().await;
    for (accept, media_type, format) in [
        ("image/png", "image/png", image::ImageFormat::Png),
        ("image/jpeg, application/json;q=0.5", "image/jpeg", image::ImageFormat::Jpeg),
        ("application/json;q=0.5, image/webp;q=0.6", "image/webp", image::ImageFormat::WebP),
    ] {
        let body = json!({"model": PLAIN, "seed": 5, "output_format": "png"}).to_string();
        let mut request = post("/v1/images/generations", body);
        request.headers_mut().insert("accept", accept.parse().unwrap());
        let reply = server.send(request).await;
        assert_eq!((reply.status.as_u16(), reply.header("content-type")), (200, media_type));
        assert_eq!(image::guess_format(&reply.body).unwrap(), format);
        assert_eq!(reply.header("x-understudy-seed"), "5");
        assert_eq!(image::load_from_memory(&reply.body).unwrap().color(), image::ColorType::Rgb8);
    }
    for body in [json!({"n": 2}), json!({"stream": true})] {
        let mut request = post("/v1/images/generations", body.to_string());
        request.headers_mut().insert("accept", "image/png".parse().unwrap());
        assert_eq!(server.send(request).await.status, 400, "{body}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn formats_do_not_change_the_picture() {
    let server = Server::start().await;
    let pixels =
        |body: &Value| image::load_from_memory(&image(&body["data"][0])).unwrap().to_luma8();
    let png = server.generate(json!({"seed": 3})).await.json();
    let webp = server.generate(json!({"seed": 3, "output_format": "webp"})).await.json();
    assert_eq!(webp["output_format"], "webp");
    assert_eq!(pixels(&png), pixels(&webp));
    for format in ["jpeg", "webp"] {
        let request =
            |quality| json!({"seed": 3, "output_format": format, "output_compression": quality});
        let (low, high) = (server.generate(request(0)).await, server.generate(request(100)).await);
        let length = |body: &Value| image(&body["data"][0]).len();
        assert!(length(&low.json()) < length(&high.json()), "{format}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fields_that_mean_nothing_here_are_accepted() {
    let server = Server::start().await;
    let reply = server
        .generate(json!({
            "quality": "high", "style": "vivid", "background": "auto", "moderation": "low",
            "user": "someone", "response_format": "b64_json", "size": "8x8", "n": null,
        }))
        .await;
    assert_eq!(reply.status, 200, "{}", reply.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn guidance_doubles_the_evaluations() {
    let server = Server::start().await;
    let reply = server.generate(json!({"guidance_scale": 3.0, "class_label": 0})).await.json();
    assert_eq!(reply["timings"]["network_evaluations"], 4);
}
