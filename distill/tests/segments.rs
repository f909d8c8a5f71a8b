//! The pool for students of few steps.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use common::{Blind, curve, learned_teacher, network, schedule, settings, teacher};
use serde_json::{Map, json};
use understudy_distill::checkpoint::Snapshot;
use understudy_distill::objective::{Objective, SegmentEnd};
use understudy_distill::pool::segments::{Segments, Settings};
use understudy_distill::ranks::Shards;
use understudy_distill::run_dir::{CHECKPOINT, RUN_DIR, RunDir};
use understudy_distill::student::{Candidate, Student};
use understudy_distill::teacher::Teacher;
use understudy_distill::train::{Task, train};
use understudy_distill::training_batch::{BatchSource, TrainingBatch};
use understudy_models::checkpoint::{Draft, ModelFolder, card::Card};
use understudy_models::rollout::{self, Row};
use understudy_models::sampler::{self, Kind};
use understudy_models::schedule::{Class, PredictionType, ScheduleConfig, TimestepSpacing};

const BATCH: usize = 4;

/// 16 samples on a walk of 10 of 20 timesteps.
fn pool(teacher: &Teacher, evaluations: usize) -> Segments<'_> {
    let settings = Settings { evaluations, walk_steps: 10, samples: 16, batch: BATCH, seed: 3 };
    let mut pool = Segments::new(teacher, settings).unwrap();
    while pool.prepare().unwrap().is_some() {}
    pool
}

/// The schedule on which a student of few steps of that teacher is sampled.
fn few_steps(teacher: &Teacher) -> ScheduleConfig {
    let channels = if teacher.learned_variance() { json!({"out_channels": 2}) } else { json!({}) };
    student(teacher, &channels).schedule
}

fn student(teacher: &Teacher, channels: &serde_json::Value) -> Student {
    let candidate = Candidate { config: network(8, channels), trained: None };
    let student = Student::new(candidate, teacher, Some(PredictionType::Velocity), 5).unwrap();
    student.of_few_steps().unwrap()
}

/// Each sample of a batch with its answer: (seed, timestep, x, answer).
fn samples(batch: &TrainingBatch) -> Vec<(u64, usize, Vec<f32>, Vec<f32>)> {
    let values = |all: &Tensor, row: usize| -> Vec<f32> {
        all.get(row).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    };
    let row = |row: usize| {
        let (x, answer) = (values(&batch.x, row), values(&batch.answer, row));
        (batch.seeds[row], batch.timesteps[row], x, answer)
    };
    (0..batch.rows()).map(row).collect()
}

/// A teacher that says one picture whatever it is shown is linear, and so is its walk: `x_t = alpha·b + s·eps` all the
/// way, and v is `(alpha·x_t − b) / s`, whichever segment x_t is in.
#[test]
fn the_answer_of_a_linear_teacher_is_its_closed_form() {
    const B: f32 = 0.3;
    let home = tempfile::tempdir().unwrap();
    let config = network(8, &json!({}));
    let mut weights: HashMap<_, _> = config.initial_weights(7).unwrap().into_iter().collect();
    let last = weights.get_mut("conv_out.weight").unwrap();
    *last = last.zeros_like().unwrap();
    let bias = weights.get_mut("conv_out.bias").unwrap();
    *bias = (bias.ones_like().unwrap() * f64::from(B)).unwrap();
    let path = home.path().join("linear");
    let schedule = schedule(&json!({"prediction_type": "sample"}));
    let card = Card::default();
    ModelFolder::write(Draft::new(&path).unwrap(), &config, &weights, &schedule, &card).unwrap();
    let teacher = Teacher::open(&path, "linear".into(), DType::F32, &Device::Cpu).unwrap();
    let alpha_bar = schedule.schedule(Class::Ddpm).unwrap().alpha_bar;
    for evaluations in [1, 2, 5] {
        let mut pool = pool(&teacher, evaluations);
        let mut seen = HashSet::new();
        for step in 1..=60 {
            for (_, t, x, answer) in samples(&pool.training_batch(step).unwrap()) {
                seen.insert(t);
                let (alpha, s) = (alpha_bar[t].sqrt() as f32, (1.0 - alpha_bar[t]).sqrt() as f32);
                for (x, answer) in x.iter().zip(answer) {
                    let v = (alpha * x - B) / s;
                    assert!((answer - v).abs() < 1e-3 * (1.0 + v.abs()), "{t}: {answer} {v}");
                }
            }
        }
        assert_eq!(seen, (0..10).map(|step| 19 - 2 * step).collect());
    }
}

/// The teacher's own walk of 10 steps from a seed, with the class of the seed: every place it comes by.
fn walk(teacher: &Teacher, seed: u64) -> Vec<(usize, Tensor)> {
    let mut schedule = teacher.schedule.clone();
    schedule.timestep_spacing = Some(TimestepSpacing::Trailing);
    let learned = teacher.learned_variance();
    let table = sampler::trajectory(&schedule, Kind::Ddim, 10, 0.0, learned).unwrap();
    let label = teacher.label(seed).map(|label| Tensor::new(&[label], &Device::Cpu).unwrap());
    let mut x = rollout::start(teacher.geometry(), &[seed], &Device::Cpu).unwrap();
    let memory = sampler::empty_memory(&x).unwrap();
    let mut places = Vec::new();
    for (position, next) in table.iter().enumerate() {
        places.push((next.timestep as usize, x.clone()));
        let time = Tensor::new(&[next.timestep as f32], &Device::Cpu).unwrap();
        let answer = teacher.network().forward(&x, &time, label.as_ref()).unwrap();
        let row = Row { seed, position, step: next.step };
        x = rollout::advance(teacher.geometry(), &x, &memory, &answer, &[row]).unwrap().x;
    }
    places.push((usize::MAX, x));
    places
}

/// What a student is shown are places of the teacher's walk from a seed, to the bit; and a student that answers what it
/// is told, sampled as its folder says, comes by the same places with K steps.
#[test]
fn a_student_that_learned_it_all_lands_on_the_teachers_walk() {
    let home = tempfile::tempdir().unwrap();
    for teacher in [teacher(home.path()), learned_teacher(home.path())] {
        for evaluations in [1, 2, 5] {
            let length = 10 / evaluations;
            let mut pool = pool(&teacher, evaluations);
            let steps = few_steps(&teacher);
            let table = sampler::trajectory(&steps, Kind::Ddim, evaluations, 0.0, false).unwrap();
            let mut starts = 0;
            for step in 1..=30 {
                for (seed, t, x, answer) in samples(&pool.training_batch(step).unwrap()) {
                    let walk = walk(&teacher, seed);
                    let at = walk.iter().position(|(time, _)| *time == t).unwrap();
                    let place: Vec<f32> = walk[at].1.flatten_all().unwrap().to_vec1().unwrap();
                    assert_eq!(x, place, "seed {seed}, timestep {t}");
                    let Some(next) = table.iter().find(|next| next.timestep as usize == t) else {
                        continue;
                    };
                    assert_eq!(at % length, 0);
                    starts += 1;
                    let end: Vec<f32> =
                        walk[at + length].1.flatten_all().unwrap().to_vec1().unwrap();
                    for ((x, answer), end) in x.iter().zip(answer).zip(end) {
                        let element = sampler::Element {
                            x: f64::from(*x),
                            model: f64::from(answer),
                            ..sampler::Element::default()
                        };
                        let landed = next.step.evaluate(element).x;
                        assert!((landed - f64::from(end)).abs() < 1e-4, "{landed} {end}");
                    }
                }
            }
            assert!(starts > 20, "{starts} of 120 begin a segment");
        }
    }
}

/// A round shows every place once, where segments begin three times, and each segment as often as the others.
#[test]
fn rounds_show_everything() {
    let home = tempfile::tempdir().unwrap();
    let teacher = teacher(home.path());
    let mut pool = pool(&teacher, 2);
    // 16 samples of 5 places, of which one counts three times.
    let batches = 16 * 7 / BATCH as u64;
    let mut all = HashMap::new();
    for step in 1..=batches {
        for (seed, t, ..) in samples(&pool.training_batch(step).unwrap()) {
            *all.entry((seed, t)).or_insert(0) += 1;
        }
    }
    assert_eq!(all.len(), 16 * 5);
    assert!(all.iter().all(|((_, t), &count)| count == if [19, 9].contains(t) { 3 } else { 1 }));
    let first: usize = all.keys().filter(|(_, t)| *t > 9).count();
    assert_eq!(first, 8 * 5);
    // Half of the samples were walked one segment before; then all walk one a round.
    assert_eq!(pool.teacher_evaluations(), 8 * 5 + 16 * 5);
    pool.training_batch(batches + 1).unwrap();
    assert_eq!(pool.teacher_evaluations(), 8 * 5 + 2 * 16 * 5);
}

/// A kill while the teacher still fills the pool.
#[test]
fn an_interrupted_filling_ends_in_the_same_pool() {
    let home = tempfile::tempdir().unwrap();
    let teacher = teacher(home.path());
    let settings = Settings { evaluations: 5, walk_steps: 10, samples: 100, batch: BATCH, seed: 3 };
    let batches = |mut pool: Segments<'_>| {
        while pool.prepare().unwrap().is_some() {}
        let batches = (1..=150).map(|step| samples(&pool.training_batch(step).unwrap()));
        (batches.collect::<Vec<_>>(), pool.teacher_evaluations())
    };
    let whole = batches(Segments::new(&teacher, settings).unwrap());
    let mut begun = Segments::new(&teacher, settings).unwrap();
    for _ in 0..2 {
        assert!(begun.prepare().unwrap().is_some());
    }
    let mut snapshot = Snapshot::default();
    begun.save(&mut snapshot).unwrap();
    let mut resumed = Segments::new(&teacher, settings).unwrap();
    resumed.restore(&snapshot).unwrap();
    assert!(whole == batches(resumed));
}

fn task<'a>(teacher: &'a Teacher, out: &Path, steps: u64) -> Task<'a> {
    let channels = if teacher.learned_variance() { json!({"out_channels": 2}) } else { json!({}) };
    let settings_of_pool =
        Settings { evaluations: 2, walk_steps: 10, samples: 8, batch: BATCH, seed: 3 };
    Task {
        run: Some(RunDir::open(out).unwrap()),
        identity: Map::new(),
        shards: Shards::one(Box::new(Segments::new(teacher, settings_of_pool).unwrap())),
        objective: Objective::SegmentEnd(SegmentEnd),
        matching: None,
        student: student(teacher, &channels),
        settings: settings(steps),
        card: Card { evaluations: vec![2, 1], ..Card::default() },
    }
}

fn weights(out: &Path) -> Vec<u8> {
    fs::read(out.join("unet/diffusion_pytorch_model.safetensors")).unwrap()
}

/// A round is 14 batches: stopped within the first, at its end, and within the second.
#[test]
fn a_resumed_run_is_the_uninterrupted_one_to_the_bit() {
    let home = tempfile::tempdir().unwrap();
    for (name, teacher) in
        [("fixed", teacher(home.path())), ("learned", learned_teacher(home.path()))]
    {
        let (whole, parts) =
            (home.path().join(format!("{name}-1")), home.path().join(format!("{name}-2")));
        train(task(&teacher, &whole, 34), &mut Blind).unwrap();
        for steps in [5, 14, 20, 28, 34] {
            train(task(&teacher, &parts, steps), &mut Blind).unwrap();
        }
        assert_eq!(curve(&whole).len(), 34);
        assert_eq!(curve(&whole), curve(&parts));
        assert_eq!(weights(&whole), weights(&parts));
    }
}

#[test]
fn losses_fall_and_the_folder_says_how_it_is_sampled() {
    let home = tempfile::tempdir().unwrap();
    let teacher = teacher(home.path());
    let out = home.path().join("out");
    train(task(&teacher, &out, 150), &mut Blind).unwrap();
    let losses: Vec<f64> = curve(&out).iter().map(|line| line["loss"].as_f64().unwrap()).collect();
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    let (first, last) = (mean(&losses[..10]), mean(&losses[130..]));
    assert!(last < 0.7 * first, "{first} → {last}");
    let folder = ModelFolder::open(&out).unwrap();
    assert_eq!(folder.card.evaluations, [2, 1]);
    let schedule = folder.schedule.to_json();
    for (field, value) in [
        ("_class_name", json!("DDIMScheduler")),
        ("prediction_type", json!("v_prediction")),
        ("timestep_spacing", json!("trailing")),
        ("set_alpha_to_one", json!(true)),
        ("clip_sample", json!(false)),
        ("beta_schedule", json!("squaredcos_cap_v2")),
        ("num_train_timesteps", json!(20)),
    ] {
        assert_eq!(schedule[field], value, "{field}");
    }
}

/// A transformer learns from a U-Net, as with DKDM.
#[test]
fn the_student_may_be_another_architecture() {
    let home = tempfile::tempdir().unwrap();
    let teacher = teacher(home.path());
    let out = home.path().join("out");
    let config = common::transformer(16, &json!({"num_embeds_ada_norm": 2}));
    let candidate = Candidate { config, trained: None };
    let student = Student::new(candidate, &teacher, Some(PredictionType::Velocity), 5).unwrap();
    let student = student.of_few_steps().unwrap();
    train(Task { student, ..task(&teacher, &out, 40) }, &mut Blind).unwrap();
    let losses: Vec<f64> = curve(&out).iter().map(|line| line["loss"].as_f64().unwrap()).collect();
    assert!(losses[39] < losses[0], "{losses:?}");
    let folder = ModelFolder::open(&out).unwrap();
    assert_eq!(folder.schedule.to_json()["timestep_spacing"], "trailing");
}

#[test]
fn settings_that_cannot_work_are_refused() {
    let home = tempfile::tempdir().unwrap();
    let teacher = teacher(home.path());
    for ((evaluations, walk_steps, samples), words) in [
        ((3, 10, 8), ["--evaluations", "20 training timesteps"]),
        ((0, 10, 8), ["--evaluations", "divide"]),
        ((4, 10, 8), ["--walk-steps", "multiple of --evaluations 4"]),
        ((10, 10, 20), ["--walk-steps", "larger"]),
        ((4, 8, 8), ["--walk-steps", "10 does"]),
        ((2, 10, 7), ["samples", "multiple of --batch 4"]),
        ((1, 10, 1 << 20), ["samples", "--rho"]),
    ] {
        let settings = Settings { evaluations, walk_steps, samples, batch: BATCH, seed: 0 };
        let problem = Segments::new(&teacher, settings).err().unwrap().to_string();
        assert!(words.iter().all(|word| problem.contains(word)), "{problem}");
    }
    let candidate = Candidate { config: network(8, &json!({})), trained: None };
    let eps = Student::new(candidate, &teacher, None, 5).unwrap().of_few_steps();
    let problem = eps.err().unwrap().to_string();
    assert!(problem.contains("epsilon") && problem.contains("--prediction"), "{problem}");
}

#[test]
fn another_walks_checkpoint_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let teacher = teacher(home.path());
    let out = home.path().join("out");
    train(task(&teacher, &out, 3), &mut Blind).unwrap();
    let snapshot = Snapshot::read(&out.join(RUN_DIR).join(CHECKPOINT)).unwrap().unwrap();
    let problem = pool(&teacher, 1).restore(&snapshot).unwrap_err().to_string();
    assert!(problem.contains("another size, or on another walk"), "{problem}");
    let mut other = task(&teacher, &out, 4);
    other.shards = Shards::one(Box::new(pool(&teacher, 1)));
    let problem = train(other, &mut Blind).unwrap_err().to_string();
    assert!(problem.contains("another run") && problem.contains("`evaluations`"), "{problem}");
}

/// The folder's schedule is the one that `golden/make_few_steps.py` gave to diffusers, and the samplers here go the way
/// that diffusers went.
#[test]
fn diffusers_samples_the_folder_as_it_is_sampled_here() {
    let golden: serde_json::Value =
        serde_json::from_str(include_str!("golden/few_steps.json")).unwrap();
    let home = tempfile::tempdir().unwrap();
    let cosine = schedule(&json!({"num_train_timesteps": 1000}));
    let path = common::folder(home.path(), "teacher", &network(8, &json!({})), &cosine);
    let teacher = Teacher::open(&path, "teacher".into(), DType::F32, &Device::Cpu).unwrap();
    let steps = few_steps(&teacher);
    assert_eq!(steps.to_json(), golden["config"]);
    for trajectory in golden["trajectories"].as_array().unwrap() {
        let evaluations = trajectory["evaluations"].as_u64().unwrap() as usize;
        let table = sampler::trajectory(&steps, Kind::Ddim, evaluations, 0.0, false).unwrap();
        let timesteps: Vec<u64> = table.iter().map(|next| next.timestep as u64).collect();
        assert_eq!(json!(timesteps), trajectory["timesteps"]);
        let latents: Vec<Vec<f64>> = serde_json::from_value(trajectory["latents"].clone()).unwrap();
        for (next, places) in table.iter().zip(latents.windows(2)) {
            for (x, expected) in places[0].iter().zip(&places[1]) {
                let model = 0.6 * x - 0.3 * next.timestep.sin();
                let element = sampler::Element { x: *x, model, ..sampler::Element::default() };
                let landed = next.step.evaluate(element).x;
                // diffusers keeps alpha_bar in f32.
                assert!((landed - expected).abs() < 1e-5, "{evaluations}: {landed} {expected}");
            }
        }
    }
}
