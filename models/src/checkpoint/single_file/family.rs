//! Which model a file is of, told by the names and shapes of its tensors.

use std::path::Path;

use serde_json::{Value, json};

use super::{clip, unet};
use crate::schedule::PredictionType;
use crate::weights::Shapes;
use crate::{Error, Result};

/// A family of models that publish the same set of networks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    /// Stable Diffusion 1: OpenAI's CLIP.
    One,
    /// Stable Diffusion 2: OpenCLIP.
    Two,
}

/// Beginnings of names that only other models' files have, and what those are.
const OTHERS: [(&str, &str); 21] = [
    ("conditioner.embedders.", "Stable Diffusion XL"),
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
        let only = "only Stable Diffusion 1 and 2 can be imported";
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
        if shapes.keys().any(|name| name.starts_with(unet::LABELS)) {
            return Err(refuse(format!(
                "is told more than a prompt (it has `{}…`), as unCLIP and upscalers are; {only}",
                unet::LABELS
            )));
        }
        if shapes.contains_key(clip::OPEN_CLIP_FIRST) {
            return Ok(Self::Two);
        }
        if clip::openai_prefix(shapes).is_some() {
            return Ok(Self::One);
        }
        let problem = format!(
            "has no text encoder (`{}…`); use the whole checkpoint, not the network alone",
            clip::PREFIX
        );
        Err(refuse(problem))
    }

    /// What the network predicts: as asked, or as all of the family do.
    pub(super) fn prediction(self, asked: Option<PredictionType>) -> Result<PredictionType> {
        match (self, asked) {
            (_, Some(PredictionType::Sample)) => {
                let remedy = "no Stable Diffusion predicts it; use epsilon or v_prediction";
                Err(Error::value("prediction", "sample", remedy))
            }
            (_, Some(asked)) => Ok(asked),
            (Self::One, None) => Ok(PredictionType::Epsilon),
            (Self::Two, None) => {
                let remedy = "this is Stable Diffusion 2, whose file does not tell what it predicts: give epsilon (2-base, \
                              of 512 pixels) or v_prediction (2, of 768)";
                Err(Error::value("prediction", "not given", remedy))
            }
        }
    }

    /// The side of a latent.
    pub(super) fn sample_size(self, prediction: PredictionType) -> usize {
        match (self, prediction) {
            (Self::Two, PredictionType::Velocity) => 96,
            _ => 64,
        }
    }

    /// `scheduler_config.json` as the family's folders have it.
    pub(super) fn scheduler(self, prediction: PredictionType) -> Value {
        let mut scheduler = json!({
            "_class_name": "PNDMScheduler",
            "num_train_timesteps": 1000,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "prediction_type": prediction.name(),
            "skip_prk_steps": true,
            "set_alpha_to_one": false,
            "steps_offset": 1,
            "timestep_spacing": "leading",
        });
        if prediction == PredictionType::Velocity {
            scheduler["_class_name"] = json!("DDIMScheduler");
            scheduler["clip_sample"] = json!(false);
            if let Some(fields) = scheduler.as_object_mut() {
                fields.remove("skip_prk_steps");
            }
        }
        scheduler
    }

    /// The token that fills a prompt.
    pub(super) fn padding(self) -> &'static str {
        match self {
            Self::One => "<|endoftext|>",
            Self::Two => "!",
        }
    }
}
