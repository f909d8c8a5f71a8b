//! Whether costs that an earlier run of the server measured still hold.

use super::cost::CostModel;

/// Evaluations of a size, at most. The first finds cold memory, so the shortest counts.
const EVALUATIONS: usize = 3;
/// Seconds after which a size has been timed enough.
const ENOUGH_SECONDS: f64 = 0.2;
/// Costs are of the same machine where they differ by less than this factor: something else may run on it now, which
/// serving follows.
const SAME_LEVEL: f64 = 3.0;
/// The largest batch is still the right one where what it saves differs by less than this factor.
const SAME_SHAPE: f64 = 1.3;

/// A check under way: one row is timed, then the largest batch.
#[derive(Debug)]
pub(super) struct CostCheck {
    known: CostModel,
    /// Shortest evaluation of one row, once it is known.
    one: Option<f64>,
    /// Seconds of the evaluations of the size being timed.
    timed: Vec<f64>,
}

/// What a check comes to.
#[derive(Debug)]
pub(super) enum Checked {
    /// The costs, at today's level.
    Hold(CostModel),
    /// They are to be measured anew.
    Stale,
}

impl CostCheck {
    pub(super) fn new(known: CostModel) -> Self {
        Self { known, one: None, timed: Vec::new() }
    }

    /// Rows of the evaluation that is to be timed next.
    pub(super) fn rows(&self) -> usize {
        if self.one.is_none() { 1 } else { self.known.max_rows() }
    }

    /// It took so many seconds. What the check comes to, once it is over.
    pub(super) fn timed(&mut self, seconds: f64) -> Option<Checked> {
        self.timed.push(seconds);
        let enough = self.timed.iter().sum::<f64>() >= ENOUGH_SECONDS;
        if self.timed.len() < EVALUATIONS && !enough {
            return None;
        }
        let shortest = self.timed.drain(..).fold(f64::INFINITY, f64::min);
        let slower = shortest / self.known.seconds(self.rows());
        let Some(one) = self.one else {
            self.one = Some(slower);
            return (self.known.max_rows() == 1).then(|| self.compare(slower, slower));
        };
        Some(self.compare(one, slower))
    }

    /// By which factors one row and the largest batch are slower than they were.
    fn compare(&self, one: f64, largest: f64) -> Checked {
        let within = |ratio: f64, factor: f64| ratio < factor && ratio > 1.0 / factor;
        let level = (one * largest).sqrt();
        if within(level, SAME_LEVEL) && within(largest / one, SAME_SHAPE) {
            return Checked::Hold(self.known.slower(level));
        }
        Checked::Stale
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known() -> CostModel {
        CostModel::new(vec![(1, 0.001), (2, 0.0015), (4, 0.002), (8, 0.004)], None)
    }

    /// What a check comes to on a machine where so many rows take so many seconds, and the sizes that it timed.
    fn check(cost: impl Fn(usize) -> f64) -> (Checked, Vec<usize>) {
        let mut check = CostCheck::new(known());
        let mut sizes = Vec::new();
        loop {
            let rows = check.rows();
            let first = sizes.last() != Some(&rows);
            sizes.push(rows);
            let seconds = cost(rows) * if first { 5.0 } else { 1.0 };
            if let Some(checked) = check.timed(seconds) {
                return (checked, sizes);
            }
        }
    }

    #[test]
    fn the_same_machine_is_known_again_after_six_evaluations() {
        let (checked, sizes) = check(|rows| known().seconds(rows));
        assert!(matches!(checked, Checked::Hold(costs) if costs.max_rows() == 8));
        assert_eq!(sizes, [1, 1, 1, 8, 8, 8]);
    }

    #[test]
    fn a_busier_machine_is_at_another_level() {
        let (checked, _) = check(|rows| 2.0 * known().seconds(rows));
        let Checked::Hold(costs) = checked else { panic!("stale") };
        assert!((costs.seconds(4) - 0.004).abs() < 1e-9, "{}", costs.seconds(4));
    }

    #[test]
    fn another_machine_is_measured_anew() {
        for cost in [|rows| 4.0 * known().seconds(rows), |rows| 0.001 * rows as f64] {
            assert!(matches!(check(cost).0, Checked::Stale));
        }
    }

    #[test]
    fn a_slow_evaluation_is_timed_once() {
        let slow = CostModel::new(vec![(1, 3.0)], None);
        let mut check = CostCheck::new(slow);
        assert!(matches!(check.timed(3.1), Some(Checked::Hold(_))));
    }
}
