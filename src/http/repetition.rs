//! The request that shadow traffic will make: a student's, to its teacher.

use std::{sync::Arc, time::Instant};

use super::{App, accept::Wanted, generate::ParsedRequest, wire::GenerationRequest};
use crate::{
    engine::SampleSpec,
    registry::{Model, State},
};
use understudy_models::checkpoint::card::Role;

/// A student's request that its teacher is to repeat.
pub(super) struct Repetition {
    teacher: Arc<Model>,
    wire: GenerationRequest,
    /// What the student drew.
    samples: Vec<SampleSpec>,
}

/// The same request to the student's teacher, for the share of requests that are to be repeated.
pub(super) fn of(
    app: &App,
    student: &ParsedRequest,
    wire: &GenerationRequest,
) -> Option<Box<Repetition>> {
    let rate = app.settings.shadow_rate;
    if rate == 0.0 || student.request.model.card.role != Role::Student || !drawn(rate) {
        return None;
    }
    let teacher = teacher(app, &student.request.model)?;
    let samples = student.request.samples.clone();
    let seed = Some(samples.first()?.seed as i64);
    let mut wire = GenerationRequest { seed, deadline_ms: None, ..wire.clone() };
    // Steps for a student of few are none for its teacher, which is held against it in those that it usually takes.
    if !student.request.model.card.evaluations.is_empty() {
        wire.num_inference_steps = None;
        (wire.scheduler, wire.eta) = (None, None);
    }
    Some(Box::new(Repetition { teacher, wire, samples }))
}

impl Repetition {
    /// The request, if the teacher can honour it: one for a class that it does not have is not repeated.
    pub(super) async fn plan(self, app: &App) -> Option<ParsedRequest> {
        let Self { teacher, wire, samples } = self;
        let (settings, wanted) = (&app.settings, Wanted::Json);
        let plan = ParsedRequest::new(settings, teacher, &wire, wanted, Instant::now()).await;
        let mut plan = plan.ok()?;
        for (repeated, sample) in plan.request.samples.iter_mut().zip(&samples) {
            repeated.class_label = repeated.class_label.and(sample.class_label);
        }
        plan.request.partial_images = 0;
        Some(plan)
    }
}

/// The teacher of a student, where it is ready.
pub(super) fn teacher(app: &App, student: &Model) -> Option<Arc<Model>> {
    match app.registry.get(student.card.teacher.as_deref()?)? {
        State::Ready(teacher) => Some(teacher),
        _ => None,
    }
}

/// True for a share `rate` of calls.
fn drawn(rate: f64) -> bool {
    getrandom::u64().is_ok_and(|number| (number as f64) < rate * u64::MAX as f64)
}
