//! Stable Diffusion XL's way: two text encoders, a pooled text, and sizes beside it.

use std::path::Path;

use candle_core::{Device, Tensor};
use serde_json::{Value, json};
use understudy_models::{Conditions, checkpoint::ModelFolder};

use crate::{folder::copy, server::Server};

const MODEL: &str = "xl";

async fn server() -> Server {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/golden");
    let models = tempfile::tempdir().unwrap();
    copy(&golden.join("pipeline/stable_diffusion_xl"), &models.path().join(MODEL));
    Server::over(models, |_| {}).await
}

async fn drawn(server: &Server, fields: Value) -> Value {
    let body = json!({"model": MODEL, "seed": 5, "num_inference_steps": 3, "guidance_scale": 4.0});
    server.drawn(body, &fields).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_the_same_alone_and_among_others() {
    let server = server().await;
    let requests = [
        json!({"prompt": "red apple"}),
        json!({"prompt": "red apple", "negative_prompt": "a cat"}),
        json!({"prompt": "red apple", "size": "24x16"}),
        json!({"prompt": "green apple ".repeat(8), "guidance_scale": 2.0}),
        json!({"prompt": "(red:1.4) apple", "prompt_syntax": "weighted", "scheduler": "dpm++"}),
        json!({"guidance_scale": 1.0}),
    ];
    let mut alone = Vec::new();
    for request in &requests {
        alone.push(drawn(&server, request.clone()).await);
    }
    for (i, one) in alone.iter().enumerate() {
        assert!(!alone[..i].contains(one), "{}", requests[i]);
    }
    let together = requests.iter().map(|request| drawn(&server, request.clone()));
    assert_eq!(futures_util::future::join_all(together).await, alone);
    // An empty one is none: zeros, which differ from an empty prompt that is read.
    let empty = drawn(&server, json!({"prompt": "red apple", "negative_prompt": ""})).await;
    assert_eq!(empty, alone[0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_raw_evaluation_is_told_a_pooled_text_and_sizes() {
    let server = server().await;
    let about = server.get(&format!("/v2/models/{MODEL}")).await.json();
    let told = |name: &str, shape: Value| json!({"name": name, "datatype": "FP32", "shape": shape});
    assert_eq!(about["inputs"][2], told("text_embeds", json!([-1, 12])));
    assert_eq!(about["inputs"][3], told("time_ids", json!([-1, 6])));
    assert_eq!(about["inputs"][4], told("encoder_hidden_states", json!([-1, 24, 40])));

    let values = |count: usize, step: f32| -> Vec<f32> {
        (0..count).map(|i| (i as f32 * step).sin()).collect()
    };
    let (x, states, text) = (values(2 * 256, 0.1), values(2 * 24 * 40, 0.2), values(2 * 12, 0.3));
    let sizes = [16.0f32, 16.0, 0.0, 0.0, 16.0, 16.0, 8.0, 24.0, 2.0, 4.0, 16.0, 16.0];
    let input = |name: &str, shape: Value, data: &[f32]| json!({"name": name, "datatype": "FP32", "shape": shape, "data": data});
    let inputs = [
        input("sample", json!([2, 4, 8, 8]), &x),
        input("timestep", json!([2]), &[7.0, 500.0]),
        input("encoder_hidden_states", json!([2, 24, 40]), &states),
        input("text_embeds", json!([2, 12]), &text),
        input("time_ids", json!([2, 6]), &sizes),
    ];
    let path = format!("/v2/models/{MODEL}/infer");
    let reply = server.post(&path, json!({"inputs": inputs}).to_string()).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    let found: Vec<f32> =
        serde_json::from_value(reply.json()["outputs"][0]["data"].clone()).unwrap();

    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/golden");
    let folder = ModelFolder::open(&golden.join("pipeline/stable_diffusion_xl")).unwrap();
    let network = folder.load(candle_core::DType::F32, &Device::Cpu).unwrap().network;
    let tensor =
        |values: &[f32], shape: &[usize]| Tensor::from_slice(values, shape, &Device::Cpu).unwrap();
    let added = Tensor::cat(&[tensor(&text, &[2, 12]), tensor(&sizes, &[2, 6])], 1).unwrap();
    let states = tensor(&states, &[2, 24, 40]);
    let conditions =
        Conditions { condition: Some(&added), prompt: Some(&states), ..Conditions::default() };
    let expected = network
        .evaluate(&tensor(&x, &[2, 4, 8, 8]), &tensor(&[7.0, 500.0], &[2]), conditions)
        .unwrap();
    assert_eq!(found, expected.flatten_all().unwrap().to_vec1::<f32>().unwrap());

    let reply = server.post(&path, json!({"inputs": inputs[..4]}).to_string()).await;
    assert_eq!(reply.status, 400);
    assert!(reply.text().contains("`time_ids` is missing"), "{}", reply.text());
}
