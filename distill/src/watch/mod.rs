//! Watching a run: what it tells whoever started it, and what it leaves on disk.

mod journal;
mod likeness;
mod samples;
mod tensorboard;

use serde_json::{Map, Value};

use crate::estimate::Estimate;
pub use journal::{Journal, Record};
pub use likeness::{Likeness, Moments};
pub use samples::sample_grid;
pub(crate) use samples::{GRID_CAPTIONS, grid};

/// What happens in a run.
#[derive(Debug, Clone, Copy)]
pub enum Event<'a> {
    /// It is about to begin, or to go on.
    Begun {
        /// What makes it this run and no other.
        identity: &'a Map<String, Value>,
    },
    /// It goes on from a checkpoint.
    Resumed {
        /// Steps done before.
        step: u64,
        /// What an earlier version's checkpoint does not say, and so could not be compared.
        unsaid: &'a [String],
    },
    /// What is left of it was measured; it begins unless [`Watch::stops`].
    Estimated(&'a Estimate),
    /// The first training batch is being prepared.
    Preparing {
        /// How much of it is done, 0 to 1.
        done: f64,
    },
    /// A step is done.
    Step {
        /// Its figures.
        record: &'a Record,
        /// Steps in all.
        steps: u64,
    },
    /// The state is on disk.
    Checkpoint {
        /// Steps done.
        step: u64,
    },
}

/// Whoever looks on.
pub trait Watch {
    /// Told of everything, as it happens.
    fn event(&mut self, event: Event<'_>);

    /// Whether the run is to stop here. What is done is kept: it goes on another time.
    fn stops(&self) -> bool {
        false
    }
}
