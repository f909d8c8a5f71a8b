//! Bodies of the Open Inference Protocol v2.

use serde::Serialize;
use utoipa::ToSchema;

/// An error, in the protocol's shape.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct InferenceError {
    /// Names the field, its value, the limit and the remedy.
    pub(in crate::http) error: String,
}
