//! What an evaluation costs, by rows: measured at warm-up, followed while serving.

use serde::{Deserialize, Serialize};

use super::stage::PerStage;

/// The costs of each stage that a model has.
pub type StageCosts = PerStage<Option<CostModel>>;

/// Seconds of one evaluation as a function of its rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CostModel {
    /// (rows, seconds), rows ascending, as measured at warm-up.
    points: Vec<(usize, f64)>,
    /// How much slower than at warm-up the device is now.
    #[serde(skip, default = "as_measured")]
    drift: f64,
    max_rows: usize,
}

/// Batches whose cost per row is within this of the best are all useful.
const USEFUL_WITHIN: f64 = 1.1;
/// Of the useful batches the largest is taken that takes no longer than this: the larger, the sooner a
/// newcomer takes part; the shorter, the sooner it joins, and the finer models share the device.
const LONGEST_SECONDS: f64 = 0.2;
/// Where larger batches take longer than that, they are tried while they make a row this much cheaper.
const WORTH: f64 = 0.97;
/// Weight of the newest observation in the drift.
const DRIFT_GAIN: f64 = 0.1;

impl CostModel {
    /// From at least one measured (rows, seconds), rows ascending. `max_rows` overrides the largest
    /// useful batch, which otherwise is the largest within 10 % of the best cost per row that takes at
    /// most 0.2 s, or the smallest within 10 % if all take longer.
    pub fn new(points: Vec<(usize, f64)>, max_rows: Option<usize>) -> Self {
        let best = best_per_row(&points);
        let useful: Vec<_> =
            points.iter().filter(|point| per_row(point) <= best * USEFUL_WITHIN).collect();
        let short = useful.iter().rev().find(|(_, seconds)| *seconds <= LONGEST_SECONDS);
        let largest = short.or(useful.first()).map_or(1, |&&(rows, _)| rows);
        Self { points, drift: 1.0, max_rows: max_rows.unwrap_or(largest) }
    }

    /// The same costs on a device that is slower by a factor.
    #[must_use]
    pub(super) fn slower(&self, factor: f64) -> Self {
        let points = self.points.iter().map(|&(rows, seconds)| (rows, seconds * factor));
        Self { points: points.collect(), ..self.clone() }
    }

    /// The costs of evaluations that take so many times as long for each row, as those of larger images do.
    #[must_use]
    pub(crate) fn enlarged(&self, factor: f64) -> Self {
        let rows = (self.max_rows as f64 / factor).floor() as usize;
        Self { drift: self.drift, max_rows: rows.clamp(1, self.max_rows), ..self.slower(factor) }
    }

    /// Whether these could have been measured: what is read from a file may be anything.
    pub fn is_plausible(&self) -> bool {
        let ascending = self.points.is_sorted_by(|(before, _), (after, _)| before < after);
        let mut sizes = self.points.iter();
        let real = sizes.all(|&(rows, seconds)| rows > 0 && seconds.is_finite() && seconds > 0.0);
        !self.points.is_empty() && self.max_rows > 0 && ascending && real
    }

    /// Most rows an evaluation of this model has.
    pub fn max_rows(&self) -> usize {
        self.max_rows
    }

    /// An evaluation of so many rows found no memory: from now on at most half as many share one.
    pub fn shrink(&mut self, rows: usize) {
        self.max_rows = (rows.min(self.max_rows) / 2).max(1);
    }

    /// From now on at most as many rows share an evaluation as take so long, at least one.
    pub fn shorten(&mut self, seconds: f64) {
        while self.max_rows > 1 && self.seconds(self.max_rows) > seconds {
            self.max_rows -= 1;
        }
    }

    /// Predicted seconds of one evaluation: linear between what was measured, proportional beyond.
    pub fn seconds(&self, rows: usize) -> f64 {
        let upper = self.points.partition_point(|&(measured, _)| measured < rows);
        let seconds = match (upper.checked_sub(1).map(|i| self.points[i]), self.points.get(upper)) {
            (None, Some(&(_, s))) => s,
            (Some((r0, s0)), Some(&(r1, s1))) => {
                s0 + (s1 - s0) * (rows - r0) as f64 / (r1 - r0) as f64
            }
            (Some((r, s)), None) => s * rows as f64 / r as f64,
            (None, None) => 0.0,
        };
        seconds * self.drift
    }

    /// An evaluation of `rows` rows took so many seconds. One observation counts at most fourfold, so
    /// that a single hiccup of the machine does not shut the door.
    pub fn observe(&mut self, rows: usize, seconds: f64) {
        let predicted = self.seconds(rows);
        if predicted > 0.0 {
            let ratio = (seconds / predicted).clamp(0.25, 4.0);
            self.drift *= 1.0 + DRIFT_GAIN * (ratio - 1.0);
        }
    }
}

/// The drift of costs that were just read.
fn as_measured() -> f64 {
    1.0
}

/// Whether a batch of twice the last point's rows may be the one to take: the last two points tell, so
/// that one hiccup does not end the search.
pub(super) fn worth_doubling(points: &[(usize, f64)]) -> bool {
    let Some(&(_, longest)) = points.last() else { return true };
    let short = 2.0 * longest <= LONGEST_SECONDS;
    (points.len().saturating_sub(2)..points.len()).any(|i| {
        let cost = per_row(&points[i]);
        let before = best_per_row(&points[..i]);
        cost < before * WORTH || (short && cost <= before * USEFUL_WITHIN)
    })
}

fn per_row(&(rows, seconds): &(usize, f64)) -> f64 {
    seconds / rows as f64
}

fn best_per_row(points: &[(usize, f64)]) -> f64 {
    points.iter().map(per_row).fold(f64::INFINITY, f64::min)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_batch_that_is_useful_and_short_is_taken() {
        let scaled = |unit: f64| {
            let measured = [(1, 1.0), (2, 1.5), (4, 2.4), (8, 4.75), (16, 9.5), (32, 25.0)];
            let points = measured.into_iter().map(|(rows, units)| (rows, units * unit)).collect();
            CostModel::new(points, None)
        };
        assert_eq!(scaled(0.01).max_rows(), 16, "32 rows cost more per row");
        assert_eq!(scaled(0.03).max_rows(), 8, "16 rows take 0.285 s");
        assert_eq!(scaled(1.0).max_rows(), 4, "all take too long: the shortest useful one");
        assert_eq!(CostModel::new(vec![(1, 1.0)], Some(16)).max_rows(), 16);
    }

    #[test]
    fn doubling_goes_on_while_a_larger_batch_may_be_taken() {
        // Flat: as far as an evaluation stays short.
        let flat: Vec<_> = (0..8).map(|i| (1 << i, 0.002 * f64::from(1 << i))).collect();
        assert!((1..=6).all(|n| worth_doubling(&flat[..n])));
        assert!(!worth_doubling(&flat[..7]), "128 rows take 0.256 s");
        // Cheaper with every doubling, but slow.
        assert!(worth_doubling(&[(1, 1.0), (2, 1.5), (4, 2.4)]));
        assert!(!worth_doubling(&[(1, 1.0), (2, 2.0), (4, 4.0)]));
        // Dearer: once may be a hiccup, twice is not.
        assert!(worth_doubling(&[(1, 0.001), (2, 0.002), (4, 0.006)]));
        assert!(!worth_doubling(&[(1, 0.001), (2, 0.003), (4, 0.006)]));
        assert!(worth_doubling(&[]));
    }

    #[test]
    fn prediction_interpolates_and_follows_drift() {
        let mut cost = CostModel::new(vec![(1, 1.0), (2, 1.5), (4, 2.5)], None);
        assert_eq!(cost.seconds(3), 2.0);
        assert_eq!(cost.seconds(8), 5.0);
        for _ in 0..200 {
            cost.observe(2, 3.0);
        }
        assert!((cost.seconds(2) - 3.0).abs() < 0.01, "{}", cost.seconds(2));
    }
}
