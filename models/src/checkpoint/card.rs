//! The model card, `understudy.json`: what a network is for and how it was made.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// What part a model plays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// A pre-trained model; what a folder without a card is.
    #[default]
    Teacher,
    /// Distilled from a teacher.
    Student,
    /// Trained another way, to compare with.
    Baseline,
}

/// What a request gets when it does not say.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Defaults {
    /// Network steps; 1 to the schedule's training steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_inference_steps: Option<usize>,
    /// A sampler's name as in the API.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scheduler: Option<String>,
}

/// A model card. Every field is optional in the file.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Card {
    /// What part it plays.
    pub role: Role,
    /// The name of a student's teacher.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher: Option<String>,
    /// A class-conditional model's classes, in order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub class_names: Vec<String>,
    /// The class that means "none", for classifier-free guidance.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub null_class: Option<u32>,
    /// What a request gets when it does not say.
    pub defaults: Defaults,
    /// How the model was made.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub recipe: Map<String, Value>,
    /// What was measured, with the feature network's name.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub scores: Map<String, Value>,
}
