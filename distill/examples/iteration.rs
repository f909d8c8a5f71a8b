//! What a distillation's iteration costs beside its two networks.
//!
//! ```sh
//! cargo run --release -p understudy-distill --example iteration -- TEACHER-FOLDER STUDENT-CONFIG [BATCH]
//! ```
//!
//! Times, in turns within one run, a teacher's evaluation alone, a student's step alone (forward, loss,
//! backward, AdamW), the pool's lesson, and all of an iteration as the loop does it. Medians.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::{DType, Device};
use understudy_distill::lesson::{Curriculum, Lesson};
use understudy_distill::objective::Dkdm;
use understudy_distill::optimizer::{AdamW, Gradients, Settings};
use understudy_distill::parameters::{Average, Parameters};
use understudy_distill::pool::{self, Order, Pool};
use understudy_distill::student::{Candidate, Student};
use understudy_distill::teacher::Teacher;
use understudy_distill::walk::Walks;
use understudy_models::Denoiser;
use understudy_models::sampler::Kind;

const ROUNDS: usize = 9;

struct Learner {
    network: Box<dyn Denoiser>,
    parameters: Parameters,
    optimizer: AdamW,
    objective: Dkdm,
}

impl Learner {
    fn step(&mut self, lesson: &Lesson) {
        let device = &Device::Cpu;
        let (times, condition) = (lesson.times(device).unwrap(), lesson.condition(device).unwrap());
        let answer = self.network.forward(&lesson.x, &times, condition.as_ref()).unwrap();
        let losses = self.objective.losses(lesson, &answer).unwrap();
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

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (folder, config) = (PathBuf::from(&arguments[0]), Path::new(&arguments[1]));
    let batch = arguments.get(2).map_or(64, |batch| batch.parse().unwrap());
    let teacher = Teacher::open(&folder, "teacher".into()).unwrap();
    let student = Student::new(Candidate::open(config).unwrap(), &teacher, None, 0).unwrap();

    let learned = teacher.learned_variance();
    let walks = Walks::new(&teacher.schedule, Kind::Ddpm, 20, learned).unwrap();
    let settings = pool::Settings {
        order: Order::Shuffled,
        batch,
        seed: 0,
        run: "iteration".into(),
        file: None,
        finished: None,
    };
    let mut pool = Pool::new(&teacher, walks, settings).unwrap();
    while pool.prepare().unwrap().is_some() {}
    let parameters = Parameters::new(student.weights.clone()).unwrap();
    let kind = teacher.schedule.prediction_type();
    let optimizer = Settings {
        learning_rate: 1e-4,
        warmup_steps: 1,
        decay_steps: None,
        weight_decay: 0.0,
        clip_norm: 1.0,
    };
    let mut average = Average::new(&parameters, 0.999).unwrap();
    let mut learner = Learner {
        network: student.config.load(parameters.tensors(), DType::F32, &Device::Cpu).unwrap(),
        optimizer: AdamW::new(&parameters, optimizer).unwrap(),
        objective: Dkdm::new(&teacher.schedule, kind, kind, learned).unwrap(),
        parameters,
    };

    let lesson = pool.lesson(0).unwrap();
    let (times, condition) =
        (lesson.times(&Device::Cpu).unwrap(), lesson.condition(&Device::Cpu).unwrap());
    let mut timings: [Vec<f64>; 4] = Default::default();
    for round in 0..=ROUNDS {
        let evaluation = seconds(|| {
            teacher.network().forward(&lesson.x, &times, condition.as_ref()).unwrap();
        });
        let step = seconds(|| learner.step(&lesson));
        let lesson_seconds = seconds(|| {
            pool.lesson(2 * round as u64 + 1).unwrap();
        });
        let iteration = seconds(|| {
            let lesson = pool.lesson(2 * round as u64 + 2).unwrap();
            learner.step(&lesson);
            average.update(&learner.parameters).unwrap();
        });
        // The first warms up.
        if round > 0 {
            let these = [evaluation, step, lesson_seconds, iteration];
            timings.iter_mut().zip(these).for_each(|(timings, seconds)| timings.push(seconds));
        }
    }
    let [evaluation, step, lesson, iteration] = timings.map(median);
    let ms = 1e3;
    println!("batch {batch}, {} threads", rayon_threads());
    println!("teacher's evaluation alone  {:8.1} ms", evaluation * ms);
    println!("student's step alone        {:8.1} ms", step * ms);
    println!(
        "lesson (pool and teacher)   {:8.1} ms: bookkeeping {:.2} % of an iteration",
        lesson * ms,
        100.0 * (lesson - evaluation) / iteration
    );
    println!(
        "iteration                   {:8.1} ms: {:.3} of the two alone, {:.1} images/s",
        iteration * ms,
        iteration / (evaluation + step),
        batch as f64 / iteration
    );
}

fn rayon_threads() -> String {
    std::env::var("RAYON_NUM_THREADS").unwrap_or_else(|_| "all".into())
}
