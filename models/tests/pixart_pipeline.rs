//! PixArt's pipelines against diffusers' own (`golden/make_pixart_pipelines.py`): what comes of the same noise, of a prompt
//! that T5 reads to the image.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use safetensors::SafeTensors;
use serde_json::Value;
use understudy_models::autoencoder::{AutoencoderConfig, Decoder};
use understudy_models::checkpoint::t5_encoder;
use understudy_models::rollout::{self, Row};
use understudy_models::sampler::{Kind, empty_memory, trajectory};
use understudy_models::schedule::ScheduleConfig;
use understudy_models::text::t5::T5Tokenizer;
use understudy_models::{Conditions, Denoiser, NetworkConfig};

const DEVICE: Device = Device::Cpu;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// A pipeline, and what diffusers makes with it.
struct Golden {
    network: Box<dyn Denoiser>,
    decoder: Decoder,
    schedule: ScheduleConfig,
    request: Value,
    /// The states of prompt and negative prompt, with zeros after the last token.
    prompts: [Tensor; 2],
    latents: Tensor,
    denoised: Tensor,
    images: Tensor,
}

impl Golden {
    fn read(name: &str) -> Self {
        let folder = golden().join("pixart_pipeline").join(name);
        let text = |file: &str| fs::read_to_string(folder.join(file)).unwrap();
        let json = |file: &str| -> Value { serde_json::from_str(&text(file)).unwrap() };
        let weights = |part: &str| -> HashMap<String, Tensor> {
            let file = folder.join(part).join("diffusion_pytorch_model.safetensors");
            candle_core::safetensors::load(file, &DEVICE).unwrap()
        };
        let path = folder.with_extension("safetensors");
        let bytes = fs::read(&path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let request: Value =
            serde_json::from_str(&header.metadata().as_ref().unwrap()["request"]).unwrap();
        let mut tensors = candle_core::safetensors::load(&path, &DEVICE).unwrap();
        let mut take = |name: &str| tensors.remove(name).unwrap();
        let latents = take("latents");
        let (_, _, height, width) = latents.dims4().unwrap();
        let tokens = request["tokens"].as_u64().unwrap() as usize;

        let vae = AutoencoderConfig::from_json(&json("vae/config.json"), "vae").unwrap();
        let config = NetworkConfig::from_json(&json("transformer/config.json"), "transformer");
        let config = config.unwrap().at([height, width], tokens).unwrap().unwrap();
        let config = config.with_factor(vae.factor()).unwrap();
        let tokenizer = T5Tokenizer::open(&golden().join("t5_tokenizer")).unwrap();
        let encoder = t5_encoder(&folder.join("text_encoder"), &DEVICE).unwrap();
        let prompts = ["prompt", "negative_prompt"].map(|field| {
            let ids = tokenizer.encode(request[field].as_str().unwrap(), tokens).unwrap();
            let states = encoder.forward(&ids).unwrap();
            states.pad_with_zeros(0, 0, tokens - ids.len()).unwrap()
        });
        let decoder = vae.decoder(weights("vae"), [height, width], DType::F32, &DEVICE).unwrap();
        let schedule = text("scheduler/scheduler_config.json");
        Self {
            network: config.load(weights("transformer"), DType::F32, &DEVICE).unwrap(),
            decoder,
            schedule: ScheduleConfig::from_text(&schedule, "scheduler").unwrap(),
            request,
            prompts,
            latents,
            denoised: take("denoised"),
            images: take("images"),
        }
    }

    /// What the network answers about `x` at a time, guided as the request says; its variance is dropped.
    fn answer(&self, x: &Tensor, time: f64) -> Tensor {
        let rows = x.dim(0).unwrap();
        let [wanted, unwanted] = &self.prompts;
        let prompts: Vec<&Tensor> = [vec![wanted; rows], vec![unwanted; rows]].concat();
        let prompt = Tensor::stack(&prompts, 0).unwrap();
        let conditions = Conditions { prompt: Some(&prompt), ..Conditions::default() };
        let times = Tensor::full(time as f32, 2 * rows, &DEVICE).unwrap();
        let both = Tensor::cat(&[x, x], 0).unwrap();
        let answers = self.network.evaluate(&both, &times, conditions).unwrap();
        let answers = answers.narrow(1, 0, self.network.geometry().in_channels).unwrap();
        let [wanted, unwanted] = [0, rows].map(|first| answers.narrow(0, first, rows).unwrap());
        let scale = self.request["guidance_scale"].as_f64().unwrap();
        (&unwanted + ((wanted - &unwanted).unwrap() * scale).unwrap()).unwrap()
    }

    /// What comes of the same noise: latents before the decoder, and images.
    fn made(&self) -> (Tensor, Tensor) {
        let kind: Kind = self.request["scheduler"].as_str().unwrap().parse().unwrap();
        let steps = self.request["steps"].as_u64().unwrap() as usize;
        let mut x = self.latents.clone();
        let mut memory = empty_memory(&x).unwrap();
        let walk = trajectory(&self.schedule, kind, steps, 0.0, false).unwrap();
        for (position, at) in walk.iter().enumerate() {
            let answer = self.answer(&x, at.timestep);
            let rows = [0, 1].map(|seed| Row { seed, position, step: at.step });
            let geometry = self.network.geometry();
            let next = rollout::advance(geometry, &x, &memory, &answer, &rows).unwrap();
            (x, memory) = (next.x, next.memory);
        }
        let images = self.decoder.forward(&x).unwrap();
        (x, images)
    }
}

/// In dB, of values that span `range`.
fn psnr(found: &Tensor, expected: &Tensor, range: f64) -> f64 {
    assert_eq!(found.dims(), expected.dims());
    let error = (found - expected).unwrap().sqr().unwrap().mean_all().unwrap();
    10.0 * (range * range / f64::from(error.to_scalar::<f32>().unwrap())).log10()
}

#[test]
fn pipelines_make_what_diffusers_makes_of_the_same_noise() {
    for name in ["alpha", "sigma"] {
        let golden = Golden::read(name);
        let (denoised, images) = golden.made();
        let largest = golden.denoised.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        let latents = psnr(&denoised, &golden.denoised, f64::from(largest));
        let images = psnr(&images, &golden.images, 2.0);
        println!("{name}: latents {latents:.1} dB, images {images:.1} dB");
        assert!(latents >= 80.0, "{name}: latents {latents:.1} dB");
        assert!(images >= 80.0, "{name}: images {images:.1} dB");
    }
}
