//! The median of figures, for the examples that measure.

/// The upper one of an even number of values, of which there must be one.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
