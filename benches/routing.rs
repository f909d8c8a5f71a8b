//! How good `model: "auto"` is: whether deadlines that were accepted are met, and how many of those that
//! could have been met are accepted.
//!
//! ```text
//! cargo bench --bench routing -- --seconds 150 --json routing.json
//! ```
//!
//! The real server runs in this process over loopback; requests arrive open loop (Poisson), whatever has
//! become of the earlier ones: three fifths are `auto` with a deadline between one and a half times what
//! the student alone needs and six times what the teacher does, a fifth go to the teacher and a fifth to the student
//! without a deadline. A deadline counts from receipt, so the reply's own `total_ms` tells whether it was met; what
//! the client saw, from when the request was due to be sent, is told as well.
//!
//! Then the same arrivals are replayed with perfect knowledge: the server's own planner, told what every
//! evaluation costs at that moment of the run (the machine's drift included) and which requests without
//! a deadline are still to come, accepts in order of arrival whatever keeps every promise, by teacher or
//! student, with no margin and no time for HTTP.

#![allow(clippy::unwrap_used)]

#[allow(dead_code)]
mod pair;

use std::{
    collections::{BTreeMap, VecDeque},
    fs,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use clap::Parser;
use pair::{Server, agent, post, verdict};
use serde_json::{Value, json};
use understudy::{
    engine::batcher::{Batch, Batcher, Costs, ModelKey, SampleKey, ScheduledWork, Urgency},
    engine::stage::Stage,
    load::{poisson, uniform},
    percentiles::{percentile, sorted},
    registry::Model,
};

/// Of the accepted deadlines, at least this share is to be met.
const MET: f64 = 0.99;
/// Of those that perfect knowledge serves, at least this share is to be accepted.
const ACCEPTED: f64 = 0.85;

#[derive(Debug, Parser)]
struct Arguments {
    /// Where to write the figures.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// How long requests arrive.
    #[arg(long, default_value_t = 120.0)]
    seconds: f64,
    /// Offered load, if the teacher served all of `auto`: 1 is what the device can do.
    #[arg(long, default_value_t = 1.0)]
    load: f64,
    /// Steps of every request.
    #[arg(long, default_value_t = 20)]
    steps: usize,
    /// Seeds the arrivals.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// What `cargo bench` passes. Without it this is `cargo test`, and nothing is measured.
    #[arg(long, hide = true)]
    bench: bool,
}

/// What one client asks for, and when.
#[derive(Debug, Clone, Copy)]
struct Arrival {
    at: f64,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    /// With a deadline in seconds from arrival.
    Auto(f64),
    Teacher,
    Student,
}

/// What became of it.
#[derive(Debug, Clone)]
struct Outcome {
    status: u16,
    code: String,
    /// As the client sees it.
    seconds: f64,
    /// From receipt, as the reply tells.
    total_seconds: f64,
    served: String,
}

impl Outcome {
    /// Whether the server took it on, kept or not.
    fn accepted(&self) -> bool {
        self.status == 200 || self.code == "deadline_passed"
    }
}

fn main() {
    let arguments = Arguments::parse();
    if !arguments.bench {
        return;
    }
    let threads = thread::available_parallelism().unwrap().to_string();
    // SAFETY: nothing has started a thread yet, so nobody reads the environment meanwhile.
    unsafe { std::env::set_var("RAYON_NUM_THREADS", threads) };
    let server = Server::start(0.0);
    let steps = arguments.steps as f64;
    let teacher = server.teacher.on(0).evaluation_seconds(Stage::Denoise, 1) * steps;
    let student = server.student.on(0).evaluation_seconds(Stage::Denoise, 1) * steps;
    let rate = arguments.load / (0.8 * teacher + 0.2 * student);
    println!(
        "alone: teacher {:.1} ms, student {:.1} ms; {rate:.2} requests/s for {} s",
        teacher * 1e3,
        student * 1e3,
        arguments.seconds
    );
    let plan: Vec<Arrival> = poisson(arguments.seed, rate, arguments.seconds)
        .enumerate()
        .map(|(i, at)| {
            let [which, deadline] = [2, 3].map(|stream| uniform(arguments.seed + stream, i as u64));
            let kind = match which {
                ..0.6 => Kind::Auto(1.5 * student * (4.0 * teacher / student).powf(deadline)),
                ..0.8 => Kind::Teacher,
                _ => Kind::Student,
            };
            Arrival { at, kind }
        })
        .collect();

    let (outcomes, trace) = run(&server, &plan, arguments.steps);
    let oracle = Replay::new(&server, &plan, arguments.steps, &trace).served();
    report(&arguments, &server, &plan, &outcomes, &oracle, &trace);
    server.stop();
}

/// Sends every request when it is due; what an evaluation costs is noted all the while.
fn run(server: &Server, plan: &[Arrival], steps: usize) -> (Vec<Outcome>, Trace) {
    let outcomes = Mutex::new(BTreeMap::new());
    let over = AtomicBool::new(false);
    let agent = agent();
    // Opens a connection, and pages memory in.
    post(&agent, &server.url, "/v1/images/generations", &json!({"model": "auto"}));
    let began = Instant::now();
    let trace = thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut trace = Trace::default();
            while !over.load(Ordering::Relaxed) {
                trace.note(began.elapsed().as_secs_f64(), server);
                thread::sleep(Duration::from_millis(50));
            }
            trace
        });
        thread::scope(|clients| {
            for (i, arrival) in plan.iter().enumerate() {
                let due = began + Duration::from_secs_f64(arrival.at);
                thread::sleep(due.saturating_duration_since(Instant::now()));
                let (outcomes, agent) = (&outcomes, &agent);
                clients.spawn(move || {
                    let (model, deadline_ms) = match arrival.kind {
                        Kind::Auto(seconds) => {
                            ("auto", Some((seconds * 1e3).floor().max(1.0) as u64))
                        }
                        Kind::Teacher => (pair::TEACHER, None),
                        Kind::Student => (pair::STUDENT, None),
                    };
                    let body = json!({"model": model, "deadline_ms": deadline_ms, "seed": i,
                        "num_inference_steps": steps});
                    let (status, reply) = post(agent, &server.url, "/v1/images/generations", &body);
                    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
                    let outcome = Outcome {
                        status,
                        code: text(&reply["error"]["code"]),
                        seconds: due.elapsed().as_secs_f64(),
                        total_seconds: reply["timings"]["total_ms"].as_f64().unwrap_or(0.0) / 1e3,
                        served: text(&reply["model"]),
                    };
                    outcomes.lock().unwrap().insert(i, outcome);
                });
            }
        });
        over.store(true, Ordering::Relaxed);
        watch.join().unwrap()
    });
    (outcomes.into_inner().unwrap().into_values().collect(), trace)
}

/// Seconds of an evaluation by model and rows.
type Table = BTreeMap<(ModelKey, usize), f64>;

/// What evaluations cost, through the run.
#[derive(Debug, Default)]
struct Trace {
    /// Seconds from the start, and what evaluations cost then.
    notes: Vec<(f64, Table)>,
}

impl Trace {
    fn note(&mut self, at: f64, server: &Server) {
        let models = [&server.teacher, &server.student];
        let costs = models.iter().flat_map(|model| {
            (1..=model.on(0).max_rows()[Stage::Denoise]).map(|rows| {
                ((model.key, rows), model.on(0).evaluation_seconds(Stage::Denoise, rows))
            })
        });
        self.notes.push((at, costs.collect()));
    }

    fn at(&self, now: f64) -> Known<'_> {
        let next = self.notes.partition_point(|(at, _)| *at <= now);
        Known(&self.notes[next.saturating_sub(1)].1)
    }

    /// The teacher's cost of one row against the first note's.
    fn drift(&self, model: &Model) -> Vec<(f64, f64)> {
        let cost = |costs: &Table| costs[&(model.key, 1)];
        let first = cost(&self.notes[0].1);
        self.notes.iter().map(|(at, costs)| (*at, cost(costs) / first)).collect()
    }
}

struct Known<'a>(&'a Table);

impl Costs for Known<'_> {
    fn seconds(&self, model: ModelKey, _: Stage, rows: usize) -> f64 {
        self.0[&(model, rows)]
    }
    fn margin(&self) -> f64 {
        1.0
    }
}

/// The same arrivals with perfect knowledge.
struct Replay<'a> {
    plan: &'a [Arrival],
    teacher: &'a Arc<Model>,
    student: &'a Arc<Model>,
    steps: usize,
    trace: &'a Trace,
}

/// A moment of the replay: the device is free at `now`.
#[derive(Clone, Default)]
struct Moment {
    now: f64,
    batcher: Batcher,
    /// Promised samples and when they are due.
    due: BTreeMap<SampleKey, f64>,
}

impl<'a> Replay<'a> {
    fn new(server: &'a Server, plan: &'a [Arrival], steps: usize, trace: &'a Trace) -> Self {
        Self { plan, teacher: &server.teacher, student: &server.student, steps, trace }
    }

    /// Which requests with a deadline are served.
    fn served(&self) -> Vec<bool> {
        let mut moment = Moment::default();
        let mut served = vec![false; self.plan.len()];
        for (i, arrival) in self.plan.iter().enumerate() {
            self.forward(&mut moment, arrival.at);
            moment.now = moment.now.max(arrival.at);
            match arrival.kind {
                Kind::Teacher => self.join(&mut moment, i, self.teacher, None),
                Kind::Student => self.join(&mut moment, i, self.student, None),
                Kind::Auto(deadline) => {
                    for model in [self.teacher, self.student] {
                        let mut trial = moment.clone();
                        self.join(&mut trial, i, model, Some(arrival.at + deadline));
                        if self.keeps_all(trial.clone(), i) {
                            (moment, served[i]) = (trial, true);
                            break;
                        }
                    }
                }
            }
        }
        served
    }

    fn join(&self, moment: &mut Moment, i: usize, model: &Model, due: Option<f64>) {
        // From the start, so that nothing that arrives later can be in their way.
        let promised = |due| Urgency::Deadline { due, from: moment.now };
        let urgency = due.map_or(Urgency::Ordinary(moment.now), promised);
        let work = ScheduledWork::denoising(1, self.steps, urgency);
        moment.batcher.join(model.key, SampleKey(i as u64), work, model.on(0).max_rows());
        moment.due.extend(due.map(|due| (SampleKey(i as u64), due)));
    }

    /// Evaluations that begin before `until`; false as soon as a promise is broken.
    fn forward(&self, moment: &mut Moment, until: f64) -> bool {
        while moment.now < until {
            let costs = self.trace.at(moment.now);
            let Some(batch) = moment.batcher.next(moment.now, &costs) else { break };
            let seconds = costs.seconds(batch.model, batch.stage, batch.rows);
            moment.now += seconds;
            if !moment.end(&batch, seconds) {
                return false;
            }
        }
        true
    }

    /// Whether all promises are kept, with the requests without a deadline that are still to come.
    fn keeps_all(&self, mut moment: Moment, i: usize) -> bool {
        let mut coming: VecDeque<usize> = (i + 1..self.plan.len()).collect();
        while !moment.due.is_empty() {
            let until = match coming.front() {
                Some(&next) => self.plan[next].at,
                None => f64::INFINITY,
            };
            let idle = moment.batcher.is_empty();
            if !self.forward(&mut moment, until) {
                return false;
            }
            if moment.due.is_empty() || (idle && coming.is_empty()) {
                break;
            }
            if let Some(next) = coming.pop_front() {
                moment.now = moment.now.max(self.plan[next].at);
                match self.plan[next].kind {
                    Kind::Teacher => self.join(&mut moment, next, self.teacher, None),
                    Kind::Student => self.join(&mut moment, next, self.student, None),
                    Kind::Auto(_) => {}
                }
            }
        }
        true
    }
}

impl Moment {
    /// The end of an evaluation; false when a promise was due before.
    fn end(&mut self, batch: &Batch, seconds: f64) -> bool {
        self.batcher.ran(batch, seconds);
        for &sample in &batch.samples {
            let work = self.batcher.scheduled(batch.model, sample);
            if work.is_some_and(|work| work.is_done()) {
                self.batcher.leave(batch.model, sample);
                if self.due.remove(&sample).is_some_and(|due| due < self.now) {
                    return false;
                }
            }
        }
        self.due.values().all(|&due| due >= self.now)
    }
}

fn report(
    arguments: &Arguments,
    server: &Server,
    plan: &[Arrival],
    outcomes: &[Outcome],
    oracle: &[bool],
    trace: &Trace,
) {
    let auto = plan.iter().zip(outcomes).zip(oracle).filter_map(|((arrival, outcome), oracle)| {
        match arrival.kind {
            Kind::Auto(deadline) => Some((deadline, outcome, *oracle)),
            _ => None,
        }
    });
    let auto: Vec<_> = auto.collect();
    let count = |what: &dyn Fn(&(f64, &Outcome, bool)) -> bool| {
        auto.iter().filter(|entry| what(entry)).count()
    };
    let accepted = count(&|(_, outcome, _)| outcome.accepted());
    let limit = |deadline: f64| (deadline * 1e3).floor().max(1.0) / 1e3;
    let met = count(&|(deadline, outcome, _)| {
        outcome.status == 200 && outcome.total_seconds <= limit(*deadline)
    });
    let seen = count(&|(deadline, outcome, _)| {
        outcome.status == 200 && outcome.seconds <= limit(*deadline)
    });
    let broken_off = count(&|(_, outcome, _)| outcome.code == "deadline_passed");
    let refused = count(&|(_, outcome, _)| outcome.status == 429);
    let impossible = auto.len() - accepted - refused;
    let by =
        |model: &str| count(&|(_, outcome, _)| outcome.status == 200 && outcome.served == model);
    let possible = count(&|(_, _, oracle)| *oracle);
    let both = count(&|(_, outcome, oracle)| *oracle && outcome.accepted());
    let share = |part: usize, whole: usize| part as f64 / whole.max(1) as f64;
    let (met_share, accepted_share) = (share(met, accepted), share(both, possible));
    let drift = trace.drift(&server.teacher);
    let factors = sorted(drift.iter().map(|(_, factor)| *factor));
    let ratio = &server.metrics.prediction_ratio;
    let ratios = [pair::TEACHER, pair::STUDENT].map(|model| {
        let histogram = ratio.with_label_values(&[model]);
        histogram.get_sample_sum() / histogram.get_sample_count().max(1) as f64
    });
    let margin = server.metrics.prediction_margin.get();
    let overhead = sorted(plan.iter().zip(outcomes).filter_map(|(_, outcome)| {
        (outcome.status == 200).then_some(outcome.seconds - outcome.total_seconds)
    }));
    let plain =
        plan.iter().zip(outcomes).filter(|(arrival, _)| !matches!(arrival.kind, Kind::Auto(_)));
    let plain = sorted(plain.map(|(_, outcome)| outcome.seconds));

    println!("{} requests, {} of them auto with a deadline", plan.len(), auto.len());
    println!(
        "accepted {accepted} (teacher {}, student {}), met {met}: {met_share:.4}, {}",
        by(pair::TEACHER),
        by(pair::STUDENT),
        verdict(met_share >= MET)
    );
    println!(
        "{broken_off} broken off at the deadline; {refused} refused with 429, {impossible} with 504; in time by the client's clock {seen}; between client and server 50 % {:.1} ms, 99 % {:.1} ms",
        percentile(&overhead, 50) * 1e3,
        percentile(&overhead, 99) * 1e3
    );
    println!(
        "perfect knowledge serves {possible}, of which accepted {both}: {accepted_share:.4}, {}",
        verdict(accepted_share >= ACCEPTED)
    );
    println!(
        "actual / predicted, mean: teacher {:.3}, student {:.3}; margin {margin:.3}",
        ratios[0], ratios[1]
    );
    println!(
        "without a deadline, seconds: median {:.3}, 99 % {:.3}",
        percentile(&plain, 50),
        percentile(&plain, 99)
    );
    let [least, median, most] = [0, 50, 100].map(|percent| percentile(&factors, percent));
    println!(
        "drift of the machine against the start: least {least:.2}, median {median:.2}, most {most:.2}"
    );
    if let Some(path) = &arguments.json {
        let every_two_seconds: Vec<_> = drift.iter().step_by(40).collect();
        let report = json!({
            "bench": "routing",
            "seconds": arguments.seconds, "load": arguments.load, "steps": arguments.steps,
            "requests": plan.len(), "auto": auto.len(),
            "accepted": accepted, "met": met, "met_by_the_clients_clock": seen, "met_share": met_share, "met_target": MET,
            "perfect_knowledge_serves": possible, "accepted_of_those": both,
            "accepted_share": accepted_share, "accepted_target": ACCEPTED,
            "margin": margin, "mean_actual_over_predicted": {"teacher": ratios[0], "student": ratios[1]},
            "drift": every_two_seconds,
        });
        fs::write(path, format!("{report:#}\n")).unwrap();
    }
}
