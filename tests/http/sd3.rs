//! Stable Diffusion 3's way: prompts that CLIP and T5 read together, or CLIP alone.

use std::{collections::HashMap, path::Path};

use candle_core::{Device, Tensor};
use serde_json::{Value, json};
use understudy_models::checkpoint::Lora;

use crate::{
    server::{Server, png, with},
    stable_diffusion_3,
};

/// With T5's text encoder, and without.
const MODELS: [&str; 2] = ["three", "two"];

async fn server() -> Server {
    let models = tempfile::tempdir().unwrap();
    for name in MODELS {
        stable_diffusion_3::put(name, &models.path().join(name));
    }
    let folder = models.path().join("loras");
    std::fs::create_dir(&folder).unwrap();
    let loras = [
        ("network", "transformer.transformer_blocks.0.attn.to_v", 12),
        ("clip", "text_encoder.text_model.encoder.layers.0.self_attn.v_proj", 8),
    ];
    let loras = loras.map(|(name, target, width)| {
        let file = folder.join(name).with_extension("safetensors");
        write_lora(&file, target, width);
        (name.to_owned(), Lora::open(&file, 1.0).unwrap())
    });
    Server::over(models, |settings| settings.loras.extend(loras)).await
}

/// Of rank 1, that adds a half to every weight of a square one.
fn write_lora(file: &Path, target: &str, width: usize) {
    let all = |shape: (usize, usize), value: f32| Tensor::full(value, shape, &Device::Cpu).unwrap();
    let tensors = HashMap::from([
        (format!("{target}.lora_A.weight"), all((1, width), 1.0)),
        (format!("{target}.lora_B.weight"), all((width, 1), 0.5)),
    ]);
    candle_core::safetensors::save(&tensors, file).unwrap();
}

fn asked(model: &str) -> Value {
    json!({"model": model, "seed": 5, "num_inference_steps": 3, "guidance_scale": 4.0})
}

async fn drawn(server: &Server, model: &str, fields: &Value) -> Value {
    server.drawn(asked(model), fields).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_the_same_alone_and_among_others() {
    let server = server().await;
    for model in MODELS {
        let requests = [
            json!({"prompt": "red apple"}),
            json!({"prompt": "red apple", "negative_prompt": "a cat"}),
            json!({"prompt": "red apple", "size": "24x16"}),
            json!({"prompt": "green apple", "guidance_scale": 2.0}),
            json!({"guidance_scale": 1.0}),
        ];
        let mut alone = Vec::new();
        for request in &requests {
            alone.push(drawn(&server, model, request).await);
        }
        for (i, one) in alone.iter().enumerate() {
            assert!(!alone[..i].contains(one), "{model}: {}", requests[i]);
        }
        let together = requests.iter().map(|request| drawn(&server, model, request));
        assert_eq!(futures_util::future::join_all(together).await, alone, "{model}");
        // An empty one is read like any other, and is what is guided away from where nothing is said.
        let empty = json!({"prompt": "red apple", "negative_prompt": ""});
        assert_eq!(drawn(&server, model, &empty).await, alone[0], "{model}");
    }
    for (model, most) in [("three", 255), ("two", 22)] {
        let about = server.get(&format!("/v1/models/{model}")).await.json();
        assert_eq!(about["max_prompt_tokens"], most);
    }
}

/// The models with LoRAs share T5's weights, and nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn a_lora_changes_the_network_or_a_text_encoder() {
    let server = server().await;
    for model in MODELS {
        let mut drawn_so_far = Vec::new();
        for loras in [json!([]), json!([{"name": "network"}]), json!([{"name": "clip"}])] {
            let fields = json!({"prompt": "red apple", "lora": loras});
            let body = with(asked(model), &fields);
            let reply = server.generate(body).await;
            assert_eq!(reply.status, 200, "{fields}: {}", reply.text());
            let (pixels, _) = png(&reply.json()["data"][0]);
            assert!(!drawn_so_far.contains(&pixels), "{model}: {fields}");
            drawn_so_far.push(pixels);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_raw_evaluation_is_told_a_pooled_text() {
    let server = server().await;
    let about = server.get("/v2/models/two").await.json();
    let names: Vec<&str> =
        about["inputs"].as_array().unwrap().iter().map(|it| it["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["sample", "timestep", "text_embeds", "encoder_hidden_states"]);
    let input = |name: &str, shape: Value, values: Vec<f64>| json!({"name": name, "datatype": "FP32", "shape": shape, "data": values});
    let body = |text: usize| {
        let inputs = [
            input("sample", json!([1, 16, 8, 8]), vec![0.5; 1024]),
            json!({"name": "timestep", "datatype": "INT64", "shape": [1], "data": [500]}),
            input("text_embeds", json!([1, text]), vec![0.25; text]),
            input("encoder_hidden_states", json!([1, 280, 28]), vec![0.125; 280 * 28]),
        ];
        json!({"inputs": inputs})
    };
    let reply = server.post("/v2/models/two/infer", body(16).to_string()).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    let answer = reply.json();
    assert_eq!(answer["outputs"][0]["shape"], json!([1, 16, 8, 8]));
    let finite = answer["outputs"][0]["data"].as_array().unwrap().iter().all(Value::is_number);
    assert!(finite, "{answer}");
    let reply = server.post("/v2/models/two/infer", body(15).to_string()).await;
    assert_eq!(reply.status, 400, "{}", reply.text());
    assert!(reply.text().contains("text_embeds"), "{}", reply.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_told_is_refused_by_name() {
    let server = server().await;
    let long = |count: usize| json!({"prompt": "apple ".repeat(count)});
    for (model, fields, wanted) in [
        ("three", long(600), ["`prompt`", "at most 256 fit"]),
        ("two", long(30), ["`prompt`", "at most 22 fit"]),
        (
            "three",
            json!({"prompt": "(red:1.5) apple", "prompt_syntax": "weighted"}),
            ["`prompt_syntax`", "take no weights"],
        ),
        (
            "two",
            json!({"prompt": "a", "scheduler": "heun"}),
            ["trained by flow matching", "flow-euler"],
        ),
        ("two", json!({"prompt": "a", "size": "18x16"}), ["`size`", "multiples of"]),
        ("two", json!({"prompt": "a", "size": "36x16"}), ["a side of 18", "pos_embed_max_size"]),
    ] {
        let reply = server.generate(with(asked(model), &fields)).await;
        assert_eq!(reply.status, 400, "{model}: {fields}: {}", reply.text());
        for word in wanted {
            assert!(reply.text().contains(word), "{word}: {}", reply.text());
        }
    }
}
