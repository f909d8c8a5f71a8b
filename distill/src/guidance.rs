//! Classifier-free guidance, and what a student learns of it.

use candle_core::{Result, Tensor};
use understudy_models::Error;

use crate::random::{self, Purpose};

/// What a student learns of its teacher's guidance (Ho & Salimans 2022).
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Guidance {
    /// Both answers, with the prompt and with the empty one: the student is guided as its teacher is. The walk is guided
    /// by this scale.
    Keep {
        /// At least 1, which is none.
        scale: f64,
    },
    /// The guided answer, for scales in a range that are drawn evenly, a trajectory each (Meng et al. 2023, arXiv
    /// 2210.03142, stage one): the student takes the scale as an input, and an image needs one row of each evaluation
    /// instead of two.
    Distil {
        /// At least 1.
        least: f64,
        /// At least that.
        most: f64,
    },
}

impl Guidance {
    /// Refuses scales that mean nothing here.
    ///
    /// # Errors
    /// [`Error::Value`] naming the flag.
    pub fn check(self) -> understudy_models::Result<Self> {
        match self {
            Self::Keep { scale } if !(scale.is_finite() && scale >= 1.0) => {
                let remedy = "must be a number from 1 (none) up, such as 7.5";
                Err(Error::value("--guidance-scale", scale, remedy))
            }
            Self::Distil { least, most }
                if !(1.0 <= least && least <= most && most.is_finite()) =>
            {
                let remedy =
                    "must be a least scale from 1 (none) up and a largest one, such as 1..8";
                Err(Error::value("--guidance distil", format!("{least}..{most}"), remedy))
            }
            guidance => Ok(guidance),
        }
    }

    /// The scale of the trajectory with that seed.
    pub(crate) fn scale(self, seed: u64) -> f64 {
        match self {
            Self::Keep { scale } => scale,
            Self::Distil { least, most } => {
                let part = random::number(seed, Purpose::Guidance, 0, 0) >> 11;
                least + (most - least) * (part as f64 / (1_u64 << 53) as f64)
            }
        }
    }
}

/// `none + s·(told − none)` with one scale a row, as the server has it; `[B, C, H, W]`.
pub(crate) fn guided(told: &Tensor, none: &Tensor, scales: &[f64]) -> Result<Tensor> {
    let scales: Vec<f32> = scales.iter().map(|scale| *scale as f32).collect();
    let rows = scales.len();
    let scales = Tensor::from_vec(scales, (rows, 1, 1, 1), told.device())?;
    none + (told - none)?.broadcast_mul(&scales)?
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn scales_are_spread_over_their_range_and_follow_the_seed() {
        let guidance = Guidance::Distil { least: 1.0, most: 8.0 };
        let scales: Vec<f64> = (0..4000).map(|seed| guidance.scale(seed)).collect();
        assert!(scales.iter().all(|scale| (1.0..8.0).contains(scale)));
        let mean = scales.iter().sum::<f64>() / 4000.0;
        assert!((mean - 4.5).abs() < 0.1, "{mean}");
        assert_eq!(guidance.scale(7).to_bits(), guidance.scale(7).to_bits());
    }

    #[test]
    fn scales_that_mean_nothing_are_refused() {
        for guidance in [
            Guidance::Keep { scale: 0.0 },
            Guidance::Keep { scale: f64::NAN },
            Guidance::Distil { least: 0.0, most: 8.0 },
            Guidance::Distil { least: 8.0, most: 1.0 },
            Guidance::Distil { least: 1.0, most: f64::INFINITY },
        ] {
            assert!(guidance.check().unwrap_err().to_string().contains("--guidance"));
        }
        assert!(Guidance::Distil { least: 4.0, most: 4.0 }.check().is_ok());
    }
}
