//! Heun's method in sigma: Karras et al. 2022 (arXiv 2206.00364), Algorithm 1.
//!
//! Each step but the last asks the network twice: an Euler step to the next level, then a correction
//! there by half the difference of the two derivatives, `x_ve' = x_ve + (sigma' − sigma)·(d' − d)/2`.
//! Both derivatives are `(x_ve − x0)/sigma'` of the same `x_ve` (the Euler step follows its own
//! derivative), so their difference is `(x0 − x0')/sigma'`: memory carries the first x0 to the second
//! evaluation, and nothing large cancels at high sigma.

use super::level::{Level, estimate, transfer};
use super::{Evaluation, Remember, Step};
use crate::Result;
use crate::schedule::{Node, Schedule};

pub(super) fn evaluations(schedule: &Schedule, nodes: &[Node]) -> Result<Vec<Evaluation>> {
    let mut evaluations = Vec::with_capacity(2 * nodes.len());
    for (i, &Node { timestep, sigma }) in nodes.iter().enumerate() {
        let from = Level::of_sigma(sigma);
        let next = nodes.get(i + 1);
        let to = next.map_or(Level::CLEAN, |next| Level::of_sigma(next.sigma));
        let (a, b) = transfer(from, to);
        let remember = if next.is_some() { Remember::X0 } else { Remember::Nothing };
        let euler = Step { a, b, remember, ..estimate(schedule, from)? };
        evaluations.push(Evaluation { timestep, step: euler });
        if let Some(&Node { timestep, .. }) = next {
            let half = to.alpha * (1.0 - from.sigma() / to.sigma()) / 2.0;
            let correction =
                Step { a: 1.0, b: -half, c: [half, 0.0, 0.0], ..estimate(schedule, to)? };
            evaluations.push(Evaluation { timestep, step: correction });
        }
    }
    Ok(evaluations)
}
