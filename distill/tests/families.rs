//! Networks of different families teach each other.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use common::{
    Blind, curve, folder, learned_teacher, network, schedule, taught, teacher, transformer,
};
use serde_json::json;
use understudy_distill::pool::Order;
use understudy_distill::student::{Candidate, Student};
use understudy_distill::teacher::Teacher;
use understudy_distill::train::train;
use understudy_distill::training_batch::BatchSource;
use understudy_models::NetworkConfig;
use understudy_models::checkpoint::ModelFolder;
use understudy_models::schedule::PredictionType;

fn transformer_teacher(home: &Path, learned: bool) -> Teacher {
    let (more, variance) = match learned {
        true => (json!({"out_channels": 2}), json!({"variance_type": "learned_range"})),
        false => (json!({}), json!({})),
    };
    let path = folder(home, "transformer", &transformer(16, &more), &schedule(&variance));
    Teacher::open(&path, "transformer".into(), DType::F32, &Device::Cpu).unwrap()
}

fn weights(out: &Path, student: &NetworkConfig) -> Vec<u8> {
    let file = format!("{}/diffusion_pytorch_model.safetensors", student.component());
    fs::read(out.join(file)).unwrap()
}

/// A teacher in a folder below the given one.
type Opened = fn(&Path) -> Teacher;

/// Either way round, with fixed and with learned variance, and whatever the student predicts: losses
/// fall, a resumed run is the uninterrupted one to the bit, and what is left is a model folder.
#[test]
fn convolutions_teach_transformers_and_learn_from_them() {
    let learned = json!({"out_channels": 2});
    let pairs: [(Opened, NetworkConfig, PredictionType); 5] = [
        (teacher, transformer(8, &json!({})), PredictionType::Epsilon),
        (teacher, transformer(8, &json!({})), PredictionType::Velocity),
        (learned_teacher, transformer(8, &learned), PredictionType::Epsilon),
        (|home| transformer_teacher(home, false), network(8, &json!({})), PredictionType::Sample),
        (|home| transformer_teacher(home, true), network(8, &learned), PredictionType::Epsilon),
    ];
    for (teacher, student, prediction) in pairs {
        let home = tempfile::tempdir().unwrap();
        let teacher = teacher(home.path());
        let (whole, parts) = (home.path().join("whole"), home.path().join("parts"));
        let run = |out: &Path, steps| {
            let file = home.path().join(format!("{}.pool", out.file_name().unwrap().display()));
            let mut task =
                taught(&teacher, student.clone(), Some(prediction), (out, steps, Some(file)));
            task.settings.optimizer.learning_rate = 5e-3;
            task
        };
        train(run(&whole, 100), &mut Blind).unwrap();
        for steps in [5, 9, 100] {
            train(run(&parts, steps), &mut Blind).unwrap();
        }
        assert_eq!(curve(&whole), curve(&parts));
        assert_eq!(weights(&whole, &student), weights(&parts, &student));

        let losses: Vec<f64> =
            curve(&whole).iter().map(|line| line["simple"].as_f64().unwrap()).collect();
        let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
        let (first, last) = (mean(&losses[..10]), mean(&losses[80..]));
        assert!(last < 0.95 * first, "{} {prediction:?}: {first} → {last}", student.class_name());

        let opened = ModelFolder::open(&whole).unwrap();
        assert_eq!(opened.network, student);
        assert_eq!(opened.schedule.prediction_type(), prediction);
        opened.load(DType::F32, &Device::Cpu).unwrap();
    }
}

/// `setting_for_classes` is what makes them fit.
#[test]
fn classes_that_differ_are_refused_with_what_to_set() {
    let home = tempfile::tempdir().unwrap();
    let teacher = teacher(home.path());
    let student = |classes: usize| {
        let config = transformer(8, &json!({"num_embeds_ada_norm": classes}));
        Student::new(Candidate { config, trained: None }, &teacher, None, 1)
    };
    let problem = student(3).err().unwrap().to_string();
    assert!(problem.contains("set the student's num_embeds_ada_norm to 2"), "{problem}");
    student(2).unwrap();
    let problem = student(0).err().unwrap().to_string();
    assert!(problem.contains("is none: the teacher's are 3"), "{problem}");
}

#[test]
fn a_transformer_has_narrower_twins_but_leaves_no_channels_out() {
    let home = tempfile::tempdir().unwrap();
    let teacher = transformer_teacher(home.path(), false);
    let narrower = teacher.config.scaled(0.5).unwrap();
    let candidate = Candidate { config: narrower, trained: None };
    let student = Student::new(candidate, &teacher, None, 1).unwrap();
    let mut pool = common::pool(&teacher, Order::Shuffled, 10, None);
    let batches: &mut dyn BatchSource = &mut pool;
    let problem = student.pruned(&teacher, batches, 1).err().unwrap().to_string();
    assert!(problem.contains("begin from random weights (--init random)"), "{problem}");
}

/// The files of `configs/` fit the bundled teacher that their name begins with.
#[test]
fn the_given_students_fit_the_bundled_teachers() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let teacher = |name: &str| {
        let folder = root.join("models/zoo").join(name);
        Teacher::open(&folder, name.into(), DType::F32, &Device::Cpu).unwrap()
    };
    let clothes = teacher("fashion-mnist-teacher");
    let emoji = teacher("emoji-text-to-image");
    let files = fs::read_dir(root.join("configs")).unwrap().map(|entry| entry.unwrap().path());
    // Beside them lie recipes, and the schema of these.
    let is_student = |path: &PathBuf| {
        path.to_string_lossy().strip_suffix(".json").is_some_and(|it| !it.ends_with(".schema"))
    };
    let files: Vec<_> = files.filter(is_student).collect();
    assert!(files.len() >= 2, "{files:?}");
    for file in files {
        let name = file.file_name().unwrap().to_str().unwrap();
        let teacher = if name.starts_with("emoji") { &emoji } else { &clothes };
        let student = Student::new(Candidate::open(&file).unwrap(), teacher, None, 1).unwrap();
        println!("{}: {}", file.display(), student.parameters());
        assert!(student.parameters() < teacher.network().parameters() * 3 / 5);
    }
}
