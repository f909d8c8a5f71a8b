//! T5's encoder and tokenizer against transformers, and files that cannot be honoured.
#![allow(clippy::unwrap_used)]

#[path = "common/described.rs"]
mod described;
#[path = "common/numbers.rs"]
mod numbers;
#[path = "common/strings.rs"]
mod strings;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use candle_core::{DType, Device, Tensor};
use described::{Described, weights};
use numbers::{bits, relative_error};
use serde_json::{Value, json};
use strings::string;
use understudy_models::checkpoint::t5_encoder;
use understudy_models::text::t5::{T5Config, T5Encoder, T5Tokenizer};

struct Case {
    golden: Described,
    config: T5Config,
    prompts: Vec<Vec<u32>>,
}

impl Case {
    fn all() -> Vec<Self> {
        let of = |golden: Described| {
            let config = T5Config::from_json(&golden.config, "config.json").unwrap();
            let prompts = serde_json::from_str(&golden.metadata["ids"]).unwrap();
            Self { golden, config, prompts }
        };
        let all: Vec<Self> = Described::all("t5").into_iter().map(of).collect();
        assert!(all.len() >= 3, "only {} files", all.len());
        all
    }

    fn named(name: &str) -> Self {
        Self::all().into_iter().find(|case| case.golden.name == name).unwrap()
    }

    /// Weights of a type.
    fn weights(&self, dtype: DType) -> HashMap<String, Tensor> {
        let all = weights(&self.config.weight_shapes()).into_iter();
        all.map(|(name, weight)| (name, weight.to_dtype(dtype).unwrap())).collect()
    }

    fn encoder(&self) -> T5Encoder {
        let weights = self.weights(DType::F32);
        T5Encoder::new(self.config.clone(), weights, &Device::Cpu).unwrap()
    }
}

/// transformers is given a batch that is filled to the longest and masked, we each prompt's own tokens.
#[test]
fn states_are_those_of_transformers() {
    for case in Case::all() {
        let encoder = case.encoder();
        for (row, prompt) in case.prompts.iter().enumerate() {
            let states = encoder.forward(prompt).unwrap();
            assert_eq!(states.dims(), [prompt.len(), case.config.width()]);
            let all = |tensor: &Tensor| tensor.unsqueeze(0).unwrap();
            let expected = case.golden.tensor(&format!("row.{row}"));
            let error = relative_error(&all(&states), &all(expected));
            println!("{} row {row}: {error:.2e}", case.golden.name);
            assert!(error <= 1e-5, "{} row {row}: {error:e}", case.golden.name);
        }
    }
}

/// Halves stay halves in memory, and count as the numbers that they are: arithmetic is in f32.
#[test]
fn halves_are_worked_with_as_f32() {
    let case = Case::named("gated_gelu");
    for dtype in [DType::F16, DType::BF16] {
        let stored = case.weights(dtype);
        let wide = stored
            .iter()
            .map(|(name, weight)| (name.clone(), weight.to_dtype(DType::F32).unwrap()))
            .collect();
        let encoder = |weights| T5Encoder::new(case.config.clone(), weights, &Device::Cpu).unwrap();
        let (halves, wide) = (encoder(stored), encoder(wide));
        for prompt in &case.prompts {
            let (found, expected) = (halves.forward(prompt), wide.forward(prompt));
            assert!(bits(&found.unwrap()) == bits(&expected.unwrap()), "{dtype:?}");
        }
    }
}

/// A folder as transformers writes it: one file, or shards of an index.
fn folder(case: &Case, dtype: DType, sharded: bool) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: String| fs::write(folder.path().join(name), text).unwrap();
    write("config.json", case.golden.config.to_string());
    let weights = case.weights(dtype);
    let save = |weights: &HashMap<String, Tensor>, name: &str| {
        candle_core::safetensors::save(weights, folder.path().join(name)).unwrap();
    };
    if !sharded {
        save(&weights, "model.safetensors");
        return folder;
    }
    let (mut map, mut shards) = (HashMap::new(), [HashMap::new(), HashMap::new()]);
    for (i, (name, weight)) in weights.into_iter().enumerate() {
        map.insert(name.clone(), format!("model-0000{}-of-00002.safetensors", i % 2 + 1));
        shards[i % 2].insert(name, weight);
    }
    write("model.safetensors.index.json", json!({ "weight_map": map }).to_string());
    for (i, shard) in shards.iter().enumerate() {
        save(shard, &format!("model-0000{}-of-00002.safetensors", i + 1));
    }
    folder
}

#[test]
fn a_folders_weights_are_read_on_first_use_and_may_be_forgotten() {
    let case = Case::named("relu");
    let prompt = &case.prompts[1];
    let expected = bits(&case.encoder().forward(prompt).unwrap());
    for sharded in [false, true] {
        let folder = folder(&case, DType::F32, sharded);
        let encoder = t5_encoder(folder.path(), &Device::Cpu).unwrap();
        for _ in 0..2 {
            assert!(!encoder.is_loaded());
            assert!(bits(&encoder.forward(prompt).unwrap()) == expected);
            assert!(encoder.is_loaded());
            assert!(!encoder.unload_if_idle(Duration::from_hours(1)));
            assert!(encoder.unload_if_idle(Duration::ZERO));
        }
        let file = folder.path().join("model.safetensors");
        if !sharded {
            fs::write(&file, "gone").unwrap();
            let message = encoder.forward(prompt).unwrap_err().to_string();
            assert!(message.contains("model.safetensors: not a whole safetensors"), "{message}");
        }
    }
}

#[test]
fn a_whole_t5_has_its_encoder_and_the_table_has_two_names() {
    let case = Case::named("relu");
    let mut weights = case.weights(DType::F32);
    let table = weights.remove("shared.weight").unwrap();
    weights.insert("encoder.embed_tokens.weight".into(), table.clone());
    weights.insert("decoder.block.0.layer.0.layer_norm.weight".into(), table.clone());
    weights.insert("lm_head.weight".into(), table);
    let whole = T5Encoder::new(case.config.clone(), weights, &Device::Cpu).unwrap();
    let answer = |encoder: &T5Encoder| bits(&encoder.forward(&case.prompts[0]).unwrap());
    assert!(answer(&whole) == answer(&case.encoder()));
    // What came as tensors stays.
    assert!(!whole.unload_if_idle(Duration::ZERO));
    assert!(whole.is_loaded());
}

#[test]
fn weights_and_tokens_that_do_not_fit_are_named() {
    let case = Case::named("relu");
    let mut weights = case.weights(DType::F32);
    let norm = weights.remove("encoder.final_layer_norm.weight").unwrap();
    weights
        .insert("encoder.block.1.layer.1.layer_norm.weight".into(), norm.narrow(0, 0, 5).unwrap());
    weights.insert("encoder.block.2.layer.1.layer_norm.weight".into(), norm);
    let refused = T5Encoder::new(case.config.clone(), weights, &Device::Cpu).err().unwrap();
    let message = refused.to_string();
    for part in [
        "1 missing: `encoder.final_layer_norm.weight` [24]",
        "1 not of this network: `encoder.block.2.layer.1.layer_norm.weight` [24]",
        "`encoder.block.1.layer.1.layer_norm.weight` is [5], not [24]",
    ] {
        assert!(message.contains(part), "{message}");
    }
    let encoder = case.encoder();
    let message = encoder.forward(&[3, 50]).unwrap_err().to_string();
    assert!(message.contains("`token` is 50: must be below 50"), "{message}");
    assert!(encoder.forward(&[]).unwrap_err().to_string().contains("must be at least 1"));
}

#[test]
fn every_value_that_cannot_be_honoured_is_refused_by_name() {
    for (changes, expected) in [
        (
            json!({"feed_forward_proj": "gelu"}),
            "feed_forward_proj` is \"gelu\": cannot be honoured",
        ),
        (json!({"vocab_size": 0}), "vocab_size` is 0: must be"),
        (json!({"d_model": "24"}), "d_model` is \"24\": cannot be honoured"),
        (json!({"d_kv": 0}), "d_kv` is 0: must be"),
        (json!({"d_ff": 1 << 20}), "d_ff` is 1048576: must be"),
        (json!({"num_layers": 0}), "num_layers` is 0: must be"),
        (json!({"num_heads": 0}), "num_heads` is 0: must be"),
        (
            json!({"relative_attention_num_buckets": 3}),
            "relative_attention_num_buckets` is 3: must be an even number",
        ),
        (
            json!({"relative_attention_max_distance": 8}),
            "relative_attention_max_distance` is 8: must be above a quarter",
        ),
        (json!({"layer_norm_epsilon": -1}), "layer_norm_epsilon` is -1: must not be negative"),
    ] {
        let mut config = Case::named("relu").golden.config;
        for (name, value) in changes.as_object().unwrap() {
            config[name] = value.clone();
        }
        let message = T5Config::from_json(&config, "config.json").unwrap_err().to_string();
        assert!(message.contains(expected), "{changes}: {message}");
    }
}

fn golden() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/t5_tokenizer")
}

fn expected() -> Value {
    serde_json::from_str(&fs::read_to_string(golden().join("strings.json")).unwrap()).unwrap()
}

/// A folder with one of the golden files.
fn tokenizer(file: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(golden().join(file), folder.path().join(file)).unwrap();
    folder
}

#[test]
fn tokens_are_those_of_transformers_in_either_form() {
    let expected = expected();
    let pieces: Vec<String> = serde_json::from_value(expected["pieces"].clone()).unwrap();
    let ids = |value: &Value| -> Vec<u32> { serde_json::from_value(value.clone()).unwrap() };
    let rows = expected["ids"].as_array().unwrap();
    assert!(rows.len() >= 400);
    for file in ["tokenizer.json", "spiece.model"] {
        let folder = tokenizer(file);
        let tokenizer = T5Tokenizer::open(folder.path()).unwrap();
        assert_eq!(tokenizer.vocabulary() as u64, expected["tokens"].as_u64().unwrap(), "{file}");
        for (seed, row) in rows.iter().enumerate() {
            let text = string(seed as u32, &pieces);
            assert_eq!(tokenizer.ids(&text).unwrap(), ids(row), "{file} {seed}: {text:?}");
        }
        for example in expected["examples"].as_array().unwrap() {
            let text = example["text"].as_str().unwrap();
            assert_eq!(tokenizer.ids(text).unwrap(), ids(&example["ids"]), "{file}: {text:?}");
            let prompt = tokenizer.encode(text, 1000).unwrap();
            assert_eq!(prompt, ids(&example["prompt"]), "{file}: {text:?}");
        }
    }
}

#[test]
fn a_long_prompt_is_never_cut_in_silence() {
    let folder = tokenizer("spiece.model");
    let tokenizer = T5Tokenizer::open(folder.path()).unwrap();
    let count = tokenizer.ids("red apple").unwrap().len();
    assert_eq!(tokenizer.encode("\x1f Red APPLE\n", count).unwrap().len(), count);
    let message = tokenizer.encode("red apple", count - 1).unwrap_err().to_string();
    assert!(
        message.contains(&format!("is {count} tokens long: at most {} fit", count - 1)),
        "{message}"
    );
}

#[test]
fn what_a_tokenizer_was_last_used_with_does_not_count() {
    let folder = tokenizer("tokenizer.json");
    let path = folder.path().join("tokenizer.json");
    let ids = || T5Tokenizer::open(folder.path()).unwrap().ids("a red apple on a table").unwrap();
    let before = ids();
    let mut written: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    written["truncation"] =
        json!({"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0});
    written["padding"] = json!({
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<pad>",
    });
    fs::write(&path, written.to_string()).unwrap();
    assert_eq!(ids(), before);
}

#[test]
fn files_of_a_tokenizer_that_do_not_fit_are_named() {
    let refused = |write: &dyn Fn(&Path)| {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path());
        T5Tokenizer::open(folder.path()).err().unwrap().to_string()
    };
    assert!(refused(&|_| {}).contains("spiece.model"));
    let message = refused(&|folder| fs::write(folder.join("tokenizer.json"), "{}").unwrap());
    assert!(message.contains("tokenizer.json: is not a tokenizer"), "{message}");
    let whole = fs::read(golden().join("spiece.model")).unwrap();
    let half = &whole[..whole.len() / 2];
    let message = refused(&|folder| fs::write(folder.join("spiece.model"), half).unwrap());
    assert!(message.contains("spiece.model: is not a whole sentencepiece model"), "{message}");
    let text = fs::read_to_string(golden().join("tokenizer.json")).unwrap();
    let endless = text.replace("</s>", "<s/>");
    let message = refused(&|folder| fs::write(folder.join("tokenizer.json"), &endless).unwrap());
    assert!(message.contains("has no token </s>, which ends a text"), "{message}");
}
