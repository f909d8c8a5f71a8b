//! Exact percentiles, by nearest rank.

/// Values in ascending order.
pub fn sorted(values: impl IntoIterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values
}

/// The smallest of at least one sorted values that at least `percent` per cent of them do not exceed
/// (nearest rank).
pub fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let rank = (percent * sorted.len()).div_ceil(100);
    sorted[rank.max(1) - 1]
}

/// The lower one of an even number of values; 0 of none.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let sorted = sorted(values);
    if sorted.is_empty() { 0.0 } else { percentile(&sorted, 50) }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    struct Golden {
        values: Vec<f64>,
        percentiles: BTreeMap<usize, f64>,
    }

    #[test]
    fn numpy_says_the_same_of_percentiles() {
        let golden = include_str!("../tests/golden/percentiles.json");
        let cases: Vec<Golden> = serde_json::from_str(golden).unwrap();
        assert!(cases.len() >= 5);
        for case in cases {
            let values = sorted(case.values);
            for (percent, expected) in case.percentiles {
                assert_eq!(percentile(&values, percent), expected, "{percent} of {}", values.len());
            }
        }
    }

    #[test]
    fn the_median_is_one_of_the_values() {
        assert_eq!(median([3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median([4.0, 1.0, 3.0, 2.0]), 2.0);
        assert_eq!(median([]), 0.0);
    }
}
