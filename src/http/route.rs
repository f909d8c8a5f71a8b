//! Which model, or models, serve a request for images.

use std::time::{Duration, Instant};

use axum::http::HeaderMap;

use super::{
    App,
    accept::Wanted,
    error::Problem,
    experiments::in_steps,
    generate::ParsedRequest,
    pair::Pair,
    run::Run,
    single::Single,
    wire::{GenerationRequest, Routing, RoutingReason},
};
use crate::{experiments, metrics::UNKNOWN_MODEL, registry::Model};

/// The `model` that gives the student's image first and the teacher's then.
const DRAFT: &str = "draft";
/// The `model` that is the teacher if it meets the deadline, else the student.
const AUTO: &str = "auto";
/// What stands before an experiment's id in a `model`.
const EXPERIMENT: &str = "experiment:";
/// Whose request it is; wins over the field `user`.
const KEY: &str = "x-understudy-key";

/// A request for images that has been admitted.
pub(super) enum Admitted {
    /// To one model.
    Single(Single),
    /// To a student for a draft, and to its teacher.
    Draft(Pair),
}

/// Admits a request by what its `model` says.
pub(super) async fn admit(
    app: &App,
    wire: &GenerationRequest,
    wanted: Wanted,
    key: Option<Vec<u8>>,
    received: Instant,
) -> Result<Admitted, Problem> {
    Ok(Admitted::Single(match wire.model.as_deref() {
        Some(model) if model.starts_with(EXPERIMENT) => {
            let id = &model[EXPERIMENT.len()..];
            let found = app.experiments.find(id).await.inspect_err(|error| {
                if let experiments::Error::Unknown(_) = error {
                    let rejected = &app.metrics.rejected;
                    rejected.with_label_values(&[UNKNOWN_MODEL, "unknown_experiment"]).inc();
                }
            });
            let experiment = found.map_err(|error| Problem::from(error).at("model"))?;
            let arm = experiment.arm_of(&sticky(key, wire)?);
            let wire = &in_steps(wire, &experiment, arm)?;
            let model = app.arm(&experiment, arm)?;
            let plan = ParsedRequest::new(&app.settings, model, wire, wanted, received).await?;
            // Its teacher repeats it in the arm's steps.
            let mut single = Single::new(app, Run::new(app, plan, received)?, wire);
            single.run.span.for_experiment(&experiment, arm);
            single.beside.arm = Some((experiment, arm));
            single
        }
        Some(DRAFT) => {
            if let Wanted::Image(_) = wanted {
                let message = "`model` is \"draft\" with an image type in Accept: a draft and its final are two images; accept application/json or text/event-stream, or name a model";
                return Err(Problem::conflict("model", message));
            }
            let models = app.pair("model", "\"draft\"")?;
            let wires = [wire.clone(), wire.clone()];
            let plans = ParsedRequest::pair(&app.settings, models, wires, wanted, received).await?;
            return Ok(Admitted::Draft(Pair::new(app, plans, received)?));
        }
        Some(AUTO) => {
            let teacher = app.model(None)?;
            let student = app.registry.default_pair().1.filter(|student| takes(student, wire));
            let plans = match student {
                Some(student) => {
                    let wires = [wire.clone(), wire.clone()];
                    let models = [teacher, student];
                    Vec::from(
                        ParsedRequest::alike(&app.settings, models, wires, wanted, received)
                            .await?,
                    )
                }
                None => {
                    vec![ParsedRequest::new(&app.settings, teacher, wire, wanted, received).await?]
                }
            };
            let candidates = candidates(plans, wire)?;
            let plans = candidates.iter().map(|candidate| candidate.plan.clone()).collect();
            let (run, served, predicted) = Run::first(app, plans, received)?;
            let mut single = Single::new(app, run, wire);
            single.beside.routing = Some(routing(&candidates, served, &predicted));
            single
        }
        id => {
            let plan =
                ParsedRequest::new(&app.settings, app.model(id)?, wire, wanted, received).await?;
            Single::new(app, Run::new(app, plan, received)?, wire)
        }
    }))
}

/// The header's key, where a request has one.
pub(super) fn key(headers: &HeaderMap) -> Option<Vec<u8>> {
    headers.get(KEY).map(|key| key.as_bytes().to_vec()).filter(|key| !key.is_empty())
}

/// What decides the arm: the header's key, else the user, else chance.
fn sticky(key: Option<Vec<u8>>, wire: &GenerationRequest) -> Result<Vec<u8>, Problem> {
    let user = || wire.user.clone().filter(|user| !user.is_empty()).map(String::into_bytes);
    match key.or_else(user) {
        Some(key) => Ok(key),
        None => Ok(getrandom::u64().map_err(Problem::internal)?.to_le_bytes().into()),
    }
}

/// Whether the request's guidance is among what a student has learned; its teacher takes any.
fn takes(student: &Model, wire: &GenerationRequest) -> bool {
    let scale = wire.guidance_scale.unwrap_or_else(|| student.default_guidance());
    let negative = wire.negative_prompt.as_deref().unwrap_or_default();
    student.check_guidance(negative, scale).is_ok()
}

/// Who may serve a request to `auto`.
struct Candidate<P = ParsedRequest> {
    /// 0 for the teacher, 1 for its student.
    model: usize,
    /// Fewer steps than the model's usual ones.
    fewer: Option<usize>,
    plan: P,
}

/// The plans of a teacher and its student, each followed by its like in fewer steps, as its model's card allows; a
/// request that names its steps gets those.
fn candidates(
    plans: Vec<ParsedRequest>,
    wire: &GenerationRequest,
) -> Result<Vec<Candidate>, Problem> {
    let mut candidates = Vec::new();
    for (model, plan) in plans.into_iter().enumerate() {
        let card = &plan.request.model;
        let usual = wire.num_inference_steps.map_or_else(|| card.default_steps(), |_| 0);
        let fewer: Vec<usize> =
            card.card.evaluations.iter().copied().filter(|steps| *steps < usual).collect();
        candidates.push(Candidate { model, fewer: None, plan: plan.clone() });
        for steps in fewer {
            let plan = plan.in_steps(wire, steps)?;
            candidates.push(Candidate { model, fewer: Some(steps), plan });
        }
    }
    Ok(candidates)
}

/// Why the candidate number `served` serves, from what was predicted of the candidates up to it.
fn routing<P>(
    candidates: &[Candidate<P>],
    served: usize,
    predicted: &[Option<Duration>],
) -> Routing {
    // Of several candidates of a model, the one that was asked last.
    let milliseconds = |model: usize| {
        let of_model = candidates.iter().zip(predicted).filter(|(it, _)| it.model == model);
        of_model.last().and_then(|(_, time)| time.map(|time| time.as_micros() as f64 / 1e3))
    };
    let teacher = milliseconds(0);
    let reason = match (candidates[served].model, teacher) {
        (0, None) => RoutingReason::NoDeadline,
        (0, Some(_)) => RoutingReason::TeacherInTime,
        _ => RoutingReason::TeacherTooLate,
    };
    Routing {
        reason,
        teacher_predicted_ms: teacher,
        student_predicted_ms: milliseconds(1),
        num_inference_steps: candidates[served].fewer,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_follows_from_who_serves_and_what_was_predicted() {
        let time = |ms| Some(Duration::from_millis(ms));
        let candidates = [(0, None), (1, None), (1, Some(2)), (1, Some(1))]
            .map(|(model, fewer)| Candidate { model, fewer, plan: () });
        let routing =
            |served, predicted: &[Option<Duration>]| routing(&candidates, served, predicted);
        assert_eq!(routing(0, &[None]).reason, RoutingReason::NoDeadline);
        assert_eq!(routing(0, &[time(3)]).reason, RoutingReason::TeacherInTime);
        let late = routing(1, &[time(30), time(7)]);
        assert_eq!(late.reason, RoutingReason::TeacherTooLate);
        assert_eq!(late.teacher_predicted_ms, Some(30.0));
        assert_eq!((late.student_predicted_ms, late.num_inference_steps), (Some(7.0), None));
        let later = routing(2, &[time(30), time(7), time(4)]);
        assert_eq!(later.reason, RoutingReason::TeacherTooLate);
        assert_eq!((later.student_predicted_ms, later.num_inference_steps), (Some(4.0), Some(2)));
    }
}
