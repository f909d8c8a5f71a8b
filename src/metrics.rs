//! Every metric of the server, each a typed field.
//!
//! Names, types and labels are a contract with dashboards; the buckets are the same for every model,
//! so that two models can be compared bucket by bucket. Labels are bounded: whoever observes passes
//! a known model's id or [`UNKNOWN_MODEL`], a route's pattern or [`UNMATCHED_ROUTE`].

use std::sync::Arc;

use prometheus::{
    Gauge, HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, Registry, TextEncoder,
    core::Collector, proto::Metric,
};

/// The `model` label of a request that names no model of this server.
pub const UNKNOWN_MODEL: &str = "unknown";

/// The `route` label of a request that no route matches.
pub const UNMATCHED_ROUTE: &str = "unmatched";

/// All metrics, in a registry of their own.
#[derive(Debug, Clone)]
pub struct Metrics {
    registry: Registry,
    /// Requests answered, by `route`, `method` and status `code`.
    pub http_requests: IntCounterVec,
    /// Seconds from receipt to the last byte's readiness of a generation or inference, by `model`.
    pub request_duration: HistogramVec,
    /// Seconds an image waited for its first evaluation, by `model`.
    pub queue_duration: HistogramVec,
    /// An image's share of the device in seconds, by `model`.
    pub device_duration: HistogramVec,
    /// Seconds of one batched network evaluation, by `model`.
    pub evaluation_duration: HistogramVec,
    /// One batched evaluation of a text encoder or a decoder.
    pub transcoding_duration: HistogramVec,
    /// Prompts whose hidden states were kept, or had to be worked out.
    pub prompts: IntCounterVec,
    /// Samples in one network evaluation, by `model`.
    pub batch_samples: HistogramVec,
    /// Finished images, by `model`.
    pub images: IntCounterVec,
    /// Samples admitted whose first evaluation has not begun, by `model`.
    pub samples_waiting: IntGaugeVec,
    /// Samples between their first and last evaluation, by `model`.
    pub samples_running: IntGaugeVec,
    /// Seconds until all that is admitted will be done, as predicted at the last scrape; 0 when idle.
    pub backlog: Gauge,
    /// Images that were not admitted, by `model` and `reason`.
    pub rejected: IntCounterVec,
    /// Images admitted but not finished, by `model` and `reason`.
    pub cancelled: IntCounterVec,
    /// Actual ÷ predicted time of images with a deadline, by `model`; what later arrivals were predicted to
    /// add is part of the prediction.
    pub prediction_ratio: HistogramVec,
    /// The factor by which predictions are lengthened before a deadline is accepted.
    pub prediction_margin: Gauge,
    /// Requests drawn for repetition by the teacher, by `model` (the student) and `outcome`: `compared`;
    /// `busy` when clients or another repetition had the device; `late` when clients held it up; `failed`.
    pub shadows: IntCounterVec,
    /// Teacher's device time ÷ student's in paired runs, by `teacher` and `student`.
    pub pair_speedup_ratio: HistogramVec,
    /// PSNR in dB between the images of paired runs, by `teacher` and `student`.
    pub pair_psnr_db: HistogramVec,
    /// SSIM between the images of paired runs, by `teacher` and `student`.
    pub pair_ssim: HistogramVec,
    /// Panics that were caught, by `thread`: `request`, `evaluation`, or `device`, which ends the device.
    pub panics: IntCounterVec,
    /// 1 for every loaded model, by `model`, `role`, `teacher`, `dtype` and `parameters`.
    pub model_info: IntGaugeVec,
    /// 1, with the server's `version`.
    pub build_info: IntGaugeVec,
}

impl Metrics {
    /// Registers every metric.
    ///
    /// # Errors
    /// Only when two metrics collide, which is a mistake in this file.
    pub fn new() -> prometheus::Result<Arc<Self>> {
        let registry = Registry::new();
        let metrics = Self {
            http_requests: counter(
                &registry,
                "understudy_http_requests_total",
                "HTTP requests answered.",
                &["route", "method", "code"],
            )?,
            request_duration: histogram(
                &registry,
                "understudy_request_duration_seconds",
                "Time from the receipt of a request for a model to its answer.",
                request_buckets(),
            )?,
            queue_duration: histogram(
                &registry,
                "understudy_queue_duration_seconds",
                "Time an image waited between admission and its first network evaluation.",
                request_buckets(),
            )?,
            device_duration: histogram(
                &registry,
                "understudy_device_duration_seconds",
                "An image's share of the device: the sum over its evaluations of time divided by rows.",
                buckets(1e-4, 10.0),
            )?,
            evaluation_duration: histogram(
                &registry,
                "understudy_evaluation_duration_seconds",
                "Time of one batched network evaluation.",
                buckets(1e-4, 10.0),
            )?,
            transcoding_duration: labelled_histogram(
                &registry,
                "understudy_transcoding_duration_seconds",
                "One batched evaluation of a model's text encoder (encode) or decoder (decode), or a part of that.",
                buckets(1e-4, 10.0),
                &["model", "stage"],
            )?,
            prompts: counter(
                &registry,
                "understudy_prompts_total",
                "Prompts of requests whose hidden states were kept (hit) or had to be worked out (miss).",
                &["model", "outcome"],
            )?,
            batch_samples: histogram(
                &registry,
                "understudy_batch_samples",
                "Samples that shared one network evaluation.",
                prometheus::exponential_buckets(1.0, 2.0, 9)?,
            )?,
            images: counter(&registry, "understudy_images_total", "Images finished.", &["model"])?,
            samples_waiting: gauge(
                &registry,
                "understudy_samples_waiting",
                "Samples admitted whose first evaluation has not begun.",
                &["model"],
            )?,
            samples_running: gauge(
                &registry,
                "understudy_samples_running",
                "Samples between their first and their last evaluation.",
                &["model"],
            )?,
            backlog: plain_gauge(
                &registry,
                "understudy_backlog_seconds",
                "Predicted time until everything admitted is done, on the busiest device; 0 when idle.",
            )?,
            rejected: counter(
                &registry,
                "understudy_rejected_total",
                "Images asked for that were not admitted.",
                &["model", "reason"],
            )?,
            cancelled: counter(
                &registry,
                "understudy_cancelled_total",
                "Images admitted that did not finish.",
                &["model", "reason"],
            )?,
            prediction_ratio: histogram(
                &registry,
                "understudy_prediction_ratio",
                "Actual divided by predicted time of an image with a deadline, later arrivals allowed for.",
                vec![
                    0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2, 1.3, 1.5, 2.0, 3.0,
                    5.0,
                ],
            )?,
            prediction_margin: plain_gauge(
                &registry,
                "understudy_prediction_margin_ratio",
                "Factor by which predictions are lengthened before a deadline is accepted.",
            )?,
            shadows: counter(
                &registry,
                "understudy_shadow_requests_total",
                "Students' requests drawn for repetition by their teacher.",
                &["model", "outcome"],
            )?,
            pair_speedup_ratio: pair_histogram(
                &registry,
                "understudy_pair_speedup_ratio",
                "Teacher's device time divided by the student's, in paired runs.",
                buckets(0.25, 64.0),
            )?,
            pair_psnr_db: pair_histogram(
                &registry,
                "understudy_pair_psnr_db",
                "PSNR between teacher's and student's 8-bit image of the same noise, in paired runs.",
                (1..=20).map(|i| f64::from(i) * 2.5).chain([60.0, 100.0]).collect(),
            )?,
            pair_ssim: pair_histogram(
                &registry,
                "understudy_pair_ssim",
                "SSIM between teacher's and student's 8-bit image of the same noise, in paired runs.",
                (0..=20).map(|i| f64::from(i) / 20.0).collect(),
            )?,
            panics: counter(
                &registry,
                "understudy_panics_total",
                "Panics that were caught, by what panicked; a device answers nothing any more after its thread did.",
                &["thread"],
            )?,
            model_info: gauge(
                &registry,
                "understudy_model_info",
                "1 for every loaded model; what it is stands in the labels.",
                &["model", "role", "teacher", "dtype", "parameters"],
            )?,
            build_info: gauge(
                &registry,
                "understudy_build_info",
                "1; the server's version stands in the label.",
                &["version"],
            )?,
            registry,
        };
        #[cfg(target_os = "linux")]
        metrics
            .registry
            .register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
        for thread in ["request", "evaluation", "device"] {
            metrics.panics.with_label_values(&[thread]);
        }
        metrics.build_info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        Ok(Arc::new(metrics))
    }

    /// Adds series that are read off their source at every scrape.
    ///
    /// # Errors
    /// When one of them has a name that is there already.
    pub fn add(&self, series: Box<dyn Collector>) -> prometheus::Result<()> {
        self.registry.register(series)
    }

    /// The Prometheus text format.
    ///
    /// # Errors
    /// When a metric cannot be written as text, which is a mistake in its name or labels.
    pub fn encode(&self) -> prometheus::Result<String> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }

    /// Images finished since the server started, of all models.
    pub fn images_finished(&self) -> u64 {
        series(&self.images).map(|metric| metric.get_counter().get_value() as u64).sum()
    }

    /// Network evaluations since the server started, of all models, and the samples that took part in them.
    pub fn evaluations(&self) -> (u64, f64) {
        series(&self.batch_samples).fold((0, 0.0), |(evaluations, samples), metric| {
            let histogram = metric.get_histogram();
            (evaluations + histogram.get_sample_count(), samples + histogram.get_sample_sum())
        })
    }

    /// Samples of all models whose first evaluation has not begun.
    pub fn waiting(&self) -> i64 {
        series(&self.samples_waiting).map(|metric| metric.get_gauge().get_value() as i64).sum()
    }
}

/// A metric's series, as they are now.
fn series(metric: &impl Collector) -> impl Iterator<Item = Metric> {
    metric.collect().into_iter().flat_map(|mut family| family.take_metric())
}

/// Bucket bounds of the times that requests take, in seconds.
pub(crate) fn request_buckets() -> Vec<f64> {
    buckets(5e-3, 300.0)
}

/// Bucket bounds from `first` in factors of √2, the last of them `last` exactly.
fn buckets(first: f64, last: f64) -> Vec<f64> {
    let mut bounds: Vec<f64> = (0..)
        .map(|i| first * f64::powf(2.0, f64::from(i) / 2.0))
        .take_while(|bound| *bound < last)
        .collect();
    bounds.push(last);
    bounds
}

fn counter(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> prometheus::Result<IntCounterVec> {
    let metric = IntCounterVec::new(Opts::new(name, help), labels)?;
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

fn gauge(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> prometheus::Result<IntGaugeVec> {
    let metric = IntGaugeVec::new(Opts::new(name, help), labels)?;
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

/// A gauge without labels.
fn plain_gauge(registry: &Registry, name: &str, help: &str) -> prometheus::Result<Gauge> {
    let metric = Gauge::new(name, help)?;
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

fn histogram(
    registry: &Registry,
    name: &str,
    help: &str,
    buckets: Vec<f64>,
) -> prometheus::Result<HistogramVec> {
    labelled_histogram(registry, name, help, buckets, &["model"])
}

fn pair_histogram(
    registry: &Registry,
    name: &str,
    help: &str,
    buckets: Vec<f64>,
) -> prometheus::Result<HistogramVec> {
    labelled_histogram(registry, name, help, buckets, &["teacher", "student"])
}

fn labelled_histogram(
    registry: &Registry,
    name: &str,
    help: &str,
    buckets: Vec<f64>,
    labels: &[&str],
) -> prometheus::Result<HistogramVec> {
    let metric = HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets), labels)?;
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn buckets_grow_by_the_square_root_of_two_up_to_the_limit() {
        let bounds = buckets(1e-4, 10.0);
        assert_eq!(bounds.first(), Some(&1e-4));
        assert_eq!(bounds.last(), Some(&10.0));
        for pair in bounds.windows(2).take(bounds.len() - 2) {
            assert!((pair[1] / pair[0] - std::f64::consts::SQRT_2).abs() < 1e-12);
        }
    }

    #[test]
    fn batch_buckets_end_at_256() {
        let metrics = Metrics::new().unwrap();
        metrics.batch_samples.with_label_values(&["m"]).observe(300.0);
        let text = metrics.encode().unwrap();
        assert!(text.contains("understudy_batch_samples_bucket{model=\"m\",le=\"256\"} 0"));
    }

    #[test]
    fn two_instances_do_not_share_anything() {
        let (one, two) = (Metrics::new().unwrap(), Metrics::new().unwrap());
        one.images.with_label_values(&["m"]).inc();
        assert!(one.encode().unwrap().contains("understudy_images_total"));
        assert!(!two.encode().unwrap().contains("understudy_images_total"));
    }
}
