//! Euler's method in sigma with fresh noise: Karras et al. 2022 (arXiv 2206.00364), Algorithm 2, with as much noise as
//! ancestral sampling adds (`eta` 1 in k-diffusion): a step goes down to `sigma'²/sigma`, and noise of
//! `sigma'·sqrt(1 − (sigma'/sigma)²)` takes it up to `sigma'`.

use super::level::{Level, estimate};
use super::{Evaluation, NoiseScale, Step};
use crate::Result;
use crate::schedule::{Node, Schedule};

pub(super) fn evaluations(schedule: &Schedule, nodes: &[Node]) -> Result<Vec<Evaluation>> {
    let levels = nodes.iter().map(|node| Level::of_sigma(node.sigma));
    let following = levels.clone().skip(1).chain([Level::CLEAN]);
    nodes
        .iter()
        .zip(levels.zip(following))
        .map(|(node, (from, to))| {
            let kept = (to.sigma() / from.sigma()).powi(2);
            let step = Step {
                a: to.alpha * kept / from.alpha,
                b: to.alpha * (1.0 - kept),
                d: NoiseScale::Fixed(to.s * (1.0 - kept).max(0.0).sqrt()),
                ..estimate(schedule, from)?
            };
            Ok(Evaluation { timestep: node.timestep, step })
        })
        .collect()
}
