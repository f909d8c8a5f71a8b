//! A real server over a teacher and its student, for the benchmarks of what pairs do: the bundled teacher,
//! and a narrower network of the same kind with random weights, which costs what a student would.

use std::{
    collections::HashMap,
    fs,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{net::TcpListener, sync::oneshot};
use understudy::{
    engine::Engine,
    experiments::Experiments,
    http::{self, App},
    metrics::Metrics,
    registry::{self, Model, Registry, State},
};
use understudy_models::{
    NetworkConfig,
    checkpoint::{Draft, ModelFolder, card::Card},
    noise,
    schedule::ScheduleConfig,
    unet::UNet2DConfig,
};

pub(crate) const TEACHER: &str = "fashion-mnist-teacher";
pub(crate) const STUDENT: &str = "student";

/// The server, on a runtime of its own as `understudy serve` has one.
pub(crate) struct Server {
    pub(crate) url: String,
    pub(crate) teacher: Arc<Model>,
    pub(crate) student: Arc<Model>,
    pub(crate) metrics: Arc<Metrics>,
    stop: oneshot::Sender<()>,
    runtime: tokio::runtime::Runtime,
    served: tokio::task::JoinHandle<std::io::Result<()>>,
    _models: TempDir,
}

impl Server {
    pub(crate) fn start(shadow_rate: f64) -> Self {
        let models = tempfile::tempdir().unwrap();
        let folder = models.path().to_owned();
        copy(&zoo().join(TEACHER), &folder.join(TEACHER));
        write_student(&folder);
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let (stop, stopped) = oneshot::channel();
        let metrics = Metrics::new().unwrap();
        let shared = Arc::clone(&metrics);
        let (url, teacher, student, served) = runtime.block_on(async move {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("http://{}", listener.local_addr().unwrap());
            let engine = Engine::start(NonZeroUsize::MIN, 256, Arc::clone(&shared)).unwrap();
            let settings = registry::Settings {
                folders: understudy::model_folders::ModelFolders::only(vec![folder]),
                default_model: Some(TEACHER.into()),
                devices: vec![Device::Cpu],
                dtype: DType::F32,
                max_rows: None,
                deterministic: false,
                kept_costs: registry::KeptCosts::default(),
                idle_encoder: None,
            };
            let registry = Registry::open(settings, engine.clone(), Arc::clone(&shared)).unwrap();
            let registry = Arc::new(registry);
            let settings = http::Settings { shadow_rate, ..http::Settings::default() };
            let none = Arc::new(Experiments::unavailable("a benchmark".into()));
            let app = App::new(engine, Arc::clone(&registry), none, shared, settings);
            let stopped = async move { drop(stopped.await) };
            let served =
                tokio::spawn(http::serve(listener, app, stopped, http::Shutdown::default()));
            registry.load_all(|_, _| {}).await.unwrap();
            let ready = |id| match registry.get(id) {
                Some(State::Ready(model)) => model,
                other => panic!("{id}: {other:?}"),
            };
            (url, ready(TEACHER), ready(STUDENT), served)
        });
        Self { url, teacher, student, metrics, stop, runtime, served, _models: models }
    }

    pub(crate) fn stop(self) {
        self.stop.send(()).unwrap();
        self.runtime.block_on(self.served).unwrap().unwrap();
    }
}

/// A request's status and body. Connections are kept by `agent`.
pub(crate) fn post(agent: &ureq::Agent, url: &str, path: &str, body: &Value) -> (u16, Value) {
    let mut response = agent.post(format!("{url}{path}")).send_json(body).unwrap();
    (response.status().as_u16(), response.body_mut().read_json().unwrap())
}

/// An agent for which 429 is an answer like any other.
pub(crate) fn agent() -> ureq::Agent {
    let config = ureq::Agent::config_builder().http_status_as_error(false);
    config.max_idle_connections_per_host(64).build().into()
}

pub(crate) fn verdict(met: bool) -> &'static str {
    if met { "target met" } else { "target MISSED" }
}

fn zoo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/zoo")
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let (path, to) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            copy(&path, &to);
        } else {
            fs::copy(&path, &to).unwrap();
        }
    }
}

/// Half the teacher's width, as its student.
fn write_student(models: &Path) {
    let read = |file: &str| -> Value {
        serde_json::from_slice(&fs::read(zoo().join(TEACHER).join(file)).unwrap()).unwrap()
    };
    let mut unet = read("unet/config.json");
    unet["block_out_channels"] = json!([16, 32, 64]);
    let unet = UNet2DConfig::from_json(&unet, "config.json").unwrap();
    let schedule = read("scheduler/scheduler_config.json");
    let schedule = ScheduleConfig::from_json(&schedule, "scheduler_config.json").unwrap();
    let weights: HashMap<_, _> = NetworkConfig::from(unet.clone())
        .weight_shapes()
        .into_iter()
        .enumerate()
        .map(|(seed, (name, shape))| {
            let mut values = vec![0.0; shape.iter().product()];
            noise::normal(seed as u64, 0, &mut values);
            values.iter_mut().for_each(|value| *value *= 0.05);
            (name, Tensor::from_vec(values, shape, &Device::Cpu).unwrap())
        })
        .collect();
    let mut card = read("understudy.json");
    card["role"] = json!("student");
    card["teacher"] = json!(TEACHER);
    card["recipe"] = json!({"note": "random weights, for benchmarks"});
    let card: Card = serde_json::from_value(card).unwrap();
    ModelFolder::write(
        Draft::new(&models.join(STUDENT)).unwrap(),
        &unet.into(),
        &weights,
        &schedule,
        &card,
    )
    .unwrap();
}
