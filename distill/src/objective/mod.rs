//! What a student's answer is held against.

mod dkdm;
mod parametrisation;

pub use dkdm::{Dkdm, Losses, MOST_WEIGHT, Weighting};
pub use parametrisation::{Linear, to_eps, to_x0};
