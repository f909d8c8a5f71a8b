//! How far predictions are off, learned while serving.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Tracks a quantile of a stream of numbers that may drift, one number at a time: up by
/// `gain·level` when a number exceeds the estimate, down by `gain·(1 − level)` when not (quantile
/// tracking: Angelopoulos, Candès and Tibshirani 2023, "Conformal PID control for time series
/// prediction", eq. 5). Over `n` numbers, whatever they are, the share that exceeded it differs from
/// `1 − level` by at most (their range + gain) ÷ (gain·n).
#[derive(Debug, Clone, Copy)]
pub(super) struct Quantile {
    estimate: f64,
    /// The share of numbers that stay below, 0 to 1.
    level: f64,
    gain: f64,
}

impl Quantile {
    /// Starts at `estimate`.
    pub(super) fn new(estimate: f64, level: f64, gain: f64) -> Self {
        Self { estimate, level, gain }
    }

    /// The present estimate.
    pub(super) fn estimate(&self) -> f64 {
        self.estimate
    }

    /// The next number; NaN counts as one that does not exceed.
    pub(super) fn observe(&mut self, number: f64) {
        self.step(number > self.estimate);
    }

    /// The same of a number that is only known to exceed the estimate or not.
    pub(super) fn step(&mut self, exceeded: bool) {
        let exceeded = if exceeded { 1.0 } else { 0.0 };
        self.estimate += self.gain * (exceeded - (1.0 - self.level));
    }
}

/// The share of deadlines that the margin is to meet.
const MET: f64 = 0.995;
/// The share of replies that are to take no longer than allowed for; the margin has the rest to answer for.
const DELIVERED: f64 = 0.9;
/// The margin before anything is known.
const BEGIN: f64 = 1.1;
/// The margin at most. What delays evaluations by more than that is no error of predictions, and a larger margin would refuse what
/// could be on time once it is over.
const MOST: f64 = 3.0;
/// In which time a margin above its beginning loses half of what it is above: deadlines that it refuses could not show that it has
/// become too large.
const HALF_LIFE: Duration = Duration::from_secs(180);

/// What admission adds to a prediction before it accepts a deadline.
#[derive(Debug, Clone, Copy)]
pub(super) struct Calibration {
    /// Of the logarithm of the factor that would have met a deadline; all that is known of that is whether
    /// it was met.
    log_margin: Quantile,
    /// Of the seconds between the last image's pixels and the reply.
    delivery_seconds: Quantile,
}

impl Default for Calibration {
    /// A tenth more than predicted, and a millisecond to the reply.
    fn default() -> Self {
        Self {
            log_margin: Quantile::new(BEGIN.ln(), MET, 0.05),
            delivery_seconds: Quantile::new(1e-3, DELIVERED, 5e-4),
        }
    }
}

impl Calibration {
    /// By how much predictions are taken to be too short, from 1 to [`MOST`].
    pub(super) fn margin(&self) -> f64 {
        self.log_margin.estimate().exp()
    }

    /// Seconds a reply takes once its images are made; at least 0.
    pub(super) fn delivery_seconds(&self) -> f64 {
        self.delivery_seconds.estimate().max(0.0)
    }

    /// A deadline was met or not.
    pub(super) fn deadline_ended(&mut self, met: bool) {
        self.log_margin.step(!met);
        self.log_margin.estimate = self.log_margin.estimate.clamp(0.0, MOST.ln());
    }

    /// So much time has passed since the last deadline ended.
    fn forget(&mut self, passed: Duration) {
        let begin = BEGIN.ln();
        let above = (self.log_margin.estimate - begin).max(0.0);
        let halvings = passed.div_duration_f64(HALF_LIFE);
        self.log_margin.estimate -= above * (1.0 - (-halvings).exp2());
    }

    /// A reply took so many seconds once its images were made.
    pub(super) fn delivered(&mut self, seconds: f64) {
        self.delivery_seconds.observe(seconds);
    }
}

/// The calibration of all devices together: they are alike, and deadlines are few.
#[derive(Debug, Clone)]
pub(super) struct Calibrator(Arc<Mutex<Known>>);

/// What was known at a moment.
#[derive(Debug, Clone, Copy)]
struct Known {
    calibration: Calibration,
    at: Instant,
}

impl Default for Calibrator {
    fn default() -> Self {
        let known = Known { calibration: Calibration::default(), at: Instant::now() };
        Self(Arc::new(Mutex::new(known)))
    }
}

impl Calibrator {
    /// What is known now.
    pub(super) fn now(&self) -> Calibration {
        self.lock().calibration
    }

    /// A request's deadline was met or not; its reply was ready so long after its images were made, where that is known. What is
    /// known now.
    pub(super) fn deadline_ended(&self, met: bool, delivery: Option<Duration>) -> Calibration {
        let calibration = &mut self.lock().calibration;
        calibration.deadline_ended(met);
        if let Some(delivery) = delivery {
            calibration.delivered(delivery.as_secs_f64());
        }
        *calibration
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let passed = now.saturating_duration_since(known.at);
        known.calibration.forget(passed);
        known.at = now;
        known
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use understudy_models::noise;

    use super::*;

    #[test]
    fn a_quantile_is_found_and_followed() {
        let mut draws = vec![0.0f32; 40_000];
        noise::normal(1, 0, &mut draws);
        let mut quantile = Quantile::new(0.0, 0.95, 0.02);
        draws.iter().for_each(|&draw| quantile.observe(f64::from(draw)));
        assert!((quantile.estimate() - 1.645).abs() < 0.2, "{}", quantile.estimate());
        // The machine gets slower.
        draws.iter().for_each(|&draw| quantile.observe(3.0 + f64::from(draw)));
        assert!((quantile.estimate() - 4.645).abs() < 0.2, "{}", quantile.estimate());
    }

    proptest! {
        /// The promise of the method, for any sequence at all.
        #[test]
        fn the_share_of_exceedances_is_bounded(
            numbers in prop::collection::vec(0.0f64..1.0, 1..2_000),
            level in 0.5f64..0.999,
        ) {
            let gain = 0.1;
            let mut quantile = Quantile::new(0.5, level, gain);
            let mut exceeded = 0;
            for &number in &numbers {
                exceeded += usize::from(number > quantile.estimate());
                quantile.observe(number);
            }
            let share = exceeded as f64 / numbers.len() as f64;
            let bound = (1.0 + gain) / (gain * numbers.len() as f64);
            prop_assert!((share - (1.0 - level)).abs() <= bound + 1e-9);
        }
    }

    #[test]
    fn margins_have_a_ceiling_and_fall_by_themselves() {
        let mut calibration = Calibration::default();
        (0..1_000).for_each(|_| calibration.deadline_ended(false));
        assert!((calibration.margin() - MOST).abs() < 1e-12);
        calibration.forget(HALF_LIFE);
        assert!((calibration.margin() - (MOST * BEGIN).sqrt()).abs() < 1e-12);
        calibration.forget(20 * HALF_LIFE);
        assert!((calibration.margin() - BEGIN).abs() < 1e-5);
        // One that has fallen further by what it met stays.
        (0..100_000).for_each(|_| calibration.deadline_ended(true));
        calibration.forget(HALF_LIFE);
        assert_eq!(calibration.margin(), 1.0);
    }

    #[test]
    fn margins_never_make_admission_bolder_than_the_prediction() {
        let mut calibration = Calibration::default();
        (0..100_000).for_each(|_| calibration.deadline_ended(true));
        (0..100_000).for_each(|_| calibration.delivered(0.0));
        assert_eq!(calibration.margin(), 1.0);
        assert!((0.0..1e-3).contains(&calibration.delivery_seconds()));
        calibration.deadline_ended(false);
        assert!(
            calibration.margin() > 1.04,
            "what was not needed for long is not held against a miss"
        );
    }
}
