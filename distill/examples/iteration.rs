//! What a distillation's iteration costs beside its two networks.
//!
//! ```sh
//! cargo run --release -p understudy-distill --example iteration -- TEACHER-FOLDER STUDENT-CONFIG [BATCH]
//! ```
//!
//! Times, in turns within one run, a teacher's evaluation alone, a student's step alone (forward, loss,
//! backward, AdamW), the training batch of a pool in memory and of one in a mapped file, and all of an iteration as the
//! loop does it. Medians, of shares too.
#![allow(clippy::unwrap_used)]

mod median;

use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::{DType, Device};
use median::median;
use understudy_distill::objective::Dkdm;
use understudy_distill::optimizer::{AdamW, Gradients, Settings};
use understudy_distill::parameters::{Average, Parameters};
use understudy_distill::pool::{self, Order, Pool};
use understudy_distill::student::{Candidate, Student};
use understudy_distill::teacher::Teacher;
use understudy_distill::training_batch::{BatchSource, TrainingBatch};
use understudy_distill::walk::Walks;
use understudy_models::Denoiser;
use understudy_models::sampler::Kind;

const ROUNDS: usize = 21;

struct Learner {
    network: Box<dyn Denoiser>,
    parameters: Parameters,
    optimizer: AdamW,
    objective: Dkdm,
}

impl Learner {
    fn step(&mut self, training_batch: &TrainingBatch) {
        let device = &Device::Cpu;
        let (times, condition) =
            (training_batch.times(device).unwrap(), training_batch.condition(device).unwrap());
        let answer = self.network.forward(&training_batch.x, &times, condition.as_ref()).unwrap();
        let losses = self.objective.losses(training_batch, &answer).unwrap();
        let mut gradients = losses.total.backward().unwrap();
        let gradients = Gradients::take(&self.parameters, &mut gradients).unwrap();
        self.optimizer.step(&self.parameters, &gradients).unwrap();
    }
}

fn seconds(work: impl FnOnce()) -> f64 {
    let began = Instant::now();
    work();
    began.elapsed().as_secs_f64()
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (folder, config) = (PathBuf::from(&arguments[0]), Path::new(&arguments[1]));
    let batch = arguments.get(2).map_or(64, |batch| batch.parse().unwrap());
    let teacher = Teacher::open(&folder, "teacher".into(), DType::F32, &Device::Cpu).unwrap();
    let student = Student::new(Candidate::open(config).unwrap(), &teacher, None, 0).unwrap();

    let learned = teacher.learned_variance();
    let folder = tempfile::tempdir().unwrap();
    let pool = |file: Option<PathBuf>| {
        let walks = Walks::new(&teacher.schedule, Kind::Ddpm, 20, learned).unwrap();
        let settings = pool::Settings {
            // Ten batches.
            order: Order::Dynamic { rho: 0.01 },
            batch,
            seed: 0,
            run: "iteration".into(),
            earlier: None,
            file,
            finished: None,
        };
        let mut pool = Pool::new(&teacher, walks, settings).unwrap();
        while pool.prepare().unwrap().is_some() {}
        pool
    };
    let mut mapped = pool(Some(folder.path().join("pool")));
    let mut pool = pool(None);
    let parameters = Parameters::new(student.weights.clone()).unwrap();
    let kind = teacher.schedule.prediction_type();
    let optimizer = Settings {
        learning_rate: 1e-4,
        warmup_steps: 1,
        decay_steps: None,
        weight_decay: 0.0,
        clip_norm: 1.0,
        beta1: understudy_distill::optimizer::BETA1,
    };
    let mut average = Average::new(&parameters, 0.999).unwrap();
    let mut learner = Learner {
        network: student.config.load(parameters.tensors(), DType::F32, &Device::Cpu).unwrap(),
        optimizer: AdamW::new(&parameters, optimizer).unwrap(),
        objective: Dkdm::new(&teacher.schedule, kind, kind, learned).unwrap(),
        parameters,
    };

    let training_batch = pool.training_batch(0).unwrap();
    let (times, condition) = (
        training_batch.times(&Device::Cpu).unwrap(),
        training_batch.condition(&Device::Cpu).unwrap(),
    );
    let mut rounds = Vec::new();
    for round in 0..=ROUNDS as u64 {
        let evaluation = seconds(|| {
            teacher.network().forward(&training_batch.x, &times, condition.as_ref()).unwrap();
        });
        let step = seconds(|| learner.step(&training_batch));
        let from_memory = seconds(|| {
            pool.training_batch(2 * round + 1).unwrap();
        });
        let from_file = seconds(|| {
            mapped.training_batch(2 * round + 1).unwrap();
        });
        let iteration = seconds(|| {
            let training_batch = pool.training_batch(2 * round + 2).unwrap();
            learner.step(&training_batch);
            average.update(&learner.parameters).unwrap();
        });
        // The first warms up.
        if round > 0 {
            rounds.push([evaluation, step, from_memory, from_file, iteration]);
        }
    }
    let typical = |value: &dyn Fn(&[f64; 5]) -> f64| median(rounds.iter().map(value).collect());
    println!("batch {batch}, {} threads", rayon_threads());
    let names = [
        "teacher's evaluation alone",
        "student's step alone",
        "training batch, pool in memory",
        "training batch, pool in a file",
        "iteration",
    ];
    for (i, name) in names.iter().enumerate() {
        println!("{name:28}{:8.1} ms", 1e3 * typical(&|round| round[i]));
    }
    let share = |i: usize| 100.0 * typical(&|round| (round[i] - round[0]) / round[4]);
    println!(
        "iteration, of the two alone {:8.3}",
        typical(&|round| round[4] / (round[0] + round[1]))
    );
    println!("bookkeeping, of an iteration{:7.2} %, in a file {:.2} %", share(2), share(3));
    println!("images per second           {:8.1}", batch as f64 / typical(&|round| round[4]));
}

fn rayon_threads() -> String {
    std::env::var("RAYON_NUM_THREADS").unwrap_or_else(|_| "all".into())
}
