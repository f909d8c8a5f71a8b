//! The JSON bodies of the API, each defined once: what is parsed, what is written, and what the
//! OpenAPI document says about both.

#[macro_use]
mod drawing;

mod compare;
mod experiments;
mod images;
mod inference;
mod models;
mod webui;

pub(super) use compare::*;
pub(super) use experiments::*;
pub(super) use images::*;
pub(super) use inference::*;
pub(super) use models::*;
pub(super) use webui::*;

use serde::Serialize;
use utoipa::ToSchema;

/// An error, in OpenAI's shape.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct ErrorReply {
    /// The error.
    pub(super) error: ErrorBody,
}

/// What went wrong, where, and how to mend it.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct ErrorBody {
    /// Names the field, its value, the limit and the remedy.
    pub(super) message: String,
    /// `invalid_request_error`, `authentication_error`, `rate_limit_error` or `server_error`.
    #[serde(rename = "type")]
    pub(super) kind: String,
    /// The field at fault, where there is one.
    pub(super) param: Option<String>,
    /// A word for programs: `invalid_value`, `unknown_field`, `model_not_found`, `queue_full`, …
    pub(super) code: String,
}

/// Bytes that are not text.
#[derive(ToSchema)]
#[schema(value_type = String, format = Binary)]
#[allow(dead_code)] // a schema only
pub(super) struct Binary(Vec<u8>);

/// Whether the server takes requests.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Health {
    /// `ok`, `loading`, `draining`, `device_lost` or `experiments_lost`.
    pub(super) status: HealthStatus,
    /// Models that serve.
    pub(super) models_ready: usize,
    /// Models in the models folder.
    pub(super) models_total: usize,
    /// Why experiments and votes cannot be kept, where they could not when somebody last asked for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) experiments: Option<String>,
}

/// What the server is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum HealthStatus {
    /// Serving.
    Ok,
    /// Loading or warming models.
    Loading,
    /// Finishing what is in flight before it stops.
    Draining,
    /// A GPU answers nothing any more until the server is started anew; others go on.
    DeviceLost,
    /// The database of experiments is damaged.
    ExperimentsLost,
}
