//! Where a request's time went, and when that was.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::wire::Timings;
use crate::engine::SampleTimings;

impl Timings {
    /// A request's timings from its images'.
    pub(super) fn of(images: &[SampleTimings], total: Duration) -> Self {
        let longest = images.iter().map(|timings| timings.queue).max().unwrap_or_default();
        let device: Duration = images.iter().map(|timings| timings.device).sum();
        let batch: f64 = images.iter().map(|timings| timings.mean_batch).sum();
        let evaluations = images.iter().map(|timings| timings.network_evaluations).max();
        Self {
            queue_ms: milliseconds(longest),
            device_ms: milliseconds(device),
            total_ms: milliseconds(total),
            network_evaluations: evaluations.unwrap_or(0),
            mean_batch: batch / images.len().max(1) as f64,
        }
    }
}

/// Milliseconds to the microsecond.
pub(super) fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// Now.
pub(super) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs())
}
