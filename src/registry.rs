//! Model folders become loaded, warmed, ready models.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use understudy_models::{
    Denoiser, Geometry,
    checkpoint::card::Card,
    sampler::{Kind, Trajectory},
    schedule::ScheduleConfig,
};

/// A model that is ready to serve.
pub struct Model {
    /// Its folder's name (`owner--name` for a Hub model).
    pub id: String,
    /// Its model card, with defaults where the folder has none.
    pub card: Card,
    /// Shapes of its network.
    pub geometry: Geometry,
    /// Its noise schedule.
    pub schedule: ScheduleConfig,
    /// Number of weights.
    pub parameters: usize,
    /// `f32`, `bf16` or `f16`.
    pub dtype: &'static str,
    /// Unix seconds when it was loaded.
    pub created: u64,
}

/// What the registry knows of one id.
#[derive(Clone)]
pub enum State {
    /// Serving.
    Ready(Arc<Model>),
    /// Being read or warmed.
    Loading,
    /// In the models folder but not loaded.
    Unloaded,
    /// Cannot be loaded.
    Failed(String),
}

/// All models of the server.
pub struct Registry {}

/// Why a model could not be had.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LoadError {
    /// No such folder.
    #[error("no model `{0}`")]
    Unknown(String),
    /// The folder cannot be served.
    #[error("{0}")]
    Refused(String),
}

impl Registry {
    /// All ids with their states and, where the card could be read, cards; the default model first, the rest by name.
    pub fn list(&self) -> Vec<(String, State)> { Vec::new() }
    /// One id.
    pub fn get(&self, id: &str) -> Option<State> { None }
    /// The model that serves requests which name none.
    pub fn default_model(&self) -> Option<Arc<Model>> { None }
    /// Loads or reloads; resolves when it is warm. In-flight requests finish on the weights they started with.
    pub async fn load(&self, id: &str) -> Result<(), LoadError> { Ok(()) }
    /// Unloads; in-flight requests finish.
    pub async fn unload(&self, id: &str) -> Result<(), LoadError> { Ok(()) }
    /// Whether every loadable model is warm and at least one is.
    pub fn ready(&self) -> bool { false }
}
