//! Half precision, as a GPU computes in, on the CPU: f16, since candle's CPU backend does not convolve bf16.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use understudy_distill::generate::{Classes, Sampling};
use understudy_distill::train::train;
use understudy_models::checkpoint::ModelFolder;
use understudy_models::sampler::{self, Kind};

#[test]
fn images_after_fifty_steps_in_half_precision_are_those_of_single() {
    let zoo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/zoo/fashion-mnist-teacher");
    let draw = |dtype| -> Tensor {
        let loaded = ModelFolder::open(&zoo).unwrap().load(dtype, &Device::Cpu).unwrap();
        let conditioning = loaded.network.geometry().conditioning;
        let sampling = Sampling {
            trajectory: sampler::trajectory(&loaded.schedule, Kind::Ddim, 50, 0.0, false).unwrap(),
            classes: Classes::all(conditioning, loaded.card.null_class).unwrap(),
            captions: None,
            first_seed: 0,
            batch: 2,
        };
        assert_eq!(loaded.network.dtype(), dtype);
        let mut batches = sampling.batches(loaded.network.as_ref(), 0..2);
        batches.next().unwrap().unwrap().x
    };
    let (single, half) = (draw(DType::F32), draw(DType::F16));
    let error = (single - half).unwrap().sqr().unwrap().mean((1, 2, 3)).unwrap();
    for (row, error) in error.to_vec1::<f32>().unwrap().into_iter().enumerate() {
        // The images' range is 2.
        let psnr = 10.0 * (4.0 / error).log10();
        println!("image {row}: {psnr:.1} dB");
        assert!(psnr >= 40.0, "image {row}: {psnr} dB");
    }
}

/// Evaluations and gradients in half precision, weights and optimizer in single, the latter as on a GPU.
#[test]
fn a_student_learns_in_half_precision_as_in_single() {
    let home = tempfile::tempdir().unwrap();
    let teacher = common::teacher(home.path());
    let losses = |dtype, name: &str| -> Vec<f64> {
        let out = home.path().join(name);
        let mut task = common::task(&teacher, &out, 12, None);
        task.settings.dtype = dtype;
        train(task, &mut common::Blind).unwrap();
        let log = std::fs::read_to_string(out.join("training/log.jsonl")).unwrap();
        let record = |line: &str| serde_json::from_str::<Value>(line).unwrap();
        log.lines().filter_map(|line| record(line)["loss"].as_f64()).collect()
    };
    let (single, half) = (losses(DType::F32, "single"), losses(DType::F16, "half"));
    assert_eq!((single.len(), half.len()), (12, 12));
    for (one, other) in single.iter().zip(&half) {
        assert!((one - other).abs() < 0.02 * one, "{single:?} {half:?}");
    }
}
