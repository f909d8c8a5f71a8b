//! Stable Diffusion 3's transformer against diffusers, against itself in other batches and at other sizes, and configurations
//! that cannot be honoured.
#![allow(clippy::unwrap_used)]

#[path = "common/described.rs"]
mod described;
#[path = "common/numbers.rs"]
mod numbers;

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor, Var};
use described::{Described, weights};
use numbers::{bits, formula, relative_error};
use serde_json::json;
use understudy_models::kernels::Isa;
use understudy_models::{Conditions, Denoiser, Geometry, NetworkConfig, Prompt};

/// As in `golden/make_sd3s.py`.
const X_SEED: u32 = 1_000_001;
const PROMPT_SEED: u32 = 1_000_002;
const POOLED_SEED: u32 = 1_000_003;
const DIRECTION_SEED: u32 = 1_000_004;
const WEIGHT_SEED: u32 = 1_000_005;
/// What diffusers keeps with the weights and does not train.
const PLACES: &str = "pos_embed.pos_embed";

struct Case {
    golden: Described,
    config: NetworkConfig,
    x: Tensor,
    timesteps: Tensor,
    prompt: Tensor,
    pooled: Tensor,
}

impl Case {
    fn all() -> Vec<Self> {
        let all: Vec<Self> = Described::all("sd3").into_iter().map(Self::of).collect();
        assert!(all.len() >= 5, "only {} files", all.len());
        all
    }

    fn named(name: &str) -> Self {
        Self::all().into_iter().find(|case| case.golden.name == name).unwrap()
    }

    fn of(golden: Described) -> Self {
        let told = |name: &str| serde_json::from_str(&golden.metadata[name]).unwrap();
        let size: Vec<usize> = serde_json::from_value(told("size")).unwrap();
        let tokens: usize = serde_json::from_value(told("tokens")).unwrap();
        let times: Vec<f32> = serde_json::from_value(told("timesteps")).unwrap();
        let read = NetworkConfig::from_json(&golden.config, "config.json").unwrap();
        let config = read.at([size[0], size[1]], tokens).unwrap().unwrap();
        let geometry = config.geometry();
        let Prompt { width, .. } = geometry.prompt.unwrap();
        let rows = times.len();
        let pooled = golden.config["pooled_projection_dim"].as_u64().unwrap() as usize;
        Self {
            x: formula(&[rows, geometry.in_channels, size[0], size[1]], 1.7, X_SEED),
            timesteps: Tensor::from_vec(times, rows, &Device::Cpu).unwrap(),
            prompt: formula(&[rows, tokens, width], 1.7, PROMPT_SEED),
            pooled: formula(&[rows, pooled], 1.7, POOLED_SEED),
            golden,
            config,
        }
    }

    fn network(&self, dtype: DType) -> Box<dyn Denoiser> {
        let weights = weights(&self.config.weight_shapes());
        self.config.load(weights, dtype, &Device::Cpu).unwrap()
    }

    /// Some rows, one after another.
    fn answer(&self, network: &dyn Denoiser, rows: &[u32]) -> Tensor {
        let rows = Tensor::new(rows, &Device::Cpu).unwrap();
        let [x, times, prompt, pooled] = [&self.x, &self.timesteps, &self.prompt, &self.pooled]
            .map(|tensor| tensor.index_select(&rows, 0).unwrap());
        let conditions =
            Conditions { condition: Some(&pooled), prompt: Some(&prompt), guidance: None };
        let y = network.evaluate(&x.to_dtype(network.dtype()).unwrap(), &times, conditions);
        y.unwrap().to_dtype(DType::F32).unwrap()
    }
}

/// Of the compiled network in f32, and of candle's operations in f64.
#[test]
fn answers_as_diffusers_does() {
    for case in Case::all() {
        for dtype in [DType::F32, DType::F64] {
            let network = case.network(dtype);
            assert_eq!(network.footprint().is_some(), dtype == DType::F32, "compiled");
            let error =
                relative_error(&case.answer(&*network, &[0, 1, 2]), case.golden.tensor("output"));
            println!("{} {dtype:?}: {error:.2e}", case.golden.name);
            assert!(error <= 1e-5, "{} {dtype:?}: {error:e}", case.golden.name);
        }
    }
}

/// Eight bits of mantissa throughout, where the processor multiplies them.
#[test]
fn bf16_answers_nearly_as_diffusers_does() {
    if !Isa::detect().multiplies_bf16() {
        println!("this processor does not multiply bf16: nothing compared");
        return;
    }
    for case in Case::all() {
        let output = case.answer(&*case.network(DType::BF16), &[0, 1, 2]);
        let error = relative_error(&output, case.golden.tensor("output"));
        println!("{}: {error:.2e}", case.golden.name);
        assert!(error <= 3e-2, "{}: {error:e}", case.golden.name);
    }
}

/// The kernels choose their instructions once per process, so each set needs a process of its own.
#[test]
fn every_instruction_set_answers_as_diffusers_does() {
    for isa in Isa::available() {
        let names = ["answers_as_diffusers_does", "a_row_does_not_depend_on_its_batch"];
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .arg("--exact")
            .args(names)
            .env("UNDERSTUDY_ISA", isa.to_string())
            .output()
            .unwrap();
        assert!(output.status.success(), "{isa}: {}", String::from_utf8_lossy(&output.stdout));
    }
}

#[test]
fn a_row_does_not_depend_on_its_batch() {
    for case in Case::all() {
        let network = case.network(DType::F32);
        let alone: Vec<_> = (0..3).map(|row| bits(&case.answer(&*network, &[row]))).collect();
        let rows = [2, 1, 0, 0, 1, 2, 2, 1];
        let together = case.answer(&*network, &rows);
        for (i, &row) in rows.iter().enumerate() {
            let found = bits(&together.get(i).unwrap());
            assert!(found == alone[row as usize], "{}: row {i}", case.golden.name);
        }
    }
}

/// Its places are cut out of the same table.
#[test]
fn a_network_made_for_another_size_answers_as_one_made_for_this() {
    for case in Case::all() {
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

/// By the noisy sample and by every weight but the table of places, of a network that is trained.
#[test]
fn gradients_are_those_of_diffusers() {
    let with_gradients = |case: &Case| case.golden.tensors.contains_key("gradients");
    let trained: Vec<Case> = Case::all().into_iter().filter(with_gradients).collect();
    assert!(trained.len() >= 3);
    for case in trained {
        for dtype in [DType::F32, DType::F64] {
            let name = &case.golden.name;
            let to = |tensor: &Tensor| tensor.to_dtype(dtype).unwrap();
            let vars: HashMap<String, Var> = weights(&case.config.weight_shapes())
                .into_iter()
                .map(|(name, weight)| (name, Var::from_tensor(&to(&weight)).unwrap()))
                .collect();
            let tensors =
                vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
            let network = case.config.load(tensors, dtype, &Device::Cpu).unwrap();
            let x = Var::from_tensor(&to(&case.x)).unwrap();
            let (condition, prompt) = (Some(&case.pooled), Some(&case.prompt));
            let conditions = Conditions { condition, prompt, guidance: None };
            let y = network.evaluate(&x, &case.timesteps, conditions).unwrap();
            let direction = to(&formula(y.dims(), 1.0, DIRECTION_SEED));
            let gradients = (y * direction).unwrap().sum_all().unwrap().backward().unwrap();
            let of_x = gradients.get(&x).unwrap().to_dtype(DType::F32).unwrap();
            let error = relative_error(&of_x, case.golden.tensor("gradient_x"));
            println!("{name} {dtype:?} x: {error:.2e}");
            assert!(error <= 1e-5, "{name} {dtype:?} x: {error:e}");
            assert!(gradients.get(&vars[PLACES]).is_none(), "places are not trained");
            let expected = case.golden.tensor("gradients").to_vec2::<f64>().unwrap();
            let all = expected.iter().map(|pair| pair[0] * pair[0]).sum::<f64>().sqrt();
            let mut shapes = case.config.weight_shapes();
            shapes.remove(PLACES).unwrap();
            assert_eq!(shapes.len(), expected.len());
            let mut worst = 0f64;
            for (weight, expected) in shapes.keys().zip(&expected) {
                let gradient = gradients.get(&vars[weight]).unwrap().to_dtype(DType::F64).unwrap();
                let direction =
                    formula(gradient.dims(), 1.0, WEIGHT_SEED).to_dtype(DType::F64).unwrap();
                let sum = |x: Tensor| x.sum_all().unwrap().to_scalar::<f64>().unwrap();
                let norm = sum(gradient.sqr().unwrap()).sqrt();
                let along = sum((&gradient * direction).unwrap());
                // Where a gradient is nothing but rounding, as that of a key's bias, it is held against all.
                let scale = expected[0] + 1e-3 * all;
                let error = (norm - expected[0]).abs().max((along - expected[1]).abs()) / scale;
                worst = worst.max(error);
                assert!(error <= 2e-5, "{name} {dtype:?} {weight}: {error:e}");
            }
            println!("{name} {dtype:?} weights: {worst:.2e}");
        }
    }
}

#[test]
fn a_new_network_has_diffusers_places() {
    let case = Case::named("sd3");
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
    let half = Case::named("sd3_5").config.scaled(0.5).unwrap().to_json();
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
    let good = Case::named("sd3").golden.config;
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
