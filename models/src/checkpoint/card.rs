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

impl Role {
    /// The name in cards, replies and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Teacher => "teacher",
            Self::Student => "student",
            Self::Baseline => "baseline",
        }
    }
}

/// What a request gets when it does not say.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Defaults {
    /// Network steps; 1 to the schedule's training steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_inference_steps: Option<usize>,
    /// A sampler's name as in the API.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scheduler: Option<String>,
    /// Scale of classifier-free guidance, finite; 1 is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guidance_scale: Option<f64>,
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
    /// Prompts that show what a text-to-image model makes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub example_prompts: Vec<String>,
    /// What a request gets when it does not say.
    pub defaults: Defaults,
    /// The least and the largest guidance scale that a network which takes one has learned, from 1 up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guidance_range: Option<[f64; 2]>,
    /// Numbers of evaluations in which a few-step student makes images, most first; other numbers are served, too.
    /// Empty for models that take any.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub evaluations: Vec<usize>,
    /// How the model was made.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub recipe: Map<String, Value>,
    /// What was measured, with the feature network's name.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub scores: Map<String, Value>,
}

impl Card {
    /// The class that a text means: the one of that name, or of that number. A model that has numbers for
    /// names is asked by name alone, so that no text means two classes. The number may be none of the
    /// network's.
    pub fn class(&self, text: &str) -> Option<u32> {
        let text = normal_name(text);
        let named = self.class_names.iter().position(|name| normal_name(name) == text);
        if let Some(named) = named {
            return u32::try_from(named).ok();
        }
        let number = |text: &str| text.parse::<u32>().ok();
        match self.class_names.iter().any(|name| number(name.trim()).is_some()) {
            true => None,
            false => number(&text),
        }
    }
}

/// The form in which class names are compared: case, and whether words are joined by a space, `-` or
/// `_`, do not matter.
pub(super) fn normal_name(name: &str) -> String {
    name.trim().to_lowercase().replace(['-', '_'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card(names: &[&str]) -> Card {
        let class_names = names.iter().map(|name| (*name).to_owned()).collect();
        Card { class_names, ..Card::default() }
    }

    #[test]
    fn a_text_is_a_name_or_a_number_and_never_both() {
        let clothes = card(&["T-shirt", "Ankle boot"]);
        for (text, class) in [
            ("ankle_BOOT", Some(1)),
            (" t shirt ", Some(0)),
            ("1", Some(1)),
            ("boot", None),
            ("-1", None),
        ] {
            assert_eq!(clothes.class(text), class, "{text}");
        }
        let numbers = card(&["0", "1", "2", "10"]);
        for (text, class) in [("2", Some(2)), ("10", Some(3)), ("3", None)] {
            assert_eq!(numbers.class(text), class, "{text}");
        }
        assert_eq!(card(&[]).class("7"), Some(7));
    }
}
