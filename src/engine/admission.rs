//! What a sample is to the planner, from its admission to its reply: said once, held by the sample.

use std::{sync::Arc, time::Instant};

use super::batcher::{SampleKey, ScheduledWork, Urgency};
use crate::registry::Model;

/// One image, or one row of a raw evaluation.
#[derive(Debug)]
pub(super) struct Admission {
    /// Later ones have larger numbers.
    pub(super) key: SampleKey,
    pub(super) model: Arc<Model>,
    /// Rows it takes in every evaluation: 2 with guidance, else 1.
    pub(super) rows: usize,
    pub(super) evaluations: usize,
    pub(super) deadline: Option<Instant>,
    /// Whether no client waits for it, so that it runs only when nothing else does.
    pub(super) background: bool,
}

impl Admission {
    /// All of it that is to be done.
    pub(super) fn work(&self, urgency: Urgency) -> ScheduledWork {
        ScheduledWork { rows: self.rows, evaluations: self.evaluations, urgency }
    }
}
