//! Ancestral sampling: Ho et al. 2020 (arXiv 2006.11239), eq. 7, over any decreasing timesteps.

use super::level::{Level, estimate};
use super::{Evaluation, NoiseScale, Step};
use crate::Result;
use crate::schedule::{Schedule, VarianceType};

/// The variance that stands for none, so that its logarithm is finite (as in diffusers).
const LEAST_VARIANCE: f64 = 1e-20;

pub(super) fn evaluations(
    schedule: &Schedule,
    timesteps: &[f64],
    learned_variance: bool,
) -> Result<Vec<Evaluation>> {
    let learns =
        matches!(schedule.variance_type, VarianceType::Learned | VarianceType::LearnedRange);
    if learns && !learned_variance {
        return Err(schedule.refuse(
            "variance_type",
            schedule.variance_type.name(),
            "the network answers with as many channels as it is given, so it tells no variance; use \
             fixed_small, or another scheduler",
        ));
    }
    let following = timesteps.iter().skip(1).map(|&t| Some(t)).chain([None]);
    timesteps
        .iter()
        .zip(following)
        .map(|(&timestep, next)| {
            let alpha_bar = schedule.alpha_bar[timestep as usize];
            let alpha_bar_next = next.map_or(1.0, |t| schedule.alpha_bar[t as usize]);
            let alpha_t = alpha_bar / alpha_bar_next;
            let beta_t = 1.0 - alpha_t;
            let noise = 1.0 - alpha_bar;
            let noise_next = 1.0 - alpha_bar_next;
            let step = Step {
                a: alpha_t.sqrt() * noise_next / noise,
                b: alpha_bar_next.sqrt() * beta_t / noise,
                // diffusers asks whether the timestep is 0, not whether the step is the last.
                d: if timestep > 0.0 {
                    scale(schedule.variance_type, beta_t, noise_next / noise * beta_t)
                } else {
                    NoiseScale::Fixed(0.0)
                },
                ..estimate(schedule, Level::of_alpha_bar(alpha_bar))?
            };
            Ok(Evaluation { timestep, step })
        })
        .collect()
}

/// `posterior` is the variance of q(x_{t−1} | x_t, x0), eq. 7.
fn scale(variance_type: VarianceType, beta_t: f64, posterior: f64) -> NoiseScale {
    let posterior = posterior.max(LEAST_VARIANCE);
    match variance_type {
        VarianceType::FixedSmall | VarianceType::FixedSmallLog => {
            NoiseScale::Fixed(posterior.sqrt())
        }
        VarianceType::FixedLarge | VarianceType::FixedLargeLog => NoiseScale::Fixed(beta_t.sqrt()),
        VarianceType::Learned => NoiseScale::Learned,
        VarianceType::LearnedRange => {
            NoiseScale::LearnedRange { min_log: posterior.ln(), max_log: beta_t.ln() }
        }
    }
}
