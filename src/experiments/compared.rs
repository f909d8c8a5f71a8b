//! An arm's last images beside its teacher's.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::guardrails::Measured;
use crate::percentiles::median;

/// How alike the last images were.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub(super) struct Compared {
    /// PSNR in dB, the oldest first.
    psnr_db: VecDeque<f64>,
    /// SSIM, of those that are large enough to have one.
    ssim: VecDeque<f64>,
}

impl Compared {
    /// Adds an image; of each measure the last `most` are kept.
    pub(super) fn add(&mut self, psnr_db: f64, ssim: Option<f64>, most: u64) {
        for (kept, value) in [(&mut self.psnr_db, Some(psnr_db)), (&mut self.ssim, ssim)] {
            kept.extend(value);
            while kept.len() as u64 > most {
                kept.pop_front();
            }
        }
    }

    /// Median PSNR in dB.
    pub(super) fn psnr_db(&self) -> Measured {
        measured(&self.psnr_db)
    }

    /// Median SSIM.
    pub(super) fn ssim(&self) -> Measured {
        measured(&self.ssim)
    }
}

fn measured(values: &VecDeque<f64>) -> Measured {
    let value = (!values.is_empty()).then(|| median(values.iter().copied()));
    Measured { count: values.len() as u64, value }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_of_the_last_ones() {
        let mut compared = Compared::default();
        assert_eq!(compared.psnr_db(), Measured::default());
        for (psnr_db, ssim) in [(90.0, Some(0.9)), (10.0, None), (12.0, Some(0.1)), (11.0, None)] {
            compared.add(psnr_db, ssim, 3);
        }
        assert_eq!(compared.psnr_db(), Measured { count: 3, value: Some(11.0) });
        assert_eq!(compared.ssim(), Measured { count: 2, value: Some(0.1) });
    }
}
