//! What an evaluation costs, by rows: measured at warm-up, followed while serving.

/// Seconds of one evaluation as a function of its rows.
#[derive(Debug, Clone)]
pub struct CostModel {
    /// (rows, seconds), rows ascending, as measured at warm-up.
    points: Vec<(usize, f64)>,
    /// How much slower than at warm-up the device is now.
    drift: f64,
    max_rows: usize,
}

/// A batch is larger than useful when a smaller one costs hardly more per row.
const USEFUL_WITHIN: f64 = 1.03;
/// Weight of the newest observation in the drift.
const DRIFT_GAIN: f64 = 0.1;

impl CostModel {
    /// From at least one measured (rows, seconds), rows ascending. `max_rows` overrides the largest
    /// useful batch, which otherwise is the smallest whose cost per row is within 3 % of the best.
    pub fn new(points: Vec<(usize, f64)>, max_rows: Option<usize>) -> Self {
        let per_row = |&(rows, seconds): &(usize, f64)| seconds / rows as f64;
        let best = points.iter().map(per_row).fold(f64::INFINITY, f64::min);
        let useful = points.iter().find(|point| per_row(point) <= best * USEFUL_WITHIN);
        let useful = useful.map_or(1, |&(rows, _)| rows);
        Self { points, drift: 1.0, max_rows: max_rows.unwrap_or(useful) }
    }

    /// Most rows an evaluation of this model has.
    pub fn max_rows(&self) -> usize {
        self.max_rows
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_useful_batch_is_where_rows_stop_getting_cheaper() {
        let measured = vec![(1, 1.0), (2, 1.5), (4, 2.4), (8, 4.75), (16, 9.5)];
        assert_eq!(CostModel::new(measured.clone(), None).max_rows(), 4);
        assert_eq!(CostModel::new(measured, Some(16)).max_rows(), 16);
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
