//! `understudy serve`: from arguments to a running server.

use std::{
    io::{self, ErrorKind, IsTerminal},
    net::SocketAddr,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use clap::{Args, ValueEnum, builder::RangedU64ValueParser};
use tokio::net::TcpListener;
#[cfg(unix)]
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::{
    announcement,
    compute::{Compute, device_names},
    faults,
    log::Log,
    models_arg::ModelsArg,
    port, throughput,
};
use crate::{
    config::{Config, Data},
    engine::Engine,
    experiments::Experiments,
    http::{self, App},
    metrics::Metrics,
    registry::{Registry, State},
    traces::Traces,
};

/// Arguments of `serve`, as typed; [`Config`] is what they mean.
#[derive(Debug, Clone, Args)]
pub struct ServeArgs {
    /// Address to listen on; 0.0.0.0 for every interface.
    #[arg(long, env = "UNDERSTUDY_HOST", default_value = "127.0.0.1", help_heading = "Address")]
    pub host: String,
    /// Port to listen on; 0 for any free one.
    #[arg(
        long,
        env = "UNDERSTUDY_PORT",
        default_value_t = port::DEFAULT,
        value_parser = port::parse,
        help_heading = "Address"
    )]
    pub port: u16,
    #[command(flatten)]
    pub(crate) models: ModelsArg,
    /// A model and its folder, such as `sd=/mnt/models`; repeatable. The models of --models are served as well where
    /// that is given, the bundled ones where it is not and this is not either.
    #[arg(long, env = "UNDERSTUDY_MODEL", value_name = "NAME=DIR", value_delimiter = ',', value_parser = named_folder)]
    pub model: Vec<(String, PathBuf)>,
    /// The model that serves requests which name none: an id, or a Hugging Face Hub id (owner/name),
    /// which is downloaded and serves as owner--name [default: the first teacher by name that has a student,
    /// those that read no text first].
    #[arg(long, env = "UNDERSTUDY_DEFAULT_MODEL", value_name = "ID")]
    pub default_model: Option<String>,
    /// A LoRA that requests may name in `lora`; may be given several times. A card's `loras` are always added.
    #[arg(
        long,
        env = "UNDERSTUDY_LORA",
        value_name = "NAME=FILE",
        value_delimiter = ',',
        value_parser = named_lora)]
    pub lora: Vec<(String, PathBuf)>,
    #[command(flatten)]
    pub(crate) compute: Compute,
    /// Images that may wait or run at a time; more are refused with 429.
    #[arg(
        long,
        env = "UNDERSTUDY_MAX_QUEUE",
        value_name = "IMAGES",
        default_value = "256",
        value_parser = whole::<usize>(1, MOST_IMAGES), help_heading = "Limits")]
    pub max_queue: usize,
    /// Images that one request may ask for.
    #[arg(
        long,
        env = "UNDERSTUDY_MAX_IMAGES_PER_REQUEST",
        value_name = "IMAGES",
        default_value = "16",
        value_parser = whole::<usize>(1, MOST_IMAGES), help_heading = "Limits")]
    pub max_images_per_request: usize,
    /// Pixels of an image, of models that make several sizes.
    #[arg(
        long,
        env = "UNDERSTUDY_MAX_PIXELS",
        value_name = "PIXELS",
        default_value = "1048576",
        value_parser = whole::<usize>(1, MOST_PIXELS), help_heading = "Limits")]
    pub max_pixels: usize,
    /// Rows of one network evaluation [default: as many as the warm-up finds useful].
    #[arg(
        long,
        env = "UNDERSTUDY_MAX_BATCH",
        value_name = "ROWS",
        value_parser = whole::<usize>(1, 1024), help_heading = "Limits")]
    pub max_batch: Option<usize>,
    /// On a GPU, give every evaluation --max-batch rows, empty ones where there are fewer, so that the bits of
    /// an image do not depend on who shares its evaluations. On a CPU they never do.
    #[arg(long, env = "UNDERSTUDY_DETERMINISTIC", requires = "max_batch", help_heading = "Limits")]
    pub deterministic: bool,
    /// Seconds without a new prompt after which a text encoder of T5's kind gives its memory back. Such an encoder is read when
    /// it is first needed, and again then [default: it stays].
    #[arg(
        long,
        env = "UNDERSTUDY_IDLE_ENCODER_SECONDS",
        value_name = "SECONDS",
        value_parser = whole::<u64>(1, DAY), help_heading = "Limits")]
    pub idle_encoder_seconds: Option<u64>,
    /// Seconds after which a request is answered with 504.
    #[arg(
        long,
        env = "UNDERSTUDY_REQUEST_TIMEOUT_SECONDS",
        value_name = "SECONDS",
        default_value = "300",
        value_parser = whole::<u64>(1, DAY), help_heading = "Limits")]
    pub request_timeout_seconds: u64,
    /// Seconds for which a server that was told to stop still takes requests, while its health says that it is not
    /// ready: until then whoever routes requests to it may not have noticed.
    #[arg(
        long,
        env = "UNDERSTUDY_SHUTDOWN_DELAY_SECONDS",
        value_name = "SECONDS",
        default_value = "0",
        value_parser = whole::<u64>(0, DAY), help_heading = "Limits")]
    pub shutdown_delay_seconds: u64,
    /// Seconds that requests in flight get to finish at shutdown, after that delay.
    #[arg(
        long,
        env = "UNDERSTUDY_DRAIN_SECONDS",
        value_name = "SECONDS",
        default_value = "10",
        value_parser = whole::<u64>(0, DAY), help_heading = "Limits")]
    pub drain_seconds: u64,
    /// Bytes of a request's body (64 MiB for /v2/…/infer).
    #[arg(
        long,
        env = "UNDERSTUDY_MAX_BODY_BYTES",
        value_name = "BYTES",
        default_value = "2097152",
        value_parser = whole::<usize>(1, 1 << 40), help_heading = "Limits")]
    pub max_body_bytes: usize,
    /// Bytes of memory for all bodies that are being read and parsed; a body takes three times its length, and at most
    /// half of what is left.
    #[arg(
        long,
        env = "UNDERSTUDY_BODY_BUDGET_BYTES",
        value_name = "BYTES",
        default_value = "536870912",
        value_parser = whole::<usize>(1, 1 << 40), help_heading = "Limits")]
    pub body_budget_bytes: usize,
    /// Connections at a time [default: as many as the limit on open files leaves, at most 4096]. Beyond them one that is
    /// idle is closed; where none is, only health and metrics answer.
    #[arg(
        long,
        env = "UNDERSTUDY_MAX_CONNECTIONS",
        value_name = "N",
        value_parser = whole::<usize>(1, 1 << 20), help_heading = "Limits")]
    pub max_connections: Option<usize>,
    /// Seconds in which the head of a request must arrive.
    #[arg(
        long,
        env = "UNDERSTUDY_HEAD_TIMEOUT_SECONDS",
        value_name = "SECONDS",
        default_value = "10",
        value_parser = whole::<u64>(1, DAY), help_heading = "Limits")]
    pub head_timeout_seconds: u64,
    /// Seconds without a byte after which a request's body is given up.
    #[arg(
        long,
        env = "UNDERSTUDY_BODY_TIMEOUT_SECONDS",
        value_name = "SECONDS",
        default_value = "30",
        value_parser = whole::<u64>(1, DAY), help_heading = "Limits")]
    pub body_timeout_seconds: u64,
    /// Seconds after which a connection without a request is closed, or one whose client takes nothing of its answer.
    #[arg(
        long,
        env = "UNDERSTUDY_IDLE_TIMEOUT_SECONDS",
        value_name = "SECONDS",
        default_value = "60",
        value_parser = whole::<u64>(1, DAY), help_heading = "Limits")]
    pub idle_timeout_seconds: u64,
    /// A key that requests must present as `Authorization: Bearer KEY`; repeat it, or separate keys
    /// with commas, for several. Health, metrics and documentation stay open.
    #[arg(
        long,
        env = "UNDERSTUDY_API_KEY",
        value_name = "KEY",
        value_delimiter = ',',
        hide_env_values = true,
        help_heading = "Access"
    )]
    pub api_key: Vec<String>,
    /// Ask for the API key on health and metrics too.
    #[arg(long, env = "UNDERSTUDY_API_KEY_EVERYWHERE", help_heading = "Access")]
    pub api_key_everywhere: bool,
    /// A key that loading and unloading models and deleting experiments want, as `Authorization: Bearer KEY`; it opens
    /// everything else, too. Without one they are open on a loopback address without an --allowed-host, and closed where
    /// others reach the server.
    #[arg(
        long,
        env = "UNDERSTUDY_ADMIN_KEY",
        value_name = "KEY",
        value_delimiter = ',',
        hide_env_values = true,
        help_heading = "Access"
    )]
    pub admin_key: Vec<String>,
    /// A host that the server answers to beside localhost, such as `pictures.example.org`; repeatable. On a loopback
    /// address all others are refused; elsewhere they are once there is one.
    #[arg(
        long,
        env = "UNDERSTUDY_ALLOWED_HOST",
        value_name = "HOST",
        value_delimiter = ',',
        help_heading = "Access"
    )]
    pub allowed_host: Vec<String>,
    /// An origin whose pages may call this server, such as `https://example.org`, or `*`; repeatable.
    #[arg(
        long,
        env = "UNDERSTUDY_CORS_ALLOW_ORIGIN",
        value_name = "ORIGIN",
        value_delimiter = ',',
        help_heading = "Access"
    )]
    pub cors_allow_origin: Vec<String>,
    /// The share of students' requests, 0 to 1, that their teachers repeat on the same noise when nothing
    /// else is to do; how alike the images are shows in the metrics.
    #[arg(
        long,
        env = "UNDERSTUDY_SHADOW_RATE",
        value_name = "SHARE",
        default_value_t = 0.0,
        help_heading = "Quality and records"
    )]
    pub shadow_rate: f64,
    /// Folder where experiments and votes are kept over restarts, made when it is not there
    /// [default: $XDG_STATE_HOME/understudy, else ~/.local/state/understudy].
    #[arg(
        long,
        env = "UNDERSTUDY_DATA_DIR",
        value_name = "DIR",
        help_heading = "Quality and records"
    )]
    pub data_dir: Option<PathBuf>,
    /// A PostgreSQL database (13 or later) that keeps experiments and votes instead of a folder, and that several servers may
    /// share: `postgres://USER:PASSWORD@HOST:PORT/DATABASE`. Its tables are made at the first start.
    #[arg(
        long,
        env = "UNDERSTUDY_DATABASE_URL",
        value_name = "URL",
        conflicts_with = "data_dir",
        hide_env_values = true,
        help_heading = "Quality and records"
    )]
    pub database_url: Option<String>,
    /// How log lines are written.
    #[arg(
        long,
        env = "UNDERSTUDY_LOG_FORMAT",
        default_value = "text",
        help_heading = "Quality and records"
    )]
    pub log_format: LogFormat,
}

/// A name and a path, with `=` between them; `example` is what the remedy shows.
fn named_path(text: &str, example: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && !path.is_empty() => {
            Ok((name.into(), path.into()))
        }
        _ => Err(format!("write a name and a path, such as {example}")),
    }
}

/// A model's name and its folder.
fn named_folder(text: &str) -> Result<(String, PathBuf), String> {
    named_path(text, "sd=/mnt/models")
}

/// A LoRA's name and its file.
fn named_lora(text: &str) -> Result<(String, PathBuf), String> {
    named_path(text, "watercolour=loras/watercolour.safetensors")
}

/// Seconds of a day: nobody waits longer.
const DAY: u64 = 24 * 60 * 60;

/// Most images in a queue: each takes memory, and admission looks at all of them.
const MOST_IMAGES: u64 = 65_536;
/// A square of 16,384, which no network here reaches.
const MOST_PIXELS: u64 = 1 << 28;

/// Whole numbers from `least` to `most`, which are what the flag's number is used for.
fn whole<T: TryFrom<u64> + Clone + Send + Sync>(least: u64, most: u64) -> RangedU64ValueParser<T> {
    RangedU64ValueParser::new().range(least..=most)
}

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// How long the end waits for the last lines of the log.
const LAST_LINES: Duration = Duration::from_millis(200);

/// How long the end waits for a collector to take the last spans.
const LAST_SPANS: Duration = Duration::from_secs(3);

/// How long the end waits for the database of experiments.
const CLOSING: Duration = Duration::from_secs(5);

/// Serves until the process is told to stop.
pub(super) fn run(arguments: ServeArgs, threads: NonZeroUsize) -> Result<(), String> {
    let config = Config::new(arguments)?;
    let lines = Log::start(io::stderr())?;
    log(config.log_format, lines.clone());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("no async runtime: {error}"))?;
    let ended = runtime.block_on(serve(config, threads, &lines));
    // Loads, downloads and the like end with the process; nobody waits for them.
    runtime.shutdown_background();
    lines.flush(LAST_LINES);
    ended
}

async fn serve(config: Config, threads: NonZeroUsize, lines: &Log) -> Result<(), String> {
    let began = Instant::now();
    let stop = stop().map_err(|error| format!("signals cannot be received: {error}"))?;
    // First, so that a taken port is known before minutes of loading.
    let listener = listen(&config).await?;
    let address = listener.local_addr().map_err(|error| error.to_string())?;
    let settings = reachable(&config, address);
    let metrics = Metrics::new().map_err(|error| error.to_string())?;
    let dropped = metrics.add(Box::new(lines.dropped.clone()));
    dropped.map_err(|error| error.to_string())?;
    let traces = config.traces.as_ref().map(Traces::start).transpose()?;
    for series in traces.iter().flat_map(Traces::series) {
        metrics.add(series).map_err(|error| error.to_string())?;
    }
    if let Some(settings) = &config.traces {
        tracing::info!(endpoint = %settings.endpoint, "traces are sent to a collector");
    }
    let (experiments, kept) = experiments(&config.data).await?;
    let experiments = Arc::new(experiments);
    let series = experiments.series().and_then(|series| metrics.add(series));
    series.map_err(|error| error.to_string())?;
    #[cfg(feature = "cuda")]
    if let Err(problem) = crate::gpu::watch(&config.registry.devices, &metrics) {
        tracing::warn!(problem, "no metrics of the GPU");
    }
    let devices = NonZeroUsize::new(config.registry.devices.len()).unwrap_or(NonZeroUsize::MIN);
    let engine = Engine::start(devices, config.max_queue, Arc::clone(&metrics))
        .map_err(|error| format!("no thread for the device: {error}"))?;
    let registry = Registry::open(config.registry.clone(), engine.clone(), Arc::clone(&metrics))?;
    let registry = Arc::new(registry);
    // What is said on standard output waits for nobody who reads it, as the log does not.
    let announced = Log::start(io::stdout())?;
    let device = device_names(&config.registry.devices);
    let models = registry.list().len();
    announced.line(&announcement::opening(address, &device, threads.get(), &kept, models));
    let logged = tokio::spawn(throughput::log(Arc::clone(&metrics)));
    let unloading = tokio::spawn(Arc::clone(&registry).unload_idle_encoders());
    let app = App::new(engine, Arc::clone(&registry), Arc::clone(&experiments), metrics, settings)
        .traced(traces.clone());

    // Health answers 503 while models load, instead of no answer at all.
    let server = http::serve(listener, app, stop.cancelled_owned(), config.shutdown);
    let load = async {
        let tried = |id: &str, state: &State| announced.line(&announcement::model(id, state));
        registry.load_all(tried).await?;
        let default = registry.default_id().unwrap_or_default();
        let wants_key = !config.http.api_keys.is_empty();
        let seconds = began.elapsed().as_secs_f64();
        announced.line(&announcement::ready(address, default, seconds, wants_key));
        Ok::<_, String>(())
    };
    let served = async {
        tokio::pin!(server);
        tokio::select! {
            ended = &mut server => return ended.map_err(|error| error.to_string()),
            loaded = load => loaded?,
        }
        server.await.map_err(|error| error.to_string())
    };
    let ended = served.await;
    logged.abort();
    unloading.abort();
    announced.flush(LAST_LINES);
    if let Some(traces) = traces {
        let ended = tokio::task::spawn_blocking(move || traces.end(LAST_SPANS)).await;
        if let Err(problem) = ended.map_err(|error| error.to_string()).flatten() {
            tracing::warn!(problem, "the last spans are lost");
        }
    }
    let closed = tokio::time::timeout(CLOSING, experiments.close()).await;
    let closed = closed.map_err(|_| {
        format!("the database of experiments did not close within {} s", CLOSING.as_secs())
    });
    ended.and(closed.and_then(|closed| closed.map_err(|error| error.to_string())))
}

/// Cancelled by the first SIGINT or SIGTERM; the second ends the process, whatever it is doing.
fn stop() -> io::Result<CancellationToken> {
    let stop = CancellationToken::new();
    let first = stop.clone();
    let mut signals = Signals::new()?;
    tokio::spawn(async move {
        signals.next().await;
        first.cancel();
        let code = signals.next().await;
        std::process::exit(code);
    });
    Ok(stop)
}

/// What tells a process to stop.
#[cfg(unix)]
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

#[cfg(unix)]
impl Signals {
    fn new() -> io::Result<Self> {
        let interrupt = signal(SignalKind::interrupt())?;
        Ok(Self { interrupt, terminate: signal(SignalKind::terminate())? })
    }

    /// The next one, as the exit code of a process that it ended.
    async fn next(&mut self) -> i32 {
        let kind = tokio::select! {
            _ = self.interrupt.recv() => SignalKind::interrupt(),
            _ = self.terminate.recv() => SignalKind::terminate(),
        };
        128 + kind.as_raw_value()
    }
}

/// What tells a process to stop.
#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self)
    }

    async fn next(&mut self) -> i32 {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
        130
    }
}

/// What HTTP is told, now that it is known who reaches the server.
fn reachable(config: &Config, address: SocketAddr) -> http::Settings {
    let mut settings = config.http.clone();
    settings.loopback = address.ip().to_canonical().is_loopback();
    settings.private = settings.loopback && settings.allowed_hosts.is_empty();
    if settings.loopback {
        // The name that it was started with is one of its names.
        settings.allowed_hosts.extend(config.host.parse::<http::Host>().ok());
    } else if settings.api_keys.is_empty() {
        tracing::warn!(
            %address,
            "other machines reach this server, and whoever does may use it: give it an --api-key, or --host 127.0.0.1"
        );
    }
    settings
}

/// The experiments, and where they are kept as the announcement says it. A folder or a database that was named must be
/// usable; without the default folder there are no experiments, and whoever asks for them is told why.
async fn experiments(data: &Data) -> Result<(Experiments, String), String> {
    let none = |problem: String| {
        tracing::warn!(problem, "no experiments");
        (Experiments::unavailable(problem.clone()), format!("no experiments: {problem}"))
    };
    let kept = |folder: &Path| format!("{} (experiments, votes)", folder.display());
    match data {
        Data::Shared(database) => {
            // It waits for the database on a thread of its own, as the one that owns it will.
            let database = database.as_ref().clone();
            let place = Experiments::place(&database);
            let opened = tokio::task::spawn_blocking(move || Experiments::shared(&database));
            let opened = opened.await.map_err(|error| error.to_string()).flatten();
            let experiments = opened.map_err(|problem| format!("--database-url: {problem}"))?;
            Ok((experiments, format!("{place} (experiments, votes)")))
        }
        Data::Named(folder) => {
            let experiments = Experiments::open(folder, true)
                .map_err(|problem| format!("--data-dir: {problem}"))?;
            Ok((experiments, kept(folder)))
        }
        Data::Default(Some(folder)) => Ok(match Experiments::open(folder, false) {
            Ok(experiments) => (experiments, kept(folder)),
            Err(problem) => none(problem),
        }),
        Data::Default(None) => {
            Ok(none("this user has no home; name a folder with --data-dir".into()))
        }
    }
}

async fn listen(config: &Config) -> Result<TcpListener, String> {
    let (host, port) = (config.host.as_str(), config.port);
    TcpListener::bind((host, port)).await.map_err(|error| match error.kind() {
        ErrorKind::AddrInUse => format!(
            "port {port} on {host} is in use by another program; choose another with --port, or --port 0 for any free one"
        ),
        ErrorKind::PermissionDenied => {
            format!("port {port} on {host} may not be used ({error}); choose one above 1023 with --port")
        }
        _ => format!("cannot listen on {host}:{port} ({error}); check --host and --port"),
    })
}

fn log(format: LogFormat, lines: Log) {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let format_lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(io::stderr().is_terminal())
        .with_writer(lines.clone())
        // It would tell of a line that standard error does not take on standard error, and panic.
        .log_internal_errors(false);
    match format {
        LogFormat::Text => format_lines.init(),
        LogFormat::Json => format_lines.json().flatten_event(true).with_span_list(false).init(),
    }
    // The default one writes to standard error itself, and waits for it.
    std::panic::set_hook(Box::new(move |panic| {
        tracing::error!("{}", faults::sentence(panic));
        // It may be the last that the process says.
        lines.flush(LAST_LINES);
    }));
}
