//! Euler's method for flow matching: Lipman et al. 2023 (arXiv 2210.02747); sigmas as Esser et al. 2024 (arXiv 2403.03206).
//!
//! Latents are `x = (1 − sigma)·x0 + sigma·noise`, and the network predicts `noise − x0`, the way from image to noise: a step
//! goes along it. These latents are not variance-preserving; the network takes them as they are, too.

use super::{Evaluation, NoiseScale, Step};
use crate::schedule::{Node, Schedule};

pub(super) fn evaluations(schedule: &Schedule, nodes: &[Node]) -> Vec<Evaluation> {
    let following = nodes.iter().skip(1).map(|node| node.sigma).chain([0.0]);
    nodes
        .iter()
        .zip(following)
        .map(|(&Node { timestep, sigma }, next)| {
            let estimate = Step { p: 1.0, q: -sigma, bound: schedule.bound, ..Step::X0 };
            let step = if schedule.stochastic_sampling {
                Step { b: 1.0 - next, d: NoiseScale::Fixed(next), ..estimate }
            } else {
                Step { a: 1.0, b: 0.0, e: next - sigma, ..estimate }
            };
            Evaluation { timestep, step }
        })
        .collect()
}
