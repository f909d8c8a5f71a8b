//! Text encoders and tokenizers against transformers, and files that cannot be honoured.
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

use candle_core::{DType, Device, Tensor};
use described::{Described, weights};
use numbers::{bits, formula, relative_error};
use serde_json::{Value, json};
use strings::string;
use understudy_models::kernels::Isa;
use understudy_models::text::clip::{ClipConfig, ClipEncoder, ClipStates, ClipTokenizer};

struct Case {
    golden: Described,
    config: ClipConfig,
    ids: Vec<Vec<u32>>,
}

impl Case {
    fn all() -> Vec<Self> {
        let of = |golden: Described| {
            let class: String = serde_json::from_str(&golden.metadata["class"]).unwrap();
            let config = ClipConfig::from_json(&class, &golden.config, "config.json");
            let ids = serde_json::from_str(&golden.metadata["ids"]).unwrap();
            Self { config: config.unwrap(), ids, golden }
        };
        Described::all("text_encoder").into_iter().map(of).collect()
    }

    fn named(name: &str) -> Self {
        Self::all().into_iter().find(|case| case.golden.name == name).unwrap()
    }

    fn encoder(&self, dtype: DType) -> ClipEncoder {
        let weights = weights(&self.config.weight_shapes());
        self.config.load(weights, dtype, &Device::Cpu).unwrap()
    }

    fn tokens(&self, rows: &[usize]) -> Tensor {
        let ids: Vec<u32> = rows.iter().flat_map(|&row| self.ids[row].clone()).collect();
        Tensor::from_vec(ids, (rows.len(), self.config.tokens()), &Device::Cpu).unwrap()
    }
}

/// Of the compiled encoder in f32, and of candle's operations in f64.
#[test]
fn states_are_those_of_transformers() {
    let all = Case::all();
    assert_eq!(all.len(), 4);
    for case in all {
        for dtype in [DType::F32, DType::F64] {
            let rows: Vec<usize> = (0..case.ids.len()).collect();
            let ClipStates { last, penultimate, pooled } =
                case.encoder(dtype).forward(&case.tokens(&rows)).unwrap();
            for (what, found) in [("last", last), ("penultimate", penultimate), ("pooled", pooled)]
            {
                let found = found.to_dtype(DType::F32).unwrap();
                let error = relative_error(&found, case.golden.tensor(what));
                println!("{} {what} {dtype:?}: {error:.2e}", case.golden.name);
                assert!(error <= 1e-5, "{} {what} {dtype:?}: {error:e}", case.golden.name);
            }
        }
    }
}

/// Eight bits of mantissa throughout, where the processor multiplies them.
#[test]
fn bf16_states_are_nearly_those_of_transformers() {
    if !Isa::detect().multiplies_bf16() {
        println!("this processor does not multiply bf16: nothing compared");
        return;
    }
    for case in Case::all() {
        let rows: Vec<usize> = (0..case.ids.len()).collect();
        let ClipStates { last, penultimate, pooled } =
            case.encoder(DType::BF16).forward(&case.tokens(&rows)).unwrap();
        for (what, found) in [("last", last), ("penultimate", penultimate), ("pooled", pooled)] {
            let error = relative_error(&found, case.golden.tensor(what));
            println!("{} {what}: {error:.2e}", case.golden.name);
            assert!(error <= 3e-2, "{} {what}: {error:e}", case.golden.name);
        }
    }
}

/// The kernels choose their instructions once per process, so each set needs a process of its own.
#[test]
fn every_instruction_set_is_as_good() {
    for isa in Isa::available() {
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "states_are_those_of_transformers",
                "a_row_does_not_depend_on_its_batch",
            ])
            .env("UNDERSTUDY_ISA", isa.to_string())
            .output()
            .unwrap();
        assert!(output.status.success(), "{isa}: {}", String::from_utf8_lossy(&output.stdout));
    }
}

#[test]
fn a_row_does_not_depend_on_its_batch() {
    for case in Case::all() {
        let encoder = case.encoder(DType::F32);
        let states = |rows: &[usize]| encoder.forward(&case.tokens(rows)).unwrap();
        let rows = [1, 0, 0, 1, 1];
        let together = states(&rows);
        for (i, &row) in rows.iter().enumerate() {
            let alone = states(&[row]);
            for (all, one) in [(&together.last, &alone.last), (&together.pooled, &alone.pooled)] {
                assert!(bits(&all.get(i).unwrap()) == bits(one), "{}: row {i}", case.golden.name);
            }
        }
    }
}

#[test]
fn names_of_earlier_files_load() {
    let case = Case::named("emoji");
    let mut named: HashMap<String, Tensor> = weights(&case.config.weight_shapes())
        .into_iter()
        .map(|(name, weight)| (format!("text_model.{name}"), weight))
        .collect();
    let places = Tensor::arange(0i64, 24, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    named.insert("text_model.embeddings.position_ids".into(), places);
    let encoder = case.config.load(named, DType::F32, &Device::Cpu).unwrap();
    let ids = case.tokens(&[0]);
    let last = bits(&encoder.forward(&ids).unwrap().last);
    assert!(last == bits(&case.encoder(DType::F32).forward(&ids).unwrap().last));
    // Its table of tokens is the most of it.
    assert!(encoder.footprint().unwrap().weight_bytes > 4 * 1414 * 128);
}

#[test]
fn tokens_that_do_not_fit_are_named() {
    let case = Case::named("projected");
    let encoder = case.encoder(DType::F32);
    let asked = |ids: Vec<u32>| {
        let count = ids.len();
        let ids = Tensor::from_vec(ids, (1, count), &Device::Cpu).unwrap();
        encoder.forward(&ids).err().unwrap().to_string()
    };
    let message = asked(vec![1; 18]);
    assert!(message.contains("tokens are U32 [1, 18], not U32 [B, 19]"), "{message}");
    let message = asked(vec![60; 19]);
    assert!(message.contains("token 60 is not below 60, the encoder's vocab_size"), "{message}");
    let message = asked(vec![1; 19]);
    assert!(message.contains("a prompt has no token 50, which ends it"), "{message}");
    let floats = formula(&[1, 19], 1.0, 1);
    let message = encoder.forward(&floats).err().unwrap().to_string();
    assert!(message.contains("tokens are F32 [1, 19]"), "{message}");
}

#[test]
fn every_value_of_an_encoder_that_cannot_be_honoured_is_refused_by_name() {
    let cases = [
        (
            json!({"hidden_act": "gelu_new"}),
            "`config.json: hidden_act` is \"gelu_new\": cannot be honoured",
        ),
        (
            json!({"num_attention_heads": 5}),
            "`config.json: num_attention_heads` is 5: must divide hidden_size, 512",
        ),
        (json!({"num_attention_heads": 0}), "`config.json: num_attention_heads` is 0"),
        (json!({"vocab_size": 0}), "`config.json: vocab_size` is 0: must be"),
        (json!({"num_hidden_layers": 0}), "`config.json: num_hidden_layers` is 0: must be"),
        (
            json!({"intermediate_size": -1}),
            "`config.json: intermediate_size` is -1: cannot be honoured",
        ),
        (
            json!({"max_position_embeddings": 1 << 20}),
            "`config.json: max_position_embeddings` is 1048576: must be",
        ),
        (json!({"projection_dim": null}), "`config.json: projection_dim` is null: must be"),
        (
            json!({"eos_token_id": [1, 2]}),
            "`config.json: eos_token_id` is [1,2]: cannot be honoured",
        ),
        (
            json!({"eos_token_id": 50000}),
            "`config.json: eos_token_id` is 50000: must be below vocab_size",
        ),
        (
            json!({"layer_norm_eps": -1.0}),
            "`config.json: layer_norm_eps` is -1.0: must not be negative",
        ),
        (json!("x"), "the file must hold one JSON object"),
    ];
    for (config, expected) in cases {
        let read = ClipConfig::from_json("CLIPTextModelWithProjection", &config, "config.json");
        let message = read.unwrap_err().to_string();
        assert!(message.contains(expected), "{config}: {message}");
    }
    let other = ClipConfig::from_json("T5EncoderModel", &json!({}), "config.json");
    let message = other.unwrap_err().to_string();
    assert!(message.contains("is T5EncoderModel: only CLIPTextModel and"), "{message}");
}

fn golden() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizer")
}

fn expected() -> Value {
    serde_json::from_str(&fs::read_to_string(golden().join("strings.json")).unwrap()).unwrap()
}

/// 10,000 strings, a hundred at a time, and some in full.
fn compare(tokenizer: &ClipTokenizer, vocabulary: &str) {
    const BLOCK: usize = 100;
    let strings = expected();
    for example in strings["examples"].as_array().unwrap() {
        let ids = tokenizer.ids(example["text"].as_str().unwrap()).unwrap();
        assert_eq!(json!(ids), example[vocabulary], "{}", example["text"]);
    }
    let pieces: Vec<String> = serde_json::from_value(strings["pieces"].clone()).unwrap();
    let digests = strings[vocabulary].as_array().unwrap();
    assert_eq!(digests.len(), 10_000 / BLOCK);
    for (block, expected) in digests.iter().enumerate() {
        let mut digest = 0xcbf2_9ce4_8422_2325u64;
        for seed in block * BLOCK..(block + 1) * BLOCK {
            let ids = tokenizer.ids(&string(seed as u32, &pieces)).unwrap();
            for token in ids.into_iter().chain([u32::MAX]) {
                digest = (digest ^ u64::from(token)).wrapping_mul(0x0100_0000_01b3);
            }
        }
        let strings = block * BLOCK..(block + 1) * BLOCK;
        assert_eq!(format!("{digest:016x}"), expected.as_str().unwrap(), "{strings:?}");
    }
}

/// A folder with some of the small tokenizer's files.
fn folder(files: &[&str]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in files {
        fs::copy(golden().join(name), folder.path().join(name)).unwrap();
    }
    folder
}

#[test]
fn a_tokenizer_in_one_file_is_transformers() {
    compare(&ClipTokenizer::open(folder(&["tokenizer.json"]).path()).unwrap(), "small");
}

/// What transformers writes after a call that cuts and fills up texts, which it sets anew at every call.
#[test]
fn what_a_tokenizer_was_last_used_with_does_not_count() {
    let folder = folder(&["tokenizer.json"]);
    let path = folder.path().join("tokenizer.json");
    let mut written: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    written["truncation"] =
        json!({"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0});
    written["padding"] = json!({
        "strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "!",
    });
    fs::write(&path, written.to_string()).unwrap();
    compare(&ClipTokenizer::open(folder.path()).unwrap(), "small");
}

#[test]
fn a_tokenizer_in_two_files_is_transformers() {
    compare(&ClipTokenizer::open(folder(&["vocab.json", "merges.txt"]).path()).unwrap(), "small");
}

/// Where the crate that has it is: what cargo has already fetched.
fn published() -> PathBuf {
    let run = |program: String, arguments: &[&str]| -> Vec<u8> {
        let mut command = std::process::Command::new(program);
        command.args(arguments).current_dir(env!("CARGO_MANIFEST_DIR"));
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    };
    // What only other platforms need is not fetched.
    let rustc = run(std::env::var("RUSTC").unwrap_or("rustc".into()), &["-vV"]);
    let rustc = String::from_utf8(rustc).unwrap();
    let host = rustc.lines().find_map(|line| line.strip_prefix("host: ")).unwrap();
    let metadata = run(
        std::env::var("CARGO").unwrap(),
        &["metadata", "--offline", "--locked", "--format-version", "1", "--filter-platform", host],
    );
    let metadata: Value = serde_json::from_slice(&metadata).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let found = packages.iter().find(|package| package["name"] == "instant-clip-tokenizer");
    let manifest = Path::new(found.unwrap()["manifest_path"].as_str().unwrap()).to_owned();
    manifest.with_file_name("bpe_simple_vocab_16e6.txt")
}

/// CLIP's own vocabulary as the two files that transformers 4 wrote.
fn write_published(folder: &Path) {
    const TOKENS: usize = 49_408;
    let text = fs::read_to_string(published()).unwrap();
    let merges: Vec<&str> = text.lines().skip(1).take(TOKENS - 512 - 2).collect();
    let kept = (33..127).chain(161..173).chain(174..256).map(|byte: u32| byte);
    let letters: Vec<String> = kept
        .chain((0..68).map(|i| 256 + i))
        .map(|code| char::from_u32(code).unwrap().to_string())
        .collect();
    let ends = letters.iter().map(|letter| format!("{letter}</w>"));
    let special = ["<|startoftext|>", "<|endoftext|>"].map(str::to_owned);
    let tokens = letters.iter().cloned().chain(ends);
    let tokens = tokens.chain(merges.iter().map(|pair| pair.replace(' ', ""))).chain(special);
    let vocabulary: serde_json::Map<String, Value> =
        tokens.enumerate().map(|(id, token)| (token, json!(id))).collect();
    assert_eq!(vocabulary.len(), TOKENS);
    fs::write(folder.join("vocab.json"), Value::from(vocabulary).to_string()).unwrap();
    fs::write(folder.join("merges.txt"), format!("#version: 0.2\n{}\n", merges.join("\n")))
        .unwrap();
}

#[test]
fn clips_own_vocabulary_is_transformers() {
    let folder = tempfile::tempdir().unwrap();
    write_published(folder.path());
    let tokenizer = ClipTokenizer::open(folder.path()).unwrap();
    assert_eq!(tokenizer.vocabulary(), 49_408);
    compare(&tokenizer, "whole");
    let prompt = tokenizer.encode("a photo of a cat", 77).unwrap();
    assert_eq!(prompt[..8], [49406, 320, 1125, 539, 320, 2368, 49407, 49407]);
    // Another implementation of what OpenAI published.
    let other = instant_clip_tokenizer::Tokenizer::new();
    for text in ["a photo of a cat", "It's 42 o'clock, don't!", "red apple, noto style"] {
        let mut tokens = Vec::new();
        other.encode(text, &mut tokens);
        let expected: Vec<u32> = tokens.into_iter().map(|one| u32::from(one.to_u16())).collect();
        assert_eq!(tokenizer.ids(text).unwrap(), expected);
    }
}

#[test]
fn a_long_prompt_is_never_cut_in_silence() {
    let tokenizer = ClipTokenizer::open(folder(&["tokenizer.json"]).path()).unwrap();
    let (start, end) = (762, 763);
    let exact = "0 ".repeat(75);
    let full = tokenizer.encode(&exact, 77).unwrap();
    assert_eq!((full.len(), full[0], full[76]), (77, start, end));
    assert!(!full[1..76].contains(&end));
    let longer = "0 ".repeat(76);
    let message = tokenizer.encode(&longer, 77).unwrap_err().to_string();
    assert_eq!(message, "`prompt` is 76 tokens long: at most 75 fit; shorten the prompt");
    let chunks = tokenizer.chunks(&longer, 77).unwrap();
    assert_eq!(chunks.len(), 2);
    assert_eq!(chunks[0], full);
    assert_eq!(chunks[1][..4], [start, full[1], end, end]);
    assert_eq!(tokenizer.chunks("", 77).unwrap(), [tokenizer.encode("", 77).unwrap()]);
    let message = tokenizer.chunks("a", 2).unwrap_err().to_string();
    assert!(message.contains("`tokens of a chunk` is 2: must be at least 3"), "{message}");
    // A megabyte, and what is no text.
    let ids = tokenizer.ids(&"na ".repeat(350_000)).unwrap();
    assert!(ids.len() >= 350_000);
    assert!(!tokenizer.ids("\0").unwrap().is_empty());
}

#[test]
fn a_folder_tells_what_begins_ends_and_fills_a_text() {
    let folder = folder(&["vocab.json", "merges.txt"]);
    let config = json!({"pad_token": "!", "eos_token": {"content": "<|endoftext|>"}, "bos_token": "<|startoftext|>"});
    fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    let tokenizer = ClipTokenizer::open(folder.path()).unwrap();
    assert_eq!(tokenizer.encode("", 5).unwrap(), [762, 763, 0, 0, 0]);
    let config = json!({"pad_token": "<pad>"});
    fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    let message = ClipTokenizer::open(folder.path()).err().unwrap().to_string();
    assert!(message.contains("pad_token` is <pad>: must be in the vocabulary"), "{message}");
}

#[test]
fn files_of_a_tokenizer_that_do_not_fit_are_named() {
    let problem = |folder: &Path| ClipTokenizer::open(folder).err().unwrap().to_string();
    let empty = tempfile::tempdir().unwrap();
    assert!(problem(empty.path()).contains("vocab.json"));
    let half = folder(&["vocab.json"]);
    assert!(problem(half.path()).contains("merges.txt"));
    fs::write(half.path().join("merges.txt"), "#version: 0.2\nzz qq\n").unwrap();
    let message = problem(half.path());
    assert!(message.contains("merges.txt") && message.contains("zz"), "{message}");
    fs::write(half.path().join("merges.txt"), "a b c\n").unwrap();
    let message = problem(half.path());
    assert!(message.contains("merges.txt: line 1 must be two tokens"), "{message}");
    fs::write(half.path().join("vocab.json"), "[]").unwrap();
    assert!(problem(half.path()).contains("vocab.json: must hold one JSON object"));
    let whole = tempfile::tempdir().unwrap();
    fs::write(whole.path().join("tokenizer.json"), "{\"model\": 3}").unwrap();
    let message = problem(whole.path());
    assert!(message.contains("tokenizer.json: is not a tokenizer"), "{message}");
}
