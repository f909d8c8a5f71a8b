//! What every handler may use.

use std::{collections::BTreeMap, ops::Deref, sync::Arc, time::Duration};

use tokio::sync::Semaphore;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use understudy_models::checkpoint::Lora;

use super::{Host, body::Budget};
use crate::{
    engine::{Client, Engine},
    experiments::Experiments,
    metrics::Metrics,
    registry::Registry,
    traces::Traces,
};

/// What the operator decided about HTTP. Valid from here on.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Most images of one request: the smaller of `--max-images-per-request` and `--max-queue`.
    pub max_images: usize,
    /// Pixels of an image, at most, of models that make several sizes.
    pub max_pixels: usize,
    /// Most rows of one inference: `--max-queue`.
    pub max_rows: usize,
    /// A request that takes longer is answered with 504.
    pub request_timeout: Duration,
    /// Most bytes of a request's body; inference has a limit of its own.
    pub max_body_bytes: usize,
    /// Bytes of memory for all bodies that are being read and parsed.
    pub body_budget_bytes: usize,
    /// Most connections at a time, as [`super::most_connections`] has them.
    pub max_connections: usize,
    /// A request's head must be here so long after its first byte.
    pub head_timeout: Duration,
    /// The next byte of a request's body must be here so long after the last.
    pub body_timeout: Duration,
    /// A connection without a request, or one whose client takes nothing of its answer, is closed after so long.
    pub idle_timeout: Duration,
    /// Keys of which a request must present one; none asks for none.
    pub api_keys: Vec<String>,
    /// Keys of which one must be presented to load and unload models and to delete experiments. Without any these are
    /// open where the server is `private`, and closed elsewhere.
    pub admin_keys: Vec<String>,
    /// Whether health and metrics ask for the key as well.
    pub api_key_everywhere: bool,
    /// Origins whose pages may use the server and read replies; `*` is any.
    pub cors_allow_origin: Vec<String>,
    /// Whether only this machine reaches the server: it is bound to a loopback address.
    pub loopback: bool,
    /// Whether nobody else does by way of a proxy either: no other host was named.
    pub private: bool,
    /// Hosts that the server answers to beside this machine's own names; without any, all of them where others
    /// reach it.
    pub allowed_hosts: Vec<Host>,
    /// LoRAs that requests may name.
    pub loras: BTreeMap<String, Lora>,
    /// The share of students' requests that their teachers repeat when nothing else is to do, 0 to 1.
    pub shadow_rate: f64,
}

/// What the flags say where nobody decides otherwise, for a server that only this machine reaches.
impl Default for Settings {
    fn default() -> Self {
        Self {
            max_images: 16,
            max_pixels: 1 << 20,
            max_rows: 256,
            request_timeout: Duration::from_secs(300),
            max_body_bytes: 2 << 20,
            body_budget_bytes: 512 << 20,
            max_connections: 1024,
            head_timeout: Duration::from_secs(10),
            body_timeout: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(60),
            api_keys: Vec::new(),
            admin_keys: Vec::new(),
            api_key_everywhere: false,
            cors_allow_origin: Vec::new(),
            loopback: true,
            private: true,
            allowed_hosts: Vec::new(),
            loras: BTreeMap::new(),
            shadow_rate: 0.0,
        }
    }
}

/// The application's parts, behind one count of who has them: every layer of every request has them once more.
#[derive(Clone)]
pub struct App(Arc<Parts>);

/// What [`App`] holds.
#[derive(Clone)]
pub struct Parts {
    pub(super) engine: Engine,
    pub(super) registry: Arc<Registry>,
    pub(super) experiments: Arc<Experiments>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) settings: Arc<Settings>,
    /// Cancelled when the server is told to stop: it is not ready any more.
    pub(super) stopping: CancellationToken,
    /// Cancelled when it takes no new work any more.
    pub(super) draining: CancellationToken,
    /// Generations and inferences, each holding a token until its last byte is made.
    pub(super) in_flight: TaskTracker,
    /// Memory for bodies.
    pub(super) bodies: Arc<Budget>,
    /// One request is repeated by a teacher at a time.
    pub(super) shadow_turn: Arc<Semaphore>,
    /// Where traces go.
    pub(super) traces: Option<Traces>,
}

impl App {
    /// Puts the parts together.
    pub fn new(
        engine: Engine,
        registry: Arc<Registry>,
        experiments: Arc<Experiments>,
        metrics: Arc<Metrics>,
        settings: Settings,
    ) -> Self {
        Self(Arc::new(Parts {
            bodies: Budget::new(settings.body_budget_bytes),
            engine,
            registry,
            experiments,
            metrics,
            settings: Arc::new(settings),
            stopping: CancellationToken::new(),
            draining: CancellationToken::new(),
            in_flight: TaskTracker::new(),
            shadow_turn: Arc::new(Semaphore::new(1)),
            traces: None,
        }))
    }

    /// The same, with traces of its requests.
    pub fn traced(self, traces: Option<Traces>) -> Self {
        Self(Arc::new(Parts { traces, ..Arc::unwrap_or_clone(self.0) }))
    }

    /// The same, asking the engine on a client's behalf.
    pub(super) fn on_behalf_of(&self, client: Client) -> Self {
        let engine = self.engine.on_behalf_of(client);
        Self(Arc::new(Parts { engine, ..Parts::clone(self) }))
    }
}

impl Deref for App {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.0
    }
}
