//! DKDM's data-free baseline: the teacher draws a set of samples, and the student is trained on them as if they were data.

mod latents;
mod pictures;

use std::path::PathBuf;

use serde_json::{Map, Value};
use understudy_models::{Error, Result};

use crate::checkpoint::Snapshot;
use crate::generate::Sampling;
use crate::teacher::Teacher;

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

impl Settings {
    /// Refuses what no training batch can be made of, before anything is drawn.
    fn check(&self) -> Result<()> {
        let Self { count, batch, .. } = *self;
        if count >= batch {
            return Ok(());
        }
        let remedy = format!("a batch has {batch}; draw more, or take a smaller --batch");
        Err(Error::value("--samples", count, remedy))
    }

    // The sampling is the task's; what was drawn is checked where it is read.
    fn identity(&self, teacher: &Teacher) -> Map<String, Value> {
        [
            ("samples".into(), self.count.into()),
            ("teacher_sha256".into(), teacher.hash.clone().into()),
            ("teacher_noise_schedule".into(), teacher.schedule.to_json()),
        ]
        .into_iter()
        .collect()
    }
}

/// SHA-256 of the samples that a run's training batches come from: what is on disk is the state, and this tells whether it is still
/// the same. None while they are drawn, and in checkpoints of earlier versions.
struct Known {
    /// Its name in a checkpoint.
    name: &'static str,
    sha256: Option<String>,
}

impl Known {
    /// Whether samples with that hash are others.
    fn differ(&self, sha256: &str) -> bool {
        self.sha256.as_ref().is_some_and(|own| own != sha256)
    }

    fn save(&self, snapshot: &mut Snapshot) {
        if let Some(sha256) = &self.sha256 {
            snapshot.u8(self.name, sha256.as_bytes());
        }
    }

    fn restore(&mut self, snapshot: &Snapshot) {
        let saved = snapshot.get_u8(self.name).ok();
        self.sha256 = saved.and_then(|saved| String::from_utf8(saved).ok());
    }
}
