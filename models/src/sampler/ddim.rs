//! Non-Markovian sampling: Song et al. 2020 (arXiv 2010.02502), eq. 12 and 16.

use super::level::{Level, direction, estimate};
use super::{Evaluation, NoiseScale, Step};
use crate::Result;
use crate::schedule::Schedule;

pub(super) fn evaluations(
    schedule: &Schedule,
    timesteps: &[f64],
    steps: usize,
    eta: f64,
) -> Result<Vec<Evaluation>> {
    // diffusers steps by this distance even where spacing puts the next timestep elsewhere.
    let distance = schedule.train_timesteps() / steps;
    let final_alpha_bar = if schedule.set_alpha_to_one { 1.0 } else { schedule.alpha_bar[0] };
    timesteps
        .iter()
        .map(|&timestep| {
            let t = timestep as usize;
            let alpha_bar = schedule.alpha_bar[t];
            let alpha_bar_next =
                t.checked_sub(distance).map_or(final_alpha_bar, |next| schedule.alpha_bar[next]);
            let variance = (1.0 - alpha_bar_next) / (1.0 - alpha_bar)
                * (1.0 - alpha_bar / alpha_bar_next).max(0.0);
            let scale = eta * variance.sqrt();
            // At eta 1 rounding may leave a little less than nothing.
            let amount = (1.0 - alpha_bar_next - scale * scale).max(0.0).sqrt();
            let level = Level::of_alpha_bar(alpha_bar);
            let (a, e) = direction(schedule.prediction_type, level, amount);
            let step = Step {
                a,
                b: alpha_bar_next.sqrt(),
                e,
                d: NoiseScale::Fixed(scale),
                ..estimate(schedule, level)?
            };
            Ok(Evaluation { timestep, step })
        })
        .collect()
}
