//! Distribution matching with a critic.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use common::{Blind, curve, learned_teacher, network, schedule, settings, teacher};
use serde_json::{Map, json};
use understudy_distill::checkpoint::Snapshot;
use understudy_distill::matching::{self, Matching};
use understudy_distill::objective::{Objective, SegmentEnd};
use understudy_distill::optimizer::{self, AdamW, Gradients};
use understudy_distill::parameters::Parameters;
use understudy_distill::pool::segments::{self, Segments};
use understudy_distill::ranks::Shards;
use understudy_distill::run_dir::{CHECKPOINT, RUN_DIR, RunDir};
use understudy_distill::student::{Candidate, Student};
use understudy_distill::teacher::Teacher;
use understudy_distill::train::{Settings, Task, train};
use understudy_models::checkpoint::{Draft, ModelFolder, card::Card};
use understudy_models::schedule::{Class, PredictionType};

const BATCH: usize = 4;

fn student(teacher: &Teacher) -> Student {
    let channels = if teacher.learned_variance() { json!({"out_channels": 2}) } else { json!({}) };
    let candidate = Candidate { config: network(8, &channels), trained: None };
    let student = Student::new(candidate, teacher, Some(PredictionType::Velocity), 5).unwrap();
    student.of_few_steps().unwrap()
}

/// Whose critic learns with that rate, times [`matching::CRITIC_RATE`].
fn matched<'a>(teacher: &'a Teacher, evaluations: usize, learning_rate: f64) -> Matching<'a> {
    let optimizer = optimizer::Settings { learning_rate, beta1: 0.0, ..settings(1).optimizer };
    let settings = matching::Settings { evaluations, seed: 3, optimizer, dtype: DType::F32 };
    Matching::new(teacher, &student(teacher).schedule, settings, &Device::Cpu).unwrap()
}

fn task<'a>(teacher: &'a Teacher, out: &Path, evaluations: usize, steps: u64) -> Task<'a> {
    let pool =
        segments::Settings { evaluations, walk_steps: 10, samples: 8, batch: BATCH, seed: 3 };
    Task {
        run: Some(RunDir::open(out).unwrap()),
        identity: Map::new(),
        shards: Shards::one(Box::new(Segments::new(teacher, pool).unwrap())),
        objective: Objective::SegmentEnd(SegmentEnd),
        matching: Some(matched(teacher, evaluations, 1e-3)),
        student: student(teacher),
        settings: Settings { accumulate: 2, sample_every: 5, ..settings(steps) },
        card: Card { evaluations: vec![evaluations], ..Card::default() },
    }
}

fn weights(out: &Path) -> Vec<u8> {
    fs::read(out.join("unet/diffusion_pytorch_model.safetensors")).unwrap()
}

#[test]
fn a_resumed_run_is_the_uninterrupted_one_to_the_bit() {
    let home = tempfile::tempdir().unwrap();
    let (fixed, learned) = (teacher(home.path()), learned_teacher(home.path()));
    for (name, teacher, evaluations) in
        [("two", &fixed, 2), ("one", &fixed, 1), ("variance", &learned, 2)]
    {
        let (whole, parts) =
            (home.path().join(format!("{name}-1")), home.path().join(format!("{name}-2")));
        train(task(teacher, &whole, evaluations, 10), &mut Blind).unwrap();
        for steps in [3, 4, 10] {
            train(task(teacher, &parts, evaluations, steps), &mut Blind).unwrap();
        }
        let lines = curve(&whole);
        assert_eq!(lines.len(), 10);
        assert!(lines.iter().all(|line| line["critic"].is_f64() && line["matching"].is_f64()));
        // Four images of eight samples of two steps, or eight of one.
        let looked_at: Vec<bool> = lines.iter().map(|line| line["likeness"].is_object()).collect();
        assert_eq!(looked_at, (1..=10).map(|step| step % 5 == 0).collect::<Vec<_>>());
        for class in lines[9]["likeness"]["classes"].as_array().unwrap() {
            let number = |name: &str| class[name].as_f64().unwrap();
            assert!(number("deviation") > 0.0 && number("teacher_deviation") > 0.0, "{class}");
        }
        assert_eq!(lines, curve(&parts));
        assert_eq!(weights(&whole), weights(&parts));
        // The teacher is asked about each row besides what its walk takes.
        let walked = task(teacher, &home.path().join(name), evaluations, 10);
        let asked = lines[9]["teacher_evaluations"].as_u64().unwrap();
        assert!(asked >= 10 * BATCH as u64 + walked.shards.teacher_evaluations(), "{asked}");
    }
}

/// A checkpoint without a critic is another run's, and one with a critic too.
#[test]
fn a_run_does_not_go_on_under_another_method() {
    let home = tempfile::tempdir().unwrap();
    let teacher = teacher(home.path());
    let regression = |out: &Path, steps: u64| {
        train(Task { matching: None, ..task(&teacher, out, 2, steps) }, &mut Blind)
    };
    let (one, two) = (home.path().join("one"), home.path().join("two"));
    regression(&one, 2).unwrap();
    let problem = train(task(&teacher, &one, 2, 4), &mut Blind).unwrap_err().to_string();
    assert!(problem.contains("another run") && problem.contains("`anchor`"), "{problem}");
    train(task(&teacher, &two, 2, 2), &mut Blind).unwrap();
    let problem = regression(&two, 4).unwrap_err().to_string();
    assert!(problem.contains("another run") && problem.contains("`anchor`"), "{problem}");
    // A checkpoint whose critic is another network's.
    let snapshot = Snapshot::read(&two.join(RUN_DIR).join(CHECKPOINT)).unwrap().unwrap();
    let path = home.path().join("wide");
    let wide = common::folder(home.path(), "wide", &network(24, &json!({})), &schedule(&json!({})));
    assert_eq!(path, wide);
    let wide = Teacher::open(&wide, "wide".into(), DType::F32, &Device::Cpu).unwrap();
    let problem = matched(&wide, 2, 1e-3).restore(&snapshot).unwrap_err().to_string();
    assert!(problem.contains("of another shape"), "{problem}");
}

/// A critic that is still the teacher tells no difference to it.
#[test]
fn a_critic_that_is_the_teacher_says_nothing() {
    let home = tempfile::tempdir().unwrap();
    let teacher = teacher(home.path());
    let student = student(&teacher);
    let parameters = Parameters::new(student.weights).unwrap();
    let network = student.config.load(parameters.tensors(), DType::F32, &Device::Cpu).unwrap();
    for evaluations in [1, 2] {
        let matched = matched(&teacher, evaluations, 1e-3).matched(network.as_ref(), 1, 0..8);
        let loss: f32 = matched.unwrap().loss.to_scalar().unwrap();
        assert!(loss.abs() < 1e-4, "{loss}");
    }
}

/// A network with random weights that answers the same whatever it is shown.
fn constant(
    channels: usize,
    answer: f64,
) -> (understudy_models::NetworkConfig, HashMap<String, Tensor>) {
    let config = network(channels, &json!({}));
    let mut weights: HashMap<_, _> = config.initial_weights(7).unwrap().into_iter().collect();
    for (name, factor) in [("conv_out.weight", 0.0), ("conv_out.bias", answer)] {
        let weight = weights.get_mut(name).unwrap();
        let ones = weight.ones_like().unwrap();
        *weight = (ones * factor).unwrap();
    }
    (config, weights)
}

/// Of a student that answers v = 0 all samples are normal, so their score is known: what the critic is told is, in the mean
/// over all that x_τ may have come from, the estimate of the clean image which belongs to that score. The student's own
/// estimate, which a step between samples does not end in, is another.
#[test]
fn the_critic_is_told_the_score_of_the_students_samples() {
    let home = tempfile::tempdir().unwrap();
    let teacher = teacher(home.path());
    let alpha_bar = teacher.schedule.schedule(Class::Ddpm).unwrap().alpha_bar;
    let (config, weights) = constant(8, 0.0);
    let student = config.load(weights, DType::F32, &Device::Cpu).unwrap();
    let matching = matched(&teacher, 2, 1e-3);
    // Sums of x², x·answer and answer² at each τ.
    let mut sums = vec![[0.0_f64; 4]; 20];
    for step in 0..60 {
        let shown = matching.matched(student.as_ref(), step, 0..32).unwrap().renoised.batch;
        for (row, &t) in shown.timesteps.iter().enumerate() {
            let values = |all: &Tensor| -> Vec<f32> {
                all.get(row).unwrap().flatten_all().unwrap().to_vec1().unwrap()
            };
            for (x, answer) in values(&shown.x).into_iter().zip(values(&shown.answer)) {
                let (x, answer) = (f64::from(x), f64::from(answer));
                let all = [1.0, x * x, x * answer, answer * answer];
                sums[t].iter_mut().zip(all).for_each(|(sum, one)| *sum += one);
            }
        }
    }
    // One step with v = 0 from t to t' is a multiplication by cos(φ_t − φ_t').
    let cos = |from: f64, to: f64| (from * to).sqrt() + ((1.0 - from) * (1.0 - to)).sqrt();
    let at_9 = cos(alpha_bar[19], alpha_bar[9]);
    let mut seen = [0, 0];
    for (t, [count, xx, xy, yy]) in sums.into_iter().enumerate() {
        if count == 0.0 {
            continue;
        }
        let first = t > 9;
        seen[usize::from(!first)] += 1;
        let (end, scale) = match first {
            true => (alpha_bar[9], at_9),
            false => (1.0, at_9 * alpha_bar[9].sqrt()),
        };
        let share = alpha_bar[t] / end;
        let variance = share * scale * scale + (1.0 - share);
        assert!((xx / count / variance - 1.0).abs() < 0.1, "{t}: {} {variance}", xx / count);
        // x0 = (x_τ + s²·score) / α, with the score −x_τ / variance.
        let expected = (1.0 - (1.0 - alpha_bar[t]) / variance) / alpha_bar[t].sqrt();
        let slope = xy / xx;
        let error = ((yy / xx - slope * slope).max(0.0) / count).sqrt();
        assert!((slope - expected).abs() < 5.0 * error + 1e-3, "{t}: {slope} {expected} ±{error}");
    }
    assert_eq!(seen, [9, 9], "timesteps of the first and of the second step");
}

/// The student is never told where a walk ends: the difference between the critic and the teacher alone brings the mean of
/// its images to the teacher's, which is one picture.
#[test]
fn samples_are_pulled_to_the_teachers() {
    const PICTURE: f64 = 0.3;
    let home = tempfile::tempdir().unwrap();
    let (config, weights) = constant(8, PICTURE);
    let path = home.path().join("teacher");
    let noise = schedule(&json!({"prediction_type": "sample"}));
    let card = Card::default();
    ModelFolder::write(Draft::new(&path).unwrap(), &config, &weights, &noise, &card).unwrap();
    let teacher = Teacher::open(&path, "teacher".into(), DType::F32, &Device::Cpu).unwrap();
    for evaluations in [2, 1] {
        let student = student(&teacher);
        let parameters = Parameters::new(student.weights).unwrap();
        let network = student.config.load(parameters.tensors(), DType::F32, &Device::Cpu).unwrap();
        let rates =
            optimizer::Settings { learning_rate: 2e-4, beta1: 0.0, ..settings(1).optimizer };
        let mut optimizer = AdamW::new(&parameters, rates).unwrap();
        let mut matching = matched(&teacher, evaluations, 5e-4);
        let seeds: Vec<u64> = (0..64).collect();
        // How far the mean over images is from the picture, and how far each image is.
        let distance = |matching: &Matching| {
            let images = matching.images(network.as_ref(), &seeds).unwrap();
            let square = |all: Tensor| {
                let square = (all - PICTURE).unwrap().sqr().unwrap().mean_all().unwrap();
                square.to_scalar::<f32>().unwrap()
            };
            (square(images.mean(0).unwrap()), square(images))
        };
        let before = distance(&matching);
        let mut losses = Vec::new();
        for step in 1..=150 {
            let matched = matching.matched(network.as_ref(), step, 0..8).unwrap();
            let mut gradients = matched.loss.backward().unwrap();
            let gradients = Gradients::take(&parameters, &mut gradients).unwrap();
            losses.push(matching.learn(&[matched.renoised]).unwrap().0);
            // The critic gets to know the samples first.
            if step > 50 {
                optimizer.step(&parameters, &gradients).unwrap();
            }
        }
        let after = distance(&matching);
        assert!(after.0 < 0.3 * before.0, "{evaluations}: {before:?} → {after:?}");
        let mean = |losses: &[f32]| losses.iter().sum::<f32>() / losses.len() as f32;
        assert!(mean(&losses[40..50]) < 0.7 * mean(&losses[..5]), "{losses:?}");
        assert_eq!(matching.teacher_evaluations(), 150 * 8);
    }
}

/// What guides a teacher makes it another, and has no gradient for a student of one step to follow.
#[test]
fn a_guided_teacher_is_another_one() {
    let home = tempfile::tempdir().unwrap();
    let alone = teacher(home.path());
    let path = alone.folder().to_owned();
    let open = || Teacher::open(&path, "teacher".into(), DType::F32, &Device::Cpu).unwrap();
    common::folder(&path, "guide", &network(8, &json!({})), &alone.schedule);
    let mut hashes = vec![alone.hash.clone()];
    for scale in [1.5, 2.0] {
        let card = json!({"autoguidance": {"scale": scale}}).to_string();
        fs::write(path.join("understudy.json"), card).unwrap();
        hashes.push(open().hash.clone());
    }
    assert!(hashes[0] != hashes[1] && hashes[1] != hashes[2], "{hashes:?}");

    let guided = open();
    let of = |evaluations| {
        let optimizer = settings(1).optimizer;
        let settings = matching::Settings { evaluations, seed: 0, optimizer, dtype: DType::F32 };
        Matching::new(&guided, &student(&guided).schedule, settings, &Device::Cpu)
    };
    assert!(of(2).is_ok());
    let problem = of(1).err().unwrap().to_string();
    let words = ["--evaluations", "guide", "ask for 2"];
    assert!(words.iter().all(|word| problem.contains(word)), "{problem}");
}

#[test]
fn students_that_do_not_predict_v_are_refused() {
    let home = tempfile::tempdir().unwrap();
    let teacher = teacher(home.path());
    let settings = matching::Settings {
        evaluations: 2,
        seed: 0,
        optimizer: settings(1).optimizer,
        dtype: DType::F32,
    };
    let problem = Matching::new(&teacher, &teacher.schedule, settings, &Device::Cpu).err().unwrap();
    let problem = problem.to_string();
    assert!(problem.contains("epsilon") && problem.contains("v_prediction"), "{problem}");
}
