//! What an element type costs: images of one model in f32 against f64, and in bf16 against f32.
//!
//! `cargo run --release -p understudy-models --example precision [MODEL-FOLDER [IMAGES]]`
//!
//! The same noise and classes go through 50 deterministic DDIM steps; PSNR is of the float images,
//! before they become bytes, with data range 2. The f64 reference is the network of candle's operations
//! (its time embedding projected in f32, as everywhere) and the sampler's scalar arithmetic. It is
//! slow: minutes for 64 images of the bundled teacher.

use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use understudy_models::checkpoint::ModelFolder;
use understudy_models::kernels::Isa;
use understudy_models::sampler::{self, Element, Kind, MEMORIES, Trajectory};
use understudy_models::{Conditioning, Denoiser, rollout};

const STEPS: usize = 50;
/// Images of one evaluation.
const BATCH: usize = 16;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> Outcome<()> {
    let mut arguments = std::env::args().skip(1);
    let bundled = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("zoo/fashion-mnist-teacher");
    let folder = arguments.next().map_or(bundled, PathBuf::from);
    let count: usize = arguments.next().map_or(Ok(64), |text| text.parse())?;

    let in_f32 = images(&folder, DType::F32, count)?;
    report("f32 against f64", &in_f32, &images(&folder, DType::F64, count)?);
    if Isa::detect().multiplies_bf16() {
        report("bf16 against f32", &images(&folder, DType::BF16, count)?, &in_f32);
    }
    Ok(())
}

/// The images of seeds 0 to `count`, each flat.
fn images(folder: &std::path::Path, dtype: DType, count: usize) -> Outcome<Vec<Vec<f64>>> {
    let loaded = ModelFolder::open(folder)?.load(dtype, &Device::Cpu)?;
    let network = loaded.network.as_ref();
    let learned = network.geometry().learned_variance();
    let trajectory = sampler::trajectory(&loaded.schedule, Kind::Ddim, STEPS, 0.0, learned)?;
    let seeds: Vec<u64> = (0..count as u64).collect();
    let mut images = Vec::new();
    for seeds in seeds.chunks(BATCH) {
        images.extend(batch(network, &trajectory, seeds)?);
        eprintln!("{}: {} of {count} images", dtype.as_str(), images.len());
    }
    Ok(images)
}

fn batch(network: &dyn Denoiser, trajectory: &Trajectory, seeds: &[u64]) -> Outcome<Vec<Vec<f64>>> {
    let (rows, geometry) = (seeds.len(), network.geometry());
    let shape = (rows, geometry.in_channels, geometry.height, geometry.width);
    let start = rollout::start(geometry, seeds, &Device::Cpu)?;
    let condition = match geometry.conditioning {
        Conditioning::None => None,
        Conditioning::Classes(classes) => {
            let labels: Vec<u32> =
                seeds.iter().map(|seed| (seed % classes as u64) as u32).collect();
            Some(Tensor::from_vec(labels, rows, &Device::Cpu)?)
        }
        ref other => return Err(format!("no conditions for {other:?}").into()),
    };
    let mut x = start.to_dtype(network.dtype())?;
    let mut memory = sampler::empty_memory(&x)?;
    for evaluation in trajectory.iter() {
        let timesteps = Tensor::full(evaluation.timestep as f32, rows, &Device::Cpu)?;
        let answer = network.forward(&x, &timesteps, condition.as_ref())?;
        if network.dtype() == DType::F64 {
            let read = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f64>();
            let element = |(x, model): (f64, f64)| {
                let (memory, variance, noise, threshold) = ([0.0; MEMORIES], 0.0, 0.0, 1.0);
                let at = Element { x, memory, model, variance, noise, threshold };
                evaluation.step.evaluate(at).x
            };
            let next: Vec<f64> = read(&x)?.into_iter().zip(read(&answer)?).map(element).collect();
            x = Tensor::from_vec(next, shape, &Device::Cpu)?;
        } else {
            let steps = vec![evaluation.step; rows];
            let next = sampler::advance(&x, &memory, &answer, None, &steps)?;
            (x, memory) = (next.x, next.memory);
        }
    }
    Ok(x.to_dtype(DType::F64)?.flatten_from(1)?.to_vec2()?)
}

fn report(what: &str, found: &[Vec<f64>], expected: &[Vec<f64>]) {
    let psnr = |(found, expected): (&Vec<f64>, &Vec<f64>)| {
        let square: f64 = found.iter().zip(expected).map(|(a, b)| (a - b) * (a - b)).sum();
        10.0 * (4.0 * found.len() as f64 / square).log10()
    };
    let mut all: Vec<f64> = found.iter().zip(expected).map(psnr).collect();
    all.sort_by(f64::total_cmp);
    println!(
        "{what}, {STEPS} DDIM steps, {} images: PSNR median {:.1} dB, 5th percentile {:.1} dB, least {:.1} dB",
        all.len(),
        all[all.len() / 2],
        all[all.len() / 20],
        all[0],
    );
}
