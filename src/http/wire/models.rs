//! Bodies of `/v1/models`.

use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

/// The models, in OpenAI's list shape; the default model first.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct ModelList {
    /// `list`.
    pub(in crate::http) object: &'static str,
    /// The models.
    pub(in crate::http) data: Vec<ModelEntry>,
}

/// A model and its card.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct ModelEntry {
    /// What requests call it.
    pub(in crate::http) id: String,
    /// `model`.
    pub(in crate::http) object: &'static str,
    /// Unix seconds when it was loaded; 0 while it is not.
    pub(in crate::http) created: u64,
    /// `understudy`.
    pub(in crate::http) owned_by: &'static str,
    /// Whether it serves.
    pub(in crate::http) ready: bool,
    /// What it is, or why it does not serve.
    #[serde(flatten)]
    pub(in crate::http) card: ModelState,
}

/// What a model is, or why it does not serve.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub(in crate::http) enum ModelState {
    /// It serves.
    Ready(Box<ModelCard>),
    /// It does not.
    NotReady {
        /// Why not.
        reason: String,
        /// How far its load is, while there is one under way.
        #[serde(skip_serializing_if = "Option::is_none")]
        loading: Option<LoadProgress>,
    },
}

/// How far the load of a model is.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
pub(in crate::http) struct LoadProgress {
    /// What is being done.
    pub(in crate::http) stage: LoadStage,
    /// Seconds since the stage began.
    pub(in crate::http) seconds: f64,
    /// Seconds that the stage takes at most, give or take one evaluation of the network; absent where nobody knows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::http) budget_seconds: Option<f64>,
}

/// The stages of a load, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http) enum LoadStage {
    /// Other models are loaded first.
    Waiting,
    /// Its files are fetched from the Hugging Face Hub.
    Downloading,
    /// Its files are read.
    Reading,
    /// The time that its evaluations take is measured, by batch size.
    Measuring,
}

/// What a model is, from its folder and its model card.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct ModelCard {
    /// `teacher`, `student` or `baseline`.
    pub(in crate::http) role: &'static str,
    /// The name of a student's teacher.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::http) teacher: Option<String>,
    /// A class-conditional model's classes, in order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(in crate::http) class_names: Vec<String>,
    /// Number of classes, of a class-conditional model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::http) num_classes: Option<usize>,
    /// The class that means "none", for guidance.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::http) null_class: Option<u32>,
    /// Most tokens of a prompt, of a text-to-image model. One longer than its text encoder takes is read in parts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::http) max_prompt_tokens: Option<usize>,
    /// Prompts that show what a text-to-image model makes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(in crate::http) example_prompts: Vec<String>,
    /// What a request gets when it does not say.
    pub(in crate::http) defaults: ModelDefaults,
    /// The least and the largest guidance scale of a model that takes the scale as an input; others are refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::http) guidance_range: Option<[f64; 2]>,
    /// Numbers of steps that a student of few steps was made for, most first; others are served, too.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(in crate::http) evaluations: Vec<usize>,
    /// Steps of its schedule, the most that a request can ask for.
    pub(in crate::http) num_train_timesteps: usize,
    /// `WIDTHxHEIGHT`.
    pub(in crate::http) size: String,
    /// What the sides of its images may be multiples of, of a model that makes several sizes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::http) size_multiple: Option<usize>,
    /// Channels of its images: 1 gray, 3 RGB.
    pub(in crate::http) channels: usize,
    /// Number of weights.
    pub(in crate::http) parameters: usize,
    /// `f32`, `bf16`, `f16` or `int8`.
    pub(in crate::http) dtype: &'static str,
    /// How it was made.
    #[serde(skip_serializing_if = "Map::is_empty")]
    #[schema(value_type = Object)]
    pub(in crate::http) recipe: Map<String, Value>,
    /// What was measured.
    #[serde(skip_serializing_if = "Map::is_empty")]
    #[schema(value_type = Object)]
    pub(in crate::http) scores: Map<String, Value>,
}

/// What a request gets when it does not say.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct ModelDefaults {
    /// Steps of the sampler.
    pub(in crate::http) num_inference_steps: usize,
    /// The sampler.
    pub(in crate::http) scheduler: String,
    /// Classifier-free guidance; 1 is none.
    pub(in crate::http) guidance_scale: f64,
}
