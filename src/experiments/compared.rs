//! An arm's last images beside its teacher's.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::{guardrails::Measured, ledger::Sum};
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
    pub(super) fn count(&mut self, psnr_db: f64, ssim: Option<f64>, most: u64) {
        self.psnr_db.push_back(psnr_db);
        self.ssim.extend(ssim);
        self.keep_last(most);
    }

    /// Forgets all but the last `most` of each measure.
    pub(super) fn keep_last(&mut self, most: u64) {
        for kept in [&mut self.psnr_db, &mut self.ssim] {
            let over = (kept.len() as u64).saturating_sub(most);
            kept.drain(..over as usize);
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

impl Sum for Compared {
    fn add(&mut self, more: &Self) {
        self.psnr_db.extend(&more.psnr_db);
        self.ssim.extend(&more.ssim);
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
            compared.count(psnr_db, ssim, 3);
        }
        assert_eq!(compared.psnr_db(), Measured { count: 3, value: Some(11.0) });
        assert_eq!(compared.ssim(), Measured { count: 2, value: Some(0.1) });
    }
}
