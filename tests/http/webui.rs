//! A1111's API: what maps gives the images of `/v1/images/…`, what does not is refused by its name.

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Value, json};

use crate::edits::picture;
use crate::server::{self, STUDENT, Server, TEXT};

async fn asked(server: &Server, path: &str, body: Value) -> Value {
    let reply = server.post(&format!("/sdapi/v1/{path}"), body.to_string()).await;
    assert_eq!(reply.status, 200, "{body}: {}", reply.text());
    reply.json()
}

/// Pixels of an image in base64.
fn pixels(image: &Value) -> Vec<u8> {
    let bytes = BASE64_STANDARD.decode(image.as_str().unwrap()).unwrap();
    image::load_from_memory(&bytes).unwrap().into_bytes()
}

/// What webuiapi sends beside the fields that it is told.
fn usual() -> Value {
    json!({
        "enable_hr": false, "hr_scale": 2, "hr_upscaler": "Latent", "hr_second_pass_steps": 0, "denoising_strength": 0.7,
        "firstphase_width": 0, "styles": [], "subseed": -1, "subseed_strength": 0.0, "seed_resize_from_h": 0,
        "restore_faces": false, "tiling": false, "do_not_save_samples": false, "eta": 1.0, "s_churn": 0, "s_tmax": 0, "s_tmin": 0,
        "s_noise": 1, "override_settings_restore_afterwards": true, "script_args": [], "script_name": null, "send_images": true,
        "save_images": false, "alwayson_scripts": {}, "scheduler": "automatic",
    })
}

fn with(fields: Value) -> Value {
    server::with(usual(), &fields)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_asked_for_is_what_v1_draws() {
    let server = Server::with_text().await;
    let model = json!({"sd_model_checkpoint": TEXT});
    let reply = asked(&server, "txt2img", with(json!({
        "prompt": "red apple", "negative_prompt": "cat", "seed": 5, "steps": 4, "cfg_scale": 4.0, "width": 24, "height": 16,
        "sampler_name": "Euler", "sampler_index": "Euler", "batch_size": 2, "override_settings": model,
    })))
    .await;
    let same = server
        .generate(json!({
            "model": TEXT, "prompt": "red apple", "negative_prompt": "cat", "seed": 5, "num_inference_steps": 4,
            "guidance_scale": 4.0, "size": "24x16", "scheduler": "euler", "n": 2,
        }))
        .await
        .json();
    let images = reply["images"].as_array().unwrap();
    assert_eq!(images.len(), 2);
    for (image, same) in images.iter().zip(same["data"].as_array().unwrap()) {
        assert_eq!(pixels(image), pixels(&same["b64_json"]));
    }
    let info: Value = serde_json::from_str(reply["info"].as_str().unwrap()).unwrap();
    assert_eq!((&info["all_seeds"], &info["sampler_name"]), (&json!([5, 6]), &json!("Euler")));
    assert_eq!((&info["width"], &info["sd_model_name"]), (&json!(24), &json!(TEXT)));
    assert!(info["infotexts"][1].as_str().unwrap().contains("Seed: 6"), "{info}");
    assert_eq!(reply["parameters"]["hr_upscaler"], "Latent");
    let none = asked(&server, "txt2img", with(json!({"send_images": false, "steps": 2}))).await;
    assert_eq!(none["images"], json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn images_begin_with_others() {
    let server = Server::with_text().await;
    let data = BASE64_STANDARD.encode(picture(16, 16, 3));
    let body = |image: String, strength: f64| {
        with(
            json!({"prompt": "red apple", "seed": 4, "steps": 6, "denoising_strength": strength, "resize_mode": 0,
            "init_images": [image], "include_init_images": false, "mask_blur": 4, "initial_noise_multiplier": 1,
            "override_settings": {"sd_model_checkpoint": TEXT}}),
        )
    };
    let plain = asked(&server, "img2img", body(data.clone(), 0.5)).await;
    let url = asked(&server, "img2img", body(format!("data:image/png;base64,{data}"), 0.5)).await;
    let more = asked(&server, "img2img", body(data, 0.9)).await;
    assert_eq!(pixels(&plain["images"][0]), pixels(&url["images"][0]));
    assert_ne!(pixels(&plain["images"][0]), pixels(&more["images"][0]));
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_are_of_what_is_there() {
    let server = Server::with_text().await;
    let list = async |path: &str| server.get(&format!("/sdapi/v1/{path}")).await.json();
    let models = list("sd-models").await;
    let titles: Vec<&str> =
        models.as_array().unwrap().iter().map(|it| it["title"].as_str().unwrap()).collect();
    assert!(titles.contains(&TEXT) && titles.contains(&STUDENT), "{titles:?}");
    assert!(list("samplers").await.as_array().unwrap().iter().any(|it| it["name"] == "Euler a"));
    assert_eq!(list("loras").await, json!([]));
    let progress = list("progress").await;
    assert_eq!((&progress["progress"], &progress["state"]["job_count"]), (&json!(0.0), &json!(0)));
    let options = list("options").await;
    let default = options["sd_model_checkpoint"].as_str().unwrap();
    assert_eq!(
        asked(&server, "options", json!({"sd_model_checkpoint": default})).await,
        Value::Null
    );
    // Every sampler of the list is one that can be asked for.
    for sampler in list("samplers").await.as_array().unwrap() {
        let body = json!({"steps": 2, "sampler_name": sampler["name"], "override_settings": {"sd_model_checkpoint": TEXT}});
        asked(&server, "txt2img", body).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_had_is_refused_by_its_name() {
    let server = Server::with_text().await;
    let image = BASE64_STANDARD.encode(picture(16, 16, 3));
    for (path, fields, parts) in [
        ("txt2img", json!({"enable_hr": true}), ["enable_hr", "true"]),
        ("txt2img", json!({"styles": ["oil"]}), ["styles", "oil"]),
        ("txt2img", json!({"subseed_strength": 0.5}), ["subseed_strength", "0.5"]),
        (
            "txt2img",
            json!({"alwayson_scripts": {"ControlNet": {"args": []}}}),
            ["alwayson_scripts", "ControlNet"],
        ),
        ("txt2img", json!({"sampler_name": "UniPC"}), ["sampler_name", "DPM++ 2M"]),
        ("txt2img", json!({"scheduler": "Karras"}), ["scheduler", "Automatic"]),
        ("txt2img", json!({"prompt": "a (red:1.3.1) apple"}), ["1.3.1", "weight"]),
        ("txt2img", json!({"prompt": "<lora:ink:1>"}), ["`prompt`", "--lora NAME=FILE"]),
        ("txt2img", json!({"steps": 0}), ["`steps`", "0"]),
        ("txt2img", json!({"steps": "x"}), ["`steps`", "whole number"]),
        ("txt2img", json!({"eta": -1}), ["`eta`", "from 0 to 1"]),
        ("txt2img", json!({"eta": 2, "sampler_name": "Euler"}), ["`eta`", "from 0 to 1"]),
        ("txt2img", json!({"denoising_strength": 2}), ["`denoising_strength`", "from 0 to 1"]),
        ("txt2img", json!({"batch_size": -1, "n_iter": -1}), ["`batch_size`", "at least 1"]),
        ("txt2img", json!({"width": 24}), ["`width`", "height"]),
        ("txt2img", json!({"width": 17, "height": 16}), ["`width`", "17x16"]),
        ("txt2img", json!({"batch_size": 1000}), ["`batch_size`", "1000"]),
        ("txt2img", json!({"batch_size": i64::MAX, "n_iter": 2}), ["`batch_size`", "--max-images"]),
        (
            "txt2img",
            json!({"override_settings": {"sd_vae": "x"}}),
            ["override_settings.sd_vae", "sd_model_checkpoint"],
        ),
        ("txt2img", json!({"init_images": [image]}), ["init_images", "img2img"]),
        ("txt2img", json!({"wings": 2}), ["wings", "not a field"]),
        ("img2img", json!({}), ["init_images", "0 images"]),
        ("img2img", json!({"init_images": ["?"]}), ["init_images", "base64"]),
        ("img2img", json!({"init_images": ["AAAA"]}), ["image", "PNG, JPEG or WebP"]),
        ("img2img", json!({"init_images": [image], "mask": "AAAA"}), ["mask", "not supported"]),
        (
            "img2img",
            json!({"init_images": [image], "denoising_strength": 2}),
            ["denoising_strength", "to 1"],
        ),
        (
            "options",
            json!({"sd_model_checkpoint": "other"}),
            ["sd_model_checkpoint", "override_settings"],
        ),
    ] {
        let mut fields = fields;
        if path != "options" && fields.get("override_settings").is_none() {
            fields["override_settings"] = json!({"sd_model_checkpoint": TEXT});
        }
        let reply = server.post(&format!("/sdapi/v1/{path}"), fields.to_string()).await;
        assert_eq!(reply.status, 400, "{fields}: {}", reply.text());
        let detail = reply.json()["detail"].as_str().unwrap().to_owned();
        assert!(parts.iter().all(|part| detail.contains(part)), "{fields}: {detail}");
    }
    let unknown = json!({"override_settings": {"sd_model_checkpoint": "no-such"}});
    let reply = server.post("/sdapi/v1/txt2img", unknown.to_string()).await;
    assert_eq!(reply.status, 404, "{}", reply.text());
}
