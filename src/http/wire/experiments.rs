//! Bodies of `/v1/experiments`.

use serde::{Deserialize, Serialize};
use serde_json::json;
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{ObjectBuilder, RefOr, Schema, schema::SchemaType},
};

use super::{ClassLabel, GenerationRequest, LoraUse, OutputFormat, PromptSyntax};
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
    /// Bounds that every arm but the first, the control, has to keep. The weight of one that does not becomes 0.
    pub(in crate::http) guardrails: Option<GuardrailsRequest>,
    /// Gives the second of two arms more traffic stage by stage. Arms then have no weights of their own.
    pub(in crate::http) ramp: Option<RampRequest>,
}

/// Bounds on an arm; at least one. Unknown fields are refused.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct GuardrailsRequest {
    /// Least median PSNR in dB between the arm's images and its teacher's, by shadow traffic.
    #[schema(minimum = 0, maximum = 100, example = 18)]
    pub(in crate::http) min_psnr_db: Option<f64>,
    /// Least median SSIM of the same.
    #[schema(minimum = -1, maximum = 1)]
    pub(in crate::http) min_ssim: Option<f64>,
    /// The medians are of the last so many images, and say nothing before; 50 when absent.
    #[schema(minimum = 1, maximum = 500)]
    pub(in crate::http) min_comparisons: Option<i64>,
    /// Greatest median time of the arm's requests ÷ the control's, since the weights last changed.
    #[schema(exclusive_minimum = 0, maximum = 1000)]
    pub(in crate::http) max_latency_ratio: Option<f64>,
    /// Requests of the arm, and of the control, before their times say anything; 100 when absent.
    #[schema(minimum = 1, maximum = 1000000)]
    pub(in crate::http) min_requests: Option<i64>,
    /// The arm is stopped where votes prefer the control to it with an always-valid p-value of at most this.
    #[schema(exclusive_minimum = 0, maximum = 0.5)]
    pub(in crate::http) votes_p_value: Option<f64>,
    /// Votes that preferred one of the two before they say anything; 20 when absent.
    #[schema(minimum = 1, maximum = 1000000)]
    pub(in crate::http) min_votes: Option<i64>,
}

/// Stages of the second arm's traffic. Unknown fields are refused.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct RampRequest {
    /// The second arm's shares of the traffic, rising to at most 1; 0.01, 0.1, 0.5 and 1 when absent.
    #[schema(min_items = 1, max_items = 16)]
    pub(in crate::http) shares: Option<Vec<f64>>,
    /// The second arm's images in a stage before the next; 100 when absent.
    #[schema(minimum = 0, maximum = 1000000000)]
    pub(in crate::http) images: Option<i64>,
    /// Votes on the two arms in a stage before the next; 0 when absent.
    #[schema(minimum = 0, maximum = 1000000000)]
    pub(in crate::http) votes: Option<i64>,
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
    /// Its part of the sum of all weights; not all may be 0. Absent where there is a ramp, and only there.
    #[schema(minimum = 0, maximum = 1000000)]
    pub(in crate::http) weight: Option<f64>,
}

impl JsonRequest for CreateExperiment {
    fn takes(field: &str) -> &'static str {
        match field {
            "arms" => "a list of {\"model\", \"weight\"}",
            "guardrails" => "an object of bounds: {\"min_psnr_db\": 18}",
            "ramp" => "an object: {\"shares\": [0.01, 0.1, 0.5, 1], \"images\": 100, \"votes\": 0}",
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
    /// The bounds on every arm but the first, where there are any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::http) guardrails: Option<GuardrailsReply>,
    /// The ramp and where it is, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::http) ramp: Option<RampReply>,
}

/// Bounds and the observations that they take; those that are not set are absent.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct GuardrailsReply {
    /// Least median PSNR in dB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::http) min_psnr_db: Option<f64>,
    /// Least median SSIM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::http) min_ssim: Option<f64>,
    /// Images that the medians are of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::http) min_comparisons: Option<u64>,
    /// Greatest median time ÷ the control's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::http) max_latency_ratio: Option<f64>,
    /// Requests of either before the times are compared.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::http) min_requests: Option<u64>,
    /// p-value of votes for the control.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::http) votes_p_value: Option<f64>,
    /// Decisive votes before they are tested.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::http) min_votes: Option<u64>,
}

/// A ramp and where it is.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct RampReply {
    /// The second arm's shares of the traffic.
    pub(in crate::http) shares: Vec<f64>,
    /// Its images in a stage before the next.
    pub(in crate::http) images: u64,
    /// Votes in a stage before the next.
    pub(in crate::http) votes: u64,
    /// The stage, from 1.
    pub(in crate::http) stage: usize,
    /// `running`, `finished` at the last stage, `stopped` by a guardrail, or `overridden` by weights set by hand.
    pub(in crate::http) phase: RampPhase,
    /// The second arm's images in this stage.
    pub(in crate::http) stage_images: u64,
    /// Votes in this stage.
    pub(in crate::http) stage_votes: u64,
}

/// Where a ramp is.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http) enum RampPhase {
    /// On its way.
    Running,
    /// At its last stage.
    Finished,
    /// A guardrail stopped the arm.
    Stopped,
    /// Weights were set by hand.
    Overridden,
}

/// What guardrails see of an arm.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct WatchedReply {
    /// Images of the arm that were compared with its teacher's, as many as a median takes at most.
    pub(in crate::http) comparisons: u64,
    /// Their median PSNR in dB; null without any.
    pub(in crate::http) psnr_db: Option<f64>,
    /// Their median SSIM; null without any.
    pub(in crate::http) ssim: Option<f64>,
    /// Requests since the weights last changed, of the arm or of the control: whichever answered fewer.
    pub(in crate::http) requests: u64,
    /// Their median time ÷ the control's; null without any.
    pub(in crate::http) latency_ratio: Option<f64>,
    /// Votes on the arm and the control, seen from the arm.
    pub(in crate::http) wins: u64,
    /// Votes for the control.
    pub(in crate::http) losses: u64,
    /// Their always-valid p-value.
    pub(in crate::http) p_value: f64,
}

/// Why the weight of an arm is 0.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct StoppedReply {
    /// The field of `guardrails` that it broke.
    pub(in crate::http) guardrail: &'static str,
    /// A sentence.
    pub(in crate::http) reason: String,
    /// What was observed.
    pub(in crate::http) observed: f64,
    /// The bound.
    pub(in crate::http) bound: f64,
    /// Of how many observations.
    pub(in crate::http) count: u64,
    /// Unix seconds when it was decided.
    pub(in crate::http) at: u64,
    /// The weight before.
    pub(in crate::http) weight: f64,
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
    /// What guardrails see of it, where there are any and it is not the control.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::http) watched: Option<WatchedReply>,
    /// Why a guardrail stopped it, where one did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::http) stopped: Option<StoppedReply>,
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
