//! The tables of betas and alpha_bar, f64.

use std::f64::consts::FRAC_PI_2;

use super::{BetaSchedule, Class, ScheduleConfig};
use crate::Result;

/// The smallest `alpha_bar` a schedule may reach without zero terminal SNR: f32's smallest normal
/// number, below which diffusers' own table loses it.
const SMALLEST_ALPHA_BAR: f64 = f32::MIN_POSITIVE as f64;

/// The least noise of the first timestep: dividing by less than its square root is no sampling.
const SMALLEST_NOISE: f64 = 1e-12;

/// What diffusers' sigma-based classes put for `alpha_bar = 0`, so that sigma stays finite.
const ALMOST_ZERO_SNR: f64 = 1.0 / (1 << 24) as f64;

impl ScheduleConfig {
    /// `beta_t` and `alpha_bar_t` for every training timestep, as `class` computes them.
    pub(super) fn tables(&self, class: Class) -> Result<(Vec<f64>, Vec<f64>)> {
        if class == Class::FlowMatchEuler {
            let alpha_bar = self.flow_alpha_bar();
            return Ok((betas_of(&alpha_bar), alpha_bar));
        }
        let mut betas = self.betas(class);
        let mut alpha_bar = cumulative_product(&betas);
        // HeunDiscreteScheduler and PNDMScheduler do not know this field.
        let knows = !matches!(class, Class::Heun | Class::Pndm);
        if self.rescale_betas_zero_snr.unwrap_or(false) && knows {
            if betas.len() < 2 {
                return Err(self.refuse(
                    "rescale_betas_zero_snr",
                    true,
                    "a schedule of one timestep cannot be rescaled; set it to false",
                ));
            }
            alpha_bar = zero_terminal_snr(&alpha_bar);
            betas = betas_of(&alpha_bar);
            if matches!(class, Class::DpmSolverMultistep | Class::Euler | Class::EulerAncestral)
                && let Some(last) = alpha_bar.last_mut()
            {
                *last = ALMOST_ZERO_SNR;
            }
        } else if let Some(&last) = alpha_bar.last()
            && last < SMALLEST_ALPHA_BAR
        {
            let remedy = "nothing of the sample is left at the last timestep; use smaller betas or \
                          fewer timesteps, or set rescale_betas_zero_snr";
            return Err(self.refuse(self.betas_field(), format!("alpha_bar {last:e}"), remedy));
        }
        if let Some(&first) = alpha_bar.first()
            && 1.0 - first < SMALLEST_NOISE
        {
            let remedy =
                format!("the first timestep has no noise; use betas above {SMALLEST_NOISE:e}");
            return Err(self.refuse(self.betas_field(), format!("alpha_bar {first}"), remedy));
        }
        Ok((betas, alpha_bar))
    }

    /// How betas go from first to last, as `class` has it.
    pub(super) fn beta_schedule(&self, class: Class) -> BetaSchedule {
        self.beta_schedule.unwrap_or(match class {
            Class::Lcm | Class::Tcd => BetaSchedule::ScaledLinear,
            _ => BetaSchedule::Linear,
        })
    }

    /// The field that decides the betas.
    fn betas_field(&self) -> &'static str {
        if self.trained_betas.is_some() { "trained_betas" } else { "beta_schedule" }
    }

    /// The variance-preserving levels with the signal-to-noise ratios of flow matching's training timesteps.
    fn flow_alpha_bar(&self) -> Vec<f64> {
        let (count, shift) = (self.train_timesteps(), self.shift.unwrap_or(1.0));
        let level = |i: usize| {
            let share = (i + 1) as f64 / count as f64;
            let sigma = shift * share / (1.0 + (shift - 1.0) * share);
            (1.0 - sigma).powi(2) / ((1.0 - sigma).powi(2) + sigma.powi(2))
        };
        (0..count).map(level).collect()
    }

    fn betas(&self, class: Class) -> Vec<f64> {
        if let Some(betas) = &self.trained_betas {
            return betas.clone();
        }
        let (start, end) = match class {
            Class::Heun | Class::Lcm | Class::Tcd => (0.000_85, 0.012),
            _ => (0.000_1, 0.02),
        };
        let start = self.beta_start.unwrap_or(start);
        let end = self.beta_end.unwrap_or(end);
        let count = self.train_timesteps();
        match self.beta_schedule(class) {
            BetaSchedule::Linear => linspace(start, end, count).collect(),
            BetaSchedule::ScaledLinear => {
                linspace(start.sqrt(), end.sqrt(), count).map(|root| root * root).collect()
            }
            BetaSchedule::SquaredCosine => {
                let alpha_bar = |t: f64| ((t + 0.008) / 1.008 * FRAC_PI_2).cos().powi(2);
                let time = |i: usize| i as f64 / count as f64;
                (0..count)
                    .map(|i| (1.0 - alpha_bar(time(i + 1)) / alpha_bar(time(i))).min(0.999))
                    .collect()
            }
            BetaSchedule::Sigmoid => linspace(-6.0, 6.0, count)
                .map(|z| (end - start) / (1.0 + (-z).exp()) + start)
                .collect(),
        }
    }
}

/// `count` numbers from `start` to `end`, both included; only `start` where `count` is 1.
pub(super) fn linspace(start: f64, end: f64, count: usize) -> impl Iterator<Item = f64> {
    let step = if count > 1 { (end - start) / (count - 1) as f64 } else { 0.0 };
    // The last number is exact, as numpy makes it.
    (0..count).map(move |i| if i > 0 && i + 1 == count { end } else { i as f64 * step + start })
}

fn cumulative_product(betas: &[f64]) -> Vec<f64> {
    betas
        .iter()
        .scan(1.0, |product, beta| {
            *product *= 1.0 - beta;
            Some(*product)
        })
        .collect()
}

/// Shifts and scales `sqrt(alpha_bar)` so that the first stays and the last is 0 (Lin et al. 2023,
/// Algorithm 1).
fn zero_terminal_snr(alpha_bar: &[f64]) -> Vec<f64> {
    let roots: Vec<f64> = alpha_bar.iter().map(|alpha_bar| alpha_bar.sqrt()).collect();
    let (Some(&first), Some(&last)) = (roots.first(), roots.last()) else {
        return roots;
    };
    roots.iter().map(|root| ((root - last) * (first / (first - last))).powi(2)).collect()
}

fn betas_of(alpha_bar: &[f64]) -> Vec<f64> {
    alpha_bar
        .iter()
        .scan(1.0, |previous, &alpha_bar| {
            let beta = 1.0 - alpha_bar / *previous;
            *previous = alpha_bar;
            Some(beta)
        })
        .collect()
}
