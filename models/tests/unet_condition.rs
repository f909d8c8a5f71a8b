//! Text-to-image U-Nets against diffusers, against themselves in other batches, and configurations that cannot be honoured.
#![allow(clippy::unwrap_used)]

#[path = "common/described.rs"]
mod described;
#[path = "common/numbers.rs"]
mod numbers;
#[path = "common/prompted.rs"]
mod prompted;

use candle_core::{DType, Device, Tensor};
use described::{Described, weights};
use numbers::{bits, formula, relative_error};
use prompted::Prompted;
use serde_json::{Value, json};
use understudy_models::{Conditioning, Conditions, Denoiser, FixedBatch, NetworkConfig, Prompt};

const ROWS: usize = 3;
/// As in `golden/make_condition_unets.py`.
const VECTOR_SEED: u32 = 1_000_003;

/// The files of `golden/make_condition_unets.py`.
fn all() -> Vec<Prompted> {
    let all: Vec<_> = Described::all("unet_condition").into_iter().map(of).collect();
    assert!(all.len() >= 12, "only {} files", all.len());
    all
}

fn named(name: &str) -> Prompted {
    Prompted::named(all(), name)
}

fn of(golden: Described) -> Prompted {
    let read = NetworkConfig::from_json(&golden.config, "config.json").unwrap();
    let number = |name: &str| -> Value {
        golden.metadata.get(name).map_or(Value::Null, |text| serde_json::from_str(text).unwrap())
    };
    let numbers = |name: &str| -> Option<Vec<f32>> {
        number(name)
            .as_array()
            .map(|all| all.iter().map(|one| one.as_f64().unwrap() as f32).collect())
    };
    let geometry = read.geometry();
    let size = [geometry.height, geometry.width];
    let tokens = number("tokens").as_u64().unwrap() as usize;
    let config = read.at(size, tokens).unwrap().unwrap();
    let tensor = |values: Vec<f32>| Tensor::from_vec(values, ROWS, &Device::Cpu).unwrap();
    let condition = match (geometry.conditioning, numbers("condition")) {
        (Conditioning::None, None) => None,
        (Conditioning::Classes(_), Some(classes)) => {
            Some(tensor(classes).to_dtype(DType::U32).unwrap())
        }
        (Conditioning::Timestep, Some(times)) => Some(tensor(times)),
        (Conditioning::Embedding(width), None) => {
            assert_eq!(number("vector").as_u64().unwrap() as usize, width);
            Some(formula(&[ROWS, width], 1.7, VECTOR_SEED))
        }
        (Conditioning::TextTime { text, numbers }, None) => {
            assert_eq!(number("text").as_u64().unwrap() as usize, text);
            let sizes: Vec<Vec<f32>> = serde_json::from_value(number("time_ids")).unwrap();
            let sizes = Tensor::new(sizes, &Device::Cpu).unwrap();
            assert_eq!(sizes.dims(), [ROWS, numbers]);
            let texts = formula(&[ROWS, text], 1.7, VECTOR_SEED);
            Some(Tensor::cat(&[texts, sizes], 1).unwrap())
        }
        other => panic!("{}: {other:?}", golden.name),
    };
    let (times, guidance) = (numbers("timesteps").unwrap(), numbers("guidance").map(tensor));
    Prompted { condition, guidance, ..Prompted::new(golden, config, &times) }
}

#[test]
fn answers_as_diffusers_does() {
    prompted::check_answers(&all());
}

/// PyTorch's autocast errs by up to 4e-2 on these.
#[test]
fn bf16_answers_nearly_as_diffusers_does() {
    prompted::check_bf16(&all(), 6e-2);
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

#[test]
fn a_fixed_batch_passes_prompts_and_guidance_on() {
    let case = named("guidance");
    let padded = FixedBatch::new(case.network(DType::F32), 2);
    let rows = [2, 0, 1];
    let found = case.answer(&padded, &rows);
    assert!(bits(&found) == bits(&case.answer(&*case.network(DType::F32), &rows)));
}

#[test]
fn gradients_are_those_of_diffusers() {
    prompted::check_gradients(&all(), 4, &[], 0.0);
}

#[test]
fn a_configuration_survives_a_round_trip() {
    for golden in Described::all("unet_condition") {
        let config = NetworkConfig::from_json(&golden.config, "config.json").unwrap();
        let written = config.to_json();
        assert_eq!(NetworkConfig::from_json(&written, "config.json").unwrap(), config);
        for (field, value) in golden.config.as_object().unwrap() {
            let same = written[field] == *value
                || written[field].as_f64().is_some_and(|number| value.as_f64() == Some(number))
                || (field == "upcast_attention" && !value.as_bool().unwrap())
                || (field == "addition_embed_type_num_heads")
                || field == "_diffusers_version";
            assert!(same, "{}: {field}: {value} became {}", golden.name, written[field]);
        }
    }
}

#[test]
fn it_is_told_what_its_geometry_says() {
    let case = named("guidance");
    let network = case.network(DType::F32);
    let Prompt { tokens, width } = network.geometry().prompt.unwrap();
    assert_eq!([tokens, width], [9, 12]);
    assert!(network.geometry().guidance);
    let conditions = case.conditions();
    let asked = |conditions: Conditions| {
        network.evaluate(&case.x, &case.timesteps, conditions).unwrap_err().to_string()
    };
    let message = asked(Conditions { prompt: None, ..conditions });
    assert!(message.contains("the prompt is None, not Some((F32, [3, 9, 12]))"), "{message}");
    let message = asked(Conditions { guidance: None, ..conditions });
    assert!(message.contains("the guidance is None, not Some((F32, [3]))"), "{message}");
    let narrow = case.prompt.narrow(2, 0, 11).unwrap();
    let message = asked(Conditions { prompt: Some(&narrow), ..conditions });
    assert!(message.contains("not Some((F32, [3, 9, 12]))"), "{message}");
    let message = network.geometry().check_images(false, false).unwrap_err().to_string();
    assert!(message.contains("`cross_attention_dim` is 12"), "{message}");
}

#[test]
fn other_sizes_and_prompts_are_other_networks_of_the_same_weights() {
    let case = named("bk_tiny");
    let shapes = case.config.weight_shapes();
    let wide = case.config.at([12, 16], 30).unwrap().unwrap();
    assert_eq!(wide.weight_shapes(), shapes);
    let network = wide.load(weights(&shapes), DType::F32, &Device::Cpu).unwrap();
    let x = formula(&[1, 4, 12, 16], 1.0, 3);
    let prompt = formula(&[1, 30, 20], 1.0, 4);
    let conditions = Conditions { prompt: Some(&prompt), ..Conditions::default() };
    let t = Tensor::new(&[7f32], &Device::Cpu).unwrap();
    assert_eq!(network.evaluate(&x, &t, conditions).unwrap().dims(), [1, 4, 12, 16]);
    let message = case.config.at([10, 16], 30).unwrap().unwrap_err().to_string();
    assert!(message.contains("sample_size` is [10,16]: must be"), "{message}");
    let half = named("emoji").config.scaled(0.5).unwrap().to_json();
    assert_eq!(half["block_out_channels"], json!([32, 64]));
    // Two levels would be equally wide, and need no shortcut between them.
    assert!(case.config.scaled(0.5).is_none());
}

/// In f32 and in f64: of another size, and from there back to the first.
#[test]
fn a_network_is_had_at_other_sizes() {
    for name in ["bk_tiny", "classes_and_resnets"] {
        let case = named(name);
        let geometry = case.config.geometry();
        let Prompt { tokens, width } = geometry.prompt.unwrap();
        for dtype in [DType::F32, DType::F64] {
            let network = case.network(dtype);
            let other = network.at([12, 16], 30).unwrap().unwrap();
            let config = case.config.at([12, 16], 30).unwrap().unwrap();
            assert_eq!(other.geometry(), &config.geometry());
            let alone = config.load(weights(&config.weight_shapes()), dtype, &Device::Cpu).unwrap();
            let x = formula(&[3, geometry.in_channels, 12, 16], 1.0, 3).to_dtype(dtype).unwrap();
            let prompt = formula(&[3, 30, width], 1.0, 4);
            let conditions = Conditions { prompt: Some(&prompt), ..case.conditions() };
            let answer = |network: &dyn Denoiser| {
                let y = network.evaluate(&x, &case.timesteps, conditions).unwrap();
                y.to_dtype(DType::F32).unwrap()
            };
            let error = relative_error(&answer(&*other), &answer(&*alone));
            println!("{name} {dtype:?}: {error:.2e}");
            assert!(error <= 1e-5, "{name} {dtype:?}: {error:e}");
            let back = other.at([geometry.height, geometry.width], tokens).unwrap().unwrap();
            let x = case.x.to_dtype(dtype).unwrap();
            let first = |network: &dyn Denoiser| {
                let y = network.evaluate(&x, &case.timesteps, case.conditions()).unwrap();
                bits(&y.to_dtype(DType::F32).unwrap())
            };
            assert!(first(&*back) == first(&*network), "{name} {dtype:?}");
            let message = network.at([3, 16], 30).unwrap().err().unwrap().to_string();
            assert!(message.contains("sample_size` is [3,16]: must be"), "{message}");
        }
    }
}

#[test]
fn every_value_that_cannot_be_honoured_is_refused_by_name() {
    let cases = [
        (json!({"encoder_hid_dim": 768}), "`config.json: encoder_hid_dim` is 768: must be null"),
        (
            json!({"encoder_hid_dim_type": "text_proj"}),
            "encoder_hid_dim_type` is \"text_proj\": must be null",
        ),
        (
            json!({"num_attention_heads": 8}),
            "num_attention_heads` is 8: must be null: attention_head_dim is",
        ),
        (json!({"addition_embed_type": "text"}), "addition_embed_type` is \"text\""),
        (
            json!({"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 9}),
            "addition_time_embed_dim` is null: must be set, since addition_embed_type is text_time",
        ),
        (
            json!({"addition_embed_type": "text_time", "addition_time_embed_dim": 8}),
            "projection_class_embeddings_input_dim` is null: must be set",
        ),
        (
            json!({"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 48}),
            "projection_class_embeddings_input_dim` is 48: must be above 48",
        ),
        (
            json!({"addition_embed_type": "text_time", "addition_time_embed_dim": 7, "projection_class_embeddings_input_dim": 60}),
            "addition_time_embed_dim` is 7: must be even",
        ),
        (
            json!({"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 60,
                "num_class_embeds": 3}),
            "num_class_embeds` is 3: must be null",
        ),
        (
            json!({"time_embedding_act_fn": "silu"}),
            "time_embedding_act_fn` is \"silu\": must be null",
        ),
        (json!({"timestep_post_act": "silu"}), "timestep_post_act` is \"silu\": must be null"),
        (json!({"cross_attention_norm": "layer_norm"}), "cross_attention_norm` is \"layer_norm\""),
        (json!({"dual_cross_attention": true}), "dual_cross_attention` is true: must be false"),
        (json!({"resnet_skip_time_act": true}), "resnet_skip_time_act` is true: must be false"),
        (
            json!({"class_embeddings_concat": true}),
            "class_embeddings_concat` is true: must be false",
        ),
        (json!({"resnet_out_scale_factor": 1.4}), "resnet_out_scale_factor` is 1.4: must be 1"),
        (json!({"attention_type": "gated"}), "attention_type` is \"gated\": cannot be honoured"),
        (json!({"time_embedding_type": "fourier"}), "time_embedding_type` is \"fourier\": cannot"),
        (
            json!({"down_block_types": ["SimpleCrossAttnDownBlock2D", "DownBlock2D"]}),
            "down_block_types[0]` is \"SimpleCrossAttnDownBlock2D\": cannot be honoured",
        ),
        (
            json!({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}),
            "mid_block_type` is \"UNetMidBlock2DSimple",
        ),
        (
            json!({"in_channels": 9}),
            "in_channels` is 9: must be at most out_channels, 4: networks that are shown a mask",
        ),
        (json!({"in_channels": 0}), "in_channels` is 0: must be a whole number"),
        (
            json!({"class_embed_type": "projection"}),
            "projection_class_embeddings_input_dim` is null: must be set",
        ),
        (
            json!({"attention_head_dim": 3}),
            "attention_head_dim` is 3: is the number of heads, and must divide the 16",
        ),
        (
            json!({"attention_head_dim": [4, 5]}),
            "attention_head_dim[1]` is 5: is the number of heads",
        ),
        (
            json!({"attention_head_dim": [4]}),
            "attention_head_dim` is [4]: must have as many entries",
        ),
        (
            json!({"attention_head_dim": "4"}),
            "attention_head_dim` is \"4\": cannot be honoured: must be one value",
        ),
        (
            json!({"down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"], "cross_attention_dim": [12, 13]}),
            "cross_attention_dim[1]` is 13: must be 12, as at level 0",
        ),
        (
            json!({"transformer_layers_per_block": [1, [1]]}),
            "reverse_transformer_layers_per_block` is null: must be set",
        ),
        (
            json!({"transformer_layers_per_block": [1, [1, 1]], "reverse_transformer_layers_per_block": [1, 1]}),
            "transformer_layers_per_block` is [1,[1,1]]: entry 1 must be",
        ),
        (
            json!({"transformer_layers_per_block": [1, 65]}),
            "transformer_layers_per_block` is [1,65]: entry 1 must be",
        ),
        (
            json!({"layers_per_block": [1, 1, 1]}),
            "layers_per_block` is [1,1,1]: must have as many entries",
        ),
        (json!({"layers_per_block": 0}), "layers_per_block` is 0: must be a whole number"),
        (json!({"sample_size": null}), "sample_size` is null: must be the side"),
        (json!({"sample_size": 7}), "sample_size` is 7: must be the side"),
        (json!({"sample_size": [8, 8, 8]}), "sample_size` is [8,8,8]: must be the side"),
        (json!({"conv_in_kernel": 4}), "conv_in_kernel` is 4: must be odd"),
        (json!({"conv_out_kernel": 9}), "conv_out_kernel` is 9: must be odd"),
        (json!({"downsample_padding": 2}), "downsample_padding` is 2: must be 0 or 1"),
        (json!({"freq_shift": 4}), "freq_shift` is 4: must be below"),
        (json!({"time_cond_proj_dim": 3}), "time_cond_proj_dim` is 3: must be"),
        (
            json!({"block_out_channels": [8, 18]}),
            "block_out_channels[1]` is 18: must be a multiple",
        ),
        (json!({"mid_block_scale_factor": 0}), "mid_block_scale_factor` is 0: must not be 0"),
        (json!({"dropout": 2}), "dropout` is 2: must be from 0 to 1"),
        (json!({"ip_adapter": true}), "ip_adapter` is true: cannot be honoured: unknown field"),
        (
            json!({"block_out_channels": [65536, 65536], "attention_head_dim": 4}),
            "block_out_channels` is [65536,65536]: the network would have",
        ),
    ];
    let plain = named("guidance").golden.config;
    for (changes, expected) in cases {
        let mut config = plain.clone();
        for (name, value) in changes.as_object().unwrap() {
            config[name] = value.clone();
        }
        let message = NetworkConfig::from_json(&config, "config.json").unwrap_err().to_string();
        assert!(message.contains(expected), "{changes}: {message}");
    }
}
