//! DPM-Solver++ 2M: Lu et al. 2022 (arXiv 2211.01095), Algorithm 2, deterministic, data prediction.

use super::level::{Level, estimate, final_level, transfer};
use super::{Evaluation, Remember, Step};
use crate::Result;
use crate::schedule::{FinalSigmas, Node, Schedule, SolverType};

/// Below this many steps `lower_order_final` applies.
const FEW_STEPS: usize = 15;

/// `nodes` are the last of `whole`.
pub(super) fn evaluations(
    schedule: &Schedule,
    nodes: &[Node],
    whole: usize,
) -> Result<Vec<Evaluation>> {
    let mut levels: Vec<Level> = nodes.iter().map(|node| Level::of_sigma(node.sigma)).collect();
    levels.push(final_level(schedule));
    let first_order_end = schedule.euler_at_final
        || (schedule.lower_order_final && whole < FEW_STEPS)
        || schedule.final_sigmas_type == FinalSigmas::Zero;
    nodes
        .iter()
        .enumerate()
        .map(|(i, node)| {
            let last = i + 1 == nodes.len();
            let (from, to) = (levels[i], levels[i + 1]);
            let (a, b) = transfer(from, to);
            let mut step = Step { a, b, ..estimate(schedule, from)? };
            if i > 0 && !(last && first_order_end) {
                // D1 = (x0 − memory)·slope
                let slope = second_order(schedule.solver_type, levels[i - 1], from, to);
                step.b += slope;
                step.c[0] = -slope;
            }
            step.remember = if last { Remember::Nothing } else { Remember::X0 };
            Ok(Evaluation { timestep: node.timestep, step })
        })
        .collect()
}

/// The coefficient of `x0 − memory` in the second-order step from `from` to `to` after one from
/// `before`; 0 where timesteps coincide, since two equal points tell no slope.
fn second_order(solver_type: SolverType, before: Level, from: Level, to: Level) -> f64 {
    let h = to.lambda() - from.lambda();
    let h_before = from.lambda() - before.lambda();
    if h == 0.0 || h_before == 0.0 {
        return 0.0;
    }
    let per_slope = match solver_type {
        // −alpha·(exp(−h) − 1)/2
        SolverType::Midpoint => -0.5 * to.alpha * (-h).exp_m1(),
        SolverType::Heun => to.alpha * ((-h).exp_m1() / h + 1.0),
    };
    per_slope * h / h_before
}
