//! Admission: what gets in, and what is told to wait.

use std::time::Duration;

use super::{GenerateRequest, InferRequest, Rejected, Submission};

/// The handle on the engine; cheap to clone.
#[derive(Debug, Clone)]
pub struct Engine {}

impl Engine {
    /// Admits a request for images, one permit per image, without waiting.
    ///
    /// # Errors
    /// [`Rejected`] when the queue is full, the deadline cannot be met, or the server drains.
    pub fn generate(&self, request: GenerateRequest) -> Result<Submission, Rejected> {
        let _ = request;
        Err(Rejected::Draining)
    }

    /// Admits one raw evaluation, one permit per row.
    ///
    /// # Errors
    /// As [`Engine::generate`].
    pub fn infer(&self, request: InferRequest) -> Result<Submission, Rejected> {
        let _ = request;
        Err(Rejected::Draining)
    }

    /// Refuses everything from now on; what is in flight goes on.
    pub fn drain(&self) {}

    /// How long what is admitted is predicted to take.
    pub fn predicted_drain(&self) -> Duration {
        Duration::ZERO
    }
}
