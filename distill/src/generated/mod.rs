//! DKDM's data-free baseline: the teacher draws a set of samples, and the student is trained on them as if they were data.

mod latents;
mod pictures;

use std::path::PathBuf;

use crate::generate::Sampling;

pub use latents::Latents;
pub use pictures::Pictures;

/// What the teacher draws, and what training batches are made of it.
#[derive(Debug, Clone)]
pub struct Settings {
    /// How samples are drawn.
    pub sampling: Sampling,
    /// How many.
    pub count: usize,
    /// Where they are kept; those already there are not drawn again.
    pub folder: PathBuf,
    /// Rows of a training batch.
    pub batch: usize,
    /// Of the training batches.
    pub seed: u64,
}
