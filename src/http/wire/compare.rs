//! Bodies of `/v1/compare`.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{
    ClassLabel, ErrorReply, GenerationReply, GenerationRequest, LoraUse, OutputFormat,
    PromptSyntax, StreamEvent,
};
use crate::http::body::JsonRequest;

drawing_request! {
    /// A request to make the same images with two models. Fields that are absent or null take their
    /// defaults; unknown fields are refused.
    struct CompareRequest {
        /// The teacher's id and the student's; absent for the default model and its first student. May be
        /// the same id twice, to compare samplers or step counts.
        #[schema(min_items = 2, max_items = 2)]
        models: Option<Vec<String>>,
        /// How many images of each model; both models' images count against the queue.
        #[schema(minimum = 1, default = 1)]
        n: Option<i64>,
        /// Steps of the sampler, for both or the teacher's and the student's; the model cards' when absent.
        num_inference_steps: Option<OneOrTwo<i64>>,
        /// The sampler, for both or the teacher's and the student's; the model cards' when absent.
        scheduler: Option<OneOrTwo<String>>,
        /// Only `b64_json`: the server keeps no images, so it has no URLs to give.
        #[schema(pattern = "^b64_json$")]
        response_format: Option<String>,
        /// Server-sent events instead of one reply: each student's image, then its teacher's, then the
        /// comparison.
        #[schema(default = false)]
        stream: Option<bool>,
        /// Previews per image of both models while streaming.
        #[schema(minimum = 0, maximum = 3, default = 0)]
        partial_images: Option<i64>,
        /// Who asks; accepted for OpenAI's clients and not used.
        #[serde(rename = "user")]
        _user: Option<String>,
    }
}

/// A value for both models, or the teacher's and the student's.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(untagged)]
pub(in crate::http) enum OneOrTwo<T> {
    /// For both.
    One(T),
    /// The teacher's and the student's.
    Two(Vec<T>),
}

impl JsonRequest for CompareRequest {
    fn takes(field: &str) -> &'static str {
        match field {
            "models" => "a list of two model ids: the teacher's and the student's",
            "num_inference_steps" => {
                "a whole number from 1 to the schedule's training steps, or a list of two of them"
            }
            "scheduler" => "a string, or a list of two of them",
            _ => GenerationRequest::takes(field),
        }
    }
}

/// What both models made, and how they compare.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct CompareReply {
    /// The teacher's reply and the student's.
    #[schema(min_items = 2, max_items = 2)]
    pub(in crate::http) pair: Vec<GenerationReply>,
    /// How they compare.
    #[serde(flatten)]
    pub(in crate::http) comparison: Comparison,
}

/// How the images and times of two models compare.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(in crate::http) struct Comparison {
    /// Teacher's time ÷ student's.
    pub(in crate::http) speedup: Speedup,
    /// Peak signal-to-noise ratio between the two 8-bit images, by index, at most 100; null where width,
    /// height or channels differ.
    pub(in crate::http) psnr_db: Vec<Option<f64>>,
    /// Structural similarity of the two 8-bit images, by index (7×7 uniform window, mean over channels);
    /// null where they have no PSNR, or a side shorter than the window.
    pub(in crate::http) ssim: Vec<Option<f64>>,
    /// Whether both models started from the same noise, which takes the same shape of latents.
    pub(in crate::http) shared_noise: bool,
}

/// Teacher's time ÷ student's; null where the student took no time that the clock can tell.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, ToSchema)]
pub(in crate::http) struct Speedup {
    /// Of device time.
    pub(in crate::http) device: Option<f64>,
    /// Of the times from receipt to the last image, while both ran side by side.
    pub(in crate::http) end_to_end: Option<f64>,
}

/// An event of a streamed comparison.
// A schema only: each is written as what it holds.
#[derive(Serialize, ToSchema)]
#[allow(dead_code)]
#[serde(untagged)]
pub(in crate::http) enum CompareStreamed {
    /// A preview, a student's image (both `image_generation.partial_image`), or a teacher's
    /// (`image_generation.completed`).
    Image(StreamEvent),
    /// The last event.
    Completed(CompareCompleted),
    /// What went wrong after the start; the last event.
    Error(ErrorReply),
}

/// The end of a streamed comparison.
#[derive(Debug, Serialize, ToSchema)]
#[serde(tag = "type")]
pub(in crate::http) enum CompareCompleted {
    /// How the images compare.
    #[serde(rename = "compare.completed")]
    Completed {
        /// The models, the teacher first.
        models: Vec<String>,
        /// Where their times went.
        timings: Vec<super::Timings>,
        /// How they compare.
        #[serde(flatten)]
        comparison: Comparison,
    },
}
