//! Times one part of a text-to-image pipeline, for `benches/peers/components.py`.
//!
//! `component KIND FOLDER INPUTS DTYPE`: `KIND` is `unet`, `decoder` or `text`, `FOLDER` holds its `config.json` and weights as
//! diffusers and transformers write them, and `INPUTS` is a safetensors file of what it is asked (`sample`, `timestep`, `states`; `sample`;
//! `ids`). Commands come as lines of JSON on the standard input, as `benches/peers/worker.py` takes them, and each is answered by a line.

use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::path::Path;
use std::time::Instant;

use candle_core::{DType, Device, Tensor, safetensors};
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
        "unet" => {
            let [sample, time, states] = [input("sample")?, input("timestep")?, input("states")?];
            let (_, _, height, width) = sample.dims4()?;
            let config = NetworkConfig::from_json(&config, "config.json")?;
            let config = config.at([height, width], states.dim(1)?).ok_or("no other sizes")??;
            let network = config.load(weights, dtype, &device)?;
            Box::new(move || {
                let conditions = Conditions { prompt: Some(&states), ..Conditions::default() };
                network.evaluate(&sample, &time, conditions)
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
