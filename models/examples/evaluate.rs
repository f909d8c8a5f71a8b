//! Times network evaluations: `evaluate FOLDER_OR_CONFIG BATCH [SECONDS] [--profile]`.
//!
//! With a model folder its weights are used; with a `config.json` alone, numbers by formula.

use std::collections::HashMap;
use std::path::Path;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use understudy_models::unet::{UNet2DConfig, UNet2DModel};
use understudy_models::{Conditioning, Denoiser};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let place = Path::new(&arguments[0]);
    let batch: usize = arguments[1].parse()?;
    let seconds: f64 = arguments.get(2).map_or(Ok(3.0), |text| text.parse())?;
    let (config, file) = if place.is_dir() {
        let weights = place.join("diffusion_pytorch_model.safetensors");
        (place.join("config.json"), Some(weights))
    } else {
        (place.to_path_buf(), None)
    };
    let json = serde_json::from_slice(&std::fs::read(&config)?)?;
    let config = UNet2DConfig::from_json(&json, "config.json")?;
    let weights = match file {
        Some(file) => candle_core::safetensors::load(file, &Device::Cpu)?,
        None => by_formula(&config)?,
    };
    let bf16 = arguments.iter().any(|argument| argument == "--bf16");
    let dtype = if bf16 { DType::BF16 } else { DType::F32 };
    let model = UNet2DModel::load(&config, weights, dtype, &Device::Cpu)?;
    let geometry = model.geometry().clone();
    let x = formula(&[batch, geometry.in_channels, geometry.height, geometry.width], 1.7, 3)?;
    let t: Vec<f32> = (0..batch).map(|i| (i * 97 % 1000) as f32).collect();
    let t = Tensor::from_vec(t, batch, &Device::Cpu)?;
    let condition = match geometry.conditioning {
        Conditioning::None => None,
        Conditioning::Classes(_) => Some(Tensor::zeros(batch, DType::U32, &Device::Cpu)?),
        Conditioning::Timestep => Some(t.clone()),
        Conditioning::Embedding(width) => Some(formula(&[batch, width], 1.0, 4)?),
    };
    let condition = condition.as_ref();
    for _ in 0..3 {
        model.forward(&x, &t, condition)?;
    }
    if arguments.iter().any(|argument| argument == "--profile") {
        let (mut names, mut best): (Vec<_>, Vec<f64>) = (Vec::new(), Vec::new());
        for _ in 0..30 {
            let lines = model.profile(&x, &t, condition)?;
            best.resize(lines.len(), f64::INFINITY);
            for (best, line) in best.iter_mut().zip(&lines) {
                *best = best.min(line.seconds);
            }
            names = lines;
        }
        let total: f64 = best.iter().sum();
        for (line, time) in names.iter().zip(&best) {
            let (name, flop) = (&line.name, line.flop);
            let (us, share) = (1e6 * time, 100.0 * time / total);
            println!("{us:9.1} µs {share:5.1} % {:7.1} GFLOP/s  {name}", flop / time * 1e-9);
        }
        let flop: f64 = names.iter().map(|line| line.flop).sum();
        println!("total {:.3} ms, {:.3} GFLOP", 1e3 * total, flop * 1e-9);
    }
    let (mut times, mut cpu) = (Vec::new(), Vec::new());
    let start = Instant::now();
    while start.elapsed().as_secs_f64() < seconds {
        let (begin, cpu_begin) = (Instant::now(), on_cpu());
        model.forward(&x, &t, condition)?;
        times.push(1e3 * begin.elapsed().as_secs_f64() / batch as f64);
        cpu.push(1e3 * (on_cpu() - cpu_begin) / batch as f64);
    }
    times.sort_by(f64::total_cmp);
    cpu.sort_by(f64::total_cmp);
    println!(
        "batch {batch}: {:.3} ms per image (median of {}), least {:.3}; calling thread on the CPU {:.3}, least {:.3}",
        times[times.len() / 2],
        times.len(),
        times[0],
        cpu[cpu.len() / 2],
        cpu[0]
    );
    Ok(())
}

fn by_formula(
    config: &UNet2DConfig,
) -> Result<HashMap<String, Tensor>, Box<dyn std::error::Error>> {
    let mut weights = HashMap::new();
    for (i, (name, shape)) in UNet2DModel::weight_shapes(config)?.into_iter().enumerate() {
        let fan_in: usize = shape[1..].iter().product();
        let tensor = formula(&shape, (1.0 / fan_in as f32).sqrt(), i as u32)?;
        weights.insert(name, tensor);
    }
    Ok(weights)
}

fn formula(shape: &[usize], scale: f32, seed: u32) -> candle_core::Result<Tensor> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((state >> 8) as f32 / (1u32 << 23) as f32 - 1.0) * scale
    };
    let values: Vec<f32> = (0..shape.iter().product::<usize>()).map(|_| next()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu)
}

/// Seconds that this thread has run, where Linux tells: with one thread the figure to look at on a
/// machine that others use too.
fn on_cpu() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanoseconds = text.split(' ').next().and_then(|word| word.parse::<f64>().ok());
    nanoseconds.unwrap_or(0.0) * 1e-9
}
