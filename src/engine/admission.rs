//! What a sample is to the planner, from its admission to its reply: said once, held by the sample.

use std::{sync::Arc, time::Instant};

use super::{
    batcher::{Part, SampleKey, ScheduledWork, Urgency},
    stage::{PerStage, Stage},
};
use crate::registry::Model;

/// One image, or one row of a raw evaluation.
#[derive(Debug)]
pub(super) struct Admission {
    /// Later ones have larger numbers.
    pub(super) key: SampleKey,
    pub(super) model: Arc<Model>,
    /// All that is to be done.
    pub(super) parts: PerStage<Part>,
    pub(super) deadline: Option<Instant>,
    /// Whether no client waits for it, so that it runs only when nothing else does.
    pub(super) background: bool,
}

impl Admission {
    pub(super) fn work(&self, urgency: Urgency) -> ScheduledWork {
        ScheduledWork { parts: self.parts, urgency }
    }

    /// Rows it takes in every evaluation of the network: 2 with guidance, else 1.
    pub(super) fn rows(&self) -> usize {
        self.parts[Stage::Denoise].rows
    }

    /// Evaluations of the network that it takes.
    pub(super) fn evaluations(&self) -> usize {
        self.parts[Stage::Denoise].evaluations
    }
}
