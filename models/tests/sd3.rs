//! Stable Diffusion 3's transformer against diffusers, against itself in other batches and at other sizes, and configurations
//! that cannot be honoured.
#![allow(clippy::unwrap_used)]

#[path = "common/described.rs"]
mod described;
#[path = "common/numbers.rs"]
mod numbers;
#[path = "common/prompted.rs"]
mod prompted;

use candle_core::{DType, Device};
use described::{Described, weights};
use numbers::{formula, relative_error};
use prompted::Prompted;
use serde_json::json;
use understudy_models::{Geometry, NetworkConfig};

/// What diffusers keeps with the weights and does not train.
const PLACES: &str = "pos_embed.pos_embed";
/// As in `golden/make_sd3s.py`.
const POOLED_SEED: u32 = 1_000_003;

/// The files of `golden/make_sd3s.py`.
fn all() -> Vec<Prompted> {
    let all: Vec<_> = Described::all("sd3").into_iter().map(of).collect();
    assert!(all.len() >= 5, "only {} files", all.len());
    all
}

fn named(name: &str) -> Prompted {
    Prompted::named(all(), name)
}

fn of(golden: Described) -> Prompted {
    let told = |name: &str| serde_json::from_str(&golden.metadata[name]).unwrap();
    let size: [usize; 2] = serde_json::from_value(told("size")).unwrap();
    let tokens = serde_json::from_value(told("tokens")).unwrap();
    let times: Vec<f32> = serde_json::from_value(told("timesteps")).unwrap();
    let read = NetworkConfig::from_json(&golden.config, "config.json").unwrap();
    let config = read.at(size, tokens).unwrap().unwrap();
    let pooled = golden.config["pooled_projection_dim"].as_u64().unwrap() as usize;
    let pooled = formula(&[times.len(), pooled], 1.7, POOLED_SEED);
    Prompted { condition: Some(pooled), ..Prompted::new(golden, config, &times) }
}

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
    ]);
}

#[test]
fn a_row_does_not_depend_on_its_batch() {
    prompted::check_rows(&all());
}

/// Its places are cut out of the same table.
#[test]
fn a_network_made_for_another_size_answers_as_one_made_for_this() {
    for case in all() {
        let Geometry { height, width, prompt, .. } = case.config.geometry();
        let patch = case.golden.config["patch_size"].as_u64().unwrap() as usize;
        let other = case.config.at([width - patch, height + patch], 3).unwrap().unwrap();
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

#[test]
fn gradients_are_those_of_diffusers() {
    prompted::check_gradients(&all(), 3, &[PLACES], 1e-3);
}

#[test]
fn a_new_network_has_diffusers_places() {
    let case = named("sd3");
    let weights = case.config.initial_weights(1).unwrap();
    let expected = case.golden.tensor("table");
    assert!(relative_error(&weights[PLACES], expected) <= 1e-7);
}

#[test]
fn a_configuration_survives_a_round_trip() {
    for golden in Described::all("sd3") {
        let config = NetworkConfig::from_json(&golden.config, "config.json").unwrap();
        let written = config.to_json();
        assert_eq!(NetworkConfig::from_json(&written, "config.json").unwrap(), config);
        for (field, value) in golden.config.as_object().unwrap() {
            let same = written[field] == *value || field == "_diffusers_version";
            assert!(same, "{}: {field}: {value} became {}", golden.name, written[field]);
        }
    }
}

/// Counted of diffusers' class with these configurations, the table of places among them.
#[test]
fn published_networks_have_as_many_weights_as_in_diffusers() {
    let medium = json!({
        "_class_name": "SD3Transformer2DModel", "num_layers": 24, "num_attention_heads": 24,
        "caption_projection_dim": 1536, "pos_embed_max_size": 192,
    });
    let mut medium_3_5 = medium.clone();
    medium_3_5["pos_embed_max_size"] = json!(384);
    medium_3_5["qk_norm"] = json!("rms_norm");
    medium_3_5["dual_attention_layers"] = json!((0..13).collect::<Vec<_>>());
    let mut large = medium.clone();
    for field in ["num_layers", "num_attention_heads"] {
        large[field] = json!(38);
    }
    large["caption_projection_dim"] = json!(2432);
    large["qk_norm"] = json!("rms_norm");
    for (config, weights) in [(medium, MEDIUM), (medium_3_5, MEDIUM_3_5), (large, LARGE)] {
        let shapes = NetworkConfig::from_json(&config, "config.json").unwrap().weight_shapes();
        let count: usize = shapes.values().map(|shape| shape.iter().product::<usize>()).sum();
        assert_eq!(count, weights);
    }
}

const MEDIUM: usize = 2_084_951_104;
const MEDIUM_3_5: usize = 2_469_663_936;
const LARGE: usize = 8_146_280_768;

#[test]
fn a_scaled_network_has_as_many_narrower_heads() {
    let half = named("sd3_5").config.scaled(0.5).unwrap().to_json();
    assert_eq!(half["attention_head_dim"], 4);
    assert_eq!(half["caption_projection_dim"], 12);
}

#[test]
fn every_value_that_cannot_be_honoured_is_refused_by_name() {
    let cases = [
        (json!({"qk_norm": "layer_norm"}), "qk_norm` is \"layer_norm\": cannot be honoured"),
        (json!({"dual_attention_layers": [-1]}), "dual_attention_layers"),
        (json!({"caption_projection_dim": 20}), "caption_projection_dim` is 20: must be 24"),
        (json!({"attention_head_dim": 7}), "attention_head_dim` is 7: times"),
        (json!({"num_attention_heads": 0}), "num_attention_heads` is 0: must be"),
        (json!({"pos_embed_max_size": null}), "pos_embed_max_size` is null: cannot be honoured"),
        (json!({"pos_embed_max_size": 7}), "sample_size` is 16: a side of 16 must be"),
        (json!({"sample_size": 15}), "sample_size` is 15: a side of 15 must be"),
        (json!({"patch_size": 0}), "patch_size` is 0: must be"),
        (json!({"num_layers": 0}), "num_layers` is 0: must be"),
        (json!({"in_channels": 0}), "in_channels` is 0: must be"),
        (json!({"out_channels": 0}), "out_channels` is 0: must be"),
        (json!({"joint_attention_dim": 0}), "joint_attention_dim` is 0: must be"),
        (json!({"pooled_projection_dim": 0}), "pooled_projection_dim` is 0: must be"),
        (json!({"pooled_projection_dim": "wide"}), "pooled_projection_dim"),
    ];
    let good = named("sd3").golden.config;
    for (change, message) in cases {
        let mut config = good.clone();
        for (field, value) in change.as_object().unwrap() {
            config[field] = value.clone();
        }
        let error = NetworkConfig::from_json(&config, "config.json").unwrap_err().to_string();
        assert!(error.contains(message), "{change}: {error}");
    }
    let config = NetworkConfig::from_json(&good, "config.json").unwrap();
    for (size, message) in [([26, 16], "a side of 26 must be"), ([15, 16], "a side of 15")] {
        let error = config.at(size, 7).unwrap().unwrap_err().to_string();
        assert!(error.contains(message), "{size:?}: {error}");
    }
}
