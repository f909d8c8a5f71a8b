//! `understudy load-test`: offers a running server load, and reports what became of it.

use std::{
    collections::BTreeSet,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    time::{Duration, UNIX_EPOCH},
};

use axum::body::Bytes;
use serde_json::{Map, Value};
use tokio_util::sync::CancellationToken;
use understudy_models::{
    checkpoint::{read, write_atomically},
    sampler::Kind,
};

use super::{print, progress::Progress};
use crate::load::{
    Answer, Arrival, Asked, Client, Mix, Recorder, Report, Run, arrivals, open_loop, svg,
};

/// Requests of a run: a number is kept for each of them.
const MOST_REQUESTS: f64 = 1e6;
/// Bytes of the largest file of prompts that is read.
const PROMPTS_LIMIT: u64 = 64 << 20;

/// Load-test a running server; report latency percentiles and rejections.
///
/// Requests arrive as a Poisson process, whatever has become of the earlier ones. Latencies count from when
/// a request was due, so neither a server that stalls nor a client that is late hides anybody's wait. With
/// several rates, or several mixes, every mix has its turn at every rate.
#[derive(Debug, clap::Args)]
pub(super) struct LoadArgs {
    /// The server.
    #[arg(long, env = "UNDERSTUDY_URL", default_value = "http://127.0.0.1:8080")]
    url: String,
    /// Models by weight: ids, auto, draft, experiment:ID, or teacher and student for the default pair.
    /// Repeat it for several mixes.
    #[arg(long, value_name = "NAME=WEIGHT,…", default_value = "teacher=1,student=1")]
    mix: Vec<Mix>,
    /// Requests per second, all models of the mix together; separate several rates with commas.
    #[arg(long, value_name = "RATE", value_delimiter = ',', value_parser = rate, default_value = "5")]
    rate: Vec<f64>,
    /// Seconds for which each run sends requests.
    #[arg(long, value_name = "SECONDS", value_parser = seconds, default_value = "30")]
    duration: f64,
    /// What arrivals and images are drawn with.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(..1 << 32))]
    seed: u64,
    /// Requests that are under way at a time; more wait here, and their wait counts.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u16).range(1..=4096))]
    connections: u16,
    /// Seconds after which a request has failed.
    #[arg(long, value_name = "SECONDS", value_parser = seconds, default_value = "300")]
    timeout_seconds: f64,
    /// Network steps per image; default: the models' own.
    #[arg(long)]
    steps: Option<NonZeroUsize>,
    /// The sampler; default: the models' own.
    #[arg(long, value_parser = super::one_of(Kind::ALL, Kind::name))]
    scheduler: Option<Kind>,
    /// What text-to-image models are to draw; given several times, the requests take turns.
    #[arg(long, value_name = "TEXT")]
    prompt: Vec<String>,
    /// A file with a prompt on each line, which take turns after those of --prompt.
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Images per request.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    n: Option<u16>,
    /// Latency budget in milliseconds.
    #[arg(long, value_name = "MS")]
    deadline_ms: Option<NonZeroUsize>,
    /// The server's key; of several, the first is used.
    #[arg(
        long,
        env = "UNDERSTUDY_API_KEY",
        value_name = "KEY",
        value_delimiter = ',',
        hide_env_values = true
    )]
    api_key: Vec<String>,
    /// One JSON object on standard output instead of tables.
    #[arg(long)]
    json: bool,
    /// Write the figures here as well, a line per run and model.
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Write a picture of latency against rate here.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// A sentence naming what to mend; what was measured until an interruption is told before.
pub(super) fn run(args: &LoadArgs) -> Result<(), String> {
    if let Some(rate) = args.rate.iter().find(|&rate| rate * args.duration > MOST_REQUESTS) {
        return Err(format!(
            "--rate {rate} for --duration {}: about {:.0} requests, and a run has at most {MOST_REQUESTS}; shorten it",
            args.duration,
            rate * args.duration
        ));
    }
    // One thread: the processors are the server's, where it is on the same machine.
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("no async runtime: {error}"))?
        .block_on(load(args))
}

async fn load(args: &LoadArgs) -> Result<(), String> {
    let timeout = Duration::from_secs_f64(args.timeout_seconds);
    let client = Client::new(&args.url, args.api_key.first().map(|key| key.trim()), timeout)?;
    let served = client.models().await?;
    let mixes: Vec<(&Mix, Vec<String>)> = args
        .mix
        .iter()
        .map(|mix| Ok((mix, mix.resolve(&served)?)))
        .collect::<Result<_, String>>()?;
    let prompts = prompts(args)?;
    let mut report = Report { asked: asked(args, &prompts), runs: Vec::new() };
    let fields = report.asked.request.clone();
    let models: BTreeSet<&String> = mixes.iter().flat_map(|(_, models)| models).collect();
    for model in models {
        try_one(&client, model, &fields).await?;
    }

    let stop = CancellationToken::new();
    let interrupted = stop.clone();
    tokio::spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            interrupted.cancel();
        }
    });
    for &rate in &args.rate {
        for (mix, models) in &mixes {
            if stop.is_cancelled() {
                break;
            }
            let asked = (&fields, prompts.as_slice());
            let run = measure(args, &client, (mix, models), rate, asked, &stop).await;
            if !args.json {
                print(run.table())?;
            }
            report.runs.push(run);
        }
    }
    tell(args, &report)?;
    if stop.is_cancelled() {
        return Err("interrupted; the figures are of what was answered before".into());
    }
    complain(&report.runs)
}

/// A request that is not counted: it opens a connection, and whatever is wrong with the flags shows.
async fn try_one(client: &Client, model: &str, fields: &Map<String, Value>) -> Result<(), String> {
    match client.images(body(model, 0, fields)).await {
        Answer::Images { .. } => Ok(()),
        // That the server is busy, or a deadline out of reach, is what is to be measured.
        Answer::Refused { status: 429 | 504, .. } => Ok(()),
        Answer::Refused { status, message } => Err(format!("{model}: {status}: {message}")),
        Answer::Failed(problem) => Err(format!("{model}: {problem}")),
    }
}

async fn measure(
    args: &LoadArgs,
    client: &Client,
    (mix, models): (&Mix, &[String]),
    rate: f64,
    (fields, prompts): (&Map<String, Value>, &[String]),
    stop: &CancellationToken,
) -> Run {
    let plan = || arrivals(args.seed, rate, args.duration, mix);
    let images = args.n.map_or(1, u64::from);
    let send = |arrival: Arrival| {
        let mut fields = fields.clone();
        if let Some(prompt) = prompts.get(arrival.number as usize % prompts.len().max(1)) {
            fields.insert("prompt".into(), prompt.as_str().into());
        }
        let body = body(&models[arrival.entry], args.seed + arrival.number * images, &fields);
        let client = client.clone();
        async move { client.images(body).await }
    };
    let mut recorder = Recorder::new(mix, rate, args.duration);
    let mut progress = Progress::new("Load test", 0, plan().count());
    let answered = |outcome| {
        recorder.add(outcome);
        let (answers, without) = recorder.answers();
        progress.at(answers, &format!("{mix} at {rate}/s, {without} failed"));
    };
    let connections = args.connections.into();
    let (seconds, sent) = open_loop(plan(), connections, send, answered, stop.cancelled()).await;
    recorder.finish(seconds, sent, stop.is_cancelled())
}

fn body(model: &str, seed: u64, fields: &Map<String, Value>) -> Bytes {
    let mut body = fields.clone();
    body.insert("model".into(), model.into());
    body.insert("seed".into(), seed.into());
    Value::Object(body).to_string().into()
}

/// All prompts, in the order of their turns.
fn prompts(args: &LoadArgs) -> Result<Vec<String>, String> {
    let mut all = args.prompt.clone();
    if let Some(path) = &args.prompts {
        let text = read::text(path, PROMPTS_LIMIT).map_err(|error| format!("--prompts {error}"))?;
        let before = all.len();
        all.extend(text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned));
        if all.len() == before {
            let path = path.display();
            return Err(format!("--prompts {path}: holds no prompt; write one on each line"));
        }
    }
    Ok(all)
}

fn asked(args: &LoadArgs, prompts: &[String]) -> Asked {
    let mut request = Map::new();
    let fields = [
        ("num_inference_steps", args.steps.map(|steps| Value::from(steps.get()))),
        ("scheduler", args.scheduler.map(Kind::name).map(Value::from)),
        ("prompt", prompts.first().map(|prompt| Value::from(prompt.as_str()))),
        ("n", args.n.map(Value::from)),
        ("deadline_ms", args.deadline_ms.map(|deadline| Value::from(deadline.get()))),
    ];
    for (field, value) in fields {
        request.extend(value.map(|value| (field.to_owned(), value)));
    }
    Asked {
        version: env!("CARGO_PKG_VERSION"),
        unix_seconds: UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs()),
        url: args.url.clone(),
        duration_seconds: args.duration,
        seed: args.seed,
        connections: args.connections.into(),
        request,
    }
}

/// Whatever one of the outputs comes to, the others are made.
fn tell(args: &LoadArgs, report: &Report) -> Result<(), String> {
    let write = |path: &Path, text: &str| {
        write_atomically(path, text.as_bytes()).map_err(|error| error.to_string())
    };
    let csv = args.csv.as_deref().map(|path| write(path, &report.csv()));
    let svg = args.svg.as_deref().map(|path| match svg(&report.runs)? {
        Some(picture) => write(path, &picture),
        None => Err(format!("--svg {}: not written, no request had images", path.display())),
    });
    let json = args.json.then(|| print(report.json().map_err(|error| error.to_string())?));
    [csv, svg, json].into_iter().flatten().collect()
}

/// A run in which nothing was answered has measured nothing.
fn complain(runs: &[Run]) -> Result<(), String> {
    let dead = runs.iter().find(|run| {
        let figures = || run.models.iter();
        figures().all(|model| model.accepted == 0) && figures().any(|model| model.requests() > 0)
    });
    let Some(run) = dead else { return Ok(()) };
    let problem = run.models.iter().find_map(|model| model.first_problem.clone());
    let problem =
        problem.unwrap_or_else(|| "429, the queue was full or the deadline out of reach".into());
    Err(format!("{} at {}/s: no request had images: {problem}", run.mix, run.rate))
}

fn rate(text: &str) -> Result<f64, String> {
    let rate = text.parse().ok().filter(|rate| (1e-3..=1e5).contains(rate));
    rate.ok_or_else(|| "write requests per second, from 0.001 to 100000".into())
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse().ok().filter(|seconds| (1e-2..=86_400.0).contains(seconds));
    seconds.ok_or_else(|| "write seconds, from 0.01 to 86400".into())
}
