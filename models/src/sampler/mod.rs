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

use std::sync::Arc;

/// How the estimate of the clean sample is bounded.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Bound {
    /// Not at all.
    None,
    /// Clamped to `[-range, range]` (`clip_sample`).
    Clamp {
        /// `clip_sample_range`.
        range: f64,
    },
    /// Dynamic thresholding (Imagen, §2.3): per sample, `s` is the `ratio` quantile of `|x0|` clamped to
    /// `[1, max]`; x0 is clamped to `[-s, s]` and divided by `s`.
    Threshold {
        /// `dynamic_thresholding_ratio`.
        ratio: f64,
        /// `sample_max_value`.
        max: f64,
    },
}

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
/// memory' = u·x + v·x0 + w·model
/// ```
///
/// `model` is the network's answer (its mean half where it also tells a variance).
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
    pub u: f64,
    pub v: f64,
    pub w: f64,
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
