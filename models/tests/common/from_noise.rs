//! What diffusers' pipelines make of given noise, and whether the same comes of it here.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use safetensors::SafeTensors;
use serde_json::Value;
use understudy_models::Denoiser;
use understudy_models::autoencoder::Decoder;
use understudy_models::rollout::{self, Row};
use understudy_models::sampler::{Kind, empty_memory, trajectory};
use understudy_models::schedule::ScheduleConfig;

/// One file of such a script: two images.
pub(crate) struct FromNoise {
    /// What the pipeline was asked for.
    pub(crate) request: Value,
    pub(crate) latents: Tensor,
    denoised: Tensor,
    images: Tensor,
}

impl FromNoise {
    /// With what else the file holds.
    pub(crate) fn read(path: &Path) -> (Self, HashMap<String, Tensor>) {
        let bytes = std::fs::read(path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let request =
            serde_json::from_str(&header.metadata().as_ref().unwrap()["request"]).unwrap();
        let mut tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
        let mut take = |name: &str| tensors.remove(name).unwrap();
        let [latents, denoised, images] = ["latents", "denoised", "images"].map(&mut take);
        (Self { request, latents, denoised, images }, tensors)
    }

    /// Answers with prompts, and behind them those without, guided as was asked; what the network says of its variance is
    /// dropped.
    pub(crate) fn guided(&self, answers: &Tensor) -> Tensor {
        let answers = answers.narrow(1, 0, self.latents.dim(1).unwrap()).unwrap();
        let rows = answers.dim(0).unwrap() / 2;
        let [wanted, unwanted] = [0, rows].map(|first| answers.narrow(0, first, rows).unwrap());
        let scale = self.request["guidance_scale"].as_f64().unwrap();
        (&unwanted + ((wanted - &unwanted).unwrap() * scale).unwrap()).unwrap()
    }

    /// That latents and images are diffusers', `answer` being what the network says of samples at a time.
    pub(crate) fn check(
        &self,
        what: &str,
        (network, schedule, decoder): (&dyn Denoiser, &ScheduleConfig, &Decoder),
        answer: impl Fn(&Tensor, f64) -> Tensor,
    ) {
        let kind: Kind = self.request["scheduler"].as_str().unwrap().parse().unwrap();
        let steps = self.request["steps"].as_u64().unwrap() as usize;
        let mut x = self.latents.clone();
        let mut memory = empty_memory(&x).unwrap();
        let walk = trajectory(schedule, kind, steps, 0.0, false).unwrap();
        for (position, at) in walk.iter().enumerate() {
            let answer = answer(&x, at.timestep);
            let rows = [0, 1].map(|seed| Row { seed, position, step: at.step });
            let next = rollout::advance(network.geometry(), &x, &memory, &answer, &rows).unwrap();
            (x, memory) = (next.x, next.memory);
        }
        let largest = self.denoised.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        let latents = psnr(&x, &self.denoised, f64::from(largest));
        let images = psnr(&decoder.forward(&x).unwrap(), &self.images, 2.0);
        println!("{what}: latents {latents:.1} dB, images {images:.1} dB");
        assert!(latents >= 80.0, "{what}: latents {latents:.1} dB");
        assert!(images >= 80.0, "{what}: images {images:.1} dB");
    }
}

/// In dB, of values that span `range`.
fn psnr(found: &Tensor, expected: &Tensor, range: f64) -> f64 {
    assert_eq!(found.dims(), expected.dims());
    let error = (found - expected).unwrap().sqr().unwrap().mean_all().unwrap();
    10.0 * (range * range / f64::from(error.to_scalar::<f32>().unwrap())).log10()
}
