//! A server over two tiny networks, and what the tests ask it with.

use std::{
    collections::HashMap,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    http::{HeaderMap, HeaderValue, Request, StatusCode, header},
    middleware::map_request,
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use candle_core::{DType, Device, Tensor};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tempfile::TempDir;
use tower::ServiceExt;
use understudy::{
    engine::Engine,
    experiments::Experiments,
    http::{self, App, Settings},
    metrics::Metrics,
    model_folders::ModelFolders,
    registry::{self, Registry},
};
use understudy_models::{
    NetworkConfig,
    checkpoint::{Draft, ModelFolder, card::Card},
    noise,
    schedule::ScheduleConfig,
    unet::UNet2DConfig,
};

use crate::folder::copy;

/// Gray, 8×8, four classes of which the last means "none"; 20,000 training steps, so that a request
/// can be made to take as long as a test needs.
pub(crate) const CLASSES: &str = "classes";
/// RGB, 8×8, unconditional; not a teacher, so not the default.
pub(crate) const PLAIN: &str = "plain";
/// As the default model, but its student; the same weights, so equal requests give equal images. Its
/// card names no null class.
pub(crate) const STUDENT: &str = "student";
/// A text-to-image model.
pub(crate) const TEXT: &str = "text";
/// The first teacher by name, so the default of the servers that have it.
pub(crate) const SLOW_TEACHER: &str = "a-slow-teacher";
/// Steps of a request that must not finish before the test is done with it.
pub(crate) const ENDLESS: usize = 20_000;

pub(crate) struct Server {
    pub(crate) app: App,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) models: TempDir,
    pub(crate) experiments: Arc<Experiments>,
}

pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Vec<u8>,
}

impl Reply {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("not JSON: {}", self.text()))
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
}

impl Server {
    pub(crate) async fn start() -> Self {
        Self::with(|_| {}).await
    }

    /// A server whose operator decided otherwise.
    pub(crate) async fn with(change: impl FnOnce(&mut Settings)) -> Self {
        Self::over(tempfile::tempdir().unwrap(), change).await
    }

    /// A server whose default model has a student.
    pub(crate) async fn pair() -> Self {
        Self::pair_with(|_| {}).await
    }

    /// A server whose default model has a student, and whose operator decided otherwise.
    pub(crate) async fn pair_with(change: impl FnOnce(&mut Settings)) -> Self {
        let models = tempfile::tempdir().unwrap();
        let card = json!({
            "role": "student",
            "teacher": CLASSES,
            "class_names": ["T-shirt/top", "Ankle boot", "Bag", "nothing"],
            "defaults": {"num_inference_steps": 3},
        });
        write_model(models.path(), STUDENT, 1, Some(4), card);
        Self::over(models, change).await
    }

    /// A server whose default model takes [`ENDLESS`] steps unless told otherwise, and has a quick student.
    pub(crate) async fn slow_pair() -> Self {
        let models = tempfile::tempdir().unwrap();
        let slow = json!({"defaults": {"num_inference_steps": ENDLESS}});
        write_model(models.path(), SLOW_TEACHER, 1, Some(4), slow);
        let quick = json!({"role": "student", "teacher": SLOW_TEACHER,
            "defaults": {"num_inference_steps": 3}});
        write_model(models.path(), STUDENT, 1, Some(4), quick);
        Self::over(models, |_| {}).await
    }

    /// A server with two devices, both of them this CPU.
    pub(crate) async fn with_two_devices() -> Self {
        Self::over_devices(tempfile::tempdir().unwrap(), 2, |_| {}).await
    }

    /// A server with a text-to-image model and its student, whose network is the same.
    pub(crate) async fn with_text() -> Self {
        Self::with_text_and(|_| {}).await
    }

    /// The same, whose operator decided otherwise.
    pub(crate) async fn with_text_and(change: impl FnOnce(&mut Settings)) -> Self {
        let models = tempfile::tempdir().unwrap();
        write_text_pair(models.path());
        let change = |settings: &mut Settings| {
            settings.max_body_bytes = 65_536;
            settings.max_pixels = 1024;
            change(settings);
        };
        Self::over(models, change).await
    }

    /// The same, whose default model reads text.
    pub(crate) async fn with_only_text() -> Self {
        let models = tempfile::tempdir().unwrap();
        write_text_pair(models.path());
        Self::over_devices_by(models, 1, Some(TEXT), |_| {}).await
    }

    pub(crate) async fn over(models: TempDir, change: impl FnOnce(&mut Settings)) -> Self {
        Self::over_devices(models, 1, change).await
    }

    async fn over_devices(
        models: TempDir,
        devices: usize,
        change: impl FnOnce(&mut Settings),
    ) -> Self {
        Self::over_devices_by(models, devices, None, change).await
    }

    async fn over_devices_by(
        models: TempDir,
        devices: usize,
        default_model: Option<&str>,
        change: impl FnOnce(&mut Settings),
    ) -> Self {
        let card = json!({
            "class_names": ["T-shirt/top", "Ankle boot", "Bag", "nothing"],
            "null_class": 3,
            "defaults": {"num_inference_steps": 2},
        });
        write_model(models.path(), CLASSES, 1, Some(4), card);
        write_model(models.path(), PLAIN, 3, None, json!({"role": "baseline"}));
        let folder = models.path().to_owned();
        Self::of(models, folder, devices, default_model, change).await
    }

    /// A server of the bundled pair.
    pub(crate) async fn bundled() -> Self {
        let zoo = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/zoo");
        Self::of(tempfile::tempdir().unwrap(), zoo, 1, None, |_| {}).await
    }

    /// A server of the models in `folder`, which keeps its experiments in `models`.
    pub(crate) async fn of(
        models: TempDir,
        folder: PathBuf,
        devices: usize,
        default_model: Option<&str>,
        change: impl FnOnce(&mut Settings),
    ) -> Self {
        let mut settings = Settings {
            max_images: 4,
            max_rows: 8,
            request_timeout: Duration::from_secs(60),
            max_body_bytes: 4096,
            ..Settings::default()
        };
        change(&mut settings);
        let metrics = Metrics::new().unwrap();
        let count = NonZeroUsize::new(devices).unwrap();
        let engine = Engine::start(count, settings.max_rows, Arc::clone(&metrics)).unwrap();
        let where_and_how = registry::Settings {
            folders: ModelFolders::only(vec![folder]),
            default_model: default_model.map(str::to_owned),
            devices: vec![Device::Cpu; devices],
            dtype: DType::F32,
            max_rows: Some(4),
            deterministic: false,
            kept_costs: registry::KeptCosts::default(),
            idle_encoder: None,
        };
        let registry = Registry::open(where_and_how, engine.clone(), Arc::clone(&metrics)).unwrap();
        let registry = Arc::new(registry);
        registry.load_all(|_, _| {}).await.unwrap();
        let experiments = Arc::new(Experiments::open(&models.path().join("data"), false).unwrap());
        metrics.add(experiments.series().unwrap()).unwrap();
        let kept = Arc::clone(&experiments);
        let app = App::new(engine, registry, kept, Arc::clone(&metrics), settings);
        Self { app, metrics, models, experiments }
    }

    /// The application; requests that name no host ask for this machine, as clients do.
    pub(crate) fn router(&self) -> Router {
        let named = |mut request: Request<Body>| async {
            let headers = request.headers_mut();
            headers.entry(header::HOST).or_insert(HeaderValue::from_static("localhost:8080"));
            request
        };
        Router::new().fallback_service(http::router(self.app.clone())).layer(map_request(named))
    }

    pub(crate) async fn send(&self, request: Request<Body>) -> Reply {
        let response = self.router().oneshot(request).await.unwrap();
        let (head, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes().to_vec();
        Reply { status: head.status, headers: head.headers, body }
    }

    pub(crate) async fn get(&self, path: &str) -> Reply {
        self.send(Request::get(path).body(Body::empty()).unwrap()).await
    }

    pub(crate) async fn post(&self, path: &str, body: impl Into<Body>) -> Reply {
        self.send(post(path, body)).await
    }

    pub(crate) async fn compare(&self, body: Value) -> Reply {
        self.post("/v1/compare", body.to_string()).await
    }

    pub(crate) async fn generate(&self, body: Value) -> Reply {
        self.post("/v1/images/generations", body.to_string()).await
    }

    /// The first image that comes of `body` and some fields more, as base64.
    pub(crate) async fn drawn(&self, body: Value, fields: &Value) -> Value {
        let reply = self.generate(with(body, fields)).await;
        assert_eq!(reply.status, 200, "{fields}: {}", reply.text());
        reply.json()["data"][0]["b64_json"].clone()
    }

    /// Lets other tasks run until something is true.
    pub(crate) async fn until(&self, what: &str, is_true: impl Fn(&Self) -> bool) {
        let patience = Duration::from_secs(30);
        let wait = async {
            while !is_true(self) {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(patience, wait).await.unwrap_or_else(|_| panic!("never: {what}"));
    }

    pub(crate) fn running(&self) -> i64 {
        self.metrics.samples_running.with_label_values(&[CLASSES]).get()
    }
}

/// The PNG of an entry: its pixels, and its texts by name.
pub(crate) fn png(entry: &Value) -> (Vec<u8>, Vec<(String, String)>) {
    let bytes = BASE64_STANDARD.decode(entry["b64_json"].as_str().unwrap()).unwrap();
    let mut reader = png::Decoder::new(std::io::Cursor::new(bytes)).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    reader.next_frame(&mut pixels).unwrap();
    let info = reader.info();
    let latin =
        info.uncompressed_latin1_text.iter().map(|it| (it.keyword.clone(), it.text.clone()));
    let utf8 = info.utf8_text.iter().map(|it| (it.keyword.clone(), it.get_text().unwrap()));
    let texts = latin.chain(utf8).collect();
    (pixels, texts)
}

/// Names and bodies of the events of a stream.
pub(crate) fn events(text: &str) -> Vec<(String, Value)> {
    let event = |block: &str| {
        let field = |name: &str| block.lines().find_map(|line| line.strip_prefix(name));
        Some((field("event: ")?.to_owned(), serde_json::from_str(field("data: ")?).unwrap()))
    };
    text.split("\n\n").filter_map(event).collect()
}

/// An object with the members of another.
pub(crate) fn with(mut body: Value, fields: &Value) -> Value {
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    body
}

pub(crate) fn post(path: &str, body: impl Into<Body>) -> Request<Body> {
    Request::post(path).header("content-type", "application/json").body(body.into()).unwrap()
}

/// diffusers' own small text-to-image pipeline, as a teacher and as its student.
fn write_text_pair(folder: &Path) {
    let golden =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/golden/pipeline/stable_diffusion");
    let defaults = |steps: usize| json!({"num_inference_steps": steps, "guidance_scale": 3.0});
    let examples = json!(["red apple, noto style"]);
    let teacher = json!({"defaults": defaults(4), "example_prompts": examples});
    let student = json!({"role": "student", "teacher": TEXT, "defaults": defaults(2)});
    for (id, card) in [(TEXT, teacher), (STUDENT, student)] {
        copy(&golden, &folder.join(id));
        std::fs::write(folder.join(id).join("understudy.json"), card.to_string()).unwrap();
    }
}

/// The same, whose network is told the guidance scale, as a latent consistency model's is.
pub(crate) fn write_told_guidance(folder: &Path, card: &Value) {
    let golden =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/golden/pipeline/stable_diffusion");
    copy(&golden, folder);
    std::fs::write(folder.join("understudy.json"), card.to_string()).unwrap();
    let [config, weights] = ["config.json", "diffusion_pytorch_model.safetensors"]
        .map(|name| folder.join("unet").join(name));
    let text = std::fs::read_to_string(&config).unwrap();
    let mut fields: Value = serde_json::from_str(&text).unwrap();
    fields["time_cond_proj_dim"] = json!(8);
    std::fs::write(&config, fields.to_string()).unwrap();
    let mut tensors = candle_core::safetensors::load(&weights, &Device::Cpu).unwrap();
    let mut values = vec![0.0; 8 * 8];
    noise::normal(1, 0, &mut values);
    let projection = Tensor::from_vec(values, (8, 8), &Device::Cpu).unwrap();
    tensors.insert("time_embedding.cond_proj.weight".into(), projection);
    candle_core::safetensors::save(&tensors, &weights).unwrap();
}

/// A model folder with random weights.
pub(crate) fn write_model(
    folder: &Path,
    id: &str,
    channels: usize,
    classes: Option<usize>,
    card: Value,
) {
    let unet = json!({
        "_class_name": "UNet2DModel",
        "sample_size": 8, "in_channels": channels, "out_channels": channels,
        "block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "add_attention": false,
        "num_class_embeds": classes,
    });
    let unet = UNet2DConfig::from_json(&unet, "config.json").unwrap();
    let schedule = json!({"_class_name": "DDIMScheduler", "num_train_timesteps": ENDLESS,
        "beta_start": 1e-6, "beta_end": 1e-4});
    let schedule = ScheduleConfig::from_json(&schedule, "scheduler_config.json").unwrap();
    let shapes = NetworkConfig::from(unet.clone()).weight_shapes();
    let weights: HashMap<_, _> = shapes
        .into_iter()
        .enumerate()
        .map(|(seed, (name, shape))| {
            let mut values = vec![0.0; shape.iter().product()];
            noise::normal(seed as u64, 0, &mut values);
            values.iter_mut().for_each(|value| *value *= 0.1);
            (name, Tensor::from_vec(values, shape, &Device::Cpu).unwrap())
        })
        .collect();
    let card: Card = serde_json::from_value(card).unwrap();
    let draft = Draft::new(&folder.join(id)).unwrap();
    ModelFolder::write(draft, &unet.into(), &weights, &schedule, &card).unwrap();
}
