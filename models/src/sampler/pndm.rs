//! Pseudo linear multistep sampling: Liu et al. 2022 (arXiv 2202.09778) with the transfer of its eq. 9, as Stable
//! Diffusion's folders ask for it: without the Runge-Kutta steps at the beginning (`skip_prk_steps`).
//!
//! The answers of the last four evaluations are combined as Adams and Bashforth do; before there are as many, fewer are.
//! The first step is taken twice, the second time from where the first began, with the mean of the answers at both ends.
//! Where it began is not remembered: the first evaluation was linear in it and in the answer, which is.

use super::level::{Level, estimate};
use super::{Evaluation, MEMORIES, Remember, Step};
use crate::Result;
use crate::schedule::{PredictionType, Schedule};

/// Coefficients of the answer and of those before it, the newest first, over their number of steps.
const FIRST: [f64; 4] = [1.0, 0.0, 0.0, 0.0];
const SECOND: [f64; 4] = [3.0 / 2.0, -1.0 / 2.0, 0.0, 0.0];
const THIRD: [f64; 4] = [23.0 / 12.0, -16.0 / 12.0, 5.0 / 12.0, 0.0];
const FOURTH: [f64; 4] = [55.0 / 24.0, -59.0 / 24.0, 37.0 / 24.0, -9.0 / 24.0];

/// `timesteps` are the last of `whole`.
pub(super) fn evaluations(
    schedule: &Schedule,
    timesteps: &[f64],
    whole: usize,
) -> Result<Vec<Evaluation>> {
    // diffusers steps by this distance even where spacing puts the next timestep elsewhere.
    let distance = schedule.train_timesteps() / whole;
    let mut evaluations = Vec::with_capacity(timesteps.len() + 1);
    for (i, &timestep) in timesteps.iter().enumerate() {
        let t = timestep as usize;
        if i == 1 {
            evaluations.push(repeated(schedule, &evaluations[0], t, distance)?);
        }
        let weights = [FIRST, SECOND, THIRD, FOURTH][i.min(3)];
        let (a, e) = transfer(schedule, t, t.checked_sub(distance));
        let [newest, before @ ..] = weights.map(|weight| weight * e);
        let step = Step {
            a,
            b: 0.0,
            e: newest,
            c: before,
            remember: Remember::Answer,
            ..estimate(schedule, level(schedule, t))?
        };
        evaluations.push(Evaluation { timestep, step });
    }
    Ok(evaluations)
}

/// The first step once more, to `t`, which `first` has reached.
fn repeated(
    schedule: &Schedule,
    first: &Evaluation,
    t: usize,
    distance: usize,
) -> Result<Evaluation> {
    let (a, e) = transfer(schedule, t + distance, Some(t));
    // x = first.a·start + first.e·memory, so this is where it started.
    let (of_x, of_memory) = (1.0 / first.step.a, -first.step.e / first.step.a);
    let mut c = [0.0; MEMORIES];
    c[0] = e / 2.0 + a * of_memory;
    let step =
        Step { a: a * of_x, b: 0.0, e: e / 2.0, c, ..estimate(schedule, level(schedule, t))? };
    Ok(Evaluation { timestep: t as f64, step })
}

fn level(schedule: &Schedule, t: usize) -> Level {
    Level::of_alpha_bar(schedule.alpha_bar[t])
}

/// Eq. 9: the coefficients of the latent and of the network's answers that take timestep `from` to `to`, which is the
/// end of the trajectory where there is none.
fn transfer(schedule: &Schedule, from: usize, to: Option<usize>) -> (f64, f64) {
    let end = if schedule.set_alpha_to_one { 1.0 } else { schedule.alpha_bar[0] };
    let (from, to) = (schedule.alpha_bar[from], to.map_or(end, |t| schedule.alpha_bar[t]));
    let of_eps = -(to - from) / (from * (1.0 - to).sqrt() + (from * (1.0 - from) * to).sqrt());
    let of_x = (to / from).sqrt();
    match schedule.prediction_type {
        // eps = alpha·v + s·x
        PredictionType::Velocity => (of_x + of_eps * (1.0 - from).sqrt(), of_eps * from.sqrt()),
        PredictionType::Epsilon | PredictionType::Sample => (of_x, of_eps),
    }
}
