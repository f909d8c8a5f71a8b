//! The Inception score (Salimans et al. 2016): `exp E KL(p(y|x) ‖ p(y))`, over ten splits.

use candle_core::{D, DType, Result, Tensor, bail};
use candle_nn::ops::log_softmax;

use crate::random;

/// Splits of the images.
const SPLITS: usize = 10;

/// The score in the making: per split Σ p and Σ p·log p, whatever the number of images.
#[derive(Debug, Clone)]
pub struct InceptionScore {
    total: usize,
    seen: usize,
    /// The places that the images take, where they do not keep their own.
    places: Option<Vec<usize>>,
    splits: Vec<Split>,
}

#[derive(Debug, Clone, Default)]
struct Split {
    count: usize,
    probabilities: Vec<f64>,
    negative_entropy: f64,
}

impl InceptionScore {
    /// For `total` images: the one at place `i` counts in split `⌊10·i / total⌋` or the one before it, as torch-fidelity cuts them.
    /// With `shuffled`, a seed, they are shuffled before, as it does unless it is told otherwise.
    pub fn new(total: usize, shuffled: Option<u64>) -> Self {
        let places = shuffled.map(|seed| random::shuffled(total, seed, 0));
        Self { total, seen: 0, places, splits: vec![Split::default(); SPLITS] }
    }

    /// Adds logits `[B, classes]`.
    ///
    /// # Errors
    /// More images than were announced, and whatever the device says.
    pub fn add(&mut self, logits: &Tensor) -> Result<()> {
        let logs = log_softmax(&logits.to_dtype(DType::F64)?, D::Minus1)?.to_vec2::<f64>()?;
        for logs in logs {
            if self.seen == self.total {
                bail!("more than the {} images announced", self.total)
            }
            let place = self.places.as_ref().map_or(self.seen, |places| places[self.seen]);
            // Split s begins at place ⌊s·total / 10⌋.
            let begun = |split: &usize| split * self.total / SPLITS <= place;
            let split = (0..SPLITS).rev().find(begun).unwrap_or_default();
            let split = &mut self.splits[split];
            split.probabilities.resize(logs.len(), 0.0);
            for (sum, log) in split.probabilities.iter_mut().zip(&logs) {
                *sum += log.exp();
                split.negative_entropy += log.exp() * log;
            }
            split.count += 1;
            self.seen += 1;
        }
        Ok(())
    }

    /// Mean and standard deviation over the splits; nothing with fewer images than splits.
    pub fn finish(&self) -> Option<(f64, f64)> {
        let scores: Option<Vec<f64>> = self.splits.iter().map(Split::score).collect();
        scores.map(|scores| mean_and_deviation(&scores))
    }
}

impl Split {
    fn score(&self) -> Option<f64> {
        let count = self.count as f64;
        // Σ_x Σ_y p(y|x)·(log p(y|x) − log p(y)) = Σ p·log p − N·Σ_y p(y)·log p(y)
        let marginal = self.probabilities.iter().map(|sum| sum / count);
        let entropy: f64 = marginal.filter(|p| *p > 0.0).map(|p| p * p.ln()).sum();
        (self.count > 0).then(|| (self.negative_entropy / count - entropy).exp())
    }
}

/// Mean, and standard deviation with divisor N.
pub(super) fn mean_and_deviation(values: &[f64]) -> (f64, f64) {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let variance = values.iter().map(|value| (value - mean) * (value - mean)).sum::<f64>() / count;
    (mean, variance.sqrt())
}
