//! What an arm served: requests, images, and how long they took.

use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

use super::ledger::Sum;
use crate::metrics::request_buckets;

/// Upper bounds in seconds of the buckets but the last, which has none; those of every request's time.
pub(super) static BOUNDS: LazyLock<Vec<f64>> = LazyLock::new(request_buckets);

/// Requests of one arm, and a histogram of their times.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Traffic {
    /// Images of answered requests.
    pub images: u64,
    /// The sum of the requests' times.
    pub seconds: f64,
    /// Requests per bucket of time.
    pub buckets: Vec<u64>,
}

impl Default for Traffic {
    fn default() -> Self {
        Self { images: 0, seconds: 0.0, buckets: vec![0; BOUNDS.len() + 1] }
    }
}

impl Sum for Traffic {
    fn add(&mut self, more: &Self) {
        self.images += more.images;
        self.seconds += more.seconds;
        self.buckets.iter_mut().zip(&more.buckets).for_each(|(sum, count)| *sum += count);
    }
}

impl Traffic {
    /// Counts an answered request.
    pub fn count(&mut self, images: u64, seconds: f64) {
        self.images += images;
        self.seconds += seconds;
        self.buckets[BOUNDS.partition_point(|bound| *bound < seconds)] += 1;
    }

    /// What was served since it stood at `before`.
    pub(super) fn since(&self, before: &Self) -> Self {
        let buckets = self.buckets.iter().zip(&before.buckets);
        Self {
            images: self.images.saturating_sub(before.images),
            seconds: self.seconds - before.seconds,
            buckets: buckets.map(|(now, before)| now.saturating_sub(*before)).collect(),
        }
    }

    /// Whether a database may say so.
    pub(super) fn is_whole(&self) -> bool {
        self.buckets.len() == BOUNDS.len() + 1
    }

    /// Answered requests.
    pub fn requests(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// The mean time in seconds; `None` without requests.
    pub fn mean(&self) -> Option<f64> {
        let requests = self.requests();
        (requests > 0).then(|| self.seconds / requests as f64)
    }

    /// The `q`-quantile of the times in seconds, linear inside a bucket as Prometheus' `histogram_quantile`
    /// has it; `None` without requests.
    pub fn quantile(&self, q: f64) -> Option<f64> {
        let rank = q * self.requests() as f64;
        let mut below = 0.0;
        for (at, count) in self.buckets.iter().enumerate().filter(|(_, count)| **count > 0) {
            let upto = below + *count as f64;
            if upto >= rank {
                let lower = if at == 0 { 0.0 } else { BOUNDS[at - 1] };
                let Some(upper) = BOUNDS.get(at) else { return Some(lower) };
                return Some(lower + (upper - lower) * (rank - below) / *count as f64);
            }
            below = upto;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_since_is_told_apart() {
        let mut before = Traffic::default();
        before.count(1, 0.001);
        before.count(3, 9.0);
        let mut now = before.clone();
        now.count(4, 0.25);
        let mut alone = Traffic::default();
        alone.count(4, 0.25);
        assert_eq!(now.since(&before), alone);
    }

    #[test]
    fn times_are_told_from_their_buckets() {
        let mut traffic = Traffic::default();
        assert_eq!((traffic.mean(), traffic.quantile(0.5)), (None, None));
        for seconds in [0.001, 0.001, 0.001, 0.02] {
            traffic.count(2, seconds);
        }
        traffic.count(1, 1e9);
        assert_eq!((traffic.requests(), traffic.images), (5, 9));
        assert_eq!(traffic.buckets[0], 3);
        // Rank 2.5 of the 3 between 0 and 5 ms.
        assert!(traffic.quantile(0.5).is_some_and(|time| (time - 5e-3 * 2.5 / 3.0).abs() < 1e-12));
        let fourth = traffic.quantile(0.8);
        assert!(fourth.is_some_and(|time| (0.02..0.0201).contains(&time)), "{fourth:?}");
        assert_eq!(traffic.quantile(1.0), Some(300.0), "beyond the last bound");
    }
}
