//! Samplers as tables: which timestep to evaluate next, and what to do with the answer.
//!
//! None of the samplers here adapts to what the network says, so a whole trajectory is known before
//! it starts: a list of [`Evaluation`]s, each a timestep and the coefficients of one [`Step`]. A
//! sample in flight is its latent and a position in that list, which is what lets samples with
//! different samplers, step counts and positions share one network evaluation.
//!
//! All latents are variance-preserving, `x = sqrt(alpha_bar)·x0 + sqrt(1 − alpha_bar)·eps`; samplers
//! that the literature writes with variance-exploding latents (Euler, Heun) are rescaled by
//! `x_vp = x_ve / sqrt(1 + sigma²)`, so every trajectory starts near N(0, I) and none rescales the
//! network's input.

mod advance;
mod ddim;
mod ddpm;
mod dpm_solver;
mod euler;
mod heun;
mod kind;
mod level;

use std::sync::Arc;

pub use advance::{Advanced, advance};
pub use kind::Kind;

pub use crate::schedule::Bound;
use crate::schedule::ScheduleConfig;
use crate::{Error, Result};

/// The scale of the noise that a step adds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum NoiseScale {
    /// The same for every element; 0 adds none.
    Fixed(f64),
    /// The network's variance half `r` tells per element: `log Σ = lerp(min_log, max_log, (r + 1) / 2)`
    /// (`learned_range`), scale `exp(log Σ / 2)`.
    LearnedRange {
        /// Clipped log of the posterior variance.
        min_log: f64,
        /// log β_t.
        max_log: f64,
    },
    /// The network's variance half `r` is `Σ` itself (`learned`), scale `sqrt(max(r, 0))`.
    Learned,
}

/// One step's arithmetic, in two stages (all coefficients dimensionless):
///
/// ```text
/// x0      = bound(p·x + q·model)
/// x'      = a·x + b·x0 + e·model + c·memory + d·noise
/// memory' = x0 where the step remembers, else memory
/// ```
///
/// `model` is the network's answer (its mean half where it also tells a variance), `noise` is N(0, 1),
/// `memory` is the x0 of an earlier step: all that a solver of second order needs to know.
/// In the samplers' comments `alpha = sqrt(alpha_bar)` and `s = sqrt(1 − alpha_bar)`.
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(missing_docs)] // the formula above is their documentation
pub struct Step {
    pub p: f64,
    pub q: f64,
    pub bound: Bound,
    pub a: f64,
    pub b: f64,
    pub e: f64,
    pub c: f64,
    pub d: NoiseScale,
    pub remember: bool,
}

impl Step {
    /// A step that keeps only the estimate of x0, to build others from.
    const X0: Self = Self {
        p: 0.0,
        q: 1.0,
        bound: Bound::None,
        a: 0.0,
        b: 1.0,
        e: 0.0,
        c: 0.0,
        d: NoiseScale::Fixed(0.0),
        remember: false,
    };

    /// Whether the step adds noise: only then must its noise be drawn.
    pub fn needs_noise(&self) -> bool {
        self.d != NoiseScale::Fixed(0.0)
    }

    /// Whether the step reads the network's variance half.
    pub fn needs_variance(&self) -> bool {
        !matches!(self.d, NoiseScale::Fixed(_))
    }

    /// Whether the step reads what the previous one left in memory.
    pub fn reads_memory(&self) -> bool {
        self.c != 0.0
    }

    /// The step for one element, in f64: what [`advance`] is tested against.
    pub fn evaluate(&self, at: Element) -> Evaluated {
        let x0 = self.p * at.x + self.q * at.model;
        let x0 = match self.bound {
            Bound::None => x0,
            Bound::Clamp { range } => clamp(x0, range),
            Bound::Threshold { .. } => clamp(x0, at.threshold) / at.threshold,
        };
        let scale = match self.d {
            NoiseScale::Fixed(scale) => scale,
            NoiseScale::LearnedRange { min_log, max_log } => {
                (0.5 * (min_log + (max_log - min_log) * (at.variance + 1.0) / 2.0)).exp()
            }
            NoiseScale::Learned => clamp_below(at.variance, 0.0).sqrt(),
        };
        let mut x = self.a * at.x + self.b * x0 + self.e * at.model;
        if self.reads_memory() {
            x += self.c * at.memory;
        }
        if self.needs_noise() {
            x += scale * at.noise;
        }
        let memory = if self.remember { x0 } else { at.memory };
        Evaluated { x, memory, x0 }
    }

    fn is_finite(&self) -> bool {
        let bound = match self.bound {
            Bound::None => [0.0; 2],
            Bound::Clamp { range } => [range, 0.0],
            Bound::Threshold { ratio, max } => [ratio, max],
        };
        let noise = match self.d {
            NoiseScale::Fixed(scale) => [scale, 0.0],
            NoiseScale::LearnedRange { min_log, max_log } => [min_log, max_log],
            NoiseScale::Learned => [0.0; 2],
        };
        let linear = [self.p, self.q, self.a, self.b, self.e, self.c];
        // Coefficients are used as f32.
        let finite = |number: &f64| (*number as f32).is_finite();
        linear.iter().chain(&bound).chain(&noise).all(finite)
    }
}

/// Clamps to `[-limit, limit]`; NaN stays NaN.
fn clamp(x: f64, limit: f64) -> f64 {
    if x > limit {
        limit
    } else if x < -limit {
        -limit
    } else {
        x
    }
}

fn clamp_below(x: f64, least: f64) -> f64 {
    if x < least { least } else { x }
}

/// One element of what a step reads.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Element {
    /// The latent.
    pub x: f64,
    /// What the previous step remembered.
    pub memory: f64,
    /// The network's answer.
    pub model: f64,
    /// The network's variance half.
    pub variance: f64,
    /// A standard normal number.
    pub noise: f64,
    /// The sample's threshold, for [`Bound::Threshold`].
    pub threshold: f64,
}

/// One element of what a step gives.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Evaluated {
    /// The next latent.
    pub x: f64,
    /// What the next step will remember.
    pub memory: f64,
    /// The bounded estimate of the clean sample.
    pub x0: f64,
}

/// One network evaluation of a trajectory, and what its answer is used for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Evaluation {
    /// The training timestep the network is asked about.
    pub timestep: f64,
    /// What becomes of the answer.
    pub step: Step,
}

/// A whole trajectory, from noise to image; shared by all samples that follow it.
pub type Trajectory = Arc<[Evaluation]>;

/// The trajectory of the sampler `kind` over `steps` steps, as the diffusers class of that name takes it
/// when built by `from_config` of `config`; it starts from N(0, I).
///
/// `eta` (0 to 1) scales DDIM's noise. `learned_variance` says whether the network answers with twice
/// its input's channels.
///
/// # Errors
/// [`Error::Value`] on `num_inference_steps` outside 1 to the number of training timesteps, on an `eta`
/// outside its range or not 0 for another sampler than DDIM, and on the configuration's field that the
/// sampler would honour and cannot.
pub fn trajectory(
    config: &ScheduleConfig,
    kind: Kind,
    steps: usize,
    eta: f64,
    learned_variance: bool,
) -> Result<Trajectory> {
    if !(0.0..=1.0).contains(&eta) {
        return Err(Error::value("eta", eta, "use a number from 0 (no noise) to 1"));
    }
    if eta != 0.0 && kind != Kind::Ddim {
        let remedy = format!("{kind} has no such setting; use 0, or the scheduler ddim");
        return Err(Error::value("eta", eta, remedy));
    }
    let schedule = config.schedule(kind.class())?;
    let timesteps = schedule.timesteps(steps)?;
    let evaluations = match kind {
        Kind::Ddpm => ddpm::evaluations(&schedule, &timesteps, learned_variance),
        Kind::Ddim => ddim::evaluations(&schedule, &timesteps, steps, eta),
        Kind::DpmSolverPlusPlus => dpm_solver::evaluations(&schedule, &timesteps),
        Kind::Euler => euler::evaluations(&schedule, &timesteps),
        Kind::Heun => heun::evaluations(&schedule, &timesteps),
    }?;
    match evaluations.iter().find(|evaluation| !evaluation.step.is_finite()) {
        Some(evaluation) => Err(Error::value(
            format!("{}: beta_schedule", config.file),
            format!("not usable by {kind} at timestep {}", evaluation.timestep),
            "its coefficients overflow; use another scheduler, or betas that leave more of the sample",
        )),
        None => Ok(evaluations.into()),
    }
}
