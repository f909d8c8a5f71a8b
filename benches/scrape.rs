//! What a scrape of `/metrics` costs when twenty models have served in every way.
//!
//! `cargo bench --bench scrape`

use understudy::metrics::Metrics;

fn main() {
    divan::main();
}

/// Every series of so many models, half of which are students of one of the others.
fn populated(models: usize) -> std::sync::Arc<Metrics> {
    let metrics = Metrics::new().expect("no two metrics of one name");
    let m = metrics.as_ref();
    let ids: Vec<String> = (0..models).map(|i| format!("fashion-mnist-model-{i}")).collect();
    for (i, id) in ids.iter().map(String::as_str).enumerate() {
        let label = &[id];
        for histogram in [
            &m.request_duration,
            &m.queue_duration,
            &m.device_duration,
            &m.evaluation_duration,
            &m.batch_samples,
            &m.prediction_ratio,
        ] {
            (0..100).for_each(|n| histogram.with_label_values(label).observe(f64::from(n) * 0.013));
        }
        m.images.with_label_values(label).inc_by(100);
        m.samples_waiting.with_label_values(label).set(3);
        m.samples_running.with_label_values(label).set(4);
        for reason in ["queue_full", "deadline_unreachable", "draining", "unknown_model"] {
            m.rejected.with_label_values(&[id, reason]).inc();
        }
        for reason in ["disconnect", "deadline", "non_finite", "evaluation"] {
            m.cancelled.with_label_values(&[id, reason]).inc();
        }
        for outcome in ["compared", "busy", "late", "failed"] {
            m.shadows.with_label_values(&[id, outcome]).inc();
        }
        m.model_info.with_label_values(&[id, "student", "the-teacher", "f32", "1800000"]).set(1);
        if i >= models / 2 {
            let pair = &[ids[i - models / 2].as_str(), id];
            for histogram in [&m.pair_speedup_ratio, &m.pair_psnr_db, &m.pair_ssim] {
                (0..100).for_each(|n| histogram.with_label_values(pair).observe(f64::from(n)));
            }
        }
    }
    let routes = ["/v1/images/generations", "/v1/compare", "/v1/models", "/v2/models/{m}/infer"];
    for route in routes {
        for code in ["200", "400", "404", "429", "499", "504"] {
            m.http_requests.with_label_values(&[route, "POST", code]).inc();
        }
    }
    metrics
}

/// All of the text, under 5 ms.
#[divan::bench]
fn scrape_of_twenty_models(bencher: divan::Bencher) {
    let metrics = populated(20);
    let series = metrics.encode().expect("text").lines().filter(|l| !l.starts_with('#')).count();
    assert!(series > 4_000, "{series} series");
    bencher.bench_local(|| metrics.encode().map(|text| text.len()));
}
