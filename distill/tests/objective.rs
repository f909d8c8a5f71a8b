//! The loss and its gradient against guided-diffusion's own code (`golden/make_objective.py`).
#![allow(clippy::unwrap_used)]

use candle_core::{Device, Tensor, Var};
use serde_json::json;
use understudy_distill::objective::{Dkdm, MOST_WEIGHT, Weighting};
use understudy_distill::training_batch::TrainingBatch;
use understudy_models::schedule::{PredictionType, ScheduleConfig};

fn cosine() -> ScheduleConfig {
    let config = json!({
        "_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2",
        "variance_type": "learned_range",
    });
    ScheduleConfig::from_json(&config, "scheduler_config.json").unwrap()
}

fn largest(tensor: &Tensor) -> f32 {
    tensor.abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

#[test]
fn loss_and_gradient_are_guided_diffusions() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/objective.safetensors");
    let golden = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let scalar = |name: &str| golden[name].to_vec1::<f32>().unwrap()[0];
    let timesteps = golden["timesteps"].to_vec1::<i64>().unwrap();
    let training_batch = TrainingBatch {
        x: golden["x"].clone(),
        seeds: vec![0; timesteps.len()],
        timesteps: timesteps.into_iter().map(|t| t as usize).collect(),
        labels: None,
        text: None,
        answer: golden["teacher"].clone(),
    };
    let student = Var::from_tensor(&golden["student"]).unwrap();
    let eps = PredictionType::Epsilon;
    let losses = Dkdm::new(&cosine(), eps, eps, true)
        .unwrap()
        .losses(&training_batch, student.as_tensor())
        .unwrap();

    let close = |found: &Tensor, expected: f32| {
        let found: f32 = found.to_scalar().unwrap();
        assert!((found - expected).abs() <= 1e-5 * expected.abs(), "{found}, not {expected}");
    };
    close(&losses.simple, scalar("simple"));
    close(losses.vlb.as_ref().unwrap(), scalar("vlb"));
    close(&losses.total, scalar("simple") + scalar("vlb"));

    let gradients = losses.total.backward().unwrap();
    let gradient = gradients.get(&student).unwrap();
    // Relative to the largest of a row: gradients at different times differ by orders of magnitude.
    for row in 0..training_batch.rows() {
        let (found, expected) = (gradient.get(row).unwrap(), golden["gradient"].get(row).unwrap());
        let error = largest(&(found - &expected).unwrap()) / largest(&expected);
        assert!(error < 1e-5, "timestep {}: {error}", training_batch.timesteps[row]);
    }
}

/// A student that says the same as its teacher in another parametrisation has no loss.
#[test]
fn networks_that_predict_different_things_agree_on_the_same_sample() {
    use PredictionType::{Epsilon, Sample, Velocity};
    let schedule = cosine();
    let tables = schedule.schedule(understudy_models::schedule::Class::Ddpm).unwrap();
    let timesteps = vec![3, 200, 700, 990];
    let draw = |seed| {
        let mut values = vec![0.0; 4 * 8];
        understudy_models::noise::normal(seed, 0, &mut values);
        Tensor::from_vec(values, (4, 2, 2, 2), &Device::Cpu).unwrap()
    };
    let (x0, eps) = (draw(1), draw(2));
    let column = |of: fn(f64) -> f64| {
        let values: Vec<f32> =
            timesteps.iter().map(|&t: &usize| of(tables.alpha_bar[t]) as f32).collect();
        Tensor::from_vec(values, (4, 1, 1, 1), &Device::Cpu).unwrap()
    };
    let (alpha, s) = (column(f64::sqrt), column(|alpha_bar| (1.0 - alpha_bar).sqrt()));
    let mix = |a: &Tensor, x: &Tensor, b: &Tensor, y: &Tensor| {
        (x.broadcast_mul(a).unwrap() + y.broadcast_mul(b).unwrap()).unwrap()
    };
    let x = mix(&alpha, &x0, &s, &eps);
    let velocity = mix(&alpha, &eps, &s.neg().unwrap(), &x0);
    let answer = |kind| match kind {
        Epsilon => eps.clone(),
        Sample => x0.clone(),
        Velocity => velocity.clone(),
    };
    for teacher in [Epsilon, Sample, Velocity] {
        for student in [Epsilon, Sample, Velocity] {
            let training_batch = TrainingBatch {
                x: x.clone(),
                timesteps: timesteps.clone(),
                labels: None,
                text: None,
                answer: answer(teacher),
                seeds: vec![0; 4],
            };
            let objective = Dkdm::new(&schedule, teacher, student, false).unwrap();
            let loss: f32 = objective
                .losses(&training_batch, &answer(student))
                .unwrap()
                .total
                .to_scalar()
                .unwrap();
            assert!(loss < 1e-8, "{teacher:?} → {student:?}: {loss}");
        }
    }
}

/// An error of 1 in eps counts as what it is in v, up to the limit.
#[test]
fn errors_weighted_as_in_v_count_by_the_signal_that_is_left() {
    let schedule = cosine();
    let alpha_bar = schedule.schedule(understudy_models::schedule::Class::Ddpm).unwrap().alpha_bar;
    let eps = PredictionType::Epsilon;
    let objective = Dkdm::new(&schedule, eps, eps, false).unwrap().weighted(Weighting::Velocity);
    for t in [0, 500, 900, 950, 999] {
        let zeros = Tensor::zeros((1, 1, 2, 2), candle_core::DType::F32, &Device::Cpu).unwrap();
        let training_batch = TrainingBatch {
            x: zeros.clone(),
            timesteps: vec![t],
            labels: None,
            text: None,
            answer: zeros.clone(),
            seeds: vec![0],
        };
        let losses = objective.losses(&training_batch, &zeros.ones_like().unwrap()).unwrap();
        let [total, simple] =
            [losses.total, losses.simple].map(|loss| loss.to_scalar::<f32>().unwrap());
        let expected = (1.0 / alpha_bar[t]).min(MOST_WEIGHT) as f32;
        assert!((total / expected - 1.0).abs() < 1e-6, "{t}: {total}, not {expected}");
        assert_eq!(simple, 1.0);
    }
    assert!(1.0 / alpha_bar[900] < MOST_WEIGHT && 1.0 / alpha_bar[950] > MOST_WEIGHT);
}
