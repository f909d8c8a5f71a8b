//! Text-to-image models: prompts, guidance, previews of latents, and what is refused.

use std::path::Path;

use base64::{Engine, prelude::BASE64_STANDARD};
use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};
use understudy_models::{
    Conditions,
    checkpoint::{Draft, ModelFolder, card::Card},
};

use crate::server::{STUDENT, Server, TEXT, events, png, with, write_told_guidance};

fn pixels(entry: &Value) -> Vec<u8> {
    let bytes = BASE64_STANDARD.decode(entry["b64_json"].as_str().unwrap()).unwrap();
    let image = image::load_from_memory(&bytes).unwrap();
    assert_eq!((image.width(), image.height(), image.color()), (16, 16, image::ColorType::Rgb8));
    image.into_bytes()
}

/// The only image of a request to the text model with these fields.
async fn drawn(server: &Server, fields: Value) -> Vec<u8> {
    let body = with(json!({"model": TEXT, "seed": 5}), &fields);
    let reply = server.generate(body).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    pixels(&reply.json()["data"][0])
}

#[tokio::test(flavor = "multi_thread")]
async fn prompts_and_guidance_change_the_image_and_defaults_are_the_cards() {
    let server = Server::with_text().await;
    let apple = drawn(&server, json!({"prompt": "red apple"})).await;
    assert_eq!(apple, drawn(&server, json!({"prompt": "red apple"})).await);
    let unweighted = json!({"prompt": "red (apple:1)", "prompt_syntax": "weighted"});
    assert_eq!(apple, drawn(&server, unweighted).await);
    assert_eq!(apple, drawn(&server, json!({"prompt": "Red  Apple", "guidance_scale": 3.0})).await);
    let others = [
        json!({"prompt": "green apple"}),
        json!({"prompt": "red apple", "guidance_scale": 1.0}),
        json!({"prompt": "red apple", "guidance_scale": 7.5}),
        json!({"prompt": "red apple", "negative_prompt": "cat"}),
        json!({"prompt": "(red:1.5) apple", "prompt_syntax": "weighted"}),
        json!({"prompt": "(red:1.5) apple"}),
        json!({}),
    ];
    for other in others {
        assert_ne!(apple, drawn(&server, other.clone()).await, "{other}");
    }
    assert_eq!(drawn(&server, json!({})).await, drawn(&server, json!({"prompt": ""})).await);

    let card = server.get(&format!("/v1/models/{TEXT}")).await.json();
    assert_eq!((&card["size"], &card["channels"]), (&json!("16x16"), &json!(3)));
    assert_eq!(card["max_prompt_tokens"], 88);
    assert_eq!(card["defaults"]["guidance_scale"], 3.0);
    assert_eq!(card["example_prompts"], json!(["red apple, noto style"]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_text_sample_is_the_same_alone_and_among_others() {
    let server = Server::with_text().await;
    let ask = json!({"prompt": "red apple", "num_inference_steps": 7});
    let alone = drawn(&server, ask.clone()).await;
    let other = |i: u64| {
        let kinds = ["ddim", "ddpm", "dpm++", "euler", "heun"];
        json!({"model": TEXT, "seed": 100 + i, "prompt": format!("cat {i}"), "guidance_scale": 1.0 + i as f64,
            "num_inference_steps": 3 + 2 * i, "scheduler": kinds[i as usize % 5]})
    };
    for _ in 0..3 {
        let (among, _, _, _, _, _, _, _) = tokio::join!(
            drawn(&server, ask.clone()),
            server.generate(other(0)),
            server.generate(other(1)),
            server.generate(other(2)),
            server.generate(other(3)),
            server.generate(other(4)),
            server.generate(other(5)),
            server.generate(other(6)),
        );
        assert_eq!(alone, among);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_says_after_which_prompts_it_was_made() {
    let server = Server::with_text().await;
    let body = json!({"model": TEXT, "prompt": "red apple,\nりんご", "negative_prompt": "cat", "seed": 5, "size": "24x16",
        "stream": true, "partial_images": 1});
    let events = events(&server.generate(body).await.text());
    let version = env!("CARGO_PKG_VERSION");
    let text = format!(
        "red apple,\nりんご\nNegative prompt: cat\nSteps: 4, Sampler: ddim, CFG scale: 3, Seed: 5, Size: 24x16, Model: text, Version: \
         understudy {version}"
    );
    let texts: Vec<_> = events.iter().map(|(_, event)| png(event).1).collect();
    assert_eq!(texts, [vec![], vec![("parameters".to_owned(), text)]]);
}

#[tokio::test(flavor = "multi_thread")]
async fn previews_of_latents_are_images_of_the_final_size() {
    let server = Server::with_text().await;
    let body = json!({"model": TEXT, "prompt": "house", "stream": true, "partial_images": 2,
        "num_inference_steps": 6});
    let reply = server.generate(body).await;
    let told = events(&reply.text());
    let names: Vec<&str> = told.iter().map(|(name, _)| name.as_str()).collect();
    let partial = "image_generation.partial_image";
    assert_eq!(names, [partial, partial, "image_generation.completed"]);
    let images: Vec<Vec<u8>> = told.iter().map(|(_, event)| pixels(event)).collect();
    assert_ne!(images[0], images[1]);
    // A preview has one colour for each pixel of the latent.
    assert!(images[0].chunks(6).all(|two| two[..3] == two[3..]));
}

#[tokio::test(flavor = "multi_thread")]
async fn all_that_there_is_takes_prompts() {
    let server = Server::with_text().await;
    let fields = json!({"prompt": "dog face", "seed": 3});
    let with = |more: Value| with(fields.clone(), &more);
    let compared = server.compare(with(json!({"models": [TEXT, STUDENT]}))).await;
    assert_eq!(compared.status, 200, "{}", compared.text());
    let compared = compared.json();
    // Both are one network: what differs is the steps.
    assert_eq!(compared["shared_noise"], true);
    let teacher = drawn(&server, fields.clone()).await;
    assert_eq!(pixels(&compared["pair"][0]["data"][0]), teacher);

    let experiment = json!({"id": "text", "arms": [{"model": TEXT, "weight": 1}, {"model": STUDENT, "weight": 1}]});
    assert_eq!(server.post("/v1/experiments", experiment.to_string()).await.status, 201);
    let by_arm = server.generate(with(json!({"model": "experiment:text", "user": "u"}))).await;
    assert_eq!(by_arm.status, 200, "{}", by_arm.text());
    let pair = server.post("/v1/experiments/text/pairs", fields.to_string()).await;
    assert_eq!(pair.status, 200, "{}", pair.text());
    let vote = json!({"pair_id": pair.json()["pair_id"], "choice": 0, "idempotency_key": "k"});
    assert_eq!(server.post("/v1/experiments/text/votes", vote.to_string()).await.status, 201);
}

#[tokio::test(flavor = "multi_thread")]
async fn draft_and_auto_take_prompts_where_the_default_model_reads_them() {
    let server = Server::with_only_text().await;
    let draft = server.generate(json!({"model": "draft", "prompt": "house", "seed": 1})).await;
    assert_eq!(draft.status, 200, "{}", draft.text());
    assert_eq!(draft.json()["draft"]["model"], STUDENT);
    let auto = json!({"model": "auto", "prompt": "house", "seed": 1, "deadline_ms": 60_000});
    let auto = server.generate(auto).await;
    assert_eq!(auto.status, 200, "{}", auto.text());
    assert_eq!(auto.json()["model"], TEXT);
}

#[tokio::test(flavor = "multi_thread")]
async fn images_have_the_size_that_is_asked_for_and_are_the_same_among_other_sizes() {
    let server = Server::with_text().await;
    let ask = |size: &str| json!({"model": TEXT, "prompt": "house", "seed": 2, "size": size});
    let card = server.get(&format!("/v1/models/{TEXT}")).await.json();
    assert_eq!(card["size_multiple"], 4);
    let mut alone = Vec::new();
    let sizes = ["16x16", "24x16", "16x24", "8x8", "4x32", "32x32"];
    for size in sizes {
        let reply = server.generate(ask(size)).await;
        assert_eq!(reply.status, 200, "{size}: {}", reply.text());
        let body = reply.json();
        assert_eq!(body["size"], size);
        let bytes = BASE64_STANDARD.decode(body["data"][0]["b64_json"].as_str().unwrap()).unwrap();
        let image = image::load_from_memory(&bytes).unwrap();
        assert_eq!(format!("{}x{}", image.width(), image.height()), size);
        alone.push(body["data"][0]["b64_json"].clone());
    }
    let among = futures_util::future::join_all(sizes.map(|size| server.generate(ask(size)))).await;
    for ((size, reply), alone) in sizes.iter().zip(among).zip(alone) {
        assert_eq!(reply.json()["data"][0]["b64_json"], alone, "{size}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn long_prompts_are_read_in_parts_and_their_images_are_the_same_among_others() {
    let server = Server::with_text().await;
    let words = |count: usize| vec!["a"; count].join(" ");
    let count = |outcome: &str| server.metrics.prompts.with_label_values(&[TEXT, outcome]).get();
    let asks = [
        json!({"prompt": "red apple"}),
        json!({"prompt": words(22)}),
        json!({"prompt": words(23)}),
        json!({"prompt": format!("{} 0", words(22))}),
        json!({"prompt": "red apple", "negative_prompt": words(50)}),
        json!({"prompt": words(88), "negative_prompt": "cat"}),
        json!({"prompt": words(60), "guidance_scale": 1.0}),
    ];
    let mut alone = Vec::new();
    for ask in &asks {
        alone.push(drawn(&server, ask.clone()).await);
    }
    for (i, one) in alone.iter().enumerate() {
        assert!(!alone[..i].contains(one), "{}", asks[i]);
    }
    let misses = count("miss");
    let among = asks.iter().map(|ask| drawn(&server, ask.clone()));
    assert_eq!(futures_util::future::join_all(among).await, alone);
    assert_eq!(count("miss"), misses);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_size_that_is_still_being_compiled_counts_against_the_deadline() {
    let server = Server::with_text().await;
    // Nothing is compiled in no time.
    let body = json!({"model": TEXT, "prompt": "house", "size": "24x24", "deadline_ms": 1});
    let reply = server.generate(body).await;
    assert_eq!(reply.status, 504, "{}", reply.text());
    assert_eq!(reply.json()["error"]["param"], "deadline_ms");
    let body = json!({"model": TEXT, "prompt": "house", "size": "24x24", "deadline_ms": 60_000});
    assert_eq!(server.generate(body).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn hidden_states_are_kept_and_counted() {
    let server = Server::with_text().await;
    let count = |outcome: &str| server.metrics.prompts.with_label_values(&[TEXT, outcome]).get();
    // The empty prompt is known since the warm-up.
    drawn(&server, json!({})).await;
    assert_eq!((count("hit"), count("miss")), (2, 0));
    drawn(&server, json!({"prompt": "cat"})).await;
    assert_eq!((count("hit"), count("miss")), (3, 1));
    drawn(&server, json!({"prompt": "cat"})).await;
    assert_eq!((count("hit"), count("miss")), (5, 1));
    let metrics = server.get("/metrics").await.text();
    let decoded = format!(
        "understudy_transcoding_duration_seconds_count{{model=\"{TEXT}\",stage=\"decode\"}} 3"
    );
    assert!(metrics.contains(&decoded), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_drawn_is_refused_by_field_value_limit_and_remedy() {
    let server = Server::with_text().await;
    let words = |count: usize| vec!["a"; count].join(" ");
    for (fields, param, parts) in [
        (json!({"prompt": words(89)}), "prompt", ["89 tokens long", "at most 88"]),
        (json!({"prompt": words(2000)}), "prompt", ["2000 tokens long", "shorten"]),
        (json!({"prompt": "x".repeat(20_000)}), "prompt", ["20000 bytes", "at most 16384"]),
        (json!({"prompt": "a\u{0}b"}), "prompt", ["U+0000", "take it out"]),
        (json!({"prompt": 7}), "prompt", ["7", "a string"]),
        (json!({"negative_prompt": words(90)}), "negative_prompt", ["90 tokens", "at most 88"]),
        (
            json!({"negative_prompt": "x", "guidance_scale": 1}),
            "negative_prompt",
            ["`guidance_scale` is 1", "larger"],
        ),
        (json!({"class_label": 1}), "class_label", ["draws after text", "leave `class_label` out"]),
        (json!({"size": "0x0"}), "size", ["0x0", "multiples of 4"]),
        (json!({"size": "511x511"}), "size", ["511x511", "16x16"]),
        (json!({"size": "4096x4"}), "size", ["4096x4", "at most 1024"]),
        (
            json!({"size": "99999999999999999999x4"}),
            "size",
            ["99999999999999999999x4", "--max-pixels"],
        ),
        (
            json!({"model": "plain", "prompt": "", "size": "16x16"}),
            "size",
            ["16x16", "makes 8x8 only"],
        ),
        (
            json!({"model": "classes", "prompt": "", "negative_prompt": "x"}),
            "negative_prompt",
            ["reads no text", "leave"],
        ),
        (
            json!({"model": "plain", "prompt": "", "guidance_scale": 2}),
            "guidance_scale",
            ["2", "null class"],
        ),
    ] {
        let body = with(json!({"model": TEXT, "prompt": "x"}), &fields);
        let reply = server.generate(body).await;
        assert_eq!(reply.status, 400, "{fields}: {}", reply.text());
        let error = &reply.json()["error"];
        assert_eq!(error["param"], param, "{fields}");
        let message = error["message"].as_str().unwrap();
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    }
    for body in [
        format!(r#"{{"model": "{TEXT}", "prompt": "\ud800"}}"#),
        format!(r#"{{"model": "{TEXT}", "guidance_scale": NaN}}"#),
        format!(r#"{{"model": "{TEXT}", "guidance_scale": 1e999}}"#),
    ] {
        let reply = server.post("/v1/images/generations", body.clone()).await;
        assert_eq!(reply.status, 400, "{body}: {}", reply.text());
    }
    // As many as are read are drawn after, and nothing else has suffered.
    drawn(&server, json!({"prompt": words(88)})).await;
}

/// A network that takes the guidance scale as an input: any of its range, and nothing to be guided away from.
#[tokio::test(flavor = "multi_thread")]
async fn a_network_that_takes_the_scale_is_asked_within_its_range() {
    let models = tempfile::tempdir().unwrap();
    let golden =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/golden/pipeline/stable_diffusion");
    let plain = ModelFolder::open(&golden).unwrap();
    let network = plain.network.with_guidance(true).unwrap();
    let weights = network.initial_weights(1).unwrap().into_iter().collect();
    let card = json!({"role": "student", "teacher": "any-scale", "guidance_range": [1.5, 4.0],
        "defaults": {"num_inference_steps": 3, "guidance_scale": 2.0}});
    let card: Card = serde_json::from_value(card).unwrap();
    let draft = Draft::new(&models.path().join(TEXT)).unwrap();
    let around = Some(&plain);
    ModelFolder::write_around(draft, &network, &weights, &plain.schedule, &card, around).unwrap();
    let draft = Draft::new(&models.path().join("any-scale")).unwrap();
    let weights = plain.tensors().unwrap();
    let card = Card::default();
    ModelFolder::write_around(draft, &plain.network, &weights, &plain.schedule, &card, around)
        .unwrap();

    let server = Server::over(models, |_| {}).await;
    // The teacher takes any scale, so `auto` does.
    for more in
        [json!({"guidance_scale": 7}), json!({"guidance_scale": 2, "negative_prompt": "cat"})]
    {
        let body = with(json!({"model": "auto", "prompt": "x", "num_inference_steps": 2}), &more);
        let reply = server.generate(body).await;
        assert_eq!(reply.status, 200, "{more}: {}", reply.text());
        assert_eq!(reply.json()["model"], "any-scale");
    }
    let usual = drawn(&server, json!({"prompt": "x"})).await;
    assert!(usual == drawn(&server, json!({"prompt": "x", "guidance_scale": 2})).await);
    assert!(usual != drawn(&server, json!({"prompt": "x", "guidance_scale": 4})).await);
    let told = server.get(&format!("/v1/models/{TEXT}")).await.json();
    assert_eq!(told["guidance_range"], json!([1.5, 4.0]));
    for (fields, param, word) in [
        (json!({"guidance_scale": 1}), "guidance_scale", "from 1.5 to 4"),
        (json!({"guidance_scale": 4.5}), "guidance_scale", "from 1.5 to 4"),
        (json!({"negative_prompt": "cat"}), "negative_prompt", "leave it out"),
    ] {
        let body = with(json!({"model": TEXT, "prompt": "x"}), &fields);
        let reply = server.generate(body).await;
        assert_eq!(reply.status, 400, "{fields}: {}", reply.text());
        let error = &reply.json()["error"];
        assert_eq!(error["param"], param, "{fields}");
        assert!(error["message"].as_str().unwrap().contains(word), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_raw_evaluation_is_told_hidden_states() {
    let server = Server::with_text().await;
    let about = server.get(&format!("/v2/models/{TEXT}")).await.json();
    assert_eq!(about["inputs"][2]["name"], "encoder_hidden_states");
    assert_eq!(about["inputs"][2]["shape"], json!([-1, 24, 16]));
    let input = |name: &str, shape: Value, count: usize| json!({"name": name, "datatype": "FP32", "shape": shape, "data": vec![0.25; count]});
    let [sample, time] =
        [input("sample", json!([1, 4, 8, 8]), 256), input("timestep", json!([1]), 1)];
    let states = input("encoder_hidden_states", json!([1, 24, 16]), 24 * 16);
    let path = format!("/v2/models/{TEXT}/infer");
    let body = json!({"inputs": [sample, time, states]});
    let reply = server.post(&path, body.to_string()).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert_eq!(reply.json()["outputs"][0]["shape"], json!([1, 4, 8, 8]));
    let reply = server.post(&path, json!({"inputs": [sample, time]}).to_string()).await;
    assert_eq!(reply.status, 400);
    assert!(reply.text().contains("`encoder_hidden_states` is missing"), "{}", reply.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_that_is_told_its_guidance_is_told_it_in_raw_evaluations_too() {
    let models = tempfile::tempdir().unwrap();
    let folder = models.path().join("told");
    let defaults = json!({"num_inference_steps": 2, "guidance_scale": 4.0});
    write_told_guidance(&folder, &json!({"defaults": defaults}));
    let network =
        ModelFolder::open(&folder).unwrap().load(DType::F32, &Device::Cpu).unwrap().network;
    let server = Server::over(models, |settings| settings.max_body_bytes = 65_536).await;
    let about = server.get("/v2/models/told").await.json();
    let told = json!({"name": "guidance_scale", "datatype": "FP32", "shape": [-1]});
    assert_eq!(about["inputs"][3], told);

    let scales = [1.0f32, 4.0, 7.5];
    let filled = |count: usize| vec![0.25f32; count];
    let (x, states) = (filled(3 * 256), filled(3 * 24 * 16));
    let tensor = |values: &[f32], shape: &[usize]| Tensor::from_slice(values, shape, &Device::Cpu);
    let conditions = Conditions {
        prompt: Some(&tensor(&states, &[3, 24, 16]).unwrap()),
        guidance: Some(&tensor(&scales.map(|scale| scale - 1.0), &[3]).unwrap()),
        ..Conditions::default()
    };
    let times = tensor(&[7.0; 3], &[3]).unwrap();
    let expected = network.evaluate(&tensor(&x, &[3, 4, 8, 8]).unwrap(), &times, conditions);
    let expected: Vec<f32> = expected.unwrap().flatten_all().unwrap().to_vec1().unwrap();

    let input = |name: &str, shape: Value, data: Value| json!({"name": name, "datatype": "FP32", "shape": shape, "data": data});
    let inputs = [
        input("sample", json!([3, 4, 8, 8]), json!(x)),
        input("timestep", json!([3]), json!([7.0, 7.0, 7.0])),
        input("encoder_hidden_states", json!([3, 24, 16]), json!(states)),
    ];
    let asked = async |more: &[Value]| -> Vec<f32> {
        let all = [&inputs[..], more].concat();
        let body = json!({"inputs": all}).to_string();
        let reply = server.post("/v2/models/told/infer", body).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        serde_json::from_value(reply.json()["outputs"][0]["data"].clone()).unwrap()
    };
    let found = asked(&[input("guidance_scale", json!([3]), json!(scales))]).await;
    assert_eq!(found, expected);
    assert_ne!(found[..256], found[256..512]);
    // As for images, the card's where nobody says.
    let found = asked(&[]).await;
    assert!((0..3).all(|row| found[256 * row..][..256] == expected[256..512]));
    // One row of an evaluation, whatever the scale.
    let mut images = Vec::new();
    for scale in [json!(1.0), json!(4.0), Value::Null] {
        let body = json!({"model": "told", "prompt": "cat", "seed": 1, "guidance_scale": scale});
        let reply = server.generate(body).await.json();
        assert_eq!(reply["timings"]["network_evaluations"], 2, "{reply}");
        images.push(pixels(&reply["data"][0]));
    }
    assert_ne!(images[0], images[1]);
    assert_eq!(images[1], images[2]);
}
