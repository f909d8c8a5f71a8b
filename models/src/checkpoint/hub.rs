//! Hugging Face Hub ids: `owner/name` becomes a local folder in the diffusers layout.
//!
//! Only what serving reads is downloaded, weights last, into the cache that Python's tools share. One
//! commit is fetched, and the cache's `main` points to it only once it is whole; a whole snapshot is
//! served without asking the network again.

use std::{
    env, fs,
    io::{self, IsTerminal},
    path::{Path, PathBuf},
};

use hf_hub::{
    Cache, Repo, RepoType,
    api::sync::{ApiBuilder, ApiError, ApiRepo},
};
use serde::Deserialize;

use super::folder::{CARD, ModelFolder, WEIGHTS};
use crate::{Error, NetworkConfig, Result};

const PUBLIC: &str = "https://huggingface.co";

/// The folder of a `MODEL` argument: a folder, the name of one inside `models`, or a Hub id, which is
/// downloaded unless it is in the cache. Blocks while it downloads.
///
/// # Errors
/// [`Error::Value`] when it is none of the three, else those of [`Hub::fetch`].
pub fn resolve(model: &str, models: &Path) -> Result<PathBuf> {
    if is_model(Path::new(model)) {
        return Ok(model.into());
    }
    if is_name(model) && is_model(&models.join(model)) {
        return Ok(models.join(model));
    }
    if is_hub_id(model) {
        return Hub::from_env()?.fetch(model);
    }
    let remedy = format!(
        "name a folder with a model_index.json, a model inside {}, or a Hugging Face Hub id (owner/name)",
        models.display()
    );
    Err(Error::value("MODEL", format!("\"{model}\""), remedy))
}

fn is_model(folder: &Path) -> bool {
    folder.join("model_index.json").is_file()
}

/// The id that a model serves under: `owner--name` for a Hub id, else the name itself.
pub fn id_of(model: &str) -> String {
    if is_hub_id(model) { model.replace('/', "--") } else { model.to_owned() }
}

/// Whether it reads `owner/name`.
pub fn is_hub_id(model: &str) -> bool {
    model.split_once('/').is_some_and(|(owner, name)| is_name(owner) && is_name(name))
}

fn is_name(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    !text.is_empty() && text.chars().all(plain) && !text.starts_with('.')
}

/// Where models come from, and where they are kept.
pub struct Hub {
    endpoint: String,
    cache: Cache,
    token: Option<String>,
}

impl Hub {
    /// The hub at `endpoint` (no trailing slash), cached in `home`/hub; `token` opens private and gated
    /// repositories.
    pub fn new(endpoint: &str, home: &Path, token: Option<String>) -> Self {
        let cache = Cache::new(home.join("hub"));
        Self { endpoint: endpoint.trim_end_matches('/').to_owned(), cache, token }
    }

    /// The hub that `HF_ENDPOINT` (<https://huggingface.co>), `HF_HOME` (`~/.cache/huggingface`) and
    /// `HF_TOKEN` (what `huggingface-cli login` left in `HF_HOME`) name.
    ///
    /// # Errors
    /// [`Error::Value`] when neither `HF_HOME` nor a home folder is known.
    pub fn from_env() -> Result<Self> {
        // A variable that is there but empty, as compose files make them, says nothing.
        let variable = |name| env::var(name).ok().filter(|value| !value.is_empty());
        let home =
            match variable("HF_HOME") {
                Some(home) => PathBuf::from(home),
                None => env::home_dir().map(|home| home.join(".cache/huggingface")).ok_or_else(
                    || Error::value("HF_HOME", "not set", "name a folder to keep models in"),
                )?,
            };
        let hub =
            Self::new(&variable("HF_ENDPOINT").unwrap_or_else(|| PUBLIC.to_owned()), &home, None);
        let token = variable("HF_TOKEN").or_else(|| hub.cache.token());
        Ok(Self { token, ..hub })
    }

    /// The folder of `owner/name`, downloading what is not there yet: descriptions first, and weights
    /// only of a model that can be served. Blocks; shows progress on a terminal, else logs each file.
    ///
    /// # Errors
    /// [`Error::Hub`] naming the id, the file, the HTTP status and the remedy; the errors of
    /// [`ModelFolder::open`] for a model that cannot be served.
    pub fn fetch(&self, id: &str) -> Result<PathBuf> {
        if let Some(folder) = self.cached(id) {
            return Ok(folder);
        }
        self.download(id)
    }

    /// The folder of `owner/name` if the cache holds it whole.
    fn cached(&self, id: &str) -> Option<PathBuf> {
        let repo = self.cache.model(id.to_owned());
        let index = repo.get("model_index.json")?;
        let folder = index.parent()?;
        let weights = ModelFolder::open(folder).ok()?.weight_files().ok()?;
        weights.iter().all(|file| file.is_file()).then(|| folder.to_owned())
    }

    fn download(&self, id: &str) -> Result<PathBuf> {
        let api = ApiBuilder::from_cache(self.cache.clone())
            .with_endpoint(self.endpoint.clone())
            .with_token(self.token.clone())
            .with_user_agent("understudy", env!("CARGO_PKG_VERSION"))
            .with_progress(io::stderr().is_terminal())
            .build()
            .map_err(|error| refuse(id, error.to_string()))?;
        let main = api.model(id.to_owned());
        let listing = self.list(id, &main)?;
        let pin = Repo::with_revision(id.to_owned(), RepoType::Model, listing.sha.clone());
        // What the snapshot holds already, whoever put it there, is found through its ref.
        let snapshot = self.cache.repo(pin.clone());
        snapshot.create_ref(&listing.sha).map_err(|error| self.disk(id, &error))?;
        let folder = snapshot.pointer_path(&listing.sha);
        let download = Download { hub: self, id, repo: api.repo(pin), listing: &listing };

        let prefix = listing.prefix();
        let scheduler = "scheduler/scheduler_config.json";
        let scheduler = if listing.has(scheduler) { scheduler } else { "scheduler_config.json" };
        let weights = listing.weights(id, &prefix)?;
        for file in ["model_index.json", &format!("{prefix}config.json"), scheduler] {
            download.file(file)?;
        }
        if listing.has(CARD) {
            download.file(CARD)?;
        }
        let opened = ModelFolder::open(&folder)?;
        download.file(&weights)?;
        for shard in opened.weight_files()?.iter().filter(|shard| !shard.is_file()) {
            let name = shard.file_name().unwrap_or_default().to_string_lossy();
            download.file(&format!("{prefix}{name}"))?;
        }
        let main = self.cache.model(id.to_owned());
        main.create_ref(&listing.sha).map_err(|error| self.disk(id, &error))?;
        Ok(folder)
    }

    fn list(&self, id: &str, repo: &ApiRepo) -> Result<Listing> {
        // With sizes, to know a file that came short.
        let reply = repo.info_request().query("blobs", "true").call();
        reply
            .and_then(|mut reply| reply.body_mut().read_json())
            .map_err(|error| self.http(id, "its list of files", &error))
    }

    fn http(&self, id: &str, what: &str, error: &ureq::Error) -> Error {
        let endpoint = &self.endpoint;
        let problem = match error {
            // The Hub answers 401 for a repository that does not exist, too.
            ureq::Error::StatusCode(status @ (401 | 403)) => format!(
                "{what}: HTTP {status} from {endpoint}: no such repository, or a private or gated \
                 one; check the spelling, or set HF_TOKEN to a token that may read it"
            ),
            ureq::Error::StatusCode(404) => format!(
                "{what}: HTTP 404 from {endpoint}: not there; check the spelling of owner/name (a \
                 local folder needs its path)"
            ),
            ureq::Error::StatusCode(status) => format!(
                "{what}: HTTP {status} from {endpoint}; try again later, and if it stays, remove {}",
                self.cache.path().join(Repo::model(id.to_owned()).folder_name()).display()
            ),
            error => format!(
                "{what}: no answer from {endpoint} ({error}); check the network and HF_ENDPOINT, \
                 then run it again"
            ),
        };
        refuse(id, problem)
    }

    fn disk(&self, id: &str, error: &io::Error) -> Error {
        let cache = self.cache.path().display();
        refuse(id, format!("{cache}: {error}; make room there, or set HF_HOME to another folder"))
    }
}

/// The files of one repository at one commit.
#[derive(Deserialize)]
struct Listing {
    sha: String,
    siblings: Vec<Listed>,
}

#[derive(Deserialize)]
struct Listed {
    rfilename: String,
    /// Bytes.
    size: Option<u64>,
}

impl Listing {
    fn get(&self, name: &str) -> Option<&Listed> {
        self.siblings.iter().find(|file| file.rfilename == name)
    }

    fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    /// The network's folder and a slash; nothing where its files lie beside the index.
    fn prefix(&self) -> String {
        let mut prefixes =
            NetworkConfig::FAMILIES.iter().map(|(component, _)| format!("{component}/"));
        prefixes.find(|prefix| self.has(&format!("{prefix}config.json"))).unwrap_or_default()
    }

    /// The weights, or the index of their shards.
    fn weights(&self, id: &str, prefix: &str) -> Result<String> {
        let whole = format!("{prefix}{WEIGHTS}");
        let index = format!("{whole}.index.json");
        if let Some(found) = [&whole, &index].into_iter().find(|name| self.has(name)) {
            return Ok(found.clone());
        }
        let pickled = |file: &&Listed| {
            let name = &file.rfilename;
            name.starts_with(prefix)
                && [".bin", ".pt", ".ckpt"].iter().any(|end| name.ends_with(end))
        };
        Err(refuse(
            id,
            match self.siblings.iter().find(pickled) {
                Some(file) => format!(
                    "no {whole}, only {}: pickled weights are not read, since reading them can run \
                 code; load it in diffusers and write it with save_pretrained(…, \
                 safe_serialization=True), then pass that folder",
                    file.rfilename
                ),
                None => format!(
                    "no {whole}: only diffusers repositories of a UNet2DModel with safetensors weights \
                 can be served"
                ),
            },
        ))
    }
}

/// Files of one commit on their way into the cache.
struct Download<'a> {
    hub: &'a Hub,
    id: &'a str,
    repo: ApiRepo,
    listing: &'a Listing,
}

impl Download<'_> {
    fn file(&self, name: &str) -> Result<()> {
        let (hub, id) = (self.hub, self.id);
        let missing =
            || refuse(id, format!("no {name}: only diffusers repositories can be served"));
        let bytes = self.listing.get(name).ok_or_else(missing)?.size;
        tracing::info!(model = id, file = name, bytes, "fetching from the Hub");
        let path = self.repo.get(name).map_err(|error| match error {
            ApiError::RequestError(error) => hub.http(id, name, &error),
            ApiError::IoError(error) if error.kind() == io::ErrorKind::StorageFull => {
                hub.disk(id, &error)
            }
            error => refuse(
                id,
                format!("{name}: the download ended early ({error}); run it again, it goes on from there"),
            ),
        })?;
        let found = fs::metadata(&path).map_err(|error| hub.disk(id, &error))?.len();
        match bytes {
            Some(bytes) if bytes != found => {
                // Neither the link nor what it points to may be taken for the file next time.
                let _ = path.canonicalize().map(fs::remove_file);
                let _ = fs::remove_file(&path);
                Err(refuse(
                    id,
                    format!(
                        "{name}: {found} of {bytes} bytes came; run it again, and check the proxy, if any"
                    ),
                ))
            }
            _ => Ok(()),
        }
    }
}

fn refuse(id: &str, problem: String) -> Error {
    Error::Hub { id: id.to_owned(), problem }
}
