//! Heun's method in sigma: Karras et al. 2022 (arXiv 2206.00364), Algorithm 1.
//!
//! Each step but the last asks the network twice: an Euler step to the next level, then a correction
//! there by half the difference of the two derivatives, `x_ve' = x_ve + (sigma' − sigma)·(d' − d)/2`.
//! Memory carries `d = (x_ve − x0)/sigma` from the first to the second.

use super::level::{Level, at_timestep, estimate, transfer};
use super::{Evaluation, Step};
use crate::Result;
use crate::schedule::Schedule;

pub(super) fn evaluations(schedule: &Schedule, timesteps: &[f64]) -> Result<Vec<Evaluation>> {
    let mut evaluations = Vec::with_capacity(2 * timesteps.len());
    for (i, &timestep) in timesteps.iter().enumerate() {
        let from = at_timestep(schedule, timestep);
        let next = timesteps.get(i + 1).copied();
        let to = next.map_or(Level::CLEAN, |next| at_timestep(schedule, next));
        let (a, b) = transfer(from, to);
        let mut euler = Step {
            a,
            b,
            ..estimate(schedule, from)?
        };
        if next.is_some() {
            // d = (x/alpha − x0)·alpha/s
            (euler.u, euler.v) = (1.0 / from.s, -from.alpha / from.s);
        }
        evaluations.push(Evaluation {
            timestep,
            step: euler,
        });
        if let Some(timestep) = next {
            let half = to.alpha * (to.sigma() - from.sigma()) / 2.0;
            let correction = Step {
                a: 1.0 + half / to.s,
                b: -half * to.alpha / to.s,
                c: -half,
                ..estimate(schedule, to)?
            };
            evaluations.push(Evaluation {
                timestep,
                step: correction,
            });
        }
    }
    Ok(evaluations)
}
