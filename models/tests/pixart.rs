//! PixArt's transformer against diffusers, against itself in other batches and at other lengths, and configurations that
//! cannot be honoured.
#![allow(clippy::unwrap_used)]

#[path = "common/described.rs"]
mod described;
#[path = "common/numbers.rs"]
mod numbers;
#[path = "common/prompted.rs"]
mod prompted;

use candle_core::{DType, Device, Tensor};
use described::{Described, weights};
use numbers::relative_error;
use prompted::Prompted;
use serde_json::{Value, json};
use understudy_models::{Conditions, Geometry, NetworkConfig};

/// The files of `golden/make_pixarts.py`.
fn all() -> Vec<Prompted> {
    let all: Vec<_> = Described::all("pixart").into_iter().map(of).collect();
    assert!(all.len() >= 6, "only {} files", all.len());
    all
}

fn named(name: &str) -> Prompted {
    Prompted::named(all(), name)
}

/// Tokens of each row's prompt.
fn lengths(golden: &Described) -> Vec<usize> {
    serde_json::from_str(&golden.metadata["lengths"]).unwrap()
}

/// With zeros after each prompt's last token.
fn of(golden: Described) -> Prompted {
    let told = |name: &str| -> Vec<usize> { serde_json::from_str(&golden.metadata[name]).unwrap() };
    let (size, lengths) = (told("size"), lengths(&golden));
    let tokens = *lengths.iter().max().unwrap();
    let read = NetworkConfig::from_json(&golden.config, "config.json").unwrap();
    let factor: usize = serde_json::from_str(&golden.metadata["factor"]).unwrap();
    let sized = read.at([size[0], size[1]], tokens).unwrap().unwrap();
    let config = sized.with_factor(factor).unwrap();
    let times: Vec<f32> = told("timesteps").into_iter().map(|time| time as f32).collect();
    let case = Prompted::new(golden, config, &times);
    let shorter = |(row, &length): (usize, &usize)| {
        let told = case.prompt.get(row).unwrap().narrow(0, 0, length).unwrap();
        told.pad_with_zeros(0, 0, tokens - length).unwrap()
    };
    let prompts: Vec<Tensor> = lengths.iter().enumerate().map(shorter).collect();
    Prompted { prompt: Tensor::stack(&prompts, 0).unwrap(), ..case }
}

/// diffusers masks what follows a prompt's last token.
#[test]
fn answers_as_diffusers_does() {
    prompted::check_answers(&all());
}

#[test]
fn bf16_answers_nearly_as_diffusers_does() {
    prompted::check_bf16(&all(), 3e-2);
}

#[test]
fn every_instruction_set_answers_as_diffusers_does() {
    prompted::check_instruction_sets(&[
        "answers_as_diffusers_does",
        "a_row_does_not_depend_on_its_batch",
        "what_follows_a_prompt_is_nothing",
        "gradients_are_those_of_diffusers",
    ]);
}

#[test]
fn a_row_does_not_depend_on_its_batch() {
    prompted::check_rows(&all());
}

/// What it is told of its size, too, is that of the size it is at.
#[test]
fn a_network_made_for_another_size_answers_as_one_made_for_this() {
    for case in all() {
        let Geometry { height, width, prompt, .. } = case.config.geometry();
        let other = case.config.at([2 * width, 2 * height], 3).unwrap().unwrap();
        for dtype in [DType::F32, DType::F64] {
            let other = other.load(weights(&other.weight_shapes()), dtype, &Device::Cpu).unwrap();
            let resized = other.at([height, width], prompt.unwrap().tokens).unwrap().unwrap();
            let found = case.answer(&*resized, &[0, 1, 2]);
            let expected = case.answer(&*case.network(dtype), &[0, 1, 2]);
            let error = relative_error(&found, &expected);
            assert!(error <= 1e-6, "{} {dtype:?}: {error:e}", case.golden.name);
        }
    }
}

/// A prompt among longer ones is what it is in a network for prompts of its own length.
#[test]
fn what_follows_a_prompt_is_nothing() {
    for case in all() {
        for dtype in [DType::F32, DType::F64] {
            let network = case.network(dtype);
            for (row, &length) in lengths(&case.golden).iter().enumerate() {
                let geometry = case.config.geometry();
                let own = network.at([geometry.height, geometry.width], length).unwrap().unwrap();
                let prompt = case.prompt.narrow(1, 0, length).unwrap().contiguous().unwrap();
                let cut = Prompted { prompt, ..case.clone() };
                let expected = cut.answer(&*own, &[row as u32]);
                let found = case.answer(&*network, &[row as u32]);
                let error = relative_error(&found, &expected);
                let name = &case.golden.name;
                assert!(error <= 1e-6, "{name} {dtype:?} row {row}: {error:e}");
            }
        }
    }
}

/// Zeros alone are a prompt like any other.
#[test]
fn a_prompt_of_zeros_is_no_fault() {
    let case = named("alpha");
    let zeros = case.prompt.zeros_like().unwrap();
    let conditions = Conditions { prompt: Some(&zeros), ..Conditions::default() };
    let answer = |dtype| {
        let x = case.x.to_dtype(dtype).unwrap();
        let y = case.network(dtype).evaluate(&x, &case.timesteps, conditions).unwrap();
        y.to_dtype(DType::F32).unwrap()
    };
    assert!(relative_error(&answer(DType::F32), &answer(DType::F64)) <= 1e-5);
}

#[test]
fn gradients_are_those_of_diffusers() {
    prompted::check_gradients(&all(), 3, &[], 1e-3);
}

#[test]
fn a_configuration_survives_a_round_trip() {
    for golden in Described::all("pixart") {
        let config = NetworkConfig::from_json(&golden.config, "config.json").unwrap();
        let written = config.to_json();
        assert_eq!(NetworkConfig::from_json(&written, "config.json").unwrap(), config);
        for (field, value) in golden.config.as_object().unwrap() {
            let same = written[field] == *value || field == "_diffusers_version";
            assert!(same, "{}: {field}: {value} became {}", golden.name, written[field]);
        }
    }
}

/// PixArt-α's folders, as they were made before diffusers had a class for it.
#[test]
fn a_former_class_is_known_by_its_norms() {
    let former: Value = serde_json::from_str(
        r#"{
        "_class_name": "Transformer2DModel", "_diffusers_version": "0.22.0.dev0",
        "activation_fn": "gelu-approximate", "attention_bias": true, "attention_head_dim": 72,
        "attention_type": "default", "caption_channels": 4096, "cross_attention_dim": 1152,
        "double_self_attention": false, "dropout": 0.0, "in_channels": 4, "norm_elementwise_affine": false,
        "norm_eps": 1e-06, "norm_num_groups": 32, "norm_type": "ada_norm_single", "num_attention_heads": 16,
        "num_embeds_ada_norm": 1000, "num_layers": 28, "num_vector_embeds": null, "only_cross_attention": false,
        "out_channels": 8, "patch_size": 2, "sample_size": 128, "upcast_attention": false,
        "use_linear_projection": false
    }"#,
    )
    .unwrap();
    let config = NetworkConfig::from_json(&former, "config.json").unwrap();
    assert_eq!(config.class_name(), "PixArtTransformer2DModel");
    let shapes = config.weight_shapes();
    // As published: 611 million weights, those of the size's embedding among them.
    let count: usize = shapes.values().map(|shape| shape.iter().product::<usize>()).sum();
    assert_eq!(count, PUBLISHED_WEIGHTS);
    assert_eq!(shapes["adaln_single.emb.resolution_embedder.linear_1.weight"], [384, 256]);
    let mut smaller = former;
    smaller["sample_size"] = json!(64);
    let smaller = NetworkConfig::from_json(&smaller, "config.json").unwrap();
    assert!(smaller.weight_shapes().keys().all(|name| !name.contains("resolution")));
    assert!(smaller.geometry().learned_variance());
}

/// Of diffusers' class with this configuration, counted there.
const PUBLISHED_WEIGHTS: usize = 611_349_152;

#[test]
fn a_scaled_network_has_as_many_narrower_heads() {
    let half = named("told_size").config.scaled(0.5);
    // Twelve channels of a head at the least.
    assert_eq!(half.unwrap().to_json()["attention_head_dim"], 12);
    let half = named("alpha").config.scaled(0.5).unwrap().to_json();
    assert_eq!(
        (&half["attention_head_dim"], &half["cross_attention_dim"]),
        (&json!(4), &json!(12))
    );
}

#[test]
fn every_value_that_cannot_be_honoured_is_refused_by_name() {
    let cases = [
        (json!({"norm_type": "layer_norm"}), "norm_type` is \"layer_norm\": cannot be honoured"),
        (json!({"norm_elementwise_affine": true}), "norm_elementwise_affine` is true: must be"),
        (json!({"attention_type": "gated"}), "attention_type` is \"gated\": cannot be honoured"),
        (json!({"activation_fn": "geglu"}), "activation_fn` is \"geglu\": cannot be honoured"),
        (json!({"cross_attention_dim": null}), "cross_attention_dim` is null: must be set"),
        (json!({"cross_attention_dim": 25}), "cross_attention_dim` is 25: must be 24"),
        (json!({"num_embeds_ada_norm": null}), "num_embeds_ada_norm` is null: must be"),
        (json!({"num_attention_heads": 0}), "num_attention_heads` is 0: must be"),
        (json!({"attention_head_dim": 7}), "attention_head_dim` is 7: times"),
        (
            json!({"attention_head_dim": 4, "num_attention_heads": 2, "use_additional_conditions": true}),
            "attention_head_dim` is 4: times num_attention_heads, 2, must be a multiple of 3",
        ),
        (json!({"in_channels": 0}), "in_channels` is 0: must be"),
        (json!({"out_channels": "8"}), "out_channels` is \"8\": cannot be honoured"),
        (json!({"num_layers": 1000}), "num_layers` is 1000: must be"),
        (json!({"sample_size": 15}), "sample_size` is 15: a side of 15 must be a multiple"),
        (json!({"sample_size": [16, 16]}), "sample_size` is [16,16]: cannot be honoured"),
        (json!({"sample_size": 16384}), "sample_size` is 16384: 67108864 patches"),
        (json!({"patch_size": 0}), "patch_size` is 0: must be"),
        (json!({"interpolation_scale": 0}), "interpolation_scale` is 0: must be above 0"),
        (json!({"norm_eps": -1}), "norm_eps` is -1: must not be negative"),
        (json!({"dropout": 2}), "dropout` is 2: must be from 0 to 1"),
        (json!({"caption_channels": 0}), "caption_channels` is 0: must be"),
        (json!({"attention_bias": 1}), "attention_bias` is 1: cannot be honoured"),
    ];
    let plain = named("alpha").golden.config;
    for (changes, expected) in cases {
        let mut config = plain.clone();
        for (name, value) in changes.as_object().unwrap() {
            config[name] = value.clone();
        }
        let message = NetworkConfig::from_json(&config, "config.json").unwrap_err().to_string();
        assert!(message.contains(expected), "{changes}: {message}");
    }
    let config = NetworkConfig::from_json(&plain, "config.json").unwrap();
    let message = config.at([16, 15], 7).unwrap().unwrap_err().to_string();
    assert!(message.contains("a side of 15 must be a multiple of patch_size, 2"), "{message}");
}
