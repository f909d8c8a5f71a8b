//! Bodies of `/v1/images/generations`.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::ErrorReply;
use crate::http::{body::JsonRequest, picture::Edit};

generation_request! {
    /// A request for images. Fields that are absent or null take their defaults; unknown fields are refused.
    struct GenerationRequest {
        /// Accepted for OpenAI's clients and ignored.
        #[serde(rename = "style")]
        _style: Option<String>,
        /// Accepted for OpenAI's clients and ignored.
        #[serde(rename = "moderation")]
        _moderation: Option<String>,
        /// What the image begins with, of a request to `/v1/images/edits`; no field of a body.
        #[serde(skip)]
        #[schema(ignore)]
        edit: Option<Edit>,
    }
}

generation_request! {
    /// A form that asks for images made of another. Fields that are absent take their defaults; unknown fields are refused.
    struct EditRequest {
        /// The image to begin with: PNG, JPEG or WebP. It is turned as its EXIF data says, its transparency is left out,
        /// and it is scaled to the size of the images that are made.
        #[serde(skip)]
        #[schema(rename = "image", value_type = String, format = Binary)]
        _image: (),
        /// A PNG of the image's size whose transparent parts (alpha 0) are drawn anew; the rest of the image stays, as far as the
        /// model's latents can tell parts of it apart.
        #[serde(skip)]
        #[schema(rename = "mask", value_type = Option<String>, format = Binary)]
        _mask: (),
        /// How much of it is drawn anew: of `num_inference_steps` steps the last `strength`, above 0 to 1.
        #[schema(minimum = 0, maximum = 1, default = 0.8)]
        strength: Option<f64>,
        /// Accepted for OpenAI's clients and ignored.
        #[serde(rename = "input_fidelity")]
        _input_fidelity: Option<String>,
    }
}

impl JsonRequest for EditRequest {
    fn takes(field: &str) -> &'static str {
        match field {
            "strength" => "a number above 0 to 1",
            _ => GenerationRequest::takes(field),
        }
    }
}

impl GenerationRequest {
    /// Whether it says which class to make.
    pub(in crate::http) fn names_class(&self) -> bool {
        self.class_label.is_some() || self.prompt.as_deref().is_some_and(|text| !text.is_empty())
    }
}

impl JsonRequest for GenerationRequest {
    fn takes(field: &str) -> &'static str {
        match field {
            "class_label" => "a class's number or its name",
            "n" => "a whole number, at least 1",
            "seed" => "a whole number from 0 to 9007199254740991",
            "num_inference_steps" => "a whole number from 1 to the schedule's training steps",
            "eta" => "a number, at least 0",
            "guidance_scale" => "a number from -1000 to 1000",
            "output_format" => "\"png\", \"jpeg\" or \"webp\"",
            "output_compression" => "a whole number from 0 to 100",
            "stream" => "true or false",
            "partial_images" => "a whole number from 0 to 3",
            "prompt_syntax" => "\"plain\" or \"weighted\"",
            "lora" => "a list of {\"name\", \"scale\"}",
            "deadline_ms" => "a whole number of milliseconds, at least 1",
            _ => "a string",
        }
    }
}

/// A LoRA of a request.
#[derive(Debug, Clone, PartialEq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct LoraUse {
    /// Its name, as the server was given it.
    pub(in crate::http) name: String,
    /// How much of it is added: 1, the default, is what it was trained for.
    #[schema(minimum = -100, maximum = 100, default = 1.0)]
    pub(in crate::http) scale: Option<f64>,
}

/// How prompts are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(in crate::http) enum PromptSyntax {
    /// Every letter is text.
    Plain,
    /// Words may have weights.
    Weighted,
}

/// A class, by number or name.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(untagged)]
pub(in crate::http) enum ClassLabel {
    /// Its number, from 0.
    Number(i64),
    /// Its name; case does not matter, and space, `-` and `_` are the same.
    Name(String),
}

/// A sampler.
// A schema only: the names live in the models crate.
#[derive(ToSchema)]
#[allow(dead_code)]
#[schema(rename_all = "lowercase")]
pub(in crate::http) enum Scheduler {
    /// Ancestral sampling, the schedule's own variance.
    Ddpm,
    /// DDIM.
    Ddim,
    /// DPM-Solver++ 2M.
    #[schema(rename = "dpm++")]
    DpmPlusPlus,
    /// Euler.
    Euler,
    /// Heun; all but the last step take two evaluations.
    Heun,
    /// Pseudo linear multistep; one evaluation more than steps.
    Pndm,
    /// Euler with fresh noise at each step.
    #[schema(rename = "euler-ancestral")]
    EulerAncestral,
    /// For latent consistency models.
    Lcm,
    /// For trajectory consistency models.
    Tcd,
    /// For networks trained by flow matching, which take no other.
    #[schema(rename = "flow-euler")]
    FlowEuler,
}

/// What an image is encoded as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(in crate::http) enum OutputFormat {
    /// Lossless.
    #[default]
    Png,
    /// Lossy.
    Jpeg,
    /// Lossless, or lossy with `output_compression`.
    Webp,
}

impl OutputFormat {
    /// The media type.
    pub(in crate::http) fn media_type(self) -> &'static str {
        match self {
            Self::Png => "image/png",
            Self::Jpeg => "image/jpeg",
            Self::Webp => "image/webp",
        }
    }
}

/// The images, and how they came about.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct GenerationReply {
    /// Unix seconds.
    pub(in crate::http) created: u64,
    /// The model that served.
    pub(in crate::http) model: String,
    /// One entry per image.
    pub(in crate::http) data: Vec<GeneratedImage>,
    /// The images' format.
    pub(in crate::http) output_format: OutputFormat,
    /// `WIDTHxHEIGHT`.
    pub(in crate::http) size: String,
    /// Where the time went.
    pub(in crate::http) timings: Timings,
    /// With `model` `draft`: what the student made first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::http) draft: Option<DraftReply>,
    /// With `model` `auto`: why this model served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::http) routing: Option<Routing>,
}

/// The student's images, made before the teacher's.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct DraftReply {
    /// The student.
    pub(in crate::http) model: String,
    /// One entry per image.
    pub(in crate::http) data: Vec<GeneratedImage>,
    /// Where its time went.
    pub(in crate::http) timings: Timings,
}

/// Why a model served.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub(in crate::http) struct Routing {
    /// The reason.
    pub(in crate::http) reason: RoutingReason,
    /// Predicted milliseconds from admission to the teacher's last image; absent without a deadline.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::http) teacher_predicted_ms: Option<f64>,
    /// The same of the student, where it was asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::http) student_predicted_ms: Option<f64>,
    /// The steps, where the deadline left time for fewer than the model's usual ones: the most of those that its card
    /// lists as `evaluations`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::http) num_inference_steps: Option<usize>,
}

/// Why a model served a request to `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http) enum RoutingReason {
    /// The teacher: there was no deadline to meet.
    NoDeadline,
    /// The teacher: it was predicted to meet the deadline.
    TeacherInTime,
    /// The student: the teacher was predicted to miss the deadline, or to make others miss theirs.
    TeacherTooLate,
}

/// One image.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct GeneratedImage {
    /// The encoded image in base64.
    pub(in crate::http) b64_json: String,
    /// Which image of the request.
    pub(in crate::http) index: usize,
    /// The seed that gives this image again, with `n` 1.
    pub(in crate::http) seed: u64,
    /// Its class, of a class-conditional model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::http) class_label: Option<u32>,
    /// Its class's name, where the model card names them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::http) class_name: Option<String>,
}

/// Where a request's time went.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, ToSchema)]
pub(in crate::http) struct Timings {
    /// From admission to the first evaluation, of the image that waited longest.
    pub(in crate::http) queue_ms: f64,
    /// The images' shares of the device, summed: each evaluation's time divided by its rows.
    pub(in crate::http) device_ms: f64,
    /// From receipt to the reply.
    pub(in crate::http) total_ms: f64,
    /// Evaluations of each image.
    pub(in crate::http) network_evaluations: usize,
    /// Mean rows of the evaluations that the images took part in.
    pub(in crate::http) mean_batch: f64,
}

/// A streamed event: a preview or a finished image, as in OpenAI's specification, with the image's
/// `index` and `seed`.
#[derive(Debug, Serialize, ToSchema)]
#[serde(tag = "type")]
pub(in crate::http) enum StreamEvent {
    /// The current estimate of the finished image.
    #[serde(rename = "image_generation.partial_image")]
    PartialImage {
        /// The image.
        #[serde(flatten)]
        image: StreamedImage,
        /// Which preview of this image by this model, from 0.
        partial_image_index: usize,
        /// The model that made it.
        model: String,
        /// In a comparison: its place in `models`, which tells two sides of one model apart.
        #[serde(skip_serializing_if = "Option::is_none")]
        side: Option<usize>,
        /// Whether it is a student's finished image, which stands in until the teacher's is there; the
        /// last partial image of its model.
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        draft: bool,
        /// Where a draft's time went.
        #[serde(skip_serializing_if = "Option::is_none")]
        timings: Option<Timings>,
    },
    /// A finished image.
    #[serde(rename = "image_generation.completed")]
    Completed {
        /// The image.
        #[serde(flatten)]
        image: StreamedImage,
        /// The model that served.
        model: String,
        /// In a comparison: its place in `models`.
        #[serde(skip_serializing_if = "Option::is_none")]
        side: Option<usize>,
        /// Where this image's time went.
        timings: Timings,
        /// With `model` `auto`: why this model served.
        #[serde(skip_serializing_if = "Option::is_none")]
        routing: Option<Routing>,
        /// Always zero: there are no tokens here.
        usage: Usage,
    },
}

/// What a stream's events carry.
// A schema only: each is written as what it holds.
#[derive(Serialize, ToSchema)]
#[allow(dead_code, clippy::large_enum_variant)]
#[serde(untagged)]
pub(in crate::http) enum Streamed {
    /// An image.
    Image(Box<StreamEvent>),
    /// What went wrong after the start; the last event.
    Error(ErrorReply),
}

impl StreamEvent {
    /// The event's name.
    pub(in crate::http) fn name(&self) -> &'static str {
        match self {
            Self::PartialImage { .. } => "image_generation.partial_image",
            Self::Completed { .. } => "image_generation.completed",
        }
    }
}

/// What both kinds of event tell of an image.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct StreamedImage {
    /// The image itself.
    #[serde(flatten)]
    pub(in crate::http) image: GeneratedImage,
    /// Unix seconds.
    pub(in crate::http) created_at: u64,
    /// `WIDTHxHEIGHT`.
    pub(in crate::http) size: String,
    /// `auto`; OpenAI's clients expect it.
    pub(in crate::http) quality: &'static str,
    /// `opaque`; OpenAI's clients expect it.
    pub(in crate::http) background: &'static str,
    /// The image's format.
    pub(in crate::http) output_format: OutputFormat,
}

/// OpenAI's token counts; all zero.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(in crate::http) struct Usage {
    pub(in crate::http) total_tokens: u64,
    pub(in crate::http) input_tokens: u64,
    pub(in crate::http) output_tokens: u64,
    pub(in crate::http) input_tokens_details: InputTokens,
}

/// Part of [`Usage`].
#[derive(Debug, Default, Serialize, ToSchema)]
pub(in crate::http) struct InputTokens {
    pub(in crate::http) text_tokens: u64,
    pub(in crate::http) image_tokens: u64,
}
