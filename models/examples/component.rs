//! Times one part of a text-to-image pipeline, for `benches/peers/components.py`.
//!
//! `component KIND FOLDER INPUTS DTYPE`: `KIND` is `network`, `decoder` or `text`, `FOLDER` holds its `config.json` and weights as
//! diffusers and transformers write them, and `INPUTS` is a safetensors file of what it is asked (`sample`, `timestep`, `states`, and `added` for a
//! network that takes a pooled text and sizes; `sample`; `ids`). `candle-network` and `candle-decoder` are candle-transformers' own, of Stable
//! Diffusion 1.5. Commands come as lines of JSON on the standard input, as `benches/peers/worker.py` takes them, and each is answered by a line.

use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::path::Path;
use std::time::Instant;

use candle_core::{DType, Device, Tensor, safetensors};
use candle_nn::VarBuilder;
use candle_transformers::models::stable_diffusion::unet_2d::{
    BlockConfig, UNet2DConditionModel, UNet2DConditionModelConfig,
};
use candle_transformers::models::stable_diffusion::vae::{AutoEncoderKL, AutoEncoderKLConfig};
use serde_json::{Value, json};
use understudy_models::autoencoder::AutoencoderConfig;
use understudy_models::text::clip::ClipConfig;
use understudy_models::{Conditions, NetworkConfig};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;
type Evaluate = Box<dyn Fn() -> candle_core::Result<Tensor>>;

/// Least evaluations of a turn.
const LEAST: usize = 3;
const WARM_UPS: usize = 2;

fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kind, folder, inputs, dtype] = &arguments[..] else {
        return Err("component KIND FOLDER INPUTS DTYPE".into());
    };
    let dtype = if dtype == "bf16" { DType::BF16 } else { DType::F32 };
    let inputs = safetensors::load(inputs, &Device::Cpu)?;
    let evaluate = build(kind, Path::new(folder), inputs, dtype)?;
    for _ in 0..WARM_UPS {
        evaluate()?;
    }
    answer(&json!({"ready": true}))?;
    for line in std::io::stdin().lock().lines() {
        let command: Value = serde_json::from_str(&line?)?;
        match command["do"].as_str() {
            Some("time") => {
                let wanted = command["seconds"].as_f64().unwrap_or(0.0);
                let mut seconds: Vec<f64> = Vec::new();
                while seconds.len() < LEAST || seconds.iter().sum::<f64>() < wanted {
                    let began = Instant::now();
                    evaluate()?;
                    seconds.push(began.elapsed().as_secs_f64());
                }
                answer(&json!({"seconds": seconds}))?;
            }
            Some("output") => {
                let output = evaluate()?.to_dtype(DType::F32)?;
                let path = command["path"].as_str().unwrap_or_default();
                safetensors::save(&HashMap::from([("output", output.clone())]), path)?;
                answer(&json!({"shape": output.dims()}))?;
            }
            _ => return answer(&json!({"max_rss_bytes": max_rss_bytes()?})),
        }
    }
    Ok(())
}

fn build(
    kind: &str,
    folder: &Path,
    mut inputs: HashMap<String, Tensor>,
    dtype: DType,
) -> Outcome<Evaluate> {
    let device = Device::Cpu;
    let mut input =
        |name: &str| inputs.remove(name).ok_or_else(|| format!("the inputs have no `{name}`"));
    let config: Value =
        serde_json::from_str(&std::fs::read_to_string(folder.join("config.json"))?)?;
    let stem = if kind == "text" { "model" } else { "diffusion_pytorch_model" };
    let weights = safetensors::load(folder.join(format!("{stem}.safetensors")), &device)?;
    Ok(match kind {
        "network" => {
            let [sample, time, states] = [input("sample")?, input("timestep")?, input("states")?];
            let added = input("added").ok();
            let (_, _, height, width) = sample.dims4()?;
            let config = NetworkConfig::from_json(&config, "config.json")?;
            let config = config.at([height, width], states.dim(1)?).ok_or("no other sizes")??;
            let network = config.load(weights, dtype, &device)?;
            Box::new(move || {
                let (prompt, condition) = (Some(&states), added.as_ref());
                let conditions = Conditions { prompt, condition, ..Conditions::default() };
                network.evaluate(&sample.to_dtype(network.dtype())?, &time, conditions)
            })
        }
        "decoder" => {
            // As a pipeline hands it over, whose latents are scaled.
            let scale = config["scaling_factor"].as_f64().unwrap_or(1.0);
            let sample = (input("sample")? * scale)?;
            let (_, _, height, width) = sample.dims4()?;
            let config = AutoencoderConfig::from_json(&config, "config.json")?;
            let decoder = config.decoder(weights, [height, width], dtype, &device)?;
            Box::new(move || decoder.forward(&sample))
        }
        "candle-network" => {
            let [sample, time, states] = [input("sample")?, input("timestep")?, input("states")?];
            let time = f64::from(time.to_vec1::<f32>()?[0]);
            let block = |out_channels, attends: bool| BlockConfig {
                out_channels,
                use_cross_attn: attends.then_some(1),
                attention_head_dim: 8,
            };
            let config = UNet2DConditionModelConfig {
                blocks: vec![
                    block(320, true),
                    block(640, true),
                    block(1280, true),
                    block(1280, false),
                ],
                cross_attention_dim: 768,
                ..UNet2DConditionModelConfig::default()
            };
            let weights = VarBuilder::from_tensors(weights, DType::F32, &device);
            let network = UNet2DConditionModel::new(weights, 4, 4, false, config)?;
            Box::new(move || network.forward(&sample, time, &states))
        }
        "candle-decoder" => {
            let sample = input("sample")?;
            let config = AutoEncoderKLConfig {
                block_out_channels: vec![128, 256, 512, 512],
                layers_per_block: 2,
                latent_channels: 4,
                norm_num_groups: 32,
                use_quant_conv: true,
                use_post_quant_conv: true,
            };
            let weights = VarBuilder::from_tensors(weights, DType::F32, &device);
            let autoencoder = AutoEncoderKL::new(weights, 3, 3, config)?;
            Box::new(move || autoencoder.decode(&sample))
        }
        "text" => {
            let ids = input("ids")?.to_dtype(DType::U32)?;
            let config = ClipConfig::from_json("CLIPTextModel", &config, "config.json")?;
            let encoder = config.load(weights, dtype, &device)?;
            Box::new(move || Ok(encoder.forward(&ids)?.last))
        }
        other => return Err(format!("no component {other}").into()),
    })
}

fn answer(reply: &Value) -> Outcome<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{reply}")?;
    Ok(out.flush()?)
}

fn max_rss_bytes() -> Outcome<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).ok_or("no VmHWM")?;
    let kilobytes: u64 = line.split_whitespace().nth(1).ok_or("no number")?.parse()?;
    Ok(kilobytes * 1024)
}
