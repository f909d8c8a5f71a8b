//! Times training steps of a network on the CPU: forward, mean squared error, backward, AdamW.
//!
//! `cargo run --release -p understudy-distill --example training -- FOLDER BATCH.safetensors SECONDS`:
//! `FOLDER` holds the network as diffusers writes it (`config.json`,
//! `diffusion_pytorch_model.safetensors`), the batch `sample`, `timestep` (f32), `target` and, for a
//! class-conditional network, `class_labels`. Prints one line of JSON: seconds of each step after two
//! that warm up, of its parts, minor page faults per step, and the losses. With 0 seconds it prints what
//! each kernel of a step took instead.
#![allow(clippy::unwrap_used)]

mod median;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use median::median;
use understudy_distill::optimizer::{AdamW, Gradients, Settings};
use understudy_distill::parameters::Parameters;
use understudy_models::kernels::Timing;
use understudy_models::{Conditions, NetworkConfig};

/// Steps that are not counted.
const WARM_UPS: usize = 2;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, folder, file, seconds] = &arguments[..] else {
        panic!("training FOLDER BATCH.safetensors SECONDS");
    };
    let (folder, seconds) = (Path::new(folder), seconds.parse::<f64>().unwrap());
    let json = std::fs::read(folder.join("config.json")).unwrap();
    let json = serde_json::from_slice(&json).unwrap();
    let config = NetworkConfig::from_json(&json, "config.json").unwrap();
    let file_of_weights = folder.join("diffusion_pytorch_model.safetensors");
    let weights: BTreeMap<String, Tensor> =
        candle_core::safetensors::load(file_of_weights, &Device::Cpu)
            .unwrap()
            .into_iter()
            .collect();
    let parameters = Parameters::new(weights).unwrap();
    let model = config.load(parameters.tensors(), DType::F32, &Device::Cpu).unwrap();
    let batch = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
    let (x, times, target) = (&batch["sample"], &batch["timestep"], &batch["target"]);
    let condition = batch.get("class_labels").map(|labels| labels.to_dtype(DType::U32).unwrap());

    if seconds == 0.0 {
        let conditions = Conditions { condition: condition.as_ref(), ..Conditions::default() };
        let profile = || model.profile(x, times, conditions).unwrap();
        profile();
        for Timing { name, flop, seconds, .. } in profile() {
            println!("{:9.3} ms {:7.1} GFLOP/s  {name}", 1e3 * seconds, 1e-9 * flop / seconds);
        }
        return;
    }
    let settings = Settings {
        learning_rate: 1e-4,
        warmup_steps: 1,
        decay_steps: None,
        weight_decay: 0.01,
        // The PyTorch steps that these are held against do not clip.
        clip_norm: f64::INFINITY,
        beta1: understudy_distill::optimizer::BETA1,
    };
    let mut optimizer = AdamW::new(&parameters, settings).unwrap();
    let (mut steps, mut parts) = (Vec::new(), [Vec::new(), Vec::new(), Vec::new()]);
    let mut faults = minor_faults();
    let mut losses = Vec::new();
    while steps.len() < 5 || steps.iter().sum::<f64>() < seconds {
        let began = Instant::now();
        let y = model.forward(x, times, condition.as_ref()).unwrap();
        let forward = began.elapsed().as_secs_f64();
        let loss = (y - target).unwrap().sqr().unwrap().mean_all().unwrap();
        let mut gradients = loss.backward().unwrap();
        let backward = began.elapsed().as_secs_f64();
        let gradients = Gradients::take(&parameters, &mut gradients).unwrap();
        optimizer.step(&parameters, &gradients).unwrap();
        let all = began.elapsed().as_secs_f64();
        losses.push(loss.to_scalar::<f32>().unwrap());
        steps.push(all);
        for (part, time) in parts.iter_mut().zip([forward, backward - forward, all - backward]) {
            part.push(time);
        }
        if losses.len() == WARM_UPS {
            faults = minor_faults();
            steps.clear();
            parts.iter_mut().for_each(Vec::clear);
        }
    }
    let faults = (minor_faults() - faults) as f64 / steps.len() as f64;
    let [forward, backward, optimizer] = parts.map(median);
    println!(
        "{}",
        serde_json::json!({
            "batch": x.dim(0).unwrap(), "parameters": model.parameters(), "seconds": steps,
            "median_seconds": median(steps.clone()), "forward_seconds": forward,
            "backward_seconds": backward, "optimizer_seconds": optimizer,
            "minor_faults_per_step": faults, "losses": losses, "max_rss_bytes": max_rss_bytes(),
        })
    );
}

/// The most memory that was resident, where Linux says so.
fn max_rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or_default();
    line.split_whitespace().next().and_then(|kib| kib.parse().ok()).unwrap_or(0) * 1024
}

/// Pages that the process was given without reading them, where Linux says so.
fn minor_faults() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split(' ').collect();
    fields.get(8).and_then(|field| field.parse().ok()).unwrap_or(0)
}
