//! Hugging Face Hub ids: `owner/name` becomes a local folder in the diffusers layout.
//!
//! Only what serving reads is downloaded, weights last, into the cache that Python's tools share. One
//! commit is fetched, and the cache's `main` points to it only once it is whole; a whole snapshot is
//! served without asking the network again. What the Hub answers is input as any other: commits, names and sizes are
//! checked before they become paths, and whoever stays silent is waited for only so long.

mod cache;
mod client;
mod places;

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::Value;

use cache::Cache;
use client::{Client, Listed, Listing, Refusal};
use places::Places;

use super::{
    card::CARD,
    file::read_json,
    folder::{ModelFolder, is_model},
    parts::{self, Around},
    read,
    weight_files::{DIFFUSERS, Stem},
};
use crate::{Error, NetworkConfig, Result, quantization};

/// The folder of a `MODEL` argument: a model folder, the name of one inside `folders` (the first that has it), or
/// a Hub id, which is downloaded unless it is in the cache. A folder that exists is never taken for a Hub id. Blocks
/// while it downloads.
///
/// # Errors
/// [`Error::Value`] when it is none of the three, with names like it; else those of [`Hub::fetch`].
pub fn resolve(model: &str, folders: &[&Path]) -> Result<PathBuf> {
    let path = Path::new(model);
    if is_model(path) {
        return Ok(model.into());
    }
    let mut named = folders.iter().map(|folder| folder.join(model));
    if is_name(model)
        && let Some(named) = named.find(|path| is_model(path))
    {
        return Ok(named);
    }
    let refuse = |remedy: String| Err(Error::value("MODEL", format!("\"{model}\""), remedy));
    if path.exists() {
        return refuse(match models_in(&[path]) {
            inside if inside.is_empty() => {
                "it exists and is no model folder: it has no model_index.json".into()
            }
            inside => format!(
                "this folder holds models and is none; name one of them: {}",
                join(path, &inside)
            ),
        });
    }
    if is_hub_id(model) {
        return Hub::from_env()?.fetch(model);
    }
    let known = models_in(folders);
    if let Some(alike) = crate::misspelt::nearest(known.iter().map(String::as_str), model) {
        return refuse(format!("there is no such model; did you mean {alike}?"));
    }
    let folders: Vec<_> = folders.iter().map(|folder| folder.display().to_string()).collect();
    let known = if known.is_empty() { String::new() } else { format!(" ({})", known.join(", ")) };
    let in_folders = match folders.as_slice() {
        [] => String::new(),
        folders => format!(" a model in {}{known},", folders.join(" or ")),
    };
    refuse(format!(
        "name a folder with a model_index.json,{in_folders} or a Hugging Face Hub id (owner/name)"
    ))
}

/// The names of the models in some folders; none for a folder that cannot be read.
fn models_in(folders: &[&Path]) -> Vec<String> {
    let entries = folders.iter().filter_map(|folder| fs::read_dir(folder).ok()).flatten();
    let models = entries.filter_map(|entry| entry.ok()).filter(|entry| is_model(&entry.path()));
    let mut names: Vec<_> =
        models.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

fn join(folder: &Path, names: &[String]) -> String {
    let paths: Vec<_> = names.iter().map(|name| folder.join(name).display().to_string()).collect();
    paths.join(", ")
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
    offline: bool,
    timeout: Duration,
}

impl Hub {
    /// The hub at `endpoint` (no trailing slash), cached in `home`/hub; `token` opens private and gated
    /// repositories. It is waited for `timeout` long at every step.
    pub fn new(endpoint: &str, home: &Path, token: Option<String>, timeout: Duration) -> Self {
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        Self { endpoint, cache: Cache { root: home.join("hub") }, token, offline: false, timeout }
    }

    /// The hub and the cache that the environment names, by the rules of Python's `huggingface_hub`: `HF_ENDPOINT`;
    /// `HF_HUB_CACHE`, `HUGGINGFACE_HUB_CACHE`, `HF_HOME`, `XDG_CACHE_HOME`, else `~/.cache/huggingface/hub`;
    /// `HF_TOKEN`, `HF_TOKEN_PATH`; `HF_HUB_OFFLINE`; `HF_HUB_DOWNLOAD_TIMEOUT`. `~` and `$NAME` are expanded.
    ///
    /// # Errors
    /// [`Error::Value`] naming a variable with a value that cannot be honoured.
    pub fn from_env() -> Result<Self> {
        let places = Places::new(&places::environment)?;
        let token = places.token(&places::environment);
        let Places { endpoint, cache, offline, timeout, .. } = places;
        Ok(Self { endpoint, cache: Cache { root: cache }, token, offline, timeout })
    }

    /// The folder of `owner/name`, downloading what is not there yet: descriptions first, and weights
    /// only of a model that can be served. Blocks; logs each file, and how far it has come.
    ///
    /// # Errors
    /// [`Error::Hub`] naming the id, the file, the HTTP status and the remedy; the errors of
    /// [`ModelFolder::open`] for a model that cannot be served.
    pub fn fetch(&self, id: &str) -> Result<PathBuf> {
        if !is_hub_id(id) {
            return Err(Error::value("MODEL", format!("{id:?}"), "a Hub id is owner/name"));
        }
        match self.cached(id) {
            Some(folder) => Ok(folder),
            None if self.offline => {
                let cache = self.cache.root.display();
                Err(refuse(
                    id,
                    format!(
                        "not whole in {cache}, and HF_HUB_OFFLINE forbids to fetch it; unset that once, or name \
                         the cache that has it with HF_HUB_CACHE"
                    ),
                ))
            }
            None => self.download(id),
        }
    }

    /// The folder of `owner/name` if the cache holds it whole.
    fn cached(&self, id: &str) -> Option<PathBuf> {
        let folder = self.cache.main(id)?;
        let weights = ModelFolder::open(&folder).ok()?.all_weight_files().ok()?;
        weights.iter().all(|file| file.is_file()).then_some(folder)
    }

    fn download(&self, id: &str) -> Result<PathBuf> {
        let client = Client::new(&self.endpoint, self.token.clone(), self.timeout);
        tracing::info!("asking {} for the files of {id}", self.endpoint);
        let listing =
            client.list(id).map_err(|error| self.explain(id, "its list of files", error))?;
        let folder = self.cache.snapshot(id, &listing.sha);
        let download = Download { hub: self, id, client, listing: &listing };

        let prefix = listing.prefix();
        let scheduler = "scheduler/scheduler_config.json";
        let scheduler = if listing.has(scheduler) { scheduler } else { "scheduler_config.json" };
        let mut weights = vec![listing.weights(id, &prefix, DIFFUSERS)?];
        for file in ["model_index.json", &format!("{prefix}config.json"), scheduler] {
            download.file(file)?;
        }
        if listing.has(CARD) {
            download.file(CARD)?;
            for file in listing.beside_card(&read_json(&folder.join(CARD))?) {
                download.file(file)?;
            }
        }
        let codes = format!("{prefix}{}", quantization::FILE);
        if listing.has(&codes) {
            download.file(&codes)?;
        }
        let Around { parts, described } = parts::around(&folder)?;
        for file in described.iter().filter(|file| listing.has(file)) {
            download.file(file)?;
        }
        let opened = ModelFolder::open(&folder)?;
        for (part, stem) in parts {
            weights.push(listing.weights(id, &format!("{part}/"), stem)?);
        }
        for file in &weights {
            download.file(file)?;
        }
        for shard in opened.all_weight_files()?.iter().filter(|shard| !shard.is_file()) {
            let name = shard.strip_prefix(&folder).unwrap_or(shard);
            download.file(&name.to_string_lossy())?;
        }
        self.cache.set_main(id, &listing.sha)?;
        Ok(folder)
    }

    fn explain(&self, id: &str, what: &str, refusal: Refusal) -> Error {
        let problem = match refusal {
            Refusal::Http(error) => return self.http(id, what, &error),
            Refusal::Disk(error) => return self.disk(id, &error),
            Refusal::Strange(problem) => {
                format!("{what}: the answer of {} {problem}; check HF_ENDPOINT", self.endpoint)
            }
            Refusal::Short { found, size, error } => {
                let why = error.map(|error| format!(" ({error})")).unwrap_or_default();
                format!(
                    "{what}: {found} bytes came, {size} were announced{why}; run it again, it goes on from there, \
                     and check the proxy, if any"
                )
            }
        };
        refuse(id, problem)
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
                self.cache.repo(id).display()
            ),
            ureq::Error::Timeout(step) => format!(
                "{what}: {endpoint} was silent for {} s ({step}); check the network and HF_ENDPOINT, or \
                 wait longer with HF_HUB_DOWNLOAD_TIMEOUT",
                self.timeout.as_secs()
            ),
            error => format!(
                "{what}: no answer from {endpoint} ({error}); check the network and HF_ENDPOINT, \
                 then run it again"
            ),
        };
        refuse(id, problem)
    }

    fn disk(&self, id: &str, error: &io::Error) -> Error {
        let cache = self.cache.root.display();
        refuse(id, format!("{cache}: {error}; make room there, or set HF_HOME to another folder"))
    }
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

    /// The files that a card names: LoRAs beside it, and what guides it.
    fn beside_card<'a>(&'a self, card: &'a Value) -> impl Iterator<Item = &'a str> {
        let loras = card["loras"].as_array().into_iter().flatten();
        let loras: Vec<&str> = loras.filter_map(|lora| lora["file"].as_str()).collect();
        let guided = card["autoguidance"].is_object();
        let read = |name: &str| [".json", ".safetensors"].iter().any(|end| name.ends_with(end));
        let named = move |name: &&str| {
            loras.contains(name) && !name.contains('/')
                || guided && name.starts_with("guide/") && read(name)
        };
        self.siblings.iter().map(|file| file.rfilename.as_str()).filter(named)
    }

    /// The weights of the component in a folder, or the index of their shards.
    fn weights(&self, id: &str, prefix: &str, stem: Stem) -> Result<String> {
        let candidates = stem.candidates().map(|name| format!("{prefix}{name}"));
        if let Some(found) = candidates.iter().find(|name| self.has(name)) {
            return Ok(found.clone());
        }
        let [whole, _, _, _, pickle, ..] = candidates;
        let other = |file: &&Listed| {
            let name = &file.rfilename;
            let ends = [".safetensors", ".bin", ".pt", ".ckpt", ".msgpack", ".h5", ".onnx"];
            name.starts_with(prefix) && ends.iter().any(|end| name.ends_with(end))
        };
        let problem = match self.siblings.iter().find(other) {
            Some(file) => format!(
                "no {whole} and no {pickle}, only {}; load it in diffusers and write it with save_pretrained, then pass that \
                 folder",
                file.rfilename
            ),
            None => {
                format!("no {whole} and no {pickle}: only diffusers repositories can be served")
            }
        };
        Err(refuse(id, problem))
    }
}

/// Files of one commit on their way into the cache.
struct Download<'a> {
    hub: &'a Hub,
    id: &'a str,
    client: Client,
    listing: &'a Listing,
}

impl Download<'_> {
    fn file(&self, name: &str) -> Result<()> {
        let (hub, id, commit) = (self.hub, self.id, self.listing.sha.as_str());
        let missing =
            || refuse(id, format!("no {name}: only diffusers repositories can be served"));
        let size = self.listing.get(name).ok_or_else(missing)?.size;
        let size =
            size.ok_or_else(|| refuse(id, format!("{name}: its list of files tells no size")))?;
        if name.ends_with(".json") && size > read::DESCRIPTION_LIMIT {
            let limit = read::DESCRIPTION_LIMIT;
            return Err(refuse(
                id,
                format!("{name}: has {size} bytes, of which at most {limit} are read"),
            ));
        }
        // What the snapshot holds already, whoever put it there.
        let there = hub.cache.snapshot(id, commit).join(name);
        if fs::metadata(&there).is_ok_and(|metadata| metadata.len() == size) {
            return Ok(());
        }
        let explain = |refusal| hub.explain(id, name, refusal);
        let disk = |error| hub.disk(id, &error);
        let etag = self.client.etag(id, commit, name).map_err(explain)?;
        let blob = hub.cache.blob(id, &etag);
        if let Some(folder) = blob.parent() {
            fs::create_dir_all(folder).map_err(disk)?;
        }
        let _lock = hub.cache.lock(id, &etag).map_err(disk)?;
        if !fs::metadata(&blob).is_ok_and(|metadata| metadata.len() == size) {
            tracing::info!("fetching {name} of {id}, {size} bytes");
            let partial = blob.with_file_name(format!("{etag}.incomplete"));
            self.client.fetch((id, commit, name), size, &partial).map_err(explain)?;
            fs::rename(&partial, &blob).map_err(disk)?;
        }
        hub.cache.link(id, commit, name, &etag).map_err(disk)
    }
}

fn refuse(id: &str, problem: String) -> Error {
    Error::Hub { id: id.to_owned(), problem }
}
