//! Euler's method in sigma: Karras et al. 2022 (arXiv 2206.00364), Algorithm 2 without churn.
//!
//! Their latent is `x_ve = x/alpha`, their step `x_ve' = x_ve + (sigma' − sigma)·(x_ve − x0)/sigma`.
//! Multiplied by the next alpha this is the transfer of the noise that x0 implies, and no infinite sigma
//! appears in it.

use super::level::{Level, estimate, final_level, transfer};
use super::{Evaluation, Step};
use crate::Result;
use crate::schedule::{Node, Schedule};

pub(super) fn evaluations(schedule: &Schedule, nodes: &[Node]) -> Result<Vec<Evaluation>> {
    // The result is x_ve: where the last sigma is not 0, it is not scaled down.
    let end = Level { alpha: 1.0, s: final_level(schedule).sigma() };
    let levels = nodes.iter().map(|node| Level::of_sigma(node.sigma));
    let following = levels.clone().skip(1).chain([end]);
    let pairs = levels.zip(following);
    nodes
        .iter()
        .zip(pairs)
        .map(|(&Node { timestep, .. }, (from, to))| {
            let (a, b) = transfer(from, to);
            Ok(Evaluation { timestep, step: Step { a, b, ..estimate(schedule, from)? } })
        })
        .collect()
}
