//! The optimizer against PyTorch's (`golden/make_adamw.py`).
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use understudy_distill::checkpoint::Snapshot;
use understudy_distill::optimizer::{AdamW, BETA1, Gradients, Settings};
use understudy_distill::parameters::{Average, Parameters};

const SETTINGS: Settings = Settings {
    learning_rate: 1e-2,
    warmup_steps: 5,
    decay_steps: None,
    weight_decay: 0.1,
    clip_norm: 2.0,
    beta1: BETA1,
};

#[test]
fn twelve_steps_are_pytorchs_and_can_be_interrupted() {
    twelve_steps(|parameters| parameters);
}

/// What is done on a GPU, done on the CPU.
#[test]
fn twelve_steps_of_all_parameters_at_once_are_pytorchs_and_can_be_interrupted() {
    twelve_steps(Parameters::flat);
}

fn twelve_steps(kept: fn(Parameters) -> Parameters) {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/adamw.safetensors");
    let golden = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let begin: BTreeMap<String, Tensor> =
        ["a", "b", "c"].map(|name| (name.into(), golden[&format!("weight.{name}")].clone())).into();
    let parameters = kept(Parameters::new(begin).unwrap());
    let mut optimizer = AdamW::new(&parameters, SETTINGS).unwrap();
    for step in 0..12 {
        if step == 6 {
            // A new optimizer that is told the old one's state goes on where that was.
            let mut snapshot = Snapshot::default();
            optimizer.save(&parameters, &mut snapshot).unwrap();
            optimizer = AdamW::new(&parameters, SETTINGS).unwrap();
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
    let mut optimizer = AdamW::new(&parameters, settings).unwrap();
    let expected = [0.25, 0.5, 0.75, 1.0].into_iter().chain(COSINE).chain([0.0]);
    for (step, expected) in expected.enumerate() {
        let rate = optimizer.learning_rate() / settings.learning_rate;
        assert!((rate - expected).abs() < 1e-9, "step {step}: {rate}, not {expected}");
        let mut loss = parameters.iter().next().unwrap().1.sum_all().unwrap().backward().unwrap();
        let gradients = Gradients::take(&parameters, &mut loss).unwrap();
        optimizer.step(&parameters, &gradients).unwrap();
    }
}

#[test]
fn the_average_of_all_parameters_at_once_is_that_of_each() {
    let weights = |shift: f32| {
        let values = |n: usize| (0..n).map(|i| i as f32 * 0.1 + shift).collect::<Vec<_>>();
        let tensor = |shape: &[usize]| {
            let count = shape.iter().product();
            Tensor::from_vec(values(count), shape, &Device::Cpu).unwrap()
        };
        [("a".to_string(), tensor(&[2, 3])), ("b".to_string(), tensor(&[5]))]
    };
    let begin = || Parameters::new(weights(0.0)).unwrap();
    let (plain, flat) = (begin(), begin().flat());
    let [mut one, mut other] = [&plain, &flat].map(|kept| Average::new(kept, 0.9).unwrap());
    for step in 1..5 {
        for (parameters, average) in [(&plain, &mut one), (&flat, &mut other)] {
            for ((_, var), (_, weight)) in parameters.iter().zip(weights(step as f32)) {
                var.set(&weight).unwrap();
            }
            average.update(parameters).unwrap();
        }
        if step == 2 {
            let mut snapshot = Snapshot::default();
            other.save(&flat, &mut snapshot).unwrap();
            other = Average::new(&flat, 0.9).unwrap();
            other.restore(&flat, &snapshot).unwrap();
        }
    }
    let (ours, theirs) = (one.tensors(&plain).unwrap(), other.tensors(&flat).unwrap());
    for (name, average) in ours {
        assert_eq!(average.dims(), theirs[&name].dims());
        let values =
            |tensor: &Tensor| -> Vec<f32> { tensor.flatten_all().unwrap().to_vec1().unwrap() };
        for (one, other) in values(&average).iter().zip(values(&theirs[&name])) {
            assert!((one - other).abs() < 1e-6, "{name}: {one}, {other}");
        }
    }
}
