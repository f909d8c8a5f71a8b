//! A noise level, and what all samplers share about it.

use super::Step;
use crate::Result;
use crate::schedule::{FinalSigmas, PredictionType, Schedule};

/// How much sample (`alpha`) and how much noise (`s`) a latent holds: `x = alpha·x0 + s·eps`.
///
/// Variance-preserving latents have `alpha² + s² = 1`. `sigma = s/alpha` alone would be infinite at
/// zero signal; the pair never is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Level {
    pub(super) alpha: f64,
    pub(super) s: f64,
}

impl Level {
    /// The clean sample.
    pub(super) const CLEAN: Self = Self { alpha: 1.0, s: 0.0 };

    /// The level with that `alpha_bar`.
    pub(super) fn of_alpha_bar(alpha_bar: f64) -> Self {
        Self { alpha: alpha_bar.sqrt(), s: (1.0 - alpha_bar).sqrt() }
    }

    /// The level with that `sigma`.
    pub(super) fn of_sigma(sigma: f64) -> Self {
        let alpha = 1.0 / sigma.hypot(1.0);
        Self { alpha, s: sigma * alpha }
    }

    /// `s / alpha`.
    pub(super) fn sigma(self) -> f64 {
        self.s / self.alpha
    }

    /// `ln(alpha / s)`, half the logarithm of the signal-to-noise ratio.
    pub(super) fn lambda(self) -> f64 {
        (self.alpha / self.s).ln()
    }
}

/// The first stage of a step at `level`: `x0 = bound(p·x + q·model)`. The rest keeps x0 alone.
///
/// # Errors
/// A network that predicts noise says nothing about x0 where there is only noise.
pub(super) fn estimate(schedule: &Schedule, level: Level) -> Result<Step> {
    let Level { alpha, s } = level;
    let (p, q) = match schedule.prediction_type {
        // x0 = (x − s·eps) / alpha
        PredictionType::Epsilon if alpha == 0.0 => {
            return Err(schedule.refuse(
                "prediction_type",
                schedule.prediction_type.name(),
                "with rescale_betas_zero_snr the last timestep is noise alone, and predicted noise \
                 says nothing about the sample; use another timestep_spacing, or a network trained \
                 with v_prediction",
            ));
        }
        PredictionType::Epsilon => (1.0 / alpha, -s / alpha),
        PredictionType::Sample => (0.0, 1.0),
        // v = alpha·eps − s·x0, so alpha·x − s·v = x0
        PredictionType::Velocity => (alpha, -s),
    };
    Ok(Step { p, q, bound: schedule.bound, ..Step::X0 })
}

/// The coefficients of `x` and `x0` that take `from` to `to` keeping the noise that x0 implies:
/// `x' = to.alpha·x0 + to.s·(x − from.alpha·x0)/from.s`.
///
/// It is the exact first-order step of DDIM, DPM-Solver++ and Euler alike.
pub(super) fn transfer(from: Level, to: Level) -> (f64, f64) {
    let a = to.s / from.s;
    (a, to.alpha - from.alpha * a)
}

/// The coefficients of the latent and of the network's answer that make `amount·eps`, with eps as the network predicts it at
/// `level`: bounding x0 does not change it.
pub(super) fn direction(predicts: PredictionType, level: Level, amount: f64) -> (f64, f64) {
    match predicts {
        PredictionType::Epsilon => (0.0, amount),
        PredictionType::Sample => (amount / level.s, -amount * level.alpha / level.s),
        PredictionType::Velocity => (amount * level.s, amount * level.alpha),
    }
}

/// Where the last step of a solver in sigma ends.
pub(super) fn final_level(schedule: &Schedule) -> Level {
    match schedule.final_sigmas_type {
        FinalSigmas::Zero => Level::CLEAN,
        FinalSigmas::SigmaMin => Level::of_sigma(schedule.sigma_at(0.0)),
    }
}
