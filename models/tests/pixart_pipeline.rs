//! PixArt's pipelines against diffusers' own (`golden/make_pixart_pipelines.py`): what comes of the same noise, of a prompt
//! that T5 reads to the image.
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
use understudy_models::checkpoint::{ModelFolder, Pipeline};
use understudy_models::schedule::ScheduleConfig;
use understudy_models::{Conditions, Denoiser};

const DEVICE: Device = Device::Cpu;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// A folder as diffusers saves it: the one that was saved, and the tokenizer.
fn folder(name: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let copy = |from: &Path, to: &Path| {
        fs::create_dir_all(to).unwrap();
        for entry in fs::read_dir(from).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.is_file() {
                fs::copy(&entry, to.join(entry.file_name().unwrap())).unwrap();
            }
        }
    };
    let from = golden().join("pixart_pipeline").join(name);
    for part in ["", "scheduler", "text_encoder", "transformer", "vae"] {
        copy(&from.join(part), &folder.path().join(part));
    }
    copy(&golden().join("t5_tokenizer"), &folder.path().join("tokenizer"));
    folder
}

/// A pipeline, and what diffusers makes with it.
struct Golden {
    network: Box<dyn Denoiser>,
    decoder: Decoder,
    schedule: ScheduleConfig,
    /// The states of prompt and negative prompt, with zeros after the last token.
    prompts: [Tensor; 2],
    theirs: FromNoise,
}

impl Golden {
    fn read(name: &str, most: usize) -> Self {
        let path = golden().join("pixart_pipeline").join(name).with_extension("safetensors");
        let (theirs, _) = FromNoise::read(&path);
        let (_, _, height, width) = theirs.latents.dims4().unwrap();

        let folder = folder(name);
        let opened = ModelFolder::open_for_images(folder.path()).unwrap();
        let Pipeline { network, decoder, reader, schedule, .. } =
            opened.load(DType::F32, &DEVICE).unwrap();
        let (reader, decoder) = (reader.unwrap(), decoder.unwrap());
        assert_eq!(network.geometry().prompt.unwrap().tokens, most);
        let prompts = ["prompt", "negative_prompt"].map(|field| {
            let ids =
                reader.tokenizer.encode(theirs.request[field].as_str().unwrap(), most).unwrap();
            let states = reader.encoder.read(&[&ids]).unwrap().remove(0).states;
            states.pad_with_zeros(0, 0, most - ids.len()).unwrap()
        });
        Self {
            network: network.at([height, width], most).unwrap().unwrap(),
            decoder: decoder.at([height, width]).unwrap(),
            schedule,
            prompts,
            theirs,
        }
    }

    /// What the network answers about `x` at a time, guided as the request says.
    fn answer(&self, x: &Tensor, time: f64) -> Tensor {
        let rows = x.dim(0).unwrap();
        let [wanted, unwanted] = &self.prompts;
        let prompts: Vec<&Tensor> = [vec![wanted; rows], vec![unwanted; rows]].concat();
        let prompt = Tensor::stack(&prompts, 0).unwrap();
        let conditions = Conditions { prompt: Some(&prompt), ..Conditions::default() };
        let times = Tensor::full(time as f32, 2 * rows, &DEVICE).unwrap();
        let both = Tensor::cat(&[x, x], 0).unwrap();
        let answers = self.network.evaluate(&both, &times, conditions).unwrap();
        self.theirs.guided(&answers)
    }
}

/// diffusers was asked with prompts filled up to 60 tokens; here they are filled up to as many as a folder's pipeline takes.
#[test]
fn pipelines_make_what_diffusers_makes_of_the_same_noise() {
    for (name, most) in [("alpha", 120), ("sigma", 300)] {
        let golden = Golden::read(name, most);
        let parts = (&*golden.network, &golden.schedule, &golden.decoder);
        golden.theirs.check(name, parts, |x, time| golden.answer(x, time));
    }
}

#[test]
fn folders_that_cannot_be_honoured_are_refused_by_name() {
    let refused = |change: &dyn Fn(&Path)| {
        let folder = folder("alpha");
        change(folder.path());
        match ModelFolder::open(folder.path()) {
            Err(error) => error.to_string(),
            Ok(opened) => opened.load(DType::F32, &DEVICE).err().unwrap().to_string(),
        }
    };
    let edited = |file: &str, pointer: &str, value: Value| {
        refused(&|folder: &Path| {
            let path = folder.join(file);
            let mut json: Value =
                serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
            *json.pointer_mut(pointer).unwrap() = value.clone();
            fs::write(&path, json.to_string()).unwrap();
        })
    };
    let no_tokenizer = refused(&|folder| fs::remove_dir_all(folder.join("tokenizer")).unwrap());
    assert!(no_tokenizer.contains("spiece.model"), "{no_tokenizer}");
    let index = "model_index.json";
    for (message, wanted) in [
        (edited(index, "/tokenizer", json!([null, null])), "needs a `tokenizer`"),
        (edited(index, "/tokenizer/1", json!("CLIPTokenizer")), "needs a T5Tokenizer"),
        (
            edited(index, "/text_encoder/1", json!("UMT5EncoderModel")),
            "T5EncoderModel are supported",
        ),
        (
            edited(index, "/_class_name", json!("IFPipeline")),
            "PixArtAlphaPipeline and PixArtSigmaPipeline",
        ),
        (
            edited("transformer/config.json", "/caption_channels", json!(20)),
            "caption_channels` is 20: must be 16, the d_model",
        ),
        (edited("text_encoder/config.json", "/d_ff", json!(25)), "wi_0"),
        (
            edited("text_encoder/config.json", "/vocab_size", json!(100)),
            "tokens, and the text encoder knows 100",
        ),
    ] {
        assert!(message.contains(wanted), "{message}");
    }
}
