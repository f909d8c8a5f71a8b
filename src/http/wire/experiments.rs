//! Bodies of `/v1/experiments`.

use serde::{Deserialize, Serialize};
use serde_json::json;
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{ObjectBuilder, RefOr, Schema, schema::SchemaType},
};

use super::{ClassLabel, GenerationRequest, OutputFormat};
use crate::http::body::JsonRequest;

/// A new experiment. Unknown fields are refused.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct CreateExperiment {
    /// Requests name it as `model` `experiment:ID`.
    #[schema(pattern = "^[A-Za-z0-9._-]+$", min_length = 1, max_length = 64, example = "first")]
    pub(in crate::http) id: String,
    /// The models it is between, each once, or with other steps.
    #[schema(min_items = 2, max_items = 6)]
    pub(in crate::http) arms: Vec<ArmRequest>,
}

/// Other weights for an experiment's arms. Unknown fields are refused.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct ChangeExperiment {
    /// Arms whose weights change; the others keep theirs. As few keys as possible change their arm.
    #[schema(max_items = 6)]
    pub(in crate::http) arms: Vec<ArmRequest>,
}

/// An arm and its weight.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct ArmRequest {
    /// A model's id. Where it is absent from a new experiment, the first arm is the default model and the second its
    /// first student; where it is absent from a change, it is the model of the experiment's arm in the same place.
    #[schema(example = "fashion-mnist-teacher")]
    pub(in crate::http) model: Option<String>,
    /// Steps of the sampler on this arm, so that one model in different steps makes several arms; requests to the
    /// experiment then name none. Without it those of the request, or the model card's.
    #[schema(minimum = 1)]
    pub(in crate::http) num_inference_steps: Option<i64>,
    /// Its part of the sum of all weights; not all may be 0.
    #[schema(minimum = 0, maximum = 1000000)]
    pub(in crate::http) weight: f64,
}

impl JsonRequest for CreateExperiment {
    fn takes(field: &str) -> &'static str {
        match field {
            "arms" => "a list of {\"model\", \"weight\"}",
            "weight" => "a number from 0 to 1000000",
            "num_inference_steps" => "a whole number from 1 to the schedule's training steps",
            _ => "a string",
        }
    }
}

impl JsonRequest for ChangeExperiment {
    fn takes(field: &str) -> &'static str {
        CreateExperiment::takes(field)
    }
}

/// All experiments.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct ExperimentList {
    /// Always `list`.
    pub(in crate::http) object: &'static str,
    /// The experiments by id.
    pub(in crate::http) data: Vec<ExperimentReply>,
}

/// An experiment and how it goes.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct ExperimentReply {
    /// Its id.
    pub(in crate::http) id: String,
    /// Unix seconds when it was created.
    pub(in crate::http) created: u64,
    /// Its arms in the order they were given.
    pub(in crate::http) arms: Vec<ArmReply>,
    /// The same votes for every two arms; where there are two, what their own results say.
    pub(in crate::http) comparisons: Vec<ArmsCompared>,
}

/// An arm: what it served, and how often it was preferred to whatever other arm it was shown with. Where there
/// are k > 2 arms there are k p-values to be wrong about: multiply them by k.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct ArmReply {
    /// The model.
    pub(in crate::http) model: String,
    /// Its steps, where the arm says them. In votes, comparisons and metrics the arm is then called `MODEL@STEPS`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::http) num_inference_steps: Option<usize>,
    /// Its weight.
    pub(in crate::http) weight: f64,
    /// Its weight ÷ the sum of all.
    pub(in crate::http) share: f64,
    /// Requests for the experiment that it answered. Blind pairs are no such requests.
    pub(in crate::http) requests: u64,
    /// Their images.
    pub(in crate::http) images: u64,
    /// How long they took; null without any.
    pub(in crate::http) latency_ms: Option<LatencyReply>,
    /// What people preferred.
    #[serde(flatten)]
    pub(in crate::http) votes: VotesReply,
}

/// Times from receipt to answer in milliseconds.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct LatencyReply {
    /// Mean.
    pub(in crate::http) mean: f64,
    /// Median, from a histogram.
    pub(in crate::http) p50: f64,
    /// 95th percentile, from a histogram.
    pub(in crate::http) p95: f64,
}

/// Votes on two arms, seen from the first.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct ArmsCompared {
    /// The two models, as `MODEL@STEPS` where the arm says its steps.
    #[schema(min_items = 2, max_items = 2)]
    pub(in crate::http) models: Vec<String>,
    /// What people preferred, seen from the first.
    #[serde(flatten)]
    pub(in crate::http) votes: VotesReply,
}

/// Votes and what follows from them. Ties are told and decide nothing: win rate, interval and p-value are of
/// the wins and losses.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct VotesReply {
    /// Votes for it.
    pub(in crate::http) wins: u64,
    /// Votes for the other image.
    pub(in crate::http) losses: u64,
    /// Votes for neither.
    pub(in crate::http) ties: u64,
    /// Wins ÷ (wins + losses); null without any.
    pub(in crate::http) win_rate: Option<f64>,
    /// Wilson's 95 % interval of the win rate, for one look; null where that is.
    pub(in crate::http) wilson_interval: Option<[f64; 2]>,
    /// p-value of "preferred as often as not" that holds whenever and however often one looks; 1 without
    /// votes.
    #[schema(minimum = 0, maximum = 1)]
    pub(in crate::http) p_value: f64,
}

drawing_request! {
    /// A request for a blind pair: what to draw, the same for both. Fields that are absent or null take their
    /// defaults; unknown fields are refused.
    struct PairRequest {
        /// Steps of the sampler for both; the model cards' when absent.
        #[schema(minimum = 1)]
        num_inference_steps: Option<i64>,
        /// The sampler for both; the model cards' when absent.
        #[schema(value_type = Option<super::Scheduler>)]
        scheduler: Option<String>,
    }
}

impl JsonRequest for PairRequest {
    fn takes(field: &str) -> &'static str {
        GenerationRequest::takes(field)
    }
}

/// Two images of one seed by two arms, in an order that nobody is told before the vote.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct PairReply {
    /// What a vote names.
    pub(in crate::http) pair_id: String,
    /// The two.
    #[schema(min_items = 2, max_items = 2)]
    pub(in crate::http) images: [BlindImage; 2],
    /// Their class, where both have the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::http) class_label: Option<u32>,
    /// Its name, where both call it the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::http) class_name: Option<String>,
}

/// An image and nothing else.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct BlindImage {
    /// The encoded image in base64.
    pub(in crate::http) b64_json: String,
}

/// A preference. Unknown fields are refused.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct VoteRequest {
    /// The pair it is on.
    #[schema(min_length = 1)]
    pub(in crate::http) pair_id: String,
    /// `0` or `1`, the preferred image, or `tie`.
    pub(in crate::http) choice: ChoiceRequest,
    /// The client's own name for this vote: sent again under it, the vote counts once.
    #[schema(min_length = 1, max_length = 64)]
    pub(in crate::http) idempotency_key: String,
}

/// The preferred image, or `tie`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub(in crate::http) enum ChoiceRequest {
    /// `0` or `1`.
    Image(i64),
    /// `tie`.
    Neither(String),
}

impl ToSchema for ChoiceRequest {}

impl PartialSchema for ChoiceRequest {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .schema_type(SchemaType::AnyValue)
            .enum_values(Some([json!(0), json!(1), json!("tie")]))
            .description(Some("The preferred image, or `tie`."))
            .into()
    }
}

impl JsonRequest for VoteRequest {
    fn takes(field: &str) -> &'static str {
        match field {
            "choice" => "0, 1 or \"tie\"",
            _ => "a string",
        }
    }
}

/// A counted vote, and what it was on.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct VoteReply {
    /// The pair.
    pub(in crate::http) pair_id: String,
    /// The models of image 0 and image 1, as `MODEL@STEPS` where the arm says its steps.
    #[schema(min_items = 2, max_items = 2)]
    pub(in crate::http) models: [String; 2],
    /// The preferred one of them; null for a tie.
    pub(in crate::http) winner: Option<String>,
    /// The seed of both images.
    pub(in crate::http) seed: u64,
}
