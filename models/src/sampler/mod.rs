//! Samplers as tables: which timestep to evaluate next, and what to do with the answer.
//!
//! None of the samplers here adapts to what the network says, so a whole trajectory is known before
//! it starts: a list of [`Evaluation`]s, each a timestep and the coefficients of one [`Step`]. A
//! sample in flight is its latent and a position in that list, which is what lets samples with
//! different samplers, step counts and positions share one network evaluation.
//!
//! Latents are variance-preserving, `x = sqrt(alpha_bar)·x0 + sqrt(1 − alpha_bar)·eps`, except those of flow matching
//! (`flow.rs`); samplers that the literature writes with variance-exploding latents (Euler, Heun) are rescaled by
//! `x_vp = x_ve / sqrt(1 + sigma²)`. So every trajectory starts near N(0, I) and none rescales the
//! network's input.

mod advance;
mod ddim;
mod ddpm;
mod dpm_solver;
mod euler;
mod euler_ancestral;
mod flow;
mod heun;
mod kind;
mod lcm;
mod level;
mod pndm;
mod tcd;

use std::sync::Arc;

pub use advance::{Advanced, advance, empty_memory};
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
/// x'      = a·x + b·x0 + e·model + c₀·memory₀ + c₁·memory₁ + c₂·memory₂ + d·noise
/// memory' = (x0 or model, memory₀, memory₁) where the step remembers, else memory
/// ```
///
/// `model` is the network's answer (its mean half where it also tells a variance), `noise` is N(0, 1),
/// `memory` holds what the last steps that remembered left there, the newest first: one x0 is all that a solver of
/// second order needs to know, three answers are what a linear multistep method of fourth order does.
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
    pub c: [f64; MEMORIES],
    pub d: NoiseScale,
    pub remember: Remember,
}

/// Values that a sample remembers for each of its elements.
pub const MEMORIES: usize = 3;

/// What a step adds to a sample's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remember {
    /// Nothing; the memory stays.
    Nothing,
    /// Its bounded estimate of the clean sample.
    X0,
    /// The network's answer.
    Answer,
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
        c: [0.0; MEMORIES],
        d: NoiseScale::Fixed(0.0),
        remember: Remember::Nothing,
    };

    /// Whether the step adds noise: only then must its noise be drawn.
    pub fn needs_noise(&self) -> bool {
        self.d != NoiseScale::Fixed(0.0)
    }

    /// Whether the step reads the network's variance half.
    pub fn needs_variance(&self) -> bool {
        !matches!(self.d, NoiseScale::Fixed(_))
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
        for (c, memory) in self.c.into_iter().zip(at.memory).filter(|&(c, _)| c != 0.0) {
            x += c * memory;
        }
        if self.needs_noise() {
            x += scale * at.noise;
        }
        let [newest, older, _] = at.memory;
        let memory = match self.remember {
            Remember::Nothing => at.memory,
            Remember::X0 => [x0, newest, older],
            Remember::Answer => [at.model, newest, older],
        };
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
        let linear = [self.p, self.q, self.a, self.b, self.e];
        // Coefficients are used as f32.
        let finite = |number: &f64| (*number as f32).is_finite();
        linear.iter().chain(&self.c).chain(&bound).chain(&noise).all(finite)
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
    /// What the last steps remembered, the newest first.
    pub memory: [f64; MEMORIES],
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
    /// What the next steps will remember.
    pub memory: [f64; MEMORIES],
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
/// `eta` (0 to 1) scales DDIM's and TCD's noise; [`Kind::default_eta`] is what diffusers takes where nobody says. `learned_variance` says whether the network answers with twice
/// its input's channels.
///
/// # Errors
/// [`Error::Value`] on `num_inference_steps` outside 1 to the number of training timesteps, on an `eta`
/// outside its range or not 0 for another sampler than DDIM and TCD, and on the configuration's field that the
/// sampler would honour and cannot.
pub fn trajectory(
    config: &ScheduleConfig,
    kind: Kind,
    steps: usize,
    eta: f64,
    learned_variance: bool,
) -> Result<Trajectory> {
    Ok(last_steps(config, kind, steps, steps, eta, learned_variance)?.trajectory)
}

/// A trajectory that begins with an image.
#[derive(Debug, Clone)]
pub struct FromImage {
    /// The steps.
    pub trajectory: Trajectory,
    /// Where they begin.
    pub begin: Mixture,
    /// Where each evaluation leads.
    pub after: Arc<[Mixture]>,
}

/// How much image and noise there is on the way: `x = signal·x0 + noise·eps`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mixture {
    /// How much of the image there is.
    pub signal: f64,
    /// How much noise.
    pub noise: f64,
}

/// The last `strength` (above 0, at most 1) of [`trajectory`]'s steps, as diffusers' image-to-image pipelines take them
/// (SDEdit, Meng et al. 2021, arXiv 2108.01073), and where they begin: `floor(steps·strength)` steps, without those before them.
/// diffusers begins PNDM one step earlier, because its list names one timestep twice.
///
/// # Errors
/// As [`trajectory`]; [`Error::Value`] on a `strength` outside its range, or so small that no step is left.
pub fn from_image(
    config: &ScheduleConfig,
    kind: Kind,
    steps: usize,
    strength: f64,
    eta: f64,
    learned_variance: bool,
) -> Result<FromImage> {
    if !(strength > 0.0 && strength <= 1.0) {
        let remedy = "use a number above 0, which keeps the image, to 1, which redraws it";
        return Err(Error::value("strength", strength, remedy));
    }
    let taken = (steps as f64 * strength).floor() as usize;
    if taken == 0 && steps > 0 {
        let remedy = format!(
            "leaves none of {steps} steps; use at least {:.3}, or more num_inference_steps",
            1.0 / steps as f64
        );
        return Err(Error::value("strength", strength, remedy));
    }
    last_steps(config, kind, steps, taken, eta, learned_variance)
}

/// The last `taken` of `steps` steps.
fn last_steps(
    config: &ScheduleConfig,
    kind: Kind,
    steps: usize,
    taken: usize,
    eta: f64,
    learned_variance: bool,
) -> Result<FromImage> {
    if !(0.0..=1.0).contains(&eta) {
        return Err(Error::value("eta", eta, "use a number from 0 (no noise) to 1"));
    }
    if eta != 0.0 && !matches!(kind, Kind::Ddim | Kind::Tcd) {
        let remedy = format!("{kind} has no such setting; use 0, or the scheduler ddim or tcd");
        return Err(Error::value("eta", eta, remedy));
    }
    let schedule = config.schedule(kind.class())?;
    let all = schedule.nodes(steps)?;
    let (whole, nodes) = (all.len(), &all[all.len().saturating_sub(taken)..]);
    let timesteps: Vec<f64> = nodes.iter().map(|node| node.timestep).collect();
    let evaluations = match kind {
        Kind::Ddpm => ddpm::evaluations(&schedule, &timesteps, learned_variance),
        Kind::Ddim => ddim::evaluations(&schedule, &timesteps, steps, eta),
        Kind::Pndm => pndm::evaluations(&schedule, &timesteps, whole),
        Kind::DpmSolverPlusPlus => dpm_solver::evaluations(&schedule, nodes, whole),
        Kind::Euler => euler::evaluations(&schedule, nodes),
        Kind::EulerAncestral => euler_ancestral::evaluations(&schedule, nodes),
        Kind::Heun => heun::evaluations(&schedule, nodes),
        Kind::Lcm => lcm::evaluations(&schedule, &timesteps),
        Kind::Tcd => tcd::evaluations(&schedule, &timesteps, eta),
        Kind::FlowEuler => Ok(flow::evaluations(&schedule, nodes)),
    }?;
    let mixture = |sigma: f64| match kind {
        Kind::FlowEuler => Mixture { signal: 1.0 - sigma, noise: sigma },
        // Of a last timestep without any signal.
        _ if sigma.is_infinite() => Mixture { signal: 0.0, noise: 1.0 },
        _ => {
            let level = level::Level::of_sigma(sigma);
            Mixture { signal: level.alpha, noise: level.s }
        }
    };
    // Where the evaluation of that number stands. Timesteps do not tell: nodes between whole timesteps are rounded to the same ones.
    let at = |(number, evaluation): (usize, &Evaluation)| {
        let node = match kind {
            Kind::Pndm => nodes.iter().find(|node| node.timestep == evaluation.timestep),
            Kind::Heun => nodes.get(number.div_ceil(2)),
            _ => nodes.get(number),
        };
        mixture(node.map_or(0.0, |node| node.sigma))
    };
    let begin = nodes.first().map_or(0.0, |node| node.sigma);
    let after = evaluations.iter().enumerate().skip(1).map(at).chain([mixture(0.0)]).collect();
    match evaluations.iter().find(|evaluation| !evaluation.step.is_finite()) {
        Some(evaluation) => Err(Error::value(
            format!("{}: beta_schedule", config.file),
            format!("not usable by {kind} at timestep {}", evaluation.timestep),
            "its coefficients overflow; use another scheduler, or betas that leave more of the sample",
        )),
        None => {
            let begin = mixture(begin);
            Ok(FromImage { trajectory: evaluations.into(), begin, after })
        }
    }
}
