//! Stable Diffusion 3's pipelines against diffusers' own (`golden/make_sd3_pipelines.py`), with T5's text encoder and without:
//! what comes of a prompt, and of the same noise, to the image.
#![allow(clippy::unwrap_used)]

#[path = "common/from_noise.rs"]
mod from_noise;

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use from_noise::FromNoise;
use serde_json::{Value, json};
use tempfile::TempDir;
use understudy_models::autoencoder::Decoder;
use understudy_models::checkpoint::{ModelFolder, Pipeline, Reader};
use understudy_models::schedule::ScheduleConfig;
use understudy_models::text::{PromptStates, joint::T5_TOKENS};
use understudy_models::{Conditions, Denoiser};

const DEVICE: Device = Device::Cpu;
/// Tokens of CLIP's encoders.
const CLIP_TOKENS: usize = 24;
const TOKENS: usize = CLIP_TOKENS + T5_TOKENS;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(|entry| entry.unwrap().path()) {
        let to = to.join(entry.file_name().unwrap());
        if entry.is_dir() {
            copy(&entry, &to);
        } else {
            fs::copy(&entry, to).unwrap();
        }
    }
}

/// A folder as diffusers saves it: the one that was saved, and the tokenizers.
fn folder(name: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    copy(&golden().join("sd3_pipeline").join(name), folder.path());
    for tokenizer in ["tokenizer", "tokenizer_2"] {
        for file in ["vocab.json", "merges.txt"] {
            let from = golden().join("tokenizer").join(file);
            fs::copy(from, folder.path().join(tokenizer).join(file)).unwrap();
        }
    }
    if folder.path().join("text_encoder_3").exists() {
        copy(&golden().join("t5_tokenizer"), &folder.path().join("tokenizer_3"));
    }
    folder
}

/// A pipeline, and what diffusers makes with it.
struct Golden {
    network: Box<dyn Denoiser>,
    decoder: Decoder,
    reader: Reader,
    schedule: ScheduleConfig,
    theirs: FromNoise,
    /// Of prompt and negative prompt.
    states: Tensor,
    pooled: Tensor,
}

impl Golden {
    fn read(name: &str) -> Self {
        let path = golden().join("sd3_pipeline").join(name).with_extension("safetensors");
        let (theirs, mut more) = FromNoise::read(&path);
        let (_, _, height, width) = theirs.latents.dims4().unwrap();
        let folder = folder(name);
        let opened = ModelFolder::open_for_images(folder.path()).unwrap();
        assert_eq!(opened.size_multiple(), Some(4));
        let Pipeline { network, decoder, reader, schedule, .. } =
            opened.load(DType::F32, &DEVICE).unwrap();
        assert_eq!(network.geometry().prompt.unwrap().tokens, TOKENS);
        let (reader, decoder) = (reader.unwrap(), decoder.unwrap());
        assert_eq!((reader.encoder.tokens(), reader.zero_empty_prompt), (TOKENS, false));
        // T5's weights wait until it is first asked.
        reader.encoder.load().unwrap();
        Self {
            network: network.at([height, width], TOKENS).unwrap().unwrap(),
            decoder: decoder.at([height, width]).unwrap(),
            reader,
            schedule,
            theirs,
            states: more.remove("states").unwrap(),
            pooled: more.remove("pooled").unwrap(),
        }
    }

    fn ids(&self, prompt: &str) -> Vec<u32> {
        self.reader.tokenizer.encode(prompt, TOKENS).unwrap()
    }

    /// What prompt and negative prompt come to.
    fn told(&self) -> [PromptStates; 2] {
        let ids = ["prompt", "negative_prompt"]
            .map(|field| self.ids(self.theirs.request[field].as_str().unwrap()));
        let read = self.reader.encoder.read(&[&ids[0], &ids[1]]).unwrap();
        read.try_into().unwrap_or_else(|_| panic!("two prompts"))
    }

    /// What the network answers about `x` at a time, guided as the request says.
    fn answer(&self, x: &Tensor, time: f64, told: &[PromptStates; 2]) -> Tensor {
        let rows = x.dim(0).unwrap();
        let each = [0, 1].into_iter().flat_map(|which| vec![&told[which]; rows]);
        let (states, pooled): (Vec<&Tensor>, Vec<Tensor>) = each
            .map(|told| (&told.states, Tensor::new(&told.pooled[..], &DEVICE).unwrap()))
            .unzip();
        let [prompt, pooled] =
            [Tensor::stack(&states, 0).unwrap(), Tensor::stack(&pooled, 0).unwrap()];
        let (condition, prompt) = (Some(&pooled), Some(&prompt));
        let times = Tensor::full(time as f32, 2 * rows, &DEVICE).unwrap();
        let both = Tensor::cat(&[x, x], 0).unwrap();
        let conditions = Conditions { condition, prompt, guidance: None };
        let answers = self.network.evaluate(&both, &times, conditions).unwrap();
        self.theirs.guided(&answers)
    }

    /// What diffusers has them come to.
    fn told_by_diffusers(&self) -> [PromptStates; 2] {
        [0, 1].map(|row| PromptStates {
            states: self.states.get(row).unwrap(),
            pooled: self.pooled.get(row).unwrap().to_vec1().unwrap(),
        })
    }
}

fn largest(tensor: &Tensor) -> f64 {
    f64::from(tensor.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap())
}

#[test]
fn prompts_come_to_what_diffusers_makes_of_them() {
    for name in ["three", "two"] {
        let golden = Golden::read(name);
        for (row, told) in golden.told().into_iter().enumerate() {
            let states = golden.states.get(row).unwrap();
            let pooled = golden.pooled.get(row).unwrap();
            let found = Tensor::new(told.pooled, &DEVICE).unwrap();
            for (what, found, expected) in
                [("states", told.states, states), ("pooled", found, pooled)]
            {
                let error = largest(&(found - &expected).unwrap()) / largest(&expected);
                println!("{name}: {what} {row}: {error:.2e}");
                assert!(error <= 1e-5, "{name}: {what} {row}: {error:e}");
            }
        }
    }
}

/// From diffusers' states of the prompts, and from the prompts.
#[test]
fn pipelines_make_what_diffusers_makes_of_the_same_noise() {
    for name in ["three", "two"] {
        let golden = Golden::read(name);
        for (what, told) in [("states", golden.told_by_diffusers()), ("prompts", golden.told())] {
            let parts = (&*golden.network, &golden.schedule, &golden.decoder);
            let answer = |x: &Tensor, time| golden.answer(x, time, &told);
            golden.theirs.check(&format!("{name} from {what}"), parts, answer);
        }
    }
}

/// With T5, which reads all of it, as diffusers does; without it nothing is cut.
#[test]
fn a_prompt_that_is_too_long_for_clip_is_cut_there_where_t5_reads_it() {
    let golden = Golden::read("three");
    let [long, longer] = [30, 40].map(|count| golden.ids(&"red apple ".repeat(count)));
    assert_eq!(long[..CLIP_TOKENS], longer[..CLIP_TOKENS]);
    assert_ne!(long[CLIP_TOKENS..], longer[CLIP_TOKENS..]);
    let refused = |name: &str, count: usize| {
        let reader = Golden::read(name).reader;
        let prompt = "red apple ".repeat(count);
        reader.tokenizer.encode(&prompt, TOKENS).unwrap_err().to_string()
    };
    let message = refused("three", 1000);
    assert!(message.contains("at most 256 fit"), "{message}");
    let message = refused("two", 30);
    assert!(message.contains(&format!("at most {} fit", CLIP_TOKENS - 2)), "{message}");
}

#[test]
fn folders_that_cannot_be_honoured_are_refused_by_name() {
    let refused = |name: &str, change: &dyn Fn(&Path)| {
        let folder = folder(name);
        change(folder.path());
        match ModelFolder::open(folder.path()) {
            Err(error) => error.to_string(),
            Ok(opened) => opened.load(DType::F32, &DEVICE).err().unwrap().to_string(),
        }
    };
    let edited = |file: &str, pointer: &str, value: Value| {
        refused("three", &|folder: &Path| {
            let path = folder.join(file);
            let mut json: Value =
                serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
            *json.pointer_mut(pointer).unwrap() = value.clone();
            fs::write(&path, json.to_string()).unwrap();
        })
    };
    let no_tokenizer =
        refused("three", &|folder| fs::remove_dir_all(folder.join("tokenizer_3")).unwrap());
    assert!(no_tokenizer.contains("spiece.model"), "{no_tokenizer}");
    let (index, network) = ("model_index.json", "transformer/config.json");
    for (message, wanted) in [
        (edited(index, "/text_encoder", json!([null, null])), "`text_encoder` is not there"),
        (edited(index, "/text_encoder_2", json!([null, null])), "`text_encoder_2` is not there"),
        (edited(index, "/tokenizer_3", json!([null, null])), "needs a `tokenizer_3`"),
        (
            edited(index, "/text_encoder_2/1", json!("CLIPTextModel")),
            "`text_encoder_2` is a CLIPTextModel, a SD3Transformer2DModel needs a CLIPTextModelWithProjection",
        ),
        (
            edited(index, "/text_encoder_3/1", json!("CLIPTextModelWithProjection")),
            "needs a CLIPTokenizer",
        ),
        (
            edited(network, "/joint_attention_dim", json!(27)),
            "joint_attention_dim` is 27: must be 28, the d_model of text_encoder_3",
        ),
        (
            edited(network, "/pooled_projection_dim", json!(17)),
            "pooled_projection_dim` is 17: must be 16, the projection_dims",
        ),
        (
            edited("text_encoder_2/config.json", "/max_position_embeddings", json!(25)),
            "max_position_embeddings` is 25: must be 24",
        ),
        (edited("vae/config.json", "/latent_channels", json!(4)), "latents of 4 channels"),
        (
            edited("scheduler/scheduler_config.json", "/use_dynamic_shifting", json!(true)),
            "use_dynamic_shifting",
        ),
    ] {
        assert!(message.contains(wanted), "{message}");
    }
    // Without T5 its width is free, as long as there is room for CLIP's.
    let narrow = refused("two", &|folder| {
        let path = folder.join(network);
        let json = fs::read_to_string(&path).unwrap();
        fs::write(
            &path,
            json.replace("\"joint_attention_dim\": 28", "\"joint_attention_dim\": 19"),
        )
        .unwrap();
    });
    assert!(narrow.contains("joint_attention_dim` is 19: must be at least 20"), "{narrow}");
    // A third text encoder is this network's alone.
    let other = edited(index, "/transformer/1", json!("PixArtTransformer2DModel"));
    assert!(other.contains("`text_encoder_3` is a third text encoder"), "{other}");
}
