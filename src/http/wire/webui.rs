//! Bodies of the API of A1111's Stable Diffusion web UI, as far as it can be had here.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use crate::http::body::JsonRequest;

/// A request for images, as A1111's clients send it. Fields of theirs that change nothing here are ignored; those that would, such
/// as `enable_hr`, are refused by name where they are set.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub(in crate::http) struct WebuiRequest {
    /// What is to be drawn, with weights of words as `(words:1.3)`, and LoRAs of the server as `<lora:NAME:SCALE>`.
    #[schema(example = "")]
    pub(in crate::http) prompt: Option<String>,
    /// What guidance leads away from.
    pub(in crate::http) negative_prompt: Option<String>,
    /// −1 to draw one.
    #[schema(minimum = -1, default = -1)]
    pub(in crate::http) seed: Option<i64>,
    /// Steps of the sampler; the model card's when absent.
    #[schema(minimum = 1)]
    pub(in crate::http) steps: Option<i64>,
    /// Guidance; the model card's when absent.
    pub(in crate::http) cfg_scale: Option<f64>,
    /// The model's own when absent.
    pub(in crate::http) width: Option<i64>,
    /// The model's own when absent.
    pub(in crate::http) height: Option<i64>,
    /// A name of `GET /sdapi/v1/samplers`; the model card's when absent.
    pub(in crate::http) sampler_name: Option<String>,
    /// The same, under an older name.
    pub(in crate::http) sampler_index: Option<String>,
    /// `Automatic`: noise levels are the model's own.
    pub(in crate::http) scheduler: Option<String>,
    /// Images of a batch.
    #[schema(minimum = 1, default = 1)]
    pub(in crate::http) batch_size: Option<i64>,
    /// Batches.
    #[schema(minimum = 1, default = 1)]
    pub(in crate::http) n_iter: Option<i64>,
    /// Fresh noise of DDIM.
    #[schema(minimum = 0, maximum = 1)]
    pub(in crate::http) eta: Option<f64>,
    /// Whether the reply has the images.
    #[schema(default = true)]
    pub(in crate::http) send_images: Option<bool>,
    /// `sd_model_checkpoint` names the model.
    #[schema(value_type = Option<Object>)]
    pub(in crate::http) override_settings: Option<Map<String, Value>>,
    /// Of `img2img`: the image to begin with, in base64, as it is or as a `data:` URL.
    pub(in crate::http) init_images: Option<Vec<String>>,
    /// Of `img2img`: how much of it is drawn anew.
    #[schema(minimum = 0, maximum = 1, default = 0.75)]
    pub(in crate::http) denoising_strength: Option<f64>,
}

impl JsonRequest for WebuiRequest {
    fn takes(field: &str) -> &'static str {
        match field {
            "seed" => "a whole number from -1, which draws one",
            "steps" | "width" | "height" | "batch_size" | "n_iter" => "a whole number, at least 1",
            "cfg_scale" | "eta" | "denoising_strength" => "a number",
            "send_images" => "true or false",
            "override_settings" => "an object",
            "init_images" => "a list of one image in base64",
            _ => "a string",
        }
    }
}

/// The images, and what they were made with.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct WebuiReply {
    /// PNGs in base64.
    pub(in crate::http) images: Vec<String>,
    /// The request.
    #[schema(value_type = Object)]
    pub(in crate::http) parameters: Value,
    /// A JSON object as a string: seeds, prompts, and a text of parameters for each image.
    pub(in crate::http) info: String,
}

/// A model, as A1111's clients list them.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct WebuiModel {
    /// Its id.
    pub(in crate::http) title: String,
    /// Its id.
    pub(in crate::http) model_name: String,
    /// Nothing: models are not told apart by hashes here.
    pub(in crate::http) hash: Option<String>,
    /// Nothing.
    pub(in crate::http) sha256: Option<String>,
    /// Its id; where it lies is not told.
    pub(in crate::http) filename: String,
    /// Nothing.
    pub(in crate::http) config: Option<String>,
}

/// A sampler by the names that A1111's clients know.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct WebuiSampler {
    /// Its name.
    pub(in crate::http) name: &'static str,
    /// Other names that are taken.
    pub(in crate::http) aliases: Vec<&'static str>,
    /// Nothing.
    #[schema(value_type = Object)]
    pub(in crate::http) options: Map<String, Value>,
}

/// Whether the server works.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct WebuiProgress {
    /// 0 where nothing is under way. The server does many things at a time, so how far one is is not told: it is 0.5 then.
    pub(in crate::http) progress: f64,
    /// 0.
    pub(in crate::http) eta_relative: f64,
    /// How many requests are under way.
    pub(in crate::http) state: WebuiState,
    /// Nothing: previews are streamed by `/v1/images/generations`.
    pub(in crate::http) current_image: Option<String>,
    /// Nothing.
    pub(in crate::http) textinfo: Option<String>,
}

/// As A1111's clients read it.
#[derive(Debug, Serialize, ToSchema)]
#[allow(missing_docs)]
pub(in crate::http) struct WebuiState {
    pub(in crate::http) skipped: bool,
    pub(in crate::http) interrupted: bool,
    pub(in crate::http) job: &'static str,
    /// Requests under way.
    pub(in crate::http) job_count: usize,
    pub(in crate::http) job_no: usize,
    pub(in crate::http) sampling_step: usize,
    pub(in crate::http) sampling_steps: usize,
}

/// Settings, of which there is one.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct WebuiOptions {
    /// The default model's id. It cannot be set: a request names its model in `override_settings`.
    pub(in crate::http) sd_model_checkpoint: Option<String>,
}

impl JsonRequest for WebuiOptions {
    fn takes(_: &str) -> &'static str {
        "the default model's id"
    }
}

/// A LoRA that prompts may name.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct WebuiLora {
    /// Its name.
    pub(in crate::http) name: String,
    /// Its name.
    pub(in crate::http) alias: String,
    /// Nothing: where it lies is not told.
    pub(in crate::http) path: String,
}

/// An error, in A1111's shape.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct WebuiError {
    /// What kind it is.
    error: &'static str,
    /// What went wrong, where, and how to mend it.
    detail: String,
    /// Nothing.
    body: &'static str,
    /// As `detail`.
    errors: String,
}

impl WebuiError {
    pub(in crate::http) fn of(error: &'static str, message: &str) -> Self {
        Self { error, detail: message.to_owned(), body: "", errors: message.to_owned() }
    }
}
