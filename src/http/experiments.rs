//! `/v1/experiments`: traffic split between models, and how it goes.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, Request, State, rejection::PathRejection},
    http::StatusCode,
};

use super::{
    App,
    body::{self, JsonRequest},
    error::{Problem, quoted},
    generate,
    models::reason,
    rollout,
    wire::{
        ArmReply, ArmRequest, ArmsCompared, ChangeExperiment, CreateExperiment, ErrorReply,
        ExperimentList, ExperimentReply, GenerationRequest, LatencyReply, VotesReply,
    },
};
use crate::{
    experiments::{Arm, Experiment, Plan, Traffic, tally::Tally},
    registry::{Model, State as ModelState},
};

/// The path's experiment; one that is not UTF-8 names none.
pub(super) type Id = Result<Path<String>, PathRejection>;

pub(super) fn id_of(id: Id) -> String {
    id.map_or_else(|_| String::from("\u{fffd}"), |Path(id)| id)
}

/// Begins an experiment between models.
#[utoipa::path(post, path = "/v1/experiments", tag = "experiments",
    operation_id = "create_experiment",
    request_body(content = CreateExperiment, example = json!(
        {"id": "first", "arms": [{"weight": 1}, {"weight": 1}]}
    )),
    responses(
        (status = 201, description = "It splits traffic from now on", body = ExperimentReply),
        (status = 404, description = "No such model", body = ErrorReply),
        (status = 409, description = "The id is taken, or there are too many experiments", body = ErrorReply),
        (status = 503, description = "A model is not ready, or nothing can be kept", body = ErrorReply),
))]
pub(super) async fn create(
    State(app): State<App>,
    request: Request,
) -> Result<(StatusCode, Json<ExperimentReply>), Problem> {
    let wire: CreateExperiment = body::json(&app, request).await?;
    let _in_flight = app.in_flight.token();
    let mut arms = Vec::with_capacity(wire.arms.len());
    let mut models = Vec::with_capacity(wire.arms.len());
    for (at, ArmRequest { model, num_inference_steps, weight }) in wire.arms.into_iter().enumerate()
    {
        let model = match model {
            Some(id) => app.model(Some(&id)).map_err(|problem| named(problem, at))?,
            None => app.default_arm(at)?,
        };
        generate::makes_images(&model).map_err(|problem| named(problem, at))?;
        let steps = steps(num_inference_steps, at)?;
        let most = model.schedule.train_timesteps();
        if let Some(steps) = steps.filter(|steps| *steps > most) {
            let remedy = format!("{} takes 1 to {most}", quoted(&model.id));
            return Err(Problem::value(&steps_field(at), steps, remedy));
        }
        let weight = match (&wire.ramp, weight) {
            (None, weight) => given(weight, at)?,
            // Its first stage sets it.
            (Some(_), None) => 0.0,
            (Some(_), Some(weight)) => {
                let message = format!(
                    "`arms[{at}].weight` is {weight}, and a `ramp` sets the weights; leave one of them out"
                );
                return Err(Problem::conflict(&format!("arms[{at}].weight"), message));
            }
        };
        arms.push(Arm { model: model.id.clone(), steps, weight });
        models.push(model);
    }
    let guardrails = wire.guardrails.map(rollout::guardrails).transpose()?;
    if let Some(guardrails) = &guardrails {
        rollout::can_be_watched(&app, guardrails, &models)?;
    }
    let ramp = wire.ramp.map(rollout::ramp).transpose()?;
    let plan = Plan { guardrails, ramp };
    let experiment = app.experiments.create(wire.id, arms, plan).await?;
    Ok((StatusCode::CREATED, Json(reply(&experiment))))
}

/// The experiments and how they go.
#[utoipa::path(get, path = "/v1/experiments", tag = "experiments",
    operation_id = "list_experiments",
    responses(
        (status = 200, description = "All experiments", body = ExperimentList),
        (status = 503, description = "Nothing can be kept", body = ErrorReply),
))]
pub(super) async fn list(State(app): State<App>) -> Result<Json<ExperimentList>, Problem> {
    let data = app.experiments.list()?.iter().map(|experiment| reply(experiment)).collect();
    Ok(Json(ExperimentList { object: "list", data }))
}

/// An experiment and how it goes.
#[utoipa::path(get, path = "/v1/experiments/{id}", tag = "experiments",
    operation_id = "show_experiment",
    params(("id" = String, Path, description = "The experiment's id", example = "first")),
    responses(
        (status = 200, description = "The experiment", body = ExperimentReply),
        (status = 404, description = "No such experiment", body = ErrorReply),
        (status = 503, description = "Nothing can be kept", body = ErrorReply),
))]
pub(super) async fn show(State(app): State<App>, id: Id) -> Result<Json<ExperimentReply>, Problem> {
    let experiment = app.experiments.find(&id_of(id)).await?;
    Ok(Json(reply(&experiment)))
}

/// Changes weights while it runs.
///
/// A ramp is over then, and an arm that a guardrail stopped is watched anew once it has a weight.
#[utoipa::path(patch, path = "/v1/experiments/{id}", tag = "experiments",
    operation_id = "change_experiment",
    params(("id" = String, Path, description = "The experiment's id", example = "first")),
    request_body(content = ChangeExperiment, example = json!({"arms": [{"weight": 9}, {"weight": 1}]})),
    responses(
        (status = 200, description = "The experiment", body = ExperimentReply),
        (status = 404, description = "No such experiment", body = ErrorReply),
        (status = 503, description = "Nothing can be kept", body = ErrorReply),
))]
pub(super) async fn change(
    State(app): State<App>,
    id: Id,
    request: Request,
) -> Result<Json<ExperimentReply>, Problem> {
    let wire: ChangeExperiment = body::json(&app, request).await?;
    let _in_flight = app.in_flight.token();
    let id = id_of(id);
    let experiment = app.experiments.find(&id).await?;
    let change = |(at, ArmRequest { model, num_inference_steps, weight }): (usize, ArmRequest)| {
        let named = steps(num_inference_steps, at)?;
        let in_place = || {
            let arm = experiment.arms.get(at)?;
            Some((arm.model.clone(), named.or(arm.steps)))
        };
        let arm = model.map(|model| (model, named)).or_else(in_place);
        let (model, steps) = arm.ok_or_else(|| {
            let remedy = format!(
                "the experiment has {} arms; name the one that is meant",
                experiment.arms.len()
            );
            Problem::value(&format!("arms[{at}].model"), "absent", remedy)
        })?;
        Ok(Arm { model, steps, weight: given(weight, at)? })
    };
    let changes = wire.arms.into_iter().enumerate().map(change).collect::<Result<_, Problem>>()?;
    let experiment = app.experiments.reweight(id, changes).await?;
    Ok(Json(reply(&experiment)))
}

/// Ends an experiment; its votes are forgotten.
#[utoipa::path(delete, path = "/v1/experiments/{id}", tag = "experiments",
    security((), ("admin_key" = [])),
    operation_id = "delete_experiment",
    params(("id" = String, Path, description = "The experiment's id", example = "first")),
    responses(
        (status = 204, description = "It is gone"),
        (status = 404, description = "No such experiment", body = ErrorReply),
        (status = 503, description = "Nothing can be kept", body = ErrorReply),
))]
pub(super) async fn delete(State(app): State<App>, id: Id) -> Result<StatusCode, Problem> {
    let _in_flight = app.in_flight.token();
    app.experiments.delete(id_of(id)).await?;
    Ok(StatusCode::NO_CONTENT)
}

impl App {
    /// The model of a new experiment's arm that names none.
    fn default_arm(&self, at: usize) -> Result<Arc<Model>, Problem> {
        let field = format!("arms[{at}].model");
        match at {
            0 => self.model(None),
            1 => Ok(Arc::clone(&self.pair(&field, "absent")?[1])),
            _ => {
                let remedy = "only the first two arms have a model without naming it; name a model, GET /v1/models lists them";
                Err(Problem::value(&field, "absent", remedy))
            }
        }
    }

    /// The model of an arm, which may have been unloaded since the experiment began.
    pub(super) fn arm(&self, experiment: &Experiment, arm: usize) -> Result<Arc<Model>, Problem> {
        if self.draining.is_cancelled() {
            return Err(Problem::draining());
        }
        let id = &experiment.arms[arm].model;
        let why = match self.registry.get(id) {
            Some(ModelState::Ready(model)) => return Ok(model),
            Some(state) => reason(id, &state),
            None => "it is not in the models folder any more".into(),
        };
        Err(Problem::not_ready(format!(
            "the experiment {} sent this request to its arm {}, which is not ready: {why}; or give that arm the weight 0 with PATCH /v1/experiments/{}",
            quoted(&experiment.id),
            quoted(id),
            experiment.id
        )))
    }
}

/// A request as an arm serves it: in the arm's steps, where it says them. Where any arm does, a request that names
/// steps, too, is refused, whichever arm it falls to.
pub(super) fn in_steps(
    wire: &GenerationRequest,
    experiment: &Experiment,
    arm: usize,
) -> Result<GenerationRequest, Problem> {
    let named = experiment.arms.iter().any(|arm| arm.steps.is_some());
    if let (true, Some(steps)) = (named, wire.num_inference_steps) {
        let message = format!(
            "`num_inference_steps` is {steps}, and arms of the experiment {} say their own; leave it out",
            quoted(&experiment.id)
        );
        return Err(Problem::conflict("num_inference_steps", message));
    }
    let steps = experiment.arms[arm].steps.map(|steps| steps as i64);
    let num_inference_steps = steps.or(wire.num_inference_steps);
    Ok(GenerationRequest { num_inference_steps, ..wire.clone() })
}

/// An arm's steps, where a request names them.
fn steps(named: Option<i64>, arm: usize) -> Result<Option<usize>, Problem> {
    let number = |steps: i64| match usize::try_from(steps) {
        Ok(steps) if steps > 0 => Ok(steps),
        _ => Err(Problem::value(&steps_field(arm), steps, "an arm takes 1 step or more")),
    };
    named.map(number).transpose()
}

/// The weight of an arm that has to have one.
fn given(weight: Option<f64>, arm: usize) -> Result<f64, Problem> {
    weight.ok_or_else(|| {
        let field = format!("arms[{arm}].weight");
        let message =
            format!("`{field}` is missing: it takes {}", CreateExperiment::takes("weight"));
        Problem::new(StatusCode::BAD_REQUEST, "missing_field", message).at(&field)
    })
}

fn steps_field(arm: usize) -> String {
    format!("arms[{arm}].num_inference_steps")
}

/// A problem with a model that an arm names.
fn named(mut problem: Problem, arm: usize) -> Problem {
    let field = format!("arms[{arm}].model");
    problem.message = problem.message.replacen("`model`", &format!("`{field}`"), 1);
    problem.at(&field)
}

fn reply(experiment: &Experiment) -> ExperimentReply {
    let arm = |(at, arm): (usize, &Arm)| {
        let traffic = experiment.traffic(at);
        ArmReply {
            model: arm.model.clone(),
            num_inference_steps: arm.steps,
            weight: arm.weight,
            share: experiment.share(at),
            requests: traffic.requests(),
            images: traffic.images,
            latency_ms: latency(&traffic),
            votes: votes(experiment.votes.of(at)),
            watched: rollout::watched(experiment, at),
            stopped: rollout::stopped(experiment, at),
        }
    };
    let compared = |(arms, tally): ([usize; 2], &Tally)| ArmsCompared {
        models: arms.iter().map(|arm| experiment.arms[*arm].name()).collect(),
        votes: votes(tally),
    };
    ExperimentReply {
        id: experiment.id.clone(),
        created: experiment.created,
        arms: experiment.arms.iter().enumerate().map(arm).collect(),
        comparisons: experiment.votes.pairs().map(compared).collect(),
        guardrails: rollout::guardrails_of(experiment),
        ramp: rollout::ramp_of(experiment),
    }
}

fn latency(traffic: &Traffic) -> Option<LatencyReply> {
    let milliseconds = |seconds: f64| (seconds * 1e6).round() / 1e3;
    Some(LatencyReply {
        mean: milliseconds(traffic.mean()?),
        p50: milliseconds(traffic.quantile(0.5)?),
        p95: milliseconds(traffic.quantile(0.95)?),
    })
}

fn votes(tally: &Tally) -> VotesReply {
    VotesReply {
        wins: tally.wins,
        losses: tally.losses,
        ties: tally.ties,
        win_rate: tally.win_rate(),
        wilson_interval: tally.interval(),
        p_value: tally.p_value(),
    }
}
