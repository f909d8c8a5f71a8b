//! What the operator asked for, checked once and trusted from then on.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{
    cli::{LogFormat, ServeArgs},
    http, registry,
};

/// A valid configuration of `serve`.
#[derive(Debug, Clone)]
pub struct Config {
    /// Address to listen on.
    pub host: String,
    /// Port to listen on; 0 for any free one.
    pub port: u16,
    /// Images that may wait or run at a time.
    pub max_queue: usize,
    /// Where and how models are loaded.
    pub registry: registry::Settings,
    /// Where experiments and votes are kept.
    pub data: DataFolder,
    /// What HTTP is told.
    pub http: http::Settings,
    /// How long requests in flight get at shutdown.
    pub drain: Duration,
    /// How log lines are written.
    pub log_format: LogFormat,
}

impl Config {
    /// Checks the arguments.
    ///
    /// # Errors
    /// A sentence that names the flag, its value and the remedy.
    pub fn new(arguments: ServeArgs) -> Result<Self, String> {
        let devices = arguments.compute.devices()?;
        if let Some(key) = arguments.api_key.iter().find(|key| key.trim().is_empty()) {
            return Err(format!(
                "--api-key {key:?}: a key may not be empty; leave the flag out for none"
            ));
        }
        for origin in &arguments.cors_allow_origin {
            check_origin(origin)?;
        }
        let max_queue = arguments.max_queue.get();
        Ok(Self {
            host: arguments.host,
            port: arguments.port,
            max_queue,
            registry: registry::Settings {
                folder: models_folder(arguments.models.as_deref())?,
                default_model: arguments.default_model,
                dtype: arguments.compute.dtype(&devices[0])?,
                devices,
                max_rows: arguments.max_batch.map(Into::into),
                deterministic: arguments.deterministic,
            },
            data: match arguments.data_dir {
                Some(folder) => DataFolder::Named(folder),
                None => DataFolder::Default(default_data_folder()),
            },
            http: http::Settings {
                max_images: arguments.max_images_per_request.get().min(max_queue),
                max_rows: max_queue,
                request_timeout: Duration::from_secs(arguments.request_timeout_seconds.get()),
                max_body_bytes: arguments.max_body_bytes.get(),
                api_keys: arguments.api_key,
                api_key_everywhere: arguments.api_key_everywhere,
                cors_allow_origin: arguments.cors_allow_origin,
                shadow_rate: shadow_rate(arguments.shadow_rate)?,
            },
            drain: Duration::from_secs(arguments.drain_seconds),
            log_format: arguments.log_format,
        })
    }
}

/// A folder for what is kept over restarts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DataFolder {
    /// The operator named it, so it must be usable.
    Named(PathBuf),
    /// Where such things are kept for this user, if there is such a place. It is made when something is to
    /// be kept, and a server that cannot use it serves all the same.
    Default(Option<PathBuf>),
}

/// `understudy` in the user's folder of states: the XDG base directory specification's, on any system.
fn default_data_folder() -> Option<PathBuf> {
    let named = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from);
    let states = named.filter(|folder| folder.is_absolute());
    let home = || Some(std::env::home_dir()?).filter(|home| home.is_absolute());
    let states = states.or_else(|| Some(home()?.join(".local/state")))?;
    Some(states.join("understudy"))
}

fn shadow_rate(rate: f64) -> Result<f64, String> {
    if (0.0..=1.0).contains(&rate) {
        return Ok(rate);
    }
    Err(format!("--shadow-rate {rate}: a share, so write a number from 0 (none) to 1 (all)"))
}

/// An origin is a scheme, a host and perhaps a port; browsers send no more.
fn check_origin(origin: &str) -> Result<(), String> {
    let host = origin.strip_prefix("http://").or(origin.strip_prefix("https://"));
    let bare = host.is_some_and(|host| {
        !host.is_empty() && host.bytes().all(|b| b.is_ascii_graphic() && b != b'/')
    });
    if bare || origin == "*" {
        return Ok(());
    }
    Err(format!(
        "--cors-allow-origin {origin}: not an origin; write scheme, host and port as in https://example.org:8443, or *"
    ))
}

/// The folder asked for, else the bundled models, wherever the binary runs.
pub(crate) fn models_folder(asked: Option<&Path>) -> Result<PathBuf, String> {
    if let Some(folder) = asked {
        return Ok(folder.to_owned());
    }
    let zoo = Path::new("models/zoo");
    let executable = std::env::current_exe().ok().and_then(|path| fs::canonicalize(path).ok());
    let beside = executable.and_then(|path| Some(path.parent()?.join(zoo)));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(zoo);
    let places = [Some(zoo.to_owned()), beside, Some(source)];
    let there = places.iter().flatten().find(|folder| folder.is_dir());
    there.cloned().ok_or_else(|| {
        let places: Vec<_> =
            places.iter().flatten().map(|folder| format!("\n  {}", folder.display())).collect();
        format!(
            "the bundled models are in none of these places; name a folder with --models{}",
            places.concat()
        )
    })
}
