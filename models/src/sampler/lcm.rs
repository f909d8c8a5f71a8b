//! Multistep consistency sampling of latent consistency models: Luo et al. 2023 (arXiv 2310.04378).
//!
//! The network's estimate of the clean sample, in the boundary-condition form `c_skip·x + c_out·x0`, is noised anew
//! for the next timestep.

use super::level::{Level, estimate};
use super::{Evaluation, NoiseScale, Step};
use crate::Result;
use crate::schedule::Schedule;

/// The standard deviation of data in the boundary condition (Song et al. 2023, arXiv 2303.01469, eq. 5).
const SIGMA_DATA: f64 = 0.5;

pub(super) fn evaluations(schedule: &Schedule, timesteps: &[f64]) -> Result<Vec<Evaluation>> {
    let level = |t: f64| Level::of_alpha_bar(schedule.alpha_bar[t as usize]);
    let following = timesteps.iter().skip(1).map(|&t| level(t)).chain([Level::CLEAN]);
    timesteps
        .iter()
        .zip(following)
        .map(|(&timestep, to)| {
            let scaled = timestep * schedule.timestep_scaling;
            let norm = scaled.hypot(SIGMA_DATA);
            let (skip, out) = ((SIGMA_DATA / norm).powi(2), scaled / norm);
            let step = Step {
                a: to.alpha * skip,
                b: to.alpha * out,
                d: NoiseScale::Fixed(to.s),
                ..estimate(schedule, level(timestep))?
            };
            Ok(Evaluation { timestep, step })
        })
        .collect()
}
