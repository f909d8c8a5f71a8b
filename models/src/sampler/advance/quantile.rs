//! The threshold of dynamic thresholding (Saharia et al. 2022, arXiv 2205.11487, §2.3).

/// The `ratio` quantile of `|values|`, clamped to `[1, max]`; NaN if any value is.
///
/// The quantile interpolates linearly, and computes its rank in f32, as `torch.quantile` does.
pub(super) fn threshold(values: &[f32], ratio: f64, max: f64) -> f32 {
    let mut magnitudes: Vec<f32> = values.iter().map(|value| value.abs()).collect();
    if magnitudes.is_empty() {
        return 1.0;
    }
    if magnitudes.iter().any(|magnitude| magnitude.is_nan()) {
        return f32::NAN;
    }
    let rank = ratio as f32 * (magnitudes.len() - 1) as f32;
    let below = (rank.floor() as usize).min(magnitudes.len() - 1);
    let (_, &mut low, above) = magnitudes.select_nth_unstable_by(below, f32::total_cmp);
    let part = rank - below as f32;
    let quantile = match above.iter().copied().min_by(f32::total_cmp) {
        Some(high) if part > 0.0 => low + part * (high - low),
        _ => low,
    };
    quantile.max(1.0).min(max as f32)
}
