//! What the server costs beyond the network evaluations it makes, and whether its memory stays flat.
//!
//! ```text
//! cargo bench --bench serving -- --json serving.json          # speed: a minute or two
//! cargo bench --bench serving -- --memory --json memory.json  # resident size over 4,000 images
//! ```
//!
//! The real server runs in this process, with the bundled teacher, warmed up; the clients are threads
//! beside it and share its processors. A machine's speed drifts, so everything is measured in turns
//! and compared within a round; the figures that count are the medians of the rounds' ratios.
//!
//! Processor seconds per image, of all threads together and the clients included, are there as well:
//! they hold still when something else runs on the machine, but do not see the processors idle.
//!
//! - *bare*: the network alone, one evaluation of `clients` rows after the other.
//! - *http*: closed-loop clients, each asking for its next image (PNG in base64) when it has one.
//! - *singles*: as many clients ask for one image each, at the same moment; until the last has it.
//! - *one request*: as many images in one request.

#![allow(clippy::unwrap_used)]

use std::{
    fs,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::{Arc, Barrier},
    thread,
    time::Instant,
};

use candle_core::{DType, Device, Tensor};
use clap::Parser;
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::oneshot};
use understudy::{
    engine::{Engine, stage::Stage},
    experiments::Experiments,
    http::{self, App},
    metrics::Metrics,
    model_folders::ModelFolders,
    percentiles::median,
    registry::{self, Registry, State},
};
use understudy_models::{Conditioning, Denoiser, checkpoint::ModelFolder, noise};

/// The server adds at most 5 % to the network's cost.
const LEAST_OF_BARE: f64 = 0.95;
/// Separate requests take at most this much longer than one for as many images.
const MOST_OF_ONE_REQUEST: f64 = 1.1;
/// Growth of the resident size, from the first count of images to the last, that counts as flat.
const FLAT: f64 = 1.02;
/// Images after which the resident size is read.
const MEMORY_AT: [usize; 5] = [200, 500, 1000, 2000, 4000];

#[derive(Debug, Parser)]
struct Arguments {
    /// Where to write the figures.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Read the resident size over 4,000 images instead of timing.
    #[arg(long)]
    memory: bool,
    /// A bundled model.
    #[arg(long, default_value = "fashion-mnist-teacher")]
    model: String,
    /// Turns; the medians of their ratios count.
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// Concurrent clients, and rows of the bare network's evaluation.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..))]
    clients: u16,
    /// Images that a closed-loop client makes in a round.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..))]
    images: u16,
    /// Network evaluations per image.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..))]
    steps: u16,
    /// Rows of the server's evaluations, instead of what its warm-up finds useful.
    #[arg(long)]
    max_batch: Option<usize>,
    /// What `cargo bench` passes. Without it this is `cargo test`, and nothing is measured.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    let arguments = Arguments::parse();
    if !arguments.bench {
        return;
    }
    // As `understudy serve` does: candle asks for the number of processors at every matrix product
    // unless this variable tells it.
    let threads = thread::available_parallelism().unwrap().to_string();
    // SAFETY: nothing has started a thread yet, so nobody reads the environment meanwhile.
    unsafe { std::env::set_var("RAYON_NUM_THREADS", threads) };
    let server = Server::start(&arguments);
    let figures = if arguments.memory { memory(&server) } else { speed(&server, &arguments) };
    if let Some(path) = &arguments.json {
        let report = json!({
            "bench": "serving",
            "unix_seconds": std::time::UNIX_EPOCH.elapsed().unwrap().as_secs(),
            "processor": processor(),
            "threads": rayon::current_num_threads(),
            "model": arguments.model,
            "max_rows": server.max_rows,
            "figures": figures,
        });
        fs::write(path, format!("{report:#}\n")).unwrap();
    }
    server.stop();
}

/// Times everything in turns.
fn speed(server: &Server, arguments: &Arguments) -> Value {
    let (clients, steps) = (usize::from(arguments.clients), usize::from(arguments.steps));
    let images = usize::from(arguments.images);
    let network = Network::load(&arguments.model, clients);
    let bare = || Cost::of(clients * images, || network.evaluate(images * steps));
    let http = || Cost::of(clients * images, || server.closed_loop(clients, images, steps));
    let singles = || Cost::of(1, || server.closed_loop(clients, 1, steps));
    let one_request = || Cost::of(1, || server.client().images(clients, steps));

    // The first requests open connections and page memory in.
    bare();
    http();
    println!(
        "{}, {clients} clients, {steps} steps, evaluations of up to {} rows",
        arguments.model, server.max_rows
    );
    println!(
        "\n        images per second          CPU s per image        seconds for {clients} images"
    );
    println!("round    bare    http  ratio    bare   http  ratio   one request singles  ratio");
    let (mut of_bare, mut cpu_of_bare, mut of_one_request) = (Vec::new(), Vec::new(), Vec::new());
    let mut added = Vec::new();
    let mut rounds = Vec::new();
    for round in 1..=arguments.rounds {
        let [bare, http, one_request, singles] = [bare(), http(), one_request(), singles()];
        let [ratio, cpu_ratio] = [bare.seconds / http.seconds, http.cpu_seconds / bare.cpu_seconds];
        let singles_ratio = singles.seconds / one_request.seconds;
        of_bare.push(ratio);
        cpu_of_bare.push(cpu_ratio);
        added.push(1000.0 * (http.seconds - bare.seconds));
        of_one_request.push(singles_ratio);
        println!(
            "{round:5} {:7.2} {:7.2} {ratio:6.3}  {:6.3} {:6.3} {cpu_ratio:6.3}   {:11.3} {:7.3} {singles_ratio:6.3}",
            1.0 / bare.seconds,
            1.0 / http.seconds,
            bare.cpu_seconds,
            http.cpu_seconds,
            one_request.seconds,
            singles.seconds,
        );
        rounds.push(json!({
            "bare_images_per_second": 1.0 / bare.seconds,
            "bare_cpu_seconds_per_image": bare.cpu_seconds,
            "http_images_per_second": 1.0 / http.seconds,
            "http_cpu_seconds_per_image": http.cpu_seconds,
            "one_request_seconds": one_request.seconds,
            "singles_seconds": singles.seconds,
        }));
    }
    let (cpu_of_bare, added) = (median(cpu_of_bare), median(added));
    let (of_bare, of_one_request) = (median(of_bare), median(of_one_request));
    println!("\nmedian of http / bare: {of_bare:.3}, {}", verdict(of_bare >= LEAST_OF_BARE));
    println!("median of their CPU seconds: {cpu_of_bare:.3}");
    println!("median of what http adds to an image: {added:.3} ms");
    let within = of_one_request <= MOST_OF_ONE_REQUEST;
    println!("median of singles / one request: {of_one_request:.3}, {}", verdict(within));
    json!({
        "clients": clients,
        "steps": steps,
        "http_of_bare": of_bare,
        "http_cpu_of_bare": cpu_of_bare,
        "http_adds_milliseconds": added,
        "http_of_bare_target": LEAST_OF_BARE,
        "singles_of_one_request": of_one_request,
        "singles_of_one_request_target": MOST_OF_ONE_REQUEST,
        "rounds": rounds,
    })
}

/// Reads the resident size now and then while images are made.
fn memory(server: &Server) -> Value {
    const CLIENTS: usize = 8;
    const STEPS: usize = 2;
    println!("images   resident, MiB");
    let mut made = 0;
    let mut sizes = Vec::new();
    for images in MEMORY_AT {
        server.closed_loop(CLIENTS, (images - made) / CLIENTS, STEPS);
        made = images;
        let Some(bytes) = resident_bytes() else {
            println!("this system does not tell");
            return Value::Null;
        };
        println!("{images:6} {:15.1}", bytes as f64 / f64::from(1 << 20));
        sizes.push((images, bytes));
    }
    let growth = sizes[sizes.len() - 1].1 as f64 / sizes[0].1 as f64;
    println!("\nlast / first: {growth:.3}, {}", verdict(growth <= FLAT));
    let sizes: Vec<Value> = sizes
        .iter()
        .map(|(images, bytes)| json!({ "images": images, "resident_bytes": bytes }))
        .collect();
    json!({ "growth": growth, "growth_target": FLAT, "resident": sizes })
}

/// The server, on a runtime of its own as `understudy serve` has one.
struct Server {
    url: String,
    max_rows: usize,
    stop: oneshot::Sender<()>,
    runtime: tokio::runtime::Runtime,
    served: tokio::task::JoinHandle<std::io::Result<()>>,
}

impl Server {
    fn start(arguments: &Arguments) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let (stop, stopped) = oneshot::channel();
        let (max_rows, name) = (arguments.max_batch, arguments.model.clone());
        let (url, max_rows, served) = runtime.block_on(async move {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("http://{}", listener.local_addr().unwrap());
            let metrics = Metrics::new().unwrap();
            let engine = Engine::start(NonZeroUsize::MIN, 256, Arc::clone(&metrics)).unwrap();
            let settings = registry::Settings {
                folders: ModelFolders::only(vec![zoo()]),
                default_model: Some(name.clone()),
                devices: vec![Device::Cpu],
                dtype: DType::F32,
                max_rows,
                deterministic: false,
                kept_costs: registry::KeptCosts::default(),
                idle_encoder: None,
            };
            let registry = Registry::open(settings, engine.clone(), Arc::clone(&metrics)).unwrap();
            let registry = Arc::new(registry);
            let settings = http::Settings { max_images: 256, ..http::Settings::default() };
            let none = Arc::new(Experiments::unavailable("a benchmark".into()));
            let app = App::new(engine, Arc::clone(&registry), none, metrics, settings);
            let stopped = async move { drop(stopped.await) };
            let served =
                tokio::spawn(http::serve(listener, app, stopped, http::Shutdown::default()));
            registry.load_all(|_, _| {}).await.unwrap();
            let Some(State::Ready(model)) = registry.get(&name) else { panic!("not ready") };
            (url, model.on(0).max_rows()[Stage::Denoise], served)
        });
        Self { url, max_rows, stop, runtime, served }
    }

    fn client(&self) -> Client {
        // One agent per client, so that each keeps a connection of its own.
        Client { agent: ureq::Agent::new_with_defaults(), url: self.url.clone() }
    }

    /// `clients` threads start together; each asks for its next image when it has the last one.
    fn closed_loop(&self, clients: usize, images: usize, steps: usize) {
        let start = Barrier::new(clients);
        thread::scope(|scope| {
            for _ in 0..clients {
                scope.spawn(|| {
                    let client = self.client();
                    start.wait();
                    (0..images).for_each(|_| client.images(1, steps));
                });
            }
        });
    }

    fn stop(self) {
        self.stop.send(()).unwrap();
        self.runtime.block_on(self.served).unwrap().unwrap();
    }
}

struct Client {
    agent: ureq::Agent,
    url: String,
}

impl Client {
    /// One request for `n` images.
    fn images(&self, n: usize, steps: usize) {
        let url = format!("{}/v1/images/generations", self.url);
        let request = json!({ "n": n, "num_inference_steps": steps });
        let mut response = self.agent.post(&url).send_json(&request).unwrap();
        let reply: Value = response.body_mut().read_json().unwrap();
        assert_eq!(reply["data"].as_array().map(Vec::len), Some(n));
    }
}

/// The network itself, with an input of some rows.
struct Network {
    network: Box<dyn Denoiser>,
    x: Tensor,
    timesteps: Tensor,
    condition: Option<Tensor>,
}

impl Network {
    fn load(name: &str, rows: usize) -> Self {
        let device = Device::Cpu;
        let loaded = ModelFolder::open(&zoo().join(name)).unwrap().load(DType::F32, &device);
        let network = loaded.unwrap().network;
        let geometry = network.geometry();
        let shape = (rows, geometry.in_channels, geometry.height, geometry.width);
        let mut values = vec![0.0; rows * geometry.in_channels * geometry.height * geometry.width];
        noise::normal(0, 0, &mut values);
        let condition = matches!(geometry.conditioning, Conditioning::Classes(_))
            .then(|| Tensor::zeros(rows, DType::U32, &device).unwrap());
        Self {
            x: Tensor::from_vec(values, shape, &device).unwrap(),
            timesteps: Tensor::full(500f32, rows, &device).unwrap(),
            condition,
            network,
        }
    }

    fn evaluate(&self, times: usize) {
        for _ in 0..times {
            self.network.forward(&self.x, &self.timesteps, self.condition.as_ref()).unwrap();
        }
    }
}

/// The bundled models.
fn zoo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/zoo")
}

/// What one image takes.
struct Cost {
    seconds: f64,
    /// Of all threads of this process, where the system tells, else NaN.
    cpu_seconds: f64,
}

impl Cost {
    fn of(images: usize, work: impl FnOnce()) -> Self {
        let (began, cpu_began) = (Instant::now(), cpu_seconds());
        work();
        let images = images as f64;
        Self {
            seconds: began.elapsed().as_secs_f64() / images,
            cpu_seconds: (cpu_seconds() - cpu_began) / images,
        }
    }
}

/// Processor time of this process so far.
fn cpu_seconds() -> f64 {
    // Linux counts in hundredths of a second, whatever the processor.
    const TICK: f64 = 0.01;
    let Ok(stat) = fs::read_to_string("/proc/self/stat") else { return f64::NAN };
    // The process's name, in parentheses, may hold spaces; user and system time are 12th and 13th
    // after it.
    let (_, fields) = stat.rsplit_once(')').unwrap();
    let ticks = fields.split_whitespace().skip(11).take(2).map(|n| n.parse::<f64>().unwrap());
    ticks.sum::<f64>() * TICK
}

fn verdict(met: bool) -> &'static str {
    if met { "target met" } else { "target MISSED" }
}

/// What is resident now, where the system tells.
fn resident_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

/// The processor's name, where the system tells.
fn processor() -> Option<String> {
    let info = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = info.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split(':').nth(1)?.trim().to_owned())
}
