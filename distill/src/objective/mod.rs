//! What a student's answer is held against.

mod dkdm;
mod matching;
mod parametrisation;
mod segment;

use candle_core::{Result, Tensor};

pub use dkdm::{Dkdm, MOST_WEIGHT, Weighting};
pub(crate) use matching::{matching, score_identity};
pub use parametrisation::{Linear, to_eps, to_x0};
pub(crate) use parametrisation::{apply, column};
pub use segment::{SegmentEnd, secant};

use crate::training_batch::TrainingBatch;

/// What a run minimises.
#[derive(Debug, Clone)]
pub enum Objective {
    /// The teacher's own answer, in eps.
    Dkdm(Dkdm),
    /// Where the teacher's walk goes, in v.
    SegmentEnd(SegmentEnd),
}

impl Objective {
    /// The losses of a student's raw answer.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn losses(&self, batch: &TrainingBatch, student: &Tensor) -> Result<Losses> {
        match self {
            Self::Dkdm(objective) => objective.losses(batch, student),
            Self::SegmentEnd(objective) => objective.losses(batch, student),
        }
    }
}

/// An iteration's losses, scalars with gradients.
#[derive(Debug, Clone)]
pub struct Losses {
    /// What is minimised.
    pub total: Tensor,
    /// The mean square error with all weights 1: in eps for DKDM, in v for the end of a segment.
    pub simple: Tensor,
    /// `L_vlb` before its weight.
    pub vlb: Option<Tensor>,
}
