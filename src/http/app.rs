//! What every handler may use.

use std::{sync::Arc, time::Duration};

use tokio::sync::Semaphore;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{engine::Engine, experiments::Experiments, metrics::Metrics, registry::Registry};

/// What the operator decided about HTTP. Valid from here on.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Most images of one request: the smaller of `--max-images-per-request` and `--max-queue`.
    pub max_images: usize,
    /// Most rows of one inference: `--max-queue`.
    pub max_rows: usize,
    /// A request that takes longer is answered with 504.
    pub request_timeout: Duration,
    /// Most bytes of a request's body; inference has a limit of its own.
    pub max_body_bytes: usize,
    /// Keys of which a request must present one; none asks for none.
    pub api_keys: Vec<String>,
    /// Whether health and metrics ask for the key as well.
    pub api_key_everywhere: bool,
    /// Origins whose pages may read replies; `*` is any.
    pub cors_allow_origin: Vec<String>,
    /// The share of students' requests that their teachers repeat when nothing else is to do, 0 to 1.
    pub shadow_rate: f64,
}

/// The application's parts; cheap to clone.
#[derive(Clone)]
pub struct App {
    pub(super) engine: Engine,
    pub(super) registry: Arc<Registry>,
    pub(super) experiments: Arc<Experiments>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) settings: Arc<Settings>,
    /// Cancelled when the server begins to shut down.
    pub(super) draining: CancellationToken,
    /// Generations and inferences, each holding a token until its last byte is made.
    pub(super) in_flight: TaskTracker,
    /// One request is repeated by a teacher at a time.
    pub(super) shadow_turn: Arc<Semaphore>,
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
        Self {
            engine,
            registry,
            experiments,
            metrics,
            settings: Arc::new(settings),
            draining: CancellationToken::new(),
            in_flight: TaskTracker::new(),
            shadow_turn: Arc::new(Semaphore::new(1)),
        }
    }
}
