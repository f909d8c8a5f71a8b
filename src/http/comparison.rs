//! What the two finished images of a pair come to.

use std::sync::Arc;

use super::{
    error::Problem,
    run::Finished,
    wire::{Comparison, Speedup},
};
use crate::{metrics::Metrics, similarity::Similarity};

/// Compares a finished pair, away from the threads that serve requests, and counts what is found.
pub(super) async fn compared(
    metrics: &Arc<Metrics>,
    [teacher, student]: [Finished; 2],
) -> Result<([Finished; 2], Comparison), Problem> {
    let metrics = Arc::clone(metrics);
    let compare = move || {
        let comparison = comparison(&teacher, &student);
        observe(&metrics, &teacher, &student, &comparison);
        ([teacher, student], comparison)
    };
    tokio::task::spawn_blocking(compare).await.map_err(Problem::internal)
}

fn comparison(teacher: &Finished, student: &Finished) -> Comparison {
    let (teachers, students) = (teacher.timings, student.timings);
    let ratio = |teacher: f64, student: f64| (student > 0.0).then(|| teacher / student);
    let pairs = teacher.images.iter().zip(&student.images);
    let alike: Vec<_> = pairs.map(|(teacher, student)| Similarity::of(teacher, student)).collect();
    Comparison {
        speedup: Speedup {
            device: ratio(teachers.device_ms, students.device_ms),
            end_to_end: ratio(teachers.total_ms, students.total_ms),
        },
        psnr_db: alike.iter().map(|alike| alike.map(|alike| alike.psnr_db)).collect(),
        ssim: alike.iter().map(|alike| alike.and_then(|alike| alike.ssim)).collect(),
        shared_noise: teacher.plan.request.shares_noise_with(&student.plan.request),
    }
}

/// Pairs that started from different noise are not alike whatever the student learned, so only their
/// speed counts.
fn observe(metrics: &Metrics, teacher: &Finished, student: &Finished, comparison: &Comparison) {
    let labels = [teacher.model(), student.model()];
    if let Some(ratio) = comparison.speedup.device {
        metrics.pair_speedup_ratio.with_label_values(&labels).observe(ratio);
    }
    if comparison.shared_noise {
        let psnr = metrics.pair_psnr_db.with_label_values(&labels);
        comparison.psnr_db.iter().flatten().for_each(|psnr_db| psnr.observe(*psnr_db));
        let ssim = metrics.pair_ssim.with_label_values(&labels);
        comparison.ssim.iter().flatten().for_each(|value| ssim.observe(*value));
    }
}
