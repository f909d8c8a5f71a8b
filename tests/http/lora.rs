//! LoRAs that requests name, beside models that have them always.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use understudy_models::checkpoint::Lora;

use crate::{
    folder::copy,
    server::{CLASSES, Server, TEXT},
};

/// The text model whose card names the LoRA that requests call `sketch`, by 0.7.
const ALWAYS: &str = "always";

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/golden")
}

async fn server() -> Server {
    let models = tempfile::tempdir().unwrap();
    for (id, card) in [
        (TEXT, json!({"defaults": {"num_inference_steps": 3, "guidance_scale": 2.0}})),
        (
            ALWAYS,
            json!({"defaults": {"num_inference_steps": 3, "guidance_scale": 2.0},
                "loras": [{"file": "sketch.safetensors", "scale": 0.7}]}),
        ),
    ] {
        let folder = models.path().join(id);
        copy(&golden().join("pipeline/stable_diffusion"), &folder);
        std::fs::copy(golden().join("lora/kohya.safetensors"), folder.join("sketch.safetensors"))
            .unwrap();
        std::fs::write(folder.join("understudy.json"), card.to_string()).unwrap();
    }
    Server::over(models, |settings| {
        for (name, file) in [("sketch", "kohya"), ("ink", "diffusers")] {
            let file = golden().join(format!("lora/{file}.safetensors"));
            settings.loras.insert(name.into(), Lora::open(&file, 1.0).unwrap());
        }
    })
    .await
}

/// The image of a request after "red apple" with these fields.
async fn drawn(server: &Server, fields: Value) -> Value {
    server.drawn(json!({"model": TEXT, "seed": 5, "prompt": "red apple"}), &fields).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_draws_what_a_model_with_the_lora_in_its_card_draws() {
    let server = server().await;
    let sketch = json!({"lora": [{"name": "sketch", "scale": 0.7}]});
    let plain = drawn(&server, json!({})).await;
    let changed = drawn(&server, sketch.clone()).await;
    // The PNG tells the model and the LoRA, so what is compared is pixels.
    let pixels = |image: &Value| {
        use base64::{Engine, prelude::BASE64_STANDARD};
        let bytes = BASE64_STANDARD.decode(image.as_str().unwrap()).unwrap();
        let told = bytes.windows(10).any(|part| part == b"sketch 0.7");
        (image::load_from_memory(&bytes).unwrap().into_bytes(), told)
    };
    let always = drawn(&server, json!({"model": ALWAYS})).await;
    assert_eq!(pixels(&changed).0, pixels(&always).0);
    assert!(pixels(&changed).1 && !pixels(&plain).1, "the parameters in the PNG");
    assert_ne!(pixels(&changed).0, pixels(&plain).0);
    // The other way round the same model, and alone the same as among others.
    let both = |first: &str, second: &str| json!({"lora": [{"name": first, "scale": 0.5}, {"name": second, "scale": 0.5}]});
    let (one, other, again, without, wide) = tokio::join!(
        drawn(&server, both("sketch", "ink")),
        drawn(&server, both("ink", "sketch")),
        drawn(&server, sketch.clone()),
        drawn(&server, json!({})),
        drawn(&server, json!({"lora": [{"name": "sketch", "scale": 0.7}], "size": "24x16"})),
    );
    assert_eq!(pixels(&one).0, pixels(&other).0);
    assert_eq!(pixels(&again).0, pixels(&changed).0);
    assert_eq!(pixels(&without).0, pixels(&plain).0);
    assert_eq!(pixels(&wide).0.len(), 3 * 24 * 16);
    let none = drawn(&server, json!({"lora": [{"name": "ink", "scale": 0}]})).await;
    assert_eq!(pixels(&none).0, pixels(&plain).0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_or_does_not_fit_is_refused() {
    let server = server().await;
    let named = |name: &str| json!({"name": name});
    for (model, lora, parts) in [
        (TEXT, json!([named("oil")]), ["`lora`", "ink, sketch"]),
        (TEXT, json!([named("ink"), named("ink")]), ["`lora`", "once"]),
        (TEXT, json!([{"name": "ink", "scale": 1000}]), ["`lora`", "-100 to 100"]),
        (TEXT, json!(vec![named("ink"); 9]), ["`lora`", "at most 8"]),
        (TEXT, json!("ink"), ["lora", "list"]),
        (TEXT, json!([{"nmae": "ink"}]), ["nmae", "name, scale"]),
        (CLASSES, json!([named("ink")]), ["`lora`", "fits no weight"]),
    ] {
        let reply = server.generate(json!({"model": model, "seed": 1, "lora": lora})).await;
        assert_eq!(reply.status, 400, "{lora}: {}", reply.text());
        let message = reply.json()["error"]["message"].as_str().unwrap().to_owned();
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
        assert!(!message.contains("/golden/"), "where files lie is the operator's: {message}");
    }
    let other = Server::start().await;
    let reply = other.generate(json!({"lora": [named("ink")]})).await;
    assert_eq!(reply.status, 400);
    assert!(reply.text().contains("--lora NAME=FILE"), "{}", reply.text());
}
