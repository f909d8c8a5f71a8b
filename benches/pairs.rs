//! What running a teacher beside its student costs: comparisons, and shadow traffic.
//!
//! ```text
//! cargo bench --bench pairs -- --json pairs.json
//! ```
//!
//! *Comparisons*, in turns within a round, medians of the rounds' ratios: the whole of `/v1/compare`
//! against the sum of both models alone (≤ 1.05), and the student's image of a streamed one against the
//! student alone (≤ 2.5).
//!
//! *Shadow traffic*: the same Poisson arrivals at the student, with `--shadow-rate` 0 and 1 in turns. The
//! 99th percentile with it is to exceed that without by at most one evaluation of the teacher; latencies
//! count from when a request was due to be sent.

#![allow(clippy::unwrap_used)]

#[allow(dead_code)]
mod pair;

use std::{
    fs,
    io::{BufRead, BufReader},
    path::PathBuf,
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use clap::Parser;
use pair::{STUDENT, Server, TEACHER, agent, post, verdict};
use serde_json::{Value, json};
use understudy::{
    engine::stage::Stage,
    load::poisson,
    percentiles::{median, percentile, sorted},
};

/// A comparison's time against both models' alone.
const MOST_OF_SUM: f64 = 1.05;
/// The student's image of a comparison against the student alone.
const MOST_OF_STUDENT: f64 = 2.5;

#[derive(Debug, Parser)]
struct Arguments {
    /// Where to write the figures.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Turns of the comparisons.
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// Turns of shadow traffic, each without and with it.
    #[arg(long, default_value_t = 3)]
    turns: usize,
    /// How long requests arrive in a turn.
    #[arg(long, default_value_t = 20.0)]
    seconds: f64,
    /// Offered load of the shadowed traffic: 1 is what the device can do.
    #[arg(long, default_value_t = 0.4)]
    load: f64,
    /// Steps of every request.
    #[arg(long, default_value_t = 20)]
    steps: usize,
    /// What `cargo bench` passes. Without it this is `cargo test`, and nothing is measured.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    let arguments = Arguments::parse();
    if !arguments.bench {
        return;
    }
    let threads = thread::available_parallelism().unwrap().to_string();
    // SAFETY: nothing has started a thread yet, so nobody reads the environment meanwhile.
    unsafe { std::env::set_var("RAYON_NUM_THREADS", threads) };
    let comparisons = comparisons(&arguments);
    let shadow = shadow(&arguments);
    if let Some(path) = &arguments.json {
        let report = json!({"bench": "pairs", "comparisons": comparisons, "shadow": shadow});
        fs::write(path, format!("{report:#}\n")).unwrap();
    }
}

fn comparisons(arguments: &Arguments) -> Value {
    let server = Server::start(0.0);
    let agent = agent();
    let steps = arguments.steps;
    let timed = |path: &str, body: Value| {
        let began = Instant::now();
        let (status, reply) = post(&agent, &server.url, path, &body);
        assert_eq!(status, 200, "{reply}");
        began.elapsed().as_secs_f64()
    };
    let alone = |model: &str| {
        let body = json!({"model": model, "seed": 1, "num_inference_steps": steps});
        timed("/v1/images/generations", body)
    };
    let (mut of_sum, mut of_student) = (Vec::new(), Vec::new());
    println!("round  teacher  student  compare  of sum   student's image  of alone   ms");
    for round in 0..=arguments.rounds {
        let (teacher, student) = (alone(TEACHER), alone(STUDENT));
        let body = json!({"seed": 1, "num_inference_steps": steps});
        let compare = timed("/v1/compare", body.clone());
        let first = first_image(&agent, &server.url, body);
        // The first round pages memory in.
        if round == 0 {
            continue;
        }
        of_sum.push(compare / (teacher + student));
        of_student.push(first / student);
        println!(
            "{round:5} {:8.1} {:8.1} {:8.1} {:7.3} {:17.1} {:9.3}",
            teacher * 1e3,
            student * 1e3,
            compare * 1e3,
            compare / (teacher + student),
            first * 1e3,
            first / student
        );
    }
    server.stop();
    let [of_sum, of_student] = [of_sum, of_student].map(median);
    println!("\ncompare / sum of both alone: {of_sum:.3}, {}", verdict(of_sum <= MOST_OF_SUM));
    println!(
        "student's image / alone: {of_student:.3}, {}\n",
        verdict(of_student <= MOST_OF_STUDENT)
    );
    json!({"of_sum": of_sum, "of_sum_target": MOST_OF_SUM, "students_image_of_alone": of_student,
        "students_image_of_alone_target": MOST_OF_STUDENT, "rounds": arguments.rounds})
}

/// Seconds until a streamed comparison's first image, the student's, is here.
fn first_image(agent: &ureq::Agent, url: &str, mut body: Value) -> f64 {
    body["stream"] = json!(true);
    let began = Instant::now();
    let response = agent.post(format!("{url}/v1/compare")).send_json(&body).unwrap();
    let mut lines = BufReader::new(response.into_body().into_reader()).lines().map(Result::unwrap);
    let first = lines.by_ref().find(|line| line.starts_with("event: ")).unwrap();
    assert_eq!(first, "event: image_generation.partial_image");
    let seconds = began.elapsed().as_secs_f64();
    lines.for_each(drop);
    seconds
}

fn shadow(arguments: &Arguments) -> Value {
    let (mut without, mut with) = (Vec::new(), Vec::new());
    let (mut evaluation, mut compared) = (0.0f64, 0);
    for turn in 0..arguments.turns {
        for rate in [0.0, 1.0] {
            let server = Server::start(rate);
            let seconds =
                server.student.on(0).evaluation_seconds(Stage::Denoise, 1) * arguments.steps as f64;
            let offered = arguments.load / seconds;
            let plan: Vec<f64> = poisson(turn as u64, offered, arguments.seconds).collect();
            let latencies = run(&server, &plan, arguments.steps);
            let outcome =
                |outcome| server.metrics.shadows.with_label_values(&[STUDENT, outcome]).get();
            if rate > 0.0 {
                evaluation =
                    evaluation.max(server.teacher.on(0).evaluation_seconds(Stage::Denoise, 1));
                compared += outcome("compared");
                with.extend(latencies);
            } else {
                without.extend(latencies);
            }
            server.stop();
        }
    }
    let [without, with] = [without, with].map(sorted);
    let [p50, p99] = [50, 99].map(|percent| [&without, &with].map(|all| percentile(all, percent)));
    println!("{} requests with and without, {compared} repeated and compared", with.len());
    println!("median ms: without {:.1}, with {:.1}", p50[0] * 1e3, p50[1] * 1e3);
    let met = p99[1] <= p99[0] + evaluation;
    println!(
        "99 %   ms: without {:.1}, with {:.1}; one evaluation of the teacher takes {:.1}: {}",
        p99[0] * 1e3,
        p99[1] * 1e3,
        evaluation * 1e3,
        verdict(met)
    );
    json!({"requests": with.len(), "compared": compared, "median_seconds": p50, "p99_seconds": p99,
        "teacher_evaluation_seconds": evaluation, "load": arguments.load})
}

/// Latencies of requests to the student, open loop.
fn run(server: &Server, plan: &[f64], steps: usize) -> Vec<f64> {
    let latencies = Mutex::new(Vec::new());
    let agent = agent();
    let request = |seed: usize| {
        let body = json!({"model": STUDENT, "seed": seed, "num_inference_steps": steps});
        assert_eq!(post(&agent, &server.url, "/v1/images/generations", &body).0, 200);
    };
    request(0);
    let began = Instant::now();
    thread::scope(|clients| {
        for (i, &at) in plan.iter().enumerate() {
            let due = began + Duration::from_secs_f64(at);
            thread::sleep(due.saturating_duration_since(Instant::now()));
            let (latencies, request) = (&latencies, &request);
            clients.spawn(move || {
                request(i);
                latencies.lock().unwrap().push(due.elapsed().as_secs_f64());
            });
        }
    });
    latencies.into_inner().unwrap()
}
