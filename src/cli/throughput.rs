//! A line a minute of what the server did, where it did anything.

use std::{sync::Arc, time::Duration};

use crate::metrics::Metrics;

/// Between two lines.
const INTERVAL: Duration = Duration::from_secs(60);

/// Writes the lines until it is dropped.
pub(super) async fn log(metrics: Arc<Metrics>) {
    let mut before = Totals::of(&metrics);
    // An interval's first tick is at once.
    let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + INTERVAL, INTERVAL);
    loop {
        ticks.tick().await;
        let now = Totals::of(&metrics);
        if let Some(Throughput { images, images_per_second, samples_per_evaluation }) =
            now.since(before, INTERVAL)
        {
            tracing::info!(
                images,
                images_per_second,
                samples_per_evaluation,
                waiting = metrics.waiting(),
                "the last minute"
            );
        }
        before = now;
    }
}

/// What has been done since the server started.
#[derive(Debug, Clone, Copy)]
struct Totals {
    images: u64,
    evaluations: u64,
    samples: f64,
}

#[derive(Debug, PartialEq)]
struct Throughput {
    images: u64,
    images_per_second: f64,
    samples_per_evaluation: f64,
}

impl Totals {
    fn of(metrics: &Metrics) -> Self {
        let (evaluations, samples) = metrics.evaluations();
        Self { images: metrics.images_finished(), evaluations, samples }
    }

    /// What was done in the time after `before`; nothing where nothing was.
    fn since(self, before: Self, time: Duration) -> Option<Throughput> {
        let evaluations = self.evaluations.checked_sub(before.evaluations).filter(|&n| n > 0)?;
        let images = self.images - before.images;
        let hundredths = |value: f64| (value * 100.0).round() / 100.0;
        Some(Throughput {
            images,
            images_per_second: hundredths(images as f64 / time.as_secs_f64()),
            samples_per_evaluation: hundredths(
                (self.samples - before.samples) / evaluations as f64,
            ),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minute_tells_what_was_done_in_it_and_an_idle_one_nothing() {
        let before = Totals { images: 100, evaluations: 50, samples: 400.0 };
        let now = Totals { images: 400, evaluations: 150, samples: 1_000.0 };
        let expected =
            Throughput { images: 300, images_per_second: 5.0, samples_per_evaluation: 6.0 };
        assert_eq!(now.since(before, INTERVAL), Some(expected));
        assert_eq!(now.since(now, INTERVAL), None);
    }

    #[test]
    fn totals_are_those_of_all_models() {
        let metrics = Metrics::new().expect("metrics");
        for (model, images, samples) in [("a", 3, 4.0), ("b", 2, 8.0)] {
            metrics.images.with_label_values(&[model]).inc_by(images);
            metrics.batch_samples.with_label_values(&[model]).observe(samples);
            metrics.samples_waiting.with_label_values(&[model]).set(5);
        }
        let Totals { images, evaluations, samples } = Totals::of(&metrics);
        assert_eq!((images, evaluations, samples, metrics.waiting()), (5, 2, 12.0, 10));
    }
}
