//! The optimizer against PyTorch's (`golden/make_adamw.py`).
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use understudy_distill::checkpoint::Snapshot;
use understudy_distill::optimizer::{AdamW, Gradients, Settings};
use understudy_distill::parameters::Parameters;

const SETTINGS: Settings = Settings {
    learning_rate: 1e-2,
    warmup_steps: 5,
    decay_steps: None,
    weight_decay: 0.1,
    clip_norm: 2.0,
};

#[test]
fn twelve_steps_are_pytorchs_and_can_be_interrupted() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/adamw.safetensors");
    let golden = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let begin: BTreeMap<String, Tensor> =
        ["a", "b", "c"].map(|name| (name.into(), golden[&format!("weight.{name}")].clone())).into();
    let parameters = Parameters::new(begin).unwrap();
    let mut optimizer = AdamW::new(&parameters, SETTINGS);
    for step in 0..12 {
        if step == 6 {
            // A new optimizer that is told the old one's state goes on where that was.
            let mut snapshot = Snapshot::default();
            optimizer.save(&parameters, &mut snapshot);
            optimizer = AdamW::new(&parameters, SETTINGS);
            optimizer.restore(&parameters, &snapshot).unwrap();
        }
        // A loss whose gradients are the golden ones.
        let mut loss = Tensor::zeros((), candle_core::DType::F32, &Device::Cpu).unwrap();
        for (name, var) in parameters.iter() {
            let gradient = &golden[&format!("gradient.{step}.{name}")];
            loss = (loss + (var.as_tensor() * gradient).unwrap().sum_all().unwrap()).unwrap();
        }
        let gradients = Gradients::take(&parameters, &mut loss.backward().unwrap()).unwrap();
        let norm = optimizer.step(&parameters, &gradients).unwrap();
        let expected = f64::from(golden[&format!("norm.{step}")].to_vec1::<f32>().unwrap()[0]);
        assert!((norm - expected).abs() < 1e-6 * expected, "step {step}: {norm}, not {expected}");
        for (name, var) in parameters.iter() {
            let expected = &golden[&format!("weight.{step}.{name}")];
            let error = (var.as_tensor() - expected).unwrap().abs().unwrap();
            let error: f32 = error.max_all().unwrap().to_scalar().unwrap();
            assert!(error < 1e-6, "step {step}, {name}: {error}");
        }
    }
}

/// What diffusers' `get_cosine_schedule_with_warmup(optimizer, 4, 10)` gives after its warm-up, whose first
/// step is not lost here.
#[test]
fn the_learning_rate_falls_along_diffusers_cosine() {
    const COSINE: [f64; 6] = [1.0, 0.933_012_701_9, 0.75, 0.5, 0.25, 0.066_987_298_1];
    let settings = Settings { warmup_steps: 4, decay_steps: Some(10), ..SETTINGS };
    let zero = Tensor::zeros(1, candle_core::DType::F32, &Device::Cpu).unwrap();
    let parameters = Parameters::new([("a".to_owned(), zero)]).unwrap();
    let mut optimizer = AdamW::new(&parameters, settings);
    let expected = [0.25, 0.5, 0.75, 1.0].into_iter().chain(COSINE).chain([0.0]);
    for (step, expected) in expected.enumerate() {
        let rate = optimizer.learning_rate() / settings.learning_rate;
        assert!((rate - expected).abs() < 1e-9, "step {step}: {rate}, not {expected}");
        let mut loss = parameters.iter().next().unwrap().1.sum_all().unwrap().backward().unwrap();
        let gradients = Gradients::take(&parameters, &mut loss).unwrap();
        optimizer.step(&parameters, &gradients).unwrap();
    }
}
