//! Measured numbers as people read them.

/// Digits behind the point at most.
const MOST: i32 = 8;

/// A mean over runs, with the standard deviation between them where there were several, in as many digits as they
/// bear: two of the spread, or three in all.
pub(crate) fn shown(mean: f64, spread: Option<f64>) -> String {
    let magnitude = |value: f64| value.abs().log10().floor() as i32;
    match spread {
        Some(spread) if spread > 0.0 => {
            let digits = (1 - magnitude(spread)).clamp(0, MOST) as usize;
            format!("{mean:.digits$} ± {spread:.digits$}")
        }
        _ if mean == 0.0 || !mean.is_finite() => format!("{mean}"),
        _ => {
            let digits = (2 - magnitude(mean)).clamp(0, MOST) as usize;
            format!("{mean:.digits$}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::shown;

    #[test]
    fn digits_are_those_that_the_spread_leaves() {
        for (mean, spread, text) in [
            (3.4991, Some(0.0213), "3.499 ± 0.021"),
            (3.4991, Some(0.213), "3.50 ± 0.21"),
            (123.456, Some(21.3), "123 ± 21"),
            (0.78821, None, "0.788"),
            (26.123, None, "26.1"),
            (1234.5, None, "1234"),
            (0.0, None, "0"),
            (1.234e-4, Some(2.1e-5), "0.000123 ± 0.000021"),
            (1.234e-5, None, "0.0000123"),
        ] {
            assert_eq!(shown(mean, spread), text);
        }
    }
}
