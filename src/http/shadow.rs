//! Shadow traffic: a share of the students' requests, repeated by their teachers on the same noise while
//! the device would otherwise idle, so that what the student costs shows on live traffic.

use std::time::{Duration, Instant};

use super::{
    App,
    accept::Wanted,
    compare::compared,
    generate::ParsedRequest,
    run::{Finished, Run},
    wire::GenerationRequest,
};
use crate::registry::{Model, State};
use understudy_models::checkpoint::card::Role;

/// A repetition that clients' requests have held up for so long is given up.
const PATIENCE: Duration = Duration::from_secs(60);

/// The same request to the student's teacher, for the share of requests that are to be repeated.
pub(super) fn plan(
    app: &App,
    student: &ParsedRequest,
    wire: &GenerationRequest,
) -> Option<Box<ParsedRequest>> {
    let rate = app.settings.shadow_rate;
    if rate == 0.0 || student.request.model.card.role != Role::Student || !drawn(rate) {
        return None;
    }
    let teacher = teacher(app, &student.request.model)?;
    let seed = Some(student.request.samples.first()?.seed as i64);
    let wire = GenerationRequest { seed, deadline_ms: None, ..wire.clone() };
    // A request that the teacher cannot honour, as for a class it does not have, is not repeated.
    let mut plan =
        ParsedRequest::new(&app.settings, teacher, &wire, Wanted::Json, Instant::now()).ok()?;
    for (repeated, sample) in plan.request.samples.iter_mut().zip(&student.request.samples) {
        repeated.class_label = repeated.class_label.and(sample.class_label);
    }
    plan.request.partial_images = 0;
    Some(Box::new(plan))
}

/// Repeats a finished request with its teacher if it was drawn, nobody waits for the device and no other
/// repetition is under way. What is found goes into the metrics of pairs.
pub(super) fn repeat(app: &App, mut student: Finished) {
    let Some(plan) = student.shadow.take() else { return };
    let id = student.model().to_owned();
    let metrics = app.metrics.clone();
    let count = move |outcome| metrics.shadows.with_label_values(&[id.as_str(), outcome]).inc();
    let turn = app.shadow_turn.clone().try_acquire_owned().ok().filter(|_| app.engine.is_idle());
    let Some(turn) = turn else { return count("busy") };
    let Ok(run) = Run::in_background(app, *plan) else { return count("busy") };
    let metrics = app.metrics.clone();
    tokio::spawn(async move {
        let _turn = turn;
        count(match tokio::time::timeout(PATIENCE, run.finish()).await {
            Err(_) => "late",
            Ok(Err(_)) => "failed",
            Ok(Ok(mut sides)) => {
                sides.push(student);
                if compared(&metrics, sides).await.is_ok() { "compared" } else { "failed" }
            }
        });
    });
}

fn teacher(app: &App, student: &Model) -> Option<std::sync::Arc<Model>> {
    match app.registry.get(student.card.teacher.as_deref()?)? {
        State::Ready(teacher) => Some(teacher),
        _ => None,
    }
}

/// True for a share `rate` of calls.
fn drawn(rate: f64) -> bool {
    getrandom::u64().is_ok_and(|number| (number as f64) < rate * u64::MAX as f64)
}
