//! The bundled models in 8 bits: their images, the bits of their rows, and what is refused.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use understudy_distill::generate::{Classes, Sampling};
use understudy_distill::quantize::{Quantized, quantize};
use understudy_models::checkpoint::{Draft, ModelFolder};
use understudy_models::quantization::{FILE, INT8};
use understudy_models::sampler::{self, Kind};
use understudy_models::{Denoiser, noise};

fn bundled(name: &str) -> ModelFolder {
    let zoo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/zoo");
    ModelFolder::open(&zoo.join(name)).unwrap()
}

/// Images of a model in so many steps.
fn sampling(folder: &ModelFolder, steps: usize, first_seed: u64) -> Sampling {
    let trajectory = sampler::trajectory(&folder.schedule, Kind::Ddim, steps, 0.0, false).unwrap();
    let conditioning = folder.network.geometry().conditioning;
    let classes = Classes::all(conditioning, folder.card.null_class).unwrap();
    Sampling { trajectory, classes, captions: None, first_seed, batch: 8 }
}

fn quantised(folder: &ModelFolder, steps: usize, rows: usize) -> Quantized {
    quantize(folder, &sampling(folder, steps, 0), rows, |_, _| {}).unwrap()
}

fn write(out: &Path, folder: &ModelFolder, made: &Quantized) {
    let draft = Draft::new(out).unwrap();
    let name = format!("{}/{FILE}", folder.network.component());
    draft.write(&name, &made.quantization.to_bytes().unwrap()).unwrap();
    let (network, schedule, card) = (&folder.network, &folder.schedule, &folder.card);
    ModelFolder::write(draft, network, &made.weights, schedule, card).unwrap();
}

/// The samples with seeds from 1,000 on, f32.
fn samples(network: &dyn Denoiser, folder: &ModelFolder, steps: usize, count: usize) -> Vec<f32> {
    let sampling = sampling(folder, steps, 1000);
    let batches = sampling.batches(network, 0..count);
    batches.flat_map(|it| it.unwrap().x.flatten_all().unwrap().to_vec1::<f32>().unwrap()).collect()
}

/// dB, of numbers from −1 to 1.
fn psnr(a: &[f32], b: &[f32]) -> f64 {
    let squares: f64 = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum();
    10.0 * (4.0 * a.len() as f64 / squares).log10()
}

#[test]
fn bundled_models_in_8_bits_draw_nearly_the_same_images() {
    for (name, steps) in [("fashion-mnist-student", 10), ("fashion-mnist-teacher", 5)] {
        let folder = bundled(name);
        let made = quantised(&folder, steps, 80);
        assert!(made.quantization.layers.len() > 5, "{name}");
        let home = tempfile::tempdir().unwrap();
        let out = home.path().join("model");
        write(&out, &folder, &made);
        let load = |path: &Path, dtype| {
            ModelFolder::open(path).unwrap().load(dtype, &Device::Cpu).unwrap().network
        };
        let exact = samples(&*load(&folder.path, DType::F32), &folder, steps, 8);
        let int8 = load(&out, INT8);
        let found = psnr(&samples(&*int8, &folder, steps, 8), &exact);
        // Whoever knows nothing of codes has the same weights.
        let plain = psnr(&samples(&*load(&out, DType::F32), &folder, steps, 8), &exact);
        println!("{name}: {found:.1} dB, of rounded weights alone {plain:.1} dB");
        assert!(found > 30.0 && plain > 30.0, "{name}: {found} {plain}");
        assert!(found < 80.0, "{name}: as if nothing were rounded");
    }
}

#[test]
fn a_row_in_8_bits_has_the_same_bits_whatever_the_batch() {
    let folder = bundled("fashion-mnist-teacher");
    let made = quantised(&folder, 4, 16);
    let network = folder.network.load_quantized(made.weights, made.quantization).unwrap();
    let rows = 9;
    let x: Vec<Tensor> = (0..rows as u64)
        .map(|seed| {
            let mut x = vec![0f32; 1024];
            noise::normal(seed, 0, &mut x);
            Tensor::from_vec(x, (1, 1, 32, 32), &Device::Cpu).unwrap()
        })
        .collect();
    // All buckets in one batch.
    let times: Vec<f32> = (0..rows).map(|i| i as f32 * 124.0).collect();
    let classes: Vec<u32> = (0..rows as u32).collect();
    let of = |range: std::ops::Range<usize>| -> Vec<u32> {
        let x = Tensor::cat(&x[range.clone()], 0).unwrap();
        let times = Tensor::new(&times[range.clone()], &Device::Cpu).unwrap();
        let classes = Tensor::new(&classes[range], &Device::Cpu).unwrap();
        let answer = network.forward(&x, &times, Some(&classes)).unwrap();
        let values: Vec<f32> = answer.flatten_all().unwrap().to_vec1().unwrap();
        values.into_iter().map(f32::to_bits).collect()
    };
    let together = of(0..rows);
    for row in 0..rows {
        assert!(of(row..row + 1) == together[row * 1024..][..1024], "row {row}");
    }
}

#[test]
fn what_cannot_be_quantised_or_served_is_refused_by_name() {
    let folder = bundled("fashion-mnist-student");
    let problem = folder_problem(&folder.path, INT8);
    assert!(
        problem.contains("`dtype` is int8") && problem.contains("understudy quantize"),
        "{problem}"
    );

    let mut made = quantised(&folder, 4, 16);
    let home = tempfile::tempdir().unwrap();
    let out: PathBuf = home.path().join("model");
    write(&out, &folder, &made);
    let again = ModelFolder::open(&out).unwrap();
    let again = quantize(&again, &sampling(&again, 4, 0), 16, |_, _| {});
    let problem = again.err().unwrap().to_string();
    assert!(problem.contains("quantised already"), "{problem}");

    // Weights that were changed since.
    let name = made.quantization.layers.keys().next().unwrap().clone();
    let changed = (&made.weights[&name] * 1.5).unwrap();
    made.weights.insert(name.clone(), changed);
    write(&home.path().join("changed"), &folder, &made);
    let problem = folder_problem(&home.path().join("changed"), INT8);
    assert!(problem.contains(&name) && problem.contains("changed since"), "{problem}");

    // A layer too few.
    made.quantization.layers.remove(&name);
    write(&home.path().join("fewer"), &folder, &made);
    let problem = folder_problem(&home.path().join("fewer"), INT8);
    assert!(problem.contains(&name) && problem.contains("is missing"), "{problem}");

    let text = bundled("emoji-text-to-image-student-4");
    let trajectory = sampling(&folder, 4, 0);
    let problem = quantize(&text, &trajectory, 16, |_, _| {}).err().unwrap().to_string();
    assert!(problem.contains("a text-to-image model"), "{problem}");
}

fn folder_problem(path: &Path, dtype: DType) -> String {
    let loaded = ModelFolder::open(path).unwrap().load(dtype, &Device::Cpu);
    loaded.map(|_| ()).unwrap_err().to_string()
}

#[test]
fn a_calibration_that_saturates_names_the_layer() {
    // The second class, which one image does not show, moves features far from where those of the first are.
    let folder = bundled("fashion-mnist-student");
    let mut weights = folder.tensors().unwrap();
    let name = "class_embedding.weight";
    let table = weights[name].to_dtype(DType::F32).unwrap();
    let factors = Tensor::new(&[[1f32], [300.0]], &Device::Cpu).unwrap();
    let two = table.narrow(0, 0, 2).unwrap().broadcast_mul(&factors).unwrap();
    let rest = table.narrow(0, 2, table.dim(0).unwrap() - 2).unwrap();
    weights.insert(name.into(), Tensor::cat(&[two, rest], 0).unwrap());
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("model");
    let draft = Draft::new(&out).unwrap();
    let (network, schedule, card) = (&folder.network, &folder.schedule, &folder.card);
    ModelFolder::write(draft, network, &weights, schedule, card).unwrap();
    let changed = ModelFolder::open(&out).unwrap();
    let made = quantize(&changed, &sampling(&changed, 2, 0), 1, |_, _| {});
    let problem = made.err().unwrap().to_string();
    assert!(
        problem.contains(".weight` is saturated by") && problem.contains("--rows"),
        "{problem}"
    );
}
