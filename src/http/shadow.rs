//! Shadow traffic: a share of the students' requests, repeated by their teachers on the same noise while
//! the device would otherwise idle, so that what the student costs shows on live traffic.

use std::time::Duration;

use super::{App, comparison::compared, run::Run, single::Served};

/// A repetition that clients' requests have held up for so long is given up.
const PATIENCE: Duration = Duration::from_secs(60);

/// Repeats a finished request with its teacher if it was drawn, nobody waits for the device and no other
/// repetition is under way. What is found goes into the metrics of pairs, and to the experiment that the request was for.
pub(super) fn repeat(app: &App, Served { finished: mut student, beside }: Served) {
    let Some(repetition) = beside.shadow else { return };
    student.span.end();
    let id = student.model().to_owned();
    let metrics = app.metrics.clone();
    let count = move |outcome| metrics.shadows.with_label_values(&[id.as_str(), outcome]).inc();
    let turn = app.shadow_turn.clone().try_acquire_owned().ok().filter(|_| app.engine.is_idle());
    let Some(turn) = turn else { return count("busy") };
    let app = app.clone();
    tokio::spawn(async move {
        let _turn = turn;
        let Some(plan) = repetition.plan(&app).await else { return };
        let Ok(run) = Run::in_background(&app, plan) else { return count("busy") };
        count(match tokio::time::timeout(PATIENCE, run.finish()).await {
            Err(_) => "late",
            Ok(Err(_)) => "failed",
            Ok(Ok(teacher)) => match compared(&app.metrics, [teacher, student]).await {
                Ok((_, comparison)) => {
                    if let Some((experiment, arm)) = beside.arm
                        && comparison.shared_noise
                    {
                        let alike = comparison.psnr_db.into_iter().zip(comparison.ssim);
                        let alike = alike.filter_map(|(psnr_db, ssim)| Some((psnr_db?, ssim)));
                        app.experiments.compared(&experiment, arm, alike);
                    }
                    "compared"
                }
                Err(_) => "failed",
            },
        });
    });
}
