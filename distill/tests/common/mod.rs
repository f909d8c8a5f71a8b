//! Small networks for tests: 8×8 gray images, 20 training timesteps.
#![allow(dead_code, clippy::unwrap_used)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde_json::{Map, Value, json};
use understudy_distill::objective::{Dkdm, Objective};
use understudy_distill::optimizer;
use understudy_distill::pool::{self, Order, Pool};
use understudy_distill::ranks::Shards;
use understudy_distill::run_dir::{RUN_DIR, RunDir};
use understudy_distill::student::{Candidate, Student};
use understudy_distill::teacher::Teacher;
use understudy_distill::train::{Settings, Task};
use understudy_distill::walk::Walks;
use understudy_distill::watch::{Event, Watch};
use understudy_models::checkpoint::{Draft, ModelFolder, card::Card};
use understudy_models::sampler::Kind;
use understudy_models::schedule::{PredictionType, ScheduleConfig};
use understudy_models::{NetworkConfig, noise};

/// A network of so many channels; `more` replaces fields.
pub(crate) fn network(channels: usize, more: &Value) -> NetworkConfig {
    let mut config = json!({
        "_class_name": "UNet2DModel", "sample_size": 8, "in_channels": 1, "out_channels": 1,
        "block_out_channels": [channels, channels], "norm_num_groups": 4, "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "DownBlock2D"], "attention_head_dim": 4,
        "up_block_types": ["UpBlock2D", "UpBlock2D"], "num_class_embeds": 3,
    });
    for (name, value) in more.as_object().into_iter().flatten() {
        config[name] = value.clone();
    }
    NetworkConfig::from_json(&config, "config.json").unwrap()
}

pub(crate) fn schedule(more: &Value) -> ScheduleConfig {
    let mut config = json!({
        "_class_name": "DDPMScheduler", "num_train_timesteps": 20,
        "beta_schedule": "squaredcos_cap_v2",
    });
    for (name, value) in more.as_object().into_iter().flatten() {
        config[name] = value.clone();
    }
    ScheduleConfig::from_json(&config, "scheduler_config.json").unwrap()
}

/// A transformer of so many channels; `more` replaces fields.
pub(crate) fn transformer(channels: usize, more: &Value) -> NetworkConfig {
    let mut config = json!({
        "_class_name": "DiTTransformer2DModel", "sample_size": 8, "in_channels": 1, "patch_size": 2,
        "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": channels / 2,
        "num_embeds_ada_norm": 2,
    });
    for (name, value) in more.as_object().into_iter().flatten() {
        config[name] = value.clone();
    }
    NetworkConfig::from_json(&config, "config.json").unwrap()
}

/// Writes a model folder with random weights, those among them that new networks begin with as zeros.
pub(crate) fn folder(
    home: &Path,
    name: &str,
    network: &NetworkConfig,
    schedule: &ScheduleConfig,
) -> PathBuf {
    let path = home.join(name);
    let mut weights: HashMap<_, _> = network.initial_weights(7).unwrap().into_iter().collect();
    for (seed, weight) in weights.values_mut().enumerate() {
        let mut values: Vec<f32> = weight.flatten_all().unwrap().to_vec1().unwrap();
        if values.iter().all(|value| *value == 0.0) && matches!(network, NetworkConfig::DiT(_)) {
            noise::normal(seed as u64, 1, &mut values);
            values.iter_mut().for_each(|value| *value *= 0.2);
            *weight = Tensor::from_vec(values, weight.shape(), &Device::Cpu).unwrap();
        }
    }
    let card = Card::default();
    ModelFolder::write(Draft::new(&path).unwrap(), network, &weights, schedule, &card).unwrap();
    path
}

pub(crate) fn teacher(home: &Path) -> Teacher {
    let path = folder(home, "teacher", &network(16, &json!({})), &schedule(&json!({})));
    Teacher::open(&path, "teacher".into(), DType::F32, &Device::Cpu).unwrap()
}

/// A teacher that learns its variance.
pub(crate) fn learned_teacher(home: &Path) -> Teacher {
    let network = network(16, &json!({"out_channels": 2}));
    let schedule = schedule(&json!({"variance_type": "learned_range"}));
    Teacher::open(
        &folder(home, "learned", &network, &schedule),
        "learned".into(),
        DType::F32,
        &Device::Cpu,
    )
    .unwrap()
}

pub(crate) fn pool<'a>(
    teacher: &'a Teacher,
    order: Order,
    steps: usize,
    file: Option<PathBuf>,
) -> Pool<'a> {
    pool_of(teacher, order, steps, file, (4, 3))
}

/// As [`pool`], of batches of so many samples, and of another seed.
pub(crate) fn pool_of<'a>(
    teacher: &'a Teacher,
    order: Order,
    steps: usize,
    file: Option<PathBuf>,
    (batch, seed): (usize, u64),
) -> Pool<'a> {
    let walks = Walks::new(&teacher.schedule, Kind::Ddpm, steps, teacher.learned_variance());
    let run = "test".into();
    let settings = pool::Settings { order, batch, seed, run, earlier: None, file, finished: None };
    Pool::new(teacher, walks.unwrap(), settings).unwrap()
}

/// A run of `steps` steps into `out`.
pub(crate) fn task<'a>(
    teacher: &'a Teacher,
    out: &Path,
    steps: u64,
    file: Option<PathBuf>,
) -> Task<'a> {
    let channels = if teacher.learned_variance() { json!({"out_channels": 2}) } else { json!({}) };
    taught(teacher, network(8, &channels), None, (out, steps, file))
}

/// As [`task`], for a student of any kind that predicts whatever.
pub(crate) fn taught<'a>(
    teacher: &'a Teacher,
    student: NetworkConfig,
    prediction: Option<PredictionType>,
    (out, steps, file): (&Path, u64, Option<PathBuf>),
) -> Task<'a> {
    let pool = pool(teacher, Order::Dynamic { rho: 0.2 }, 10, file);
    let run = RunDir::open(out).unwrap();
    shared(teacher, (student, prediction), Some(run), Shards::one(Box::new(pool)), steps)
}

/// A run of these shards, of which this may be a part.
pub(crate) fn shared<'a>(
    teacher: &'a Teacher,
    (student, prediction): (NetworkConfig, Option<PredictionType>),
    run: Option<RunDir>,
    shards: Shards<'a>,
    steps: u64,
) -> Task<'a> {
    let learned = teacher.learned_variance();
    let candidate = Candidate { config: student, trained: None };
    let student = Student::new(candidate, teacher, prediction, 5).unwrap();
    let kind = teacher.schedule.prediction_type();
    let identity: Map<_, _> = [("seed".to_string(), json!(3))].into_iter().collect();
    Task {
        run,
        identity,
        shards,
        objective: Objective::Dkdm(
            Dkdm::new(&teacher.schedule, kind, student.schedule.prediction_type(), learned)
                .unwrap(),
        ),
        matching: None,
        student,
        settings: settings(steps),
        card: Card::default(),
    }
}

pub(crate) fn settings(steps: u64) -> Settings {
    Settings {
        steps,
        accumulate: 1,
        optimizer: optimizer::Settings {
            learning_rate: 1e-3,
            warmup_steps: 3,
            decay_steps: None,
            weight_decay: 0.01,
            clip_norm: 1.0,
            beta1: optimizer::BETA1,
        },
        average: 0.9,
        checkpoint_every: 4,
        sample_every: 0,
        dtype: DType::F32,
    }
}

/// Whoever does not look.
pub(crate) struct Blind;

impl Watch for Blind {
    fn event(&mut self, _: Event<'_>) {}
}

/// The losses a run wrote down, without its times.
pub(crate) fn curve(out: &Path) -> Vec<Value> {
    let log = std::fs::read_to_string(out.join(RUN_DIR).join("log.jsonl")).unwrap();
    let line = |line: &str| {
        let mut value: Value = serde_json::from_str(line).unwrap();
        let object = value.as_object_mut().unwrap();
        object.remove("images_per_second");
        object.remove("seconds");
        value
    };
    log.lines().map(line).collect()
}
