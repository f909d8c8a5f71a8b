//! The model card, `understudy.json`: what a network is for and how it was made.

use std::{collections::HashMap, ops::RangeInclusive, path::Path};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{Conditioning, Error, NetworkConfig, Result, sampler::Kind, schedule::ScheduleConfig};

/// Its file in a model folder.
pub(super) const CARD: &str = "understudy.json";

/// Steps where a card says none.
const STEPS: usize = 50;
/// Scales of guidance; beyond these images are noise, and sooner or later no numbers.
const SCALES: RangeInclusive<f64> = -1000.0..=1000.0;

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

/// A LoRA in a model's folder, which is added to its weights whenever they are read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CardLora {
    /// The name of its file, a safetensors beside the card.
    pub file: String,
    /// How much of it is added; 1 is what it was trained for.
    #[serde(default = "whole")]
    pub scale: f64,
}

/// Guidance of a model by a worse one, which is the model folder `guide` in its own ([`crate::Autoguided`]).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Autoguidance {
    /// How far, finite, from 1 (not at all) up.
    pub scale: f64,
}

fn whole() -> f64 {
    1.0
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
    /// What is added to the weights, in this order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub loras: Vec<CardLora>,
    /// How far the model is guided by a worse one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub autoguidance: Option<Autoguidance>,
    /// How the model was made.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub recipe: Map<String, Value>,
    /// What was measured, with the feature network's name.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub scores: Map<String, Value>,
}

impl Card {
    /// The card of a model that is made out of this one's weights: LoRAs are a part of those, and what guides the model is not.
    #[must_use]
    pub fn of_weights(&self) -> Self {
        Self { loras: Vec::new(), autoguidance: None, ..self.clone() }
    }

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

    /// Steps of who does not say: the card's, else 50, or all that the schedule has where those are fewer.
    pub fn steps(&self, schedule: &ScheduleConfig) -> usize {
        self.defaults.num_inference_steps.unwrap_or(STEPS).min(schedule.train_timesteps())
    }

    /// The sampler of who does not say: the card's, else the one that fits the schedule's class.
    pub fn sampler(&self, schedule: &ScheduleConfig) -> Kind {
        // A card that names no sampler there is has been refused.
        let named = self.defaults.scheduler.as_ref().and_then(|name| name.parse().ok());
        named.unwrap_or_else(|| Kind::for_scheduler_class(schedule))
    }

    /// Refuses a card, read from `path`, that speaks of classes, steps or samplers that are not there: it would mislead
    /// every request.
    pub(super) fn check(
        &self,
        network: &NetworkConfig,
        schedule: &ScheduleConfig,
        path: &Path,
    ) -> Result<()> {
        let refuse = |problem: String| Err(Error::Format { path: path.to_owned(), problem });
        let classes = match network.geometry().conditioning {
            Conditioning::Classes(classes) => classes,
            _ => 0,
        };
        let names = self.class_names.len();
        // The class that means "none" needs no name.
        if names > 0
            && names != classes
            && names + usize::from(self.null_class.is_some()) != classes
        {
            return refuse(format!(
                "`class_names` has {names} names, the network has {classes} classes; name each one"
            ));
        }
        let mut seen = HashMap::new();
        for name in &self.class_names {
            if let Some(other) = seen.insert(normal_name(name), name) {
                return refuse(format!(
                    "`class_names` has two names that read the same, \"{other}\" and \"{name}\" (case, spaces, - \
                     and _ make no difference); rename one of the classes"
                ));
            }
        }
        if let Some(null_class) = self.null_class
            && null_class as usize >= classes
        {
            return refuse(format!(
                "`null_class` is {null_class}, the network has {classes} classes"
            ));
        }
        // A card may come from elsewhere, and reads nothing outside of its folder.
        let beside =
            |file: &str| Path::new(file).components().count() == 1 && !file.starts_with("..");
        if let Some(lora) = self.loras.iter().find(|lora| !beside(&lora.file)) {
            return refuse(format!(
                "`loras`: `{}` must be the name of a file beside the card; put it there",
                lora.file
            ));
        }
        if let Some(Autoguidance { scale }) = self.autoguidance
            && !(scale.is_finite() && scale >= 1.0)
        {
            return refuse(format!(
                "`autoguidance.scale` is {scale}: write a number from 1 (none) up, such as 1.5"
            ));
        }
        let most = schedule.train_timesteps();
        if let Some(steps) = self.defaults.num_inference_steps
            && !(1..=most).contains(&steps)
        {
            return refuse(format!(
                "`defaults.num_inference_steps` is {steps}: the schedule allows 1 to {most}"
            ));
        }
        let falling = self.evaluations.is_sorted_by(|more, fewer| more > fewer);
        if !falling || self.evaluations.iter().any(|steps| !(1..=most).contains(steps)) {
            return refuse(format!(
                "`evaluations` is {:?}: list numbers from {most} down to 1, each once, such as [4, 2, 1]",
                self.evaluations
            ));
        }
        if let Some([least, most]) = self.guidance_range {
            if !network.geometry().guidance {
                return refuse(
                    "`guidance_range` is of networks that take a guidance scale (time_cond_proj_dim), which this one does \
                     not; leave it out"
                        .into(),
                );
            }
            if !(1.0 <= least && least <= most && SCALES.contains(&most)) {
                return refuse(format!(
                    "`guidance_range` is [{least}, {most}]: write the least and the largest scale, from 1 up"
                ));
            }
            let usual = self.defaults.guidance_scale.unwrap_or(1.0);
            if !(least..=most).contains(&usual) {
                return refuse(format!(
                    "`defaults.guidance_scale` is {usual}, and `guidance_range` from {least} to {most}; write one of these"
                ));
            }
        }
        if let Some(scale) = self.defaults.guidance_scale
            && !SCALES.contains(&scale)
        {
            let (least, most) = (SCALES.start(), SCALES.end());
            return refuse(format!(
                "`defaults.guidance_scale` is {scale}: write a number from {least} to {most}"
            ));
        }
        if let Some(Err(error)) = self.defaults.scheduler.as_ref().map(|name| name.parse::<Kind>())
        {
            return refuse(format!("`defaults`: {error}"));
        }
        Ok(())
    }

    /// Refuses a guidance scale that is too large for any network, or that this one has not learned; `name` is the model's.
    ///
    /// # Errors
    /// [`Error::Value`] naming `guidance_scale` and the scales that it takes.
    pub fn check_scale(&self, name: &str, scale: f64) -> Result<()> {
        let remedy = match self.guidance_range {
            Some([least, most]) if !(least..=most).contains(&scale) => {
                format!("{name} has learned scales from {least} to {most}")
            }
            None if !SCALES.contains(&scale) => {
                format!("it takes a number from {} to {}", SCALES.start(), SCALES.end())
            }
            _ => return Ok(()),
        };
        Err(Error::value("guidance_scale", scale, remedy))
    }
}

/// The form in which class names are compared: case, and whether words are joined by a space, `-` or
/// `_`, do not matter.
fn normal_name(name: &str) -> String {
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
