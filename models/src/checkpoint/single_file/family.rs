//! Which model a file is of, told by the names and shapes of its tensors.

use std::path::Path;

use serde_json::{Value, json};

use super::clip::{self, Encoder};
use super::unet;
use crate::schedule::PredictionType;
use crate::weights::Shapes;
use crate::{Error, Result};

/// A family of models that publish the same set of networks.
#[derive(Debug, Clone, Copy)]
pub(super) enum Family {
    /// Stable Diffusion 1: OpenAI's CLIP.
    One(Encoder),
    /// Stable Diffusion 2: OpenCLIP.
    Two(Encoder),
    /// Stable Diffusion XL: both.
    Xl([Encoder; 2]),
}

/// Beginnings of names that only other models' files have, and what those are.
const OTHERS: [(&str, &str); 20] = [
    ("control_model.", "a ControlNet"),
    ("controlnet_", "a ControlNet"),
    ("model.diffusion_model.joint_blocks.", "Stable Diffusion 3"),
    ("joint_blocks.", "Stable Diffusion 3"),
    ("model.diffusion_model.double_blocks.", "Flux"),
    ("double_blocks.", "Flux"),
    ("text_encoders.", "Stable Diffusion 3"),
    ("model.diffusion_model.cap_embedder.", "Lumina"),
    ("model.diffusion_model.patchify_proj.", "LTX-Video"),
    ("lora_unet_", "a LoRA, which changes another model"),
    ("lora_te", "a LoRA, which changes another model"),
    ("unet.down_blocks.", "a LoRA, which changes another model"),
    ("unet.up_blocks.", "a LoRA, which changes another model"),
    ("base_model.model.", "a LoRA, which changes another model"),
    ("string_to_param", "a textual inversion"),
    ("emb_params", "a textual inversion"),
    ("ip_adapter.", "an IP-Adapter"),
    ("image_proj.", "an IP-Adapter"),
    ("motion_modules.", "AnimateDiff"),
    ("encoder.down.", "an autoencoder alone"),
];

impl Family {
    /// Tells the family.
    ///
    /// # Errors
    /// [`Error::Format`] that says what the file is instead, where that is known.
    pub(super) fn tell(path: &Path, shapes: &Shapes) -> Result<Self> {
        let refuse = |problem: String| Error::Format { path: path.to_owned(), problem };
        let only = "only Stable Diffusion 1, 2 and XL can be imported";
        if let Some(name) = shapes.keys().find(|name| name.ends_with(".scale_weight")) {
            return Err(refuse(format!(
                "has weights of 8 bits with scales (`{name}`); use the model's file of 16 or 32 bits"
            )));
        }
        let other =
            OTHERS.iter().find(|(prefix, _)| shapes.keys().any(|name| name.starts_with(prefix)));
        if let Some((prefix, what)) = other {
            return Err(refuse(format!("is {what} (it has tensors `{prefix}…`); {only}")));
        }
        if !shapes.contains_key(unet::FIRST) {
            let some = shapes.keys().next().map(String::as_str).unwrap_or_default();
            return Err(refuse(format!(
                "has no `{}`, so it is not Stable Diffusion (it has `{some}`); {only}",
                unet::FIRST
            )));
        }
        match shapes[unet::FIRST].get(1) {
            Some(9) => {
                return Err(refuse(format!(
                    "is a model for inpainting (`{}` takes 9 channels); {only}",
                    unet::FIRST
                )));
            }
            Some(8) => {
                return Err(refuse(format!(
                    "is a model that edits images, such as InstructPix2Pix (`{}` takes 8 channels); {only}",
                    unet::FIRST
                )));
            }
            _ => {}
        }
        if let Some(encoders) = Encoder::both(shapes) {
            return Ok(Self::Xl(encoders));
        }
        if shapes.keys().any(|name| name.starts_with(clip::BOTH[0])) {
            return Err(refuse(format!(
                "has one text encoder of Stable Diffusion XL's two (`{}…`), as its refiner has; {only}",
                clip::BOTH[0]
            )));
        }
        if shapes.keys().any(|name| name.starts_with(unet::LABELS)) {
            return Err(refuse(format!(
                "is told more than a prompt (it has `{}…`), as unCLIP and upscalers are; {only}",
                unet::LABELS
            )));
        }
        match Encoder::alone(shapes) {
            Some(encoder) if encoder.is_openai() => Ok(Self::One(encoder)),
            Some(encoder) => Ok(Self::Two(encoder)),
            None => Err(refuse(format!(
                "has no text encoder (`{}…`); use the whole checkpoint, not the network alone",
                clip::ALONE
            ))),
        }
    }

    /// What the network predicts: as asked, or as all of the family do.
    pub(super) fn prediction(self, asked: Option<PredictionType>) -> Result<PredictionType> {
        match (self, asked) {
            (_, Some(PredictionType::Sample)) => {
                let remedy = "no Stable Diffusion predicts it; use epsilon or v_prediction";
                Err(Error::value("prediction", "sample", remedy))
            }
            (_, Some(asked)) => Ok(asked),
            (Self::One(_) | Self::Xl(_), None) => Ok(PredictionType::Epsilon),
            (Self::Two(_), None) => {
                let remedy = "this is Stable Diffusion 2, whose file does not tell what it predicts: give epsilon (2-base, \
                              of 512 pixels) or v_prediction (2, of 768)";
                Err(Error::value("prediction", "not given", remedy))
            }
        }
    }

    /// The side of a latent.
    pub(super) fn sample_size(self, prediction: PredictionType) -> usize {
        match (self, prediction) {
            (Self::Xl(_), _) => 128,
            (Self::Two(_), PredictionType::Velocity) => 96,
            _ => 64,
        }
    }

    /// What latents are multiplied with, so that they spread as noise does (Rombach et al. 2022, §G).
    pub(super) fn latent_scale(self) -> f64 {
        match self {
            Self::One(_) | Self::Two(_) => 0.18215,
            Self::Xl(_) => 0.13025,
        }
    }

    /// The text encoders.
    pub(super) fn encoders(&self) -> &[Encoder] {
        match self {
            Self::One(encoder) | Self::Two(encoder) => std::slice::from_ref(encoder),
            Self::Xl(encoders) => encoders,
        }
    }

    /// `model_index.json` without its components.
    pub(super) fn index(self) -> Value {
        let nothing = json!([null, null]);
        match self {
            Self::One(_) | Self::Two(_) => json!({
                "_class_name": "StableDiffusionPipeline",
                "safety_checker": nothing,
                "feature_extractor": nothing,
                "requires_safety_checker": false,
            }),
            Self::Xl(_) => json!({
                "_class_name": "StableDiffusionXLPipeline",
                "force_zeros_for_empty_prompt": true,
                "image_encoder": nothing,
                "feature_extractor": nothing,
            }),
        }
    }

    /// `scheduler_config.json` as the family's folders have it.
    pub(super) fn scheduler(self, prediction: PredictionType) -> Value {
        let own = match (self, prediction) {
            (Self::Xl(_), _) => json!({"_class_name": "EulerDiscreteScheduler"}),
            (_, PredictionType::Velocity) => json!({
                "_class_name": "DDIMScheduler", "set_alpha_to_one": false, "clip_sample": false,
            }),
            _ => json!({
                "_class_name": "PNDMScheduler", "set_alpha_to_one": false, "skip_prk_steps": true,
            }),
        };
        let mut scheduler = json!({
            "num_train_timesteps": 1000,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "prediction_type": prediction.name(),
            "steps_offset": 1,
            "timestep_spacing": "leading",
        });
        for (name, value) in own.as_object().into_iter().flatten() {
            scheduler[name] = value.clone();
        }
        scheduler
    }
}
