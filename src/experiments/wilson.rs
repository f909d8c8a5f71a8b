//! How sure a win rate is: Wilson's score interval.

/// The 0.975 quantile of the normal distribution: 95 % lie within ±z.
const Z: f64 = 1.959_963_984_540_054;

/// Wilson's 95 % score interval of a probability that was seen to happen `successes` times in `trials`
/// (Wilson 1927, "Probable inference, the law of succession, and statistical inference", J. Amer. Statist.
/// Assoc. 22, p. 209), within [0, 1]; `None` without trials. For one look: whoever looks again and again
/// and stops when it excludes ½ is wrong more often than in 5 % of cases, for which there is
/// [`super::sequential`].
pub fn interval(successes: u64, trials: u64) -> Option<[f64; 2]> {
    if trials == 0 {
        return None;
    }
    let n = trials as f64;
    let rate = successes as f64 / n;
    let center = rate + Z * Z / (2.0 * n);
    let half_width = Z * (rate * (1.0 - rate) / n + Z * Z / (4.0 * n * n)).sqrt();
    let scale = 1.0 + Z * Z / n;
    // Rounding may leave the ends a hair outside of what they are exactly.
    let low = if successes == 0 { 0.0 } else { (center - half_width) / scale };
    let high = if successes == trials { 1.0 } else { (center + half_width) / scale };
    Some([low, high])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experiments::golden;

    #[test]
    fn intervals_are_those_of_statsmodels() {
        for case in golden::cases() {
            let [low, high] = interval(case.wins, case.wins + case.losses).unwrap_or_default();
            assert!((low - case.wilson[0]).abs() < 1e-12, "{case:?}: {low}");
            assert!((high - case.wilson[1]).abs() < 1e-12, "{case:?}: {high}");
        }
        assert_eq!(interval(0, 0), None);
    }
}
