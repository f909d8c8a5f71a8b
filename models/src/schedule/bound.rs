//! What the estimate of the clean sample is kept within.

/// How the estimate of the clean sample is bounded.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Bound {
    /// Not at all.
    None,
    /// Clamped to `[-range, range]` (`clip_sample`).
    Clamp {
        /// `clip_sample_range`.
        range: f64,
    },
    /// Dynamic thresholding (Imagen, §2.3): per sample, `s` is the `ratio` quantile of `|x0|` clamped to
    /// `[1, max]`; x0 is clamped to `[-s, s]` and divided by `s`.
    Threshold {
        /// `dynamic_thresholding_ratio`.
        ratio: f64,
        /// `sample_max_value`.
        max: f64,
    },
}
