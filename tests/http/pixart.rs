//! PixArt's way: a transformer, and prompts that T5 reads, each as long as it is.

use std::path::Path;

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Value, json};

use crate::{
    folder::copy,
    server::{Server, with},
};

const MODEL: &str = "pixart";

async fn server() -> Server {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/golden");
    let models = tempfile::tempdir().unwrap();
    let folder = models.path().join(MODEL);
    copy(&golden.join("pixart_pipeline/alpha"), &folder);
    copy(&golden.join("t5_tokenizer"), &folder.join("tokenizer"));
    std::fs::write(folder.join("understudy.json"), card().to_string()).unwrap();
    Server::over(models, |_| {}).await
}

fn card() -> Value {
    json!({"defaults": {"num_inference_steps": 3, "guidance_scale": 4.5}})
}

/// Its own size, of 256 pixels a side, takes too long for a test.
fn asked(fields: &Value) -> Value {
    with(json!({"model": MODEL, "seed": 5, "size": "24x16"}), fields)
}

/// Without the parameters that a PNG holds beside its pixels.
async fn drawn(server: &Server, fields: &Value) -> Vec<u8> {
    let reply = server.generate(asked(fields)).await;
    assert_eq!(reply.status, 200, "{fields}: {}", reply.text());
    let png = reply.json()["data"][0]["b64_json"].clone();
    let png = BASE64_STANDARD.decode(png.as_str().unwrap()).unwrap();
    image::load_from_memory(&png).unwrap().into_bytes()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_the_same_alone_and_among_others() {
    let server = server().await;
    let requests = [
        json!({"prompt": "a small cactus"}),
        json!({"prompt": "a small cactus", "negative_prompt": "word"}),
        json!({"prompt": "a small cactus with a happy face in the desert"}),
        json!({"prompt": "a small cactus", "size": "16x16"}),
        json!({"prompt": "a small cactus", "guidance_scale": 2.0, "scheduler": "ddim"}),
        json!({"guidance_scale": 1.0}),
    ];
    let mut alone = Vec::new();
    for request in &requests {
        alone.push(drawn(&server, request).await);
    }
    for (i, one) in alone.iter().enumerate() {
        assert!(!alone[..i].contains(one), "{}", requests[i]);
    }
    let together = requests.iter().map(|request| drawn(&server, request));
    assert_eq!(futures_util::future::join_all(together).await, alone);
    // As diffusers, which looks at small letters, without white space around them.
    let shouted = drawn(&server, &json!({"prompt": "  A Small CACTUS "})).await;
    assert_eq!(shouted, alone[0]);
    let about = server.get(&format!("/v1/models/{MODEL}")).await.json();
    assert_eq!(about["max_prompt_tokens"], 119);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_t5_cannot_be_told_is_refused_by_name() {
    let server = server().await;
    for (fields, wanted) in [
        (json!({"prompt": "cactus ".repeat(200)}), ["`prompt`", "at most 120 fit"]),
        (
            json!({"prompt": "a", "negative_prompt": "cactus ".repeat(200)}),
            ["`negative_prompt`", "at most 120 fit"],
        ),
        (
            json!({"prompt": "(red:1.5) cactus", "prompt_syntax": "weighted"}),
            ["`prompt_syntax`", "takes no weights"],
        ),
        (json!({"prompt": "a\u{0}b"}), ["`prompt`", "U+0000"]),
        (json!({"prompt": "a", "size": "18x17"}), ["`size`", "multiples of"]),
    ] {
        let reply = server.generate(asked(&fields)).await;
        assert_eq!(reply.status, 400, "{}", reply.text());
        for word in wanted {
            assert!(reply.text().contains(word), "{word}: {}", reply.text());
        }
    }
}
