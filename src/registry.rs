//! Model folders become loaded, warmed, ready models.

mod forms;
mod kept_costs;
mod model;
mod text;
mod trajectories;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use candle_core::{DType, Device};
use understudy_models::checkpoint::{
    ModelFolder,
    card::Role,
    hub::{self, Hub},
};

use crate::{
    engine::{self, Engine},
    metrics::Metrics,
    model_folders::ModelFolders,
    names::{UNUSABLE_NAME, is_id},
};

pub use forms::Form;
pub use kept_costs::KeptCosts;
pub use model::{Model, Origin, Replica};
pub use text::{Syntax, Text};

/// What the registry knows of one id.
#[derive(Debug, Clone)]
pub enum State {
    /// Serving.
    Ready(Arc<Model>),
    /// Being read or warmed for the first time.
    Loading(Progress),
    /// In the models folder but not loaded.
    Unloaded,
    /// Cannot be loaded, and why.
    Failed(String),
}

/// How far the load of a model is.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// What is being done.
    pub stage: Loading,
    /// Since when.
    pub since: Instant,
}

impl Progress {
    fn at(stage: Loading) -> Self {
        Self { stage, since: Instant::now() }
    }
}

/// The stages of a load, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loading {
    /// Other models are loaded first.
    Waiting,
    /// Its files are fetched from the Hub, unless the cache has them.
    Downloading,
    /// Its files are read.
    Reading,
    /// The time of its evaluations is measured, for at most about [`crate::engine::WARM_UP_SECONDS`].
    Measuring,
}

/// Why a model could not be had.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LoadError {
    /// No such folder.
    #[error("no folder `{0}` with a model_index.json in the models folders")]
    Unknown(String),
    /// The folder cannot be served.
    #[error("{0}")]
    Refused(String),
    /// Another load of the same id is under way.
    #[error("`{0}` is being loaded already; wait for that")]
    Busy(String),
}

/// Where and how models are loaded.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The folders whose direct subfolders are models.
    pub folders: ModelFolders,
    /// The default model, if it was named: an id, or a Hub id (`owner/name`), which is downloaded and
    /// serves as `owner--name`.
    pub default_model: Option<String>,
    /// Where networks run: every model is loaded onto each, which are as many as the engine has, and alike.
    pub devices: Vec<Device>,
    /// Element type of weights and activations.
    pub dtype: DType,
    /// Rows per evaluation, instead of what the warm-up finds useful.
    pub max_rows: Option<usize>,
    /// Whether every evaluation on a GPU has `max_rows` rows, whoever asks.
    pub deterministic: bool,
    /// What evaluations cost when the server last ran.
    pub kept_costs: KeptCosts,
    /// After how long without a prompt the weights of text encoders are forgotten that can be read again.
    pub idle_encoder: Option<Duration>,
}

impl Settings {
    fn default_id(&self) -> Option<String> {
        self.default_model.as_deref().map(hub::id_of)
    }

    /// The Hub id behind an id, if that is where it comes from.
    fn hub_id(&self, id: &str) -> Option<&str> {
        let named = self.default_model.as_deref().filter(|model| hub::is_hub_id(model))?;
        (hub::id_of(named) == id).then_some(named)
    }

    /// The folder of an id; blocks while it is downloaded.
    fn folder_of(&self, id: &str) -> understudy_models::Result<PathBuf> {
        match self.hub_id(id) {
            Some(model) => Hub::from_env()?.fetch(model),
            // The place of a folder that is gone says what is missing.
            None => Ok(self.folders.find(id).unwrap_or_else(|| id.into())),
        }
    }

    /// Bytes of the weights of a model that is on disk; of any other more than any has.
    fn bytes(&self, id: &str) -> u64 {
        let folder = self.folders.find(id).and_then(|folder| ModelFolder::open(&folder).ok());
        let files = folder.and_then(|folder| folder.all_weight_files().ok());
        let sizes = files.into_iter().flatten().map(|file| file.metadata().map(|it| it.len()));
        sizes.sum::<std::io::Result<u64>>().ok().filter(|bytes| *bytes > 0).unwrap_or(u64::MAX)
    }
}

/// All models of the server.
pub struct Registry {
    settings: Settings,
    engine: Engine,
    metrics: Arc<Metrics>,
    entries: Mutex<BTreeMap<String, Entry>>,
    default_id: OnceLock<String>,
    next_key: AtomicU64,
    /// Held by the load that reads and warms.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Debug, Clone, Default)]
struct Entry {
    /// What serves now; stays while its replacement is being loaded.
    current: Option<Arc<Model>>,
    loading: Option<Progress>,
    problem: Option<String>,
}

impl Entry {
    fn state(&self) -> State {
        match (&self.current, self.loading, &self.problem) {
            (Some(model), _, _) => State::Ready(Arc::clone(model)),
            (None, Some(progress), _) => State::Loading(progress),
            (None, None, Some(problem)) => State::Failed(problem.clone()),
            (None, None, None) => State::Unloaded,
        }
    }
}

impl Registry {
    /// Looks for models: every direct subfolder that holds a `model_index.json`, and the bundled teachers of students
    /// among them. Loads nothing yet.
    ///
    /// # Errors
    /// A sentence when a folder cannot be read, or the named default model is in none.
    pub fn open(settings: Settings, engine: Engine, metrics: Arc<Metrics>) -> Result<Self, String> {
        let shown = settings.folders.shown();
        let ids = settings.folders.names()?.into_iter().filter(|id| {
            let servable = is_id(id);
            if !servable {
                tracing::warn!(folder = id, "not served: {UNUSABLE_NAME}");
            }
            servable
        });
        // Loading, until `load_all` has been through them: the server is not ready before.
        let entry = Entry { loading: Some(Progress::at(Loading::Waiting)), ..Entry::default() };
        let named = settings.default_id();
        let from_hub = named.clone().filter(|id| settings.hub_id(id).is_some());
        let entries: BTreeMap<_, _> = ids.chain(from_hub).map(|id| (id, entry.clone())).collect();
        if let Some(id) = &named
            && !entries.contains_key(id)
        {
            let known: Vec<&str> = entries.keys().map(String::as_str).collect();
            return Err(format!(
                "--default-model {id}: not in {shown}, which holds: {}; for a Hugging Face Hub model write owner/name",
                if known.is_empty() { "no model".into() } else { known.join(", ") }
            ));
        }
        Ok(Self {
            settings,
            engine,
            metrics,
            entries: Mutex::new(entries),
            default_id: OnceLock::new(),
            next_key: AtomicU64::new(0),
            turn: tokio::sync::Mutex::default(),
        })
    }

    /// Loads and warms every model, one after the other, and tells `tried` of each.
    ///
    /// # Errors
    /// A sentence when not one of them can be served.
    pub async fn load_all(&self, mut tried: impl FnMut(&str, &State)) -> Result<(), String> {
        let mut ids: Vec<String> = self.entries().keys().cloned().collect();
        // The one that was named, then the smallest first: something serves soon.
        let named = self.settings.default_id();
        ids.sort_by_cached_key(|id| (Some(id) != named.as_ref(), self.settings.bytes(id)));
        for id in &ids {
            if let Err(error) = self.load_marked(id).await {
                tracing::error!(model = %id, %error, "model not ready");
            }
            if let Some(state) = self.get(id) {
                tried(id, &state);
            }
        }
        let mut ready: Vec<Arc<Model>> =
            self.entries().values().filter_map(|entry| entry.current.clone()).collect();
        // Who names no model may say nothing to draw either.
        ready.sort_by_key(|model| model.text().is_some());
        let is_teacher = |model: &&Arc<Model>| model.card.role == Role::Teacher;
        // Who opens the page wants to see a pair.
        let has_student = |model: &&Arc<Model>| {
            ready.iter().any(|it| {
                it.card.role == Role::Student && it.card.teacher.as_ref() == Some(&model.id)
            })
        };
        let paired = ready.iter().filter(is_teacher).find(has_student);
        let Some(first) = paired.or(ready.iter().find(is_teacher)).or(ready.first()) else {
            let problems = self.entries();
            let problems = problems.iter().filter_map(|(id, entry)| {
                entry.problem.as_ref().map(|problem| format!("\n  {id}: {problem}"))
            });
            let problems: String = problems.collect();
            let problems = match problems.is_empty() {
                true => "; a model is a subfolder with a model_index.json, as diffusers writes it"
                    .into(),
                false => problems,
            };
            return Err(format!(
                "--models {}: no model can be served{problems}",
                self.settings.folders.shown()
            ));
        };
        let _ = self.default_id.set(named.unwrap_or_else(|| first.id.clone()));
        Ok(())
    }

    /// All ids with their states; the default model first, the rest by name.
    pub fn list(&self) -> Vec<(String, State)> {
        let entries = self.entries();
        let mut all: Vec<_> = entries.iter().map(|(id, e)| (id.clone(), e.state())).collect();
        all.sort_by_key(|(id, _)| Some(id) != self.default_id.get());
        all
    }

    /// One id.
    pub fn get(&self, id: &str) -> Option<State> {
        self.entries().get(id).map(Entry::state)
    }

    /// The id that serves requests which name none; `None` until the models have been loaded.
    pub fn default_id(&self) -> Option<&str> {
        self.default_id.get().map(String::as_str)
    }

    /// The default model and its first student by name, as far as they are ready.
    pub fn default_pair(&self) -> (Option<Arc<Model>>, Option<Arc<Model>>) {
        let Some(default_id) = self.default_id() else { return (None, None) };
        let entries = self.entries();
        let mut ready = entries.values().filter_map(|entry| entry.current.as_ref());
        let student = ready.find(|model| {
            model.card.role == Role::Student && model.card.teacher.as_deref() == Some(default_id)
        });
        let teacher = entries.get(default_id).and_then(|entry| entry.current.as_ref());
        (teacher.cloned(), student.cloned())
    }

    /// Whether every model that the server began with has been tried, and there is one now: what is loaded later keeps nobody from
    /// those that serve.
    pub fn ready(&self) -> bool {
        let entries = self.entries();
        self.default_id.get().is_some() && entries.values().any(|entry| entry.current.is_some())
    }

    /// Loads or reloads; resolves when the model is warm. Requests in flight finish on the weights they
    /// started with, and when the folder cannot be loaded what served before goes on serving.
    ///
    /// # Errors
    /// [`LoadError`].
    pub async fn load(self: &Arc<Self>, id: &str) -> Result<(), LoadError> {
        let settings = &self.settings;
        let known = settings.hub_id(id).is_some() || settings.folders.find(id).is_some();
        if !is_id(id) || !known {
            return Err(LoadError::Unknown(id.to_owned()));
        }
        {
            let mut entries = self.entries();
            let entry = entries.entry(id.to_owned()).or_default();
            if entry.loading.is_some() {
                return Err(LoadError::Busy(id.to_owned()));
            }
            entry.loading = Some(Progress::at(Loading::Waiting));
        }
        // Whoever asked may go away. The load goes on to its end, and the mark with it: there is never more than one.
        let (registry, marked) = (Arc::clone(self), id.to_owned());
        let loading = tokio::spawn(async move {
            let loaded = registry.load_marked(&marked).await;
            if let (Ok(()), Some(State::Ready(model))) = (&loaded, registry.get(&marked)) {
                tracing::info!(
                    model = marked,
                    parameters = model.parameters,
                    max_rows = model.on(0).max_rows()[engine::stage::Stage::Denoise],
                    evaluation_seconds =
                        model.on(0).evaluation_seconds(engine::stage::Stage::Denoise, 1),
                    "model ready"
                );
            }
            loaded
        });
        loading.await.unwrap_or_else(|error| {
            Err(LoadError::Refused(format!("loading ended early: {error}; ask again")))
        })
    }

    /// Forgets the weights of text encoders that nobody has used for long enough, until it is dropped.
    pub async fn unload_idle_encoders(self: Arc<Self>) {
        let Some(idle) = self.settings.idle_encoder else { return };
        // At most a tenth late.
        let mut ticks = tokio::time::interval(idle.div_f64(10.0));
        loop {
            ticks.tick().await;
            let models: Vec<_> =
                self.entries().values().filter_map(|entry| entry.current.clone()).collect();
            let unload = move || {
                for model in models.iter().filter(|model| model.unload_idle_encoders(idle)) {
                    tracing::info!(model = model.id, "idle text encoder unloaded");
                }
            };
            // Giving back many gigabytes takes a while.
            let _ = tokio::task::spawn_blocking(unload).await;
        }
    }

    /// Unloads; requests in flight finish.
    ///
    /// # Errors
    /// [`LoadError::Unknown`], or [`LoadError::Busy`] while it is being loaded.
    pub fn unload(&self, id: &str) -> Result<(), LoadError> {
        let mut entries = self.entries();
        let entry = entries.get_mut(id).ok_or_else(|| LoadError::Unknown(id.to_owned()))?;
        if entry.loading.is_some() {
            return Err(LoadError::Busy(id.to_owned()));
        }
        if let Some(model) = entry.current.take() {
            self.publish(&model, false);
        }
        entry.problem = None;
        Ok(())
    }

    /// Loads what its entry already calls loading.
    async fn load_marked(&self, id: &str) -> Result<(), LoadError> {
        // Whatever happens, a panic included, the entry does not stay "loading".
        let unmark = Unmark { registry: self, id };
        let loaded = self.read_and_warm(id).await;
        let mut entries = self.entries();
        let entry = entries.entry(id.to_owned()).or_default();
        // Together with what comes of it: whoever unloads in between would be told that it is done, and then it would be there.
        entry.loading = None;
        std::mem::forget(unmark);
        match loaded {
            Ok(model) => {
                if let Some(old) = entry.current.replace(Arc::clone(&model)) {
                    self.publish(&old, false);
                }
                self.publish(&model, true);
                entry.problem = None;
                Ok(())
            }
            Err(problem) => {
                entry.problem = Some(problem.clone());
                Err(LoadError::Refused(problem))
            }
        }
    }

    async fn read_and_warm(&self, id: &str) -> Result<Arc<Model>, String> {
        let key = self.next_key.fetch_add(1, Ordering::Relaxed);
        let (settings, id_) = (self.settings.clone(), id.to_owned());
        let from_hub = settings.hub_id(id).is_some();
        self.enter(id, if from_hub { Loading::Downloading } else { Loading::Waiting });
        let found = move || settings.folder_of(&id_);
        let folder = blocking(found).await?;
        self.enter(id, Loading::Waiting);
        // One after the other, so that what loads take together is what the largest takes.
        let _turn = self.turn.lock().await;
        self.enter(id, Loading::Reading);
        let (settings, id_) = (self.settings.clone(), id.to_owned());
        let read = move || {
            let circumstances = settings.kept_costs.circumstances(
                &ModelFolder::open(&folder)?,
                settings.dtype,
                settings.max_rows,
                &settings.devices,
            );
            let origin = Origin::new(&folder, settings.dtype, &settings.devices);
            let model = Model::load(origin, id_, key)?;
            let model = match settings.max_rows {
                Some(rows) if settings.deterministic => model.padded(rows),
                _ => model,
            };
            Ok::<_, understudy_models::Error>((Arc::new(model), circumstances))
        };
        let (model, circumstances) = blocking(read).await?;
        self.enter(id, Loading::Measuring);
        let Settings { kept_costs, max_rows, .. } = &self.settings;
        let known = circumstances.as_ref().map(|it| kept_costs.recall(it)).unwrap_or_default();
        let measured = self.engine.warm_up(Arc::clone(&model), *max_rows, known).await?;
        if let (Some(circumstances), Some(costs)) = (circumstances, measured) {
            kept_costs.keep(circumstances, costs);
        }
        Ok(model)
    }

    /// The load of a model has come to a stage.
    fn enter(&self, id: &str, stage: Loading) {
        if let Some(entry) = self.entries().get_mut(id) {
            entry.loading = Some(Progress::at(stage));
        }
    }

    fn publish(&self, model: &Model, loaded: bool) {
        let card = &model.card;
        let role = card.role.name();
        let parameters = model.parameters.to_string();
        let teacher = card.teacher.as_deref().unwrap_or("");
        let labels = [model.id.as_str(), role, teacher, model.dtype, &parameters];
        if loaded {
            self.metrics.model_info.with_label_values(&labels).set(1);
            // What increases from nothing does not increase, to Prometheus: what alerts watch begins at 0.
            self.metrics.images.with_label_values(&[&model.id]);
            for reason in engine::Rejected::REASONS {
                self.metrics.rejected.with_label_values(&[&model.id, reason]);
            }
            for reason in engine::Failure::FAULTS {
                self.metrics.cancelled.with_label_values(&[&model.id, reason]);
            }
        } else {
            // Nothing to remove is what it should come to.
            let _ = self.metrics.model_info.remove_label_values(&labels);
        }
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Does what takes long off the threads that serve requests.
async fn blocking<T: Send + 'static>(
    read: impl FnOnce() -> understudy_models::Result<T> + Send + 'static,
) -> Result<T, String> {
    tokio::task::spawn_blocking(read)
        .await
        .map_err(|error| format!("loading ended early: {error}"))?
        .map_err(|error| error.to_string())
}

/// Clears an entry's `loading` mark when dropped.
struct Unmark<'a> {
    registry: &'a Registry,
    id: &'a str,
}

impl Drop for Unmark<'_> {
    fn drop(&mut self) {
        if let Some(entry) = self.registry.entries().get_mut(self.id) {
            entry.loading = None;
        }
    }
}
