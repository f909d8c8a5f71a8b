//! Finding out what evaluations cost: which batch size is to be timed next, and what the timings come to.
//!
//! What else a machine does slows it down, for moments or from some moment on. A short evaluation slips
//! through between such moments, a long one does not; and what is timed before another program starts
//! looks cheaper than what is timed after. So the sizes take turns in rounds, each for the same stretch of
//! time, and what is compared is their share of a round, by the median of the rounds.

use super::cost::{CostModel, worth_doubling};
use crate::percentiles::median;

/// Seconds for which a size is timed in a round, at least: several time slices of an operating system where sizes are
/// compared, a few evaluations where the largest is decided already.
const STRETCH_SECONDS: [f64; 2] = [0.03, 0.005];
/// Least rounds.
const ROUNDS: usize = 3;
/// Rounds agree where so many have every size within [`AGREEMENT`] of its median.
const AGREEING: usize = 3;
/// Where sizes within a tenth are taken for equally good, half of that is near enough.
const AGREEMENT: f64 = 0.05;
/// Seconds that finding out about a model may take.
pub const BUDGET_SECONDS: f64 = 4.0;
/// The largest batch ever tried.
const LARGEST: usize = 256;

/// A calibration under way.
#[derive(Debug)]
pub(super) struct BatchCalibration {
    max_rows: Option<usize>,
    /// Nothing begins that is predicted to end later than this, if anything has been timed.
    budget_seconds: f64,
    /// Mean seconds of an evaluation, by round and size; size `i` is 2ⁱ rows. All rounds but the last, which
    /// may be under way, have as many sizes: a round that goes further makes those before it void.
    rounds: Vec<Vec<f64>>,
    /// Evaluations and seconds of the size being timed.
    stretch: (usize, f64),
}

impl BatchCalibration {
    /// `max_rows` is how many rows there are to be, where that is decided already; `budget_seconds` is how long it may
    /// take, give or take an evaluation.
    pub(super) fn new(max_rows: Option<usize>, budget_seconds: f64) -> Self {
        Self { max_rows, budget_seconds, rounds: vec![Vec::new()], stretch: (0, 0.0) }
    }

    /// How long it may take.
    pub(super) fn budget_seconds(&self) -> f64 {
        self.budget_seconds
    }

    /// Rows of the evaluation that is to be timed next.
    pub(super) fn rows(&self) -> usize {
        1 << self.rounds.last().map_or(0, Vec::len)
    }

    /// It took so many seconds; the calibration has taken `spent` seconds by now. The costs, once it is over.
    pub(super) fn timed(&mut self, seconds: f64, spent: f64) -> Option<CostModel> {
        self.stretch.0 += 1;
        self.stretch.1 += seconds;
        let (evaluations, stretch) = self.stretch;
        let mean = stretch / evaluations as f64;
        let budget = self.budget_seconds;
        let affordable = |seconds: f64| spent + seconds < budget;
        if stretch < self.least() && affordable(mean) {
            return None;
        }
        self.stretch = (0, 0.0);
        let rows = self.rows();
        let sizes = rows.ilog2() as usize + 1;
        let (round, before) = self.rounds.split_last_mut()?;
        round.push(mean);
        let known = before.first();
        if let Some(&next) = known.and_then(|known| known.get(sizes)) {
            if affordable(next.max(self.least())) {
                return None;
            }
            // Sizes that were timed more often than others would not have had the same moments.
            self.rounds.pop();
            return Some(self.costs());
        }
        let points: Vec<_> = round.iter().enumerate().map(|(i, &s)| (1 << i, s)).collect();
        let allowed = 2 * rows <= self.max_rows.unwrap_or(LARGEST);
        if allowed && affordable(2.0 * mean) && worth_doubling(&points) {
            return None;
        }
        if known.is_some_and(|known| known.len() < sizes) {
            // Something ended them early.
            self.rounds.drain(..self.rounds.len() - 1);
        }
        let another: f64 = self.rounds.last()?.iter().map(|s| s.max(self.least())).sum();
        if !self.settled() && affordable(another) {
            self.rounds.push(Vec::new());
            return None;
        }
        Some(self.costs())
    }

    /// The evaluation that was to be timed found no memory: the costs of the sizes below; nothing without any.
    pub(super) fn found_no_memory(&mut self) -> Option<CostModel> {
        let fitting = self.rounds.last().map_or(0, Vec::len);
        self.rounds.iter_mut().for_each(|round| round.truncate(fitting));
        self.rounds.retain(|round| round.len() == fitting);
        let most = 1 << fitting.checked_sub(1)?;
        self.max_rows = self.max_rows.map(|asked| asked.min(most));
        Some(self.costs())
    }

    /// Seconds for which a size is timed in a round, at least.
    fn least(&self) -> f64 {
        STRETCH_SECONDS[usize::from(self.max_rows.is_some())]
    }

    /// Whether more rounds would not change much; all of them are complete.
    fn settled(&self) -> bool {
        if self.max_rows.is_some() {
            return self.rounds.len() >= ROUNDS;
        }
        let shares = self.shares();
        let typical = self.typical(&shares);
        let near = |share: &f64, typical: &f64| (share / typical - 1.0).abs() <= AGREEMENT;
        let agreeing = shares.iter().filter(|round| {
            round.iter().zip(&typical).all(|(share, typical)| near(share, typical))
        });
        self.rounds.len() >= ROUNDS && agreeing.count() >= AGREEING
    }

    /// The sizes' costs as parts of their round's cost for one row of each size.
    fn shares(&self) -> Vec<Vec<f64>> {
        let share = |round: &Vec<f64>| {
            let all = per_row(round);
            round.iter().map(|seconds| seconds / all).collect()
        };
        self.rounds.iter().map(share).collect()
    }

    /// By size, the median of the rounds.
    fn typical(&self, shares: &[Vec<f64>]) -> Vec<f64> {
        let sizes = shares.first().map_or(0, Vec::len);
        (0..sizes).map(|size| median(shares.iter().map(|round| round[size]))).collect()
    }

    fn costs(&self) -> CostModel {
        let level = median(self.rounds.iter().map(|round| per_row(round)));
        let typical = self.typical(&self.shares());
        let points = typical.into_iter().enumerate().map(|(i, share)| (1 << i, share * level));
        CostModel::new(points.collect(), self.max_rows)
    }
}

/// Seconds of a row of each size.
fn per_row(round: &[f64]) -> f64 {
    round.iter().enumerate().map(|(i, seconds)| seconds / f64::from(1 << i)).sum()
}

#[cfg(test)]
mod tests {
    use understudy_models::noise;

    use super::*;

    /// Seconds of the bundled student's evaluation on a quiet machine.
    fn student(rows: usize) -> f64 {
        0.000_26 + 0.000_39 * rows as f64
    }

    /// A machine that is somebody else's in the time between `taken` pairs, in seconds, ascending.
    struct Machine {
        now: f64,
        taken: Vec<(f64, f64)>,
    }

    impl Machine {
        /// Until work of so many seconds is done.
        fn run(&mut self, work: f64) -> f64 {
            let began = self.now;
            let mut left = work;
            let next = self.taken.partition_point(|(_, to)| *to <= self.now);
            for &(from, to) in &self.taken[next..] {
                let free = (from - self.now).max(0.0);
                if free >= left {
                    break;
                }
                left -= free;
                self.now = to;
            }
            self.now += left;
            self.now - began
        }

        /// The calibration's costs, and how long it took.
        fn calibrated(
            mut self,
            max_rows: Option<usize>,
            cost: impl Fn(usize) -> f64,
        ) -> (CostModel, f64) {
            let mut calibration = BatchCalibration::new(max_rows, BUDGET_SECONDS);
            loop {
                let seconds = self.run(cost(calibration.rows()));
                if let Some(costs) = calibration.timed(seconds, self.now) {
                    return (costs, self.now);
                }
            }
        }
    }

    fn quiet() -> Machine {
        Machine { now: 0.0, taken: Vec::new() }
    }

    /// Another program that has the machine for `slice` out of every 2 × `slice` seconds, on average: from
    /// `from` to `to`, drawn by `seed`.
    fn busy(seed: u64, slice: f64, from: f64, to: f64) -> Machine {
        let mut taken = Vec::new();
        let mut now = from;
        for draw in 0.. {
            let length =
                |draw| slice * (0.5 + noise::uniform_u64(seed, draw) as f64 / 2f64.powi(64));
            let begins = now + length(2 * draw);
            now = begins + length(2 * draw + 1);
            if now >= to {
                break;
            }
            taken.push((begins, now));
        }
        Machine { now: 0.0, taken }
    }

    /// How much dearer a row is than it could be, at the batch size that was chosen.
    fn loss(costs: &CostModel, cost: impl Fn(usize) -> f64) -> f64 {
        let per_row = |rows: usize| cost(rows) / rows as f64;
        per_row(costs.max_rows()) / per_row(256)
    }

    #[test]
    fn on_a_quiet_machine_costs_are_exact_and_known_after_three_rounds() {
        let (costs, seconds) = quiet().calibrated(None, student);
        assert_eq!(costs.max_rows(), 256);
        for rows in [1, 2, 8, 64, 256] {
            assert!((costs.seconds(rows) / student(rows) - 1.0).abs() < 1e-9, "{rows}");
        }
        assert!(seconds < 1.8, "{seconds}");
        let (costs, seconds) = quiet().calibrated(Some(4), student);
        assert_eq!(costs.max_rows(), 4);
        assert!(seconds < 0.35, "three rounds of three sizes: {seconds}");
    }

    /// What the median of single evaluations makes of this: 1 row costs 0.65 ms, 4 rows twice as much each.
    #[test]
    fn short_evaluations_do_not_look_cheap_because_they_slip_through() {
        for seed in 0..20 {
            for slice in [0.000_7, 0.002, 0.004] {
                let (costs, seconds) = busy(seed, slice, 0.0, 10.0).calibrated(None, student);
                assert!(costs.max_rows() >= 8, "{seed} {slice}: {}", costs.max_rows());
                assert!(loss(&costs, student) < 1.15, "{seed} {slice}: {}", costs.max_rows());
                assert!(seconds < 5.0, "{seconds}");
            }
        }
    }

    #[test]
    fn another_program_may_start_or_end_at_any_moment() {
        for moment in (0..150).map(|i| f64::from(i) * 0.01) {
            for machine in [busy(1, 0.000_5, moment, 10.0), busy(1, 0.000_5, -1.0, moment)] {
                let (costs, _) = machine.calibrated(None, student);
                assert!(loss(&costs, student) < 1.15, "{moment}: {}", costs.max_rows());
            }
        }
    }

    #[test]
    fn memory_ends_the_survey_at_what_fits() {
        for (max_rows, expected) in [(None, 8), (Some(32), 8), (Some(4), 4)] {
            let mut calibration = BatchCalibration::new(max_rows, BUDGET_SECONDS);
            let mut spent = 0.0;
            let costs = loop {
                if calibration.rows() > 8 {
                    break calibration.found_no_memory();
                }
                spent += student(calibration.rows());
                if let Some(costs) = calibration.timed(student(calibration.rows()), spent) {
                    break Some(costs);
                }
            };
            let costs = costs.expect("some sizes fit");
            assert_eq!(costs.max_rows(), expected);
            assert!((costs.seconds(4) / student(4) - 1.0).abs() < 1e-9);
        }
        assert!(BatchCalibration::new(None, BUDGET_SECONDS).found_no_memory().is_none());
    }

    #[test]
    fn slow_networks_end_in_time() {
        for row in [0.05, 0.2, 0.5, 1.0, 1.9, 3.0, 9.0] {
            let (costs, seconds) = quiet().calibrated(None, |rows| row * rows as f64);
            assert!(seconds < 4.0 + row, "{row}: {seconds}");
            assert!((costs.seconds(1) / row - 1.0).abs() < 1e-9);
            assert!(costs.max_rows() <= 8);
        }
        // A batch of four makes a row a third cheaper, and is found although two rounds are not affordable.
        let (costs, seconds) = quiet().calibrated(None, |rows| 0.3 + 0.3 * rows as f64);
        assert_eq!(costs.max_rows(), 4);
        assert!(seconds < 4.0, "{seconds}");
    }
}
