//! Strategic stochastic sampling of trajectory consistency models: Zheng et al. 2024 (arXiv 2402.19159).
//!
//! A step goes down the trajectory to the timestep `(1 − eta)` of the way to the next, and up to the next by fresh noise;
//! `eta` 0 adds none. The last step ends at timestep 0.

use super::level::{Level, direction, estimate};
use super::{Evaluation, NoiseScale, Step};
use crate::Result;
use crate::schedule::Schedule;

pub(super) fn evaluations(
    schedule: &Schedule,
    timesteps: &[f64],
    eta: f64,
) -> Result<Vec<Evaluation>> {
    let alpha_bar = |t: f64| schedule.alpha_bar[t as usize];
    let following = timesteps.iter().skip(1).map(|&t| Some(t)).chain([None]);
    timesteps
        .iter()
        .zip(following)
        .map(|(&timestep, next)| {
            // In f32, as PyTorch multiplies a number and a whole one.
            let down = next.map_or(0.0, |t| f64::from(((1.0 - eta) as f32 * t as f32).floor()));
            let reached = Level::of_alpha_bar(alpha_bar(down));
            // The share of what is reached that the next timestep keeps.
            let kept = next.map_or(1.0, |t| alpha_bar(t) / alpha_bar(down));
            let level = Level::of_alpha_bar(alpha_bar(timestep));
            let (a, e) = direction(schedule.prediction_type, level, reached.s);
            let step = Step {
                a: a * kept.sqrt(),
                b: reached.alpha * kept.sqrt(),
                e: e * kept.sqrt(),
                d: NoiseScale::Fixed((1.0 - kept).max(0.0).sqrt()),
                ..estimate(schedule, level)?
            };
            Ok(Evaluation { timestep, step })
        })
        .collect()
}
