//! Where a solver in sigma evaluates the network: timesteps and the sigmas of the latents there.

use super::{BetaSchedule, Class, Schedule, sigma, tables::linspace};
use crate::{Error, Result};

/// A place on a trajectory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Node {
    /// What the network is asked about.
    pub timestep: f64,
    /// The noise of the latent, in its class's sense: `sqrt((1 − alpha_bar)/alpha_bar)`, or flow matching's share.
    pub sigma: f64,
}

/// How sigmas lie between the largest and the smallest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SigmaSpacing {
    /// As the timesteps do.
    Timesteps,
    /// Evenly in `sigma^(1/7)` (Karras et al. 2022, eq. 5).
    Karras,
    /// Evenly in the logarithm.
    Exponential,
    /// As quantiles of the Beta(0.6, 0.6) distribution (Lee et al. 2024, arXiv 2407.12173).
    Beta,
}

/// How far below a whole timestep one may lie and still be cut to it: rounding, not another timestep.
const ROUNDING: f64 = 1e-3;

impl Schedule {
    /// The places of a trajectory of `steps` steps, noisiest first.
    ///
    /// # Errors
    /// As [`Schedule::timesteps`]; [`Error::Value`] where `sigma_min` is not below `sigma_max`.
    pub fn nodes(&self, steps: usize) -> Result<Vec<Node>> {
        if self.class == Class::FlowMatchEuler {
            return self.flow(steps);
        }
        let node = |timestep| Node { timestep, sigma: self.sigma_at(timestep) };
        let nodes: Vec<Node> = self.spaced_timesteps(steps)?.into_iter().map(node).collect();
        if self.sigma_spacing == SigmaSpacing::Timesteps {
            return Ok(nodes);
        }
        let ends = match (self.class, nodes.first(), nodes.last()) {
            (Class::DpmSolverMultistep, ..) | (_, None, _) | (_, _, None) => {
                [self.sigma_at((self.train_timesteps() - 1) as f64), self.sigma_at(0.0)]
            }
            (_, Some(first), Some(last)) => [first.sigma, last.sigma],
        };
        let log_sigmas: Vec<f64> = self.alpha_bar.iter().map(|&it| sigma(it).ln()).collect();
        let node = |sigma: f64| Node { timestep: self.timestep_of(&log_sigmas, sigma), sigma };
        Ok(self.respaced(ends, steps)?.into_iter().map(node).collect())
    }

    /// `sigma` at a timestep, interpolated between whole ones.
    pub(crate) fn sigma_at(&self, timestep: f64) -> f64 {
        let below = timestep.floor() as usize;
        let sigma_of = |t: usize| {
            let last = self.alpha_bar.len().saturating_sub(1);
            sigma(self.alpha_bar.get(t.min(last)).copied().unwrap_or(1.0))
        };
        let (low, part) = (sigma_of(below), timestep.fract());
        // Not `low + 0·(high − low)`, to stay on the table's value at whole timesteps.
        if part == 0.0 { low } else { low + part * (sigma_of(below + 1) - low) }
    }

    /// `steps` sigmas from the first of `ends` to the second, or between what the file names.
    fn respaced(&self, [first, last]: [f64; 2], steps: usize) -> Result<Vec<f64>> {
        let (most, least) = (self.sigma_max.unwrap_or(first), self.sigma_min.unwrap_or(last));
        if most < least {
            let field = if self.sigma_min.is_some() { "sigma_min" } else { "sigma_max" };
            let value = self.sigma_min.or(self.sigma_max).unwrap_or(least);
            let remedy = format!(
                "sigmas go from {most} down to {least}; name a smaller sigma_min or a larger sigma_max"
            );
            return Err(self.refuse(field, value, remedy));
        }
        let between = |from: f64, to: f64| linspace(from, to, steps);
        Ok(match self.sigma_spacing {
            SigmaSpacing::Timesteps => between(most, least).collect(),
            SigmaSpacing::Karras => {
                let root = |sigma: f64| sigma.powf(1.0 / 7.0);
                between(root(most), root(least)).map(|root| root.powi(7)).collect()
            }
            SigmaSpacing::Exponential => between(most.ln(), least.ln()).map(f64::exp).collect(),
            SigmaSpacing::Beta => between(1.0, 0.0)
                .map(|share| least + beta_quantile(share) * (most - least))
                .collect(),
        })
    }

    /// The timestep whose sigma that is, by the logarithm between whole ones; a whole one for DPM-Solver++.
    fn timestep_of(&self, log_sigmas: &[f64], sigma: f64) -> f64 {
        let Some(last) = log_sigmas.len().checked_sub(2) else { return 0.0 };
        let wanted = sigma.max(1e-10).ln();
        let below = log_sigmas.partition_point(|&log| log <= wanted).saturating_sub(1).min(last);
        let (low, high) = (log_sigmas[below], log_sigmas[below + 1]);
        let part = ((low - wanted) / (low - high)).clamp(0.0, 1.0);
        let timestep = below as f64 + part;
        let rounds = self.sigma_spacing == SigmaSpacing::Karras
            && self.beta_schedule != BetaSchedule::SquaredCosine;
        match self.class {
            Class::DpmSolverMultistep if rounds => timestep.round_ties_even(),
            Class::DpmSolverMultistep => (timestep + ROUNDING).floor(),
            // As diffusers hands them to the network.
            _ => f64::from(timestep as f32),
        }
    }

    /// Flow matching's: shares of noise, shifted to where large images need them.
    fn flow(&self, steps: usize) -> Result<Vec<Node>> {
        let count = self.train_timesteps();
        if steps == 0 || steps > count {
            let remedy = format!("use 1 to {count}, the number of training timesteps");
            return Err(Error::value("num_inference_steps", steps, remedy));
        }
        let shifted = |sigma: f64| self.shift * sigma / (1.0 + (self.shift - 1.0) * sigma);
        // diffusers shifts twice: the training schedule that the ends are taken from, and what lies between them.
        let ends = [shifted(1.0), shifted(1.0 / count as f64)];
        let mut sigmas: Vec<f64> = linspace(ends[0], ends[1], steps).map(shifted).collect();
        if let (Some(terminal), Some(&last)) = (self.shift_terminal, sigmas.last()) {
            let scale = (1.0 - last) / (1.0 - terminal);
            // One step has no end to stretch to.
            if scale > 0.0 {
                sigmas.iter_mut().for_each(|sigma| *sigma = 1.0 - (1.0 - *sigma) / scale);
            }
        }
        if let (true, [first, ..], [.., last]) =
            (self.sigma_spacing != SigmaSpacing::Timesteps, &sigmas[..], &sigmas[..])
        {
            sigmas = self.respaced([*first, *last], steps)?;
        }
        let timestep = |sigma: f64| f64::from((sigma * count as f64) as f32);
        Ok(sigmas.into_iter().map(|sigma| Node { timestep: timestep(sigma), sigma }).collect())
    }
}

/// The quantile of the Beta(0.6, 0.6) distribution at `share`, 0 to 1.
fn beta_quantile(share: f64) -> f64 {
    use statrs::distribution::{Beta, ContinuousCDF};
    match Beta::new(0.6, 0.6) {
        Ok(beta) => beta.inverse_cdf(share),
        Err(_) => share,
    }
}
