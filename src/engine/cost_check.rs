//! Whether costs that an earlier run of the server measured still hold.

use super::cost::CostModel;
use crate::percentiles::median;

/// Evaluations of a size in a round, at least. The first finds cold memory; the median counts, since what is known are usual
/// times, too: the shortest of many would make short evaluations look cheaper than long ones.
const EVALUATIONS: usize = 3;
/// Seconds for which a size is timed in a round: a few evaluations of a millisecond say little, and one of seconds is enough.
const STRETCH_SECONDS: std::ops::Range<f64> = 0.02..0.2;
/// Rounds, at most: to measure anew takes longer than to look again.
const ROUNDS: usize = 3;
/// Costs are of the same machine where they differ by less than this factor: something else may run on it now, which
/// serving follows.
const SAME_LEVEL: f64 = 3.0;
/// The largest batch is still the right one where what it saves differs by less than this factor.
const SAME_SHAPE: f64 = 1.5;

/// A check under way: one row and the largest batch are timed in turns, until a round finds the costs that are known.
#[derive(Debug)]
pub(super) struct CostCheck {
    known: CostModel,
    rounds: usize,
    /// By which factor one row is slower than it was in this round, once that is known.
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
        Self { known, rounds: 0, one: None, timed: Vec::new() }
    }

    /// Rows of the evaluation that is to be timed next.
    pub(super) fn rows(&self) -> usize {
        if self.one.is_none() { 1 } else { self.known.max_rows() }
    }

    /// It took so many seconds. What the check comes to, once it is over.
    pub(super) fn timed(&mut self, seconds: f64) -> Option<Checked> {
        self.timed.push(seconds);
        let stretch: f64 = self.timed.iter().sum();
        let few = self.timed.len() < EVALUATIONS || stretch < STRETCH_SECONDS.start;
        if few && stretch < STRETCH_SECONDS.end {
            return None;
        }
        let usual = median(self.timed.drain(..));
        let slower = usual / self.known.seconds(self.rows());
        if self.one.is_none() && self.known.max_rows() > 1 {
            self.one = Some(slower);
            return None;
        }
        let one = self.one.take().unwrap_or(slower);
        self.rounds += 1;
        match self.level(one, slower) {
            Some(level) => Some(Checked::Hold(self.known.slower(level))),
            None => (self.rounds == ROUNDS).then_some(Checked::Stale),
        }
    }

    /// By which factor everything is slower than it was, where one row and the largest batch agree on it.
    fn level(&self, one: f64, largest: f64) -> Option<f64> {
        let within = |ratio: f64, factor: f64| ratio < factor && ratio > 1.0 / factor;
        let level = (one * largest).sqrt();
        tracing::debug!(one, largest, rows = self.known.max_rows(), "costs that were known");
        (within(level, SAME_LEVEL) && within(largest / one, SAME_SHAPE)).then_some(level)
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
    fn the_same_machine_is_known_again_after_a_round() {
        let (checked, sizes) = check(|rows| known().seconds(rows));
        assert!(matches!(checked, Checked::Hold(costs) if costs.max_rows() == 8));
        // The first evaluation takes five times as long.
        assert_eq!(sizes, [vec![1; 16], vec![8; 3]].concat());
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
            let (checked, sizes) = check(cost);
            assert!(matches!(checked, Checked::Stale));
            assert_eq!(sizes.chunk_by(|a, b| a == b).count(), 2 * ROUNDS);
        }
    }

    #[test]
    fn what_else_the_machine_did_for_a_moment_is_looked_through() {
        let mut check = CostCheck::new(known());
        let checked = loop {
            // Somebody else has half of the machine while the first size is timed.
            let slow = check.rounds == 0 && check.one.is_none();
            let seconds = known().seconds(check.rows()) * if slow { 2.0 } else { 1.0 };
            if let Some(checked) = check.timed(seconds) {
                break checked;
            }
        };
        let Checked::Hold(costs) = checked else { panic!("stale") };
        assert!((costs.seconds(1) - 0.001).abs() < 1e-9, "{}", costs.seconds(1));
    }

    #[test]
    fn a_slow_evaluation_is_timed_once() {
        let slow = CostModel::new(vec![(1, 3.0)], None);
        let mut check = CostCheck::new(slow);
        assert!(matches!(check.timed(3.1), Some(Checked::Hold(_))));
    }
}
