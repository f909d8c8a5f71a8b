//! `/v1/experiments/{id}/pairs` and `…/votes`: two images without names, and which of them is preferred.

use axum::{
    Extension, Json,
    extract::{Request, State},
    http::StatusCode,
};
use futures_util::future::try_join;

use super::{
    App,
    accept::Wanted,
    body,
    caller::Caller,
    error::{Problem, quoted},
    experiments::{Id, id_of, in_steps},
    generate::ParsedRequest,
    observe::Received,
    pair::Pair as Running,
    run::Delivery,
    wire::{
        BlindImage, ChoiceRequest, ErrorReply, GenerationRequest, PairReply, PairRequest,
        VoteReply, VoteRequest,
    },
};
use crate::experiments::{Choice, Pair, Vote};

/// Makes a blind pair: two of the experiment's arms, each two as often as any others, draw from one seed.
///
/// Nothing in the reply tells which is which; a vote does. Nobody can vote on a pair after 24 hours, or
/// when 10,000 younger ones wait for their votes.
#[utoipa::path(post, path = "/v1/experiments/{id}/pairs", tag = "experiments",
    operation_id = "make_pair",
    params(("id" = String, Path, description = "The experiment's id", example = "first")),
    request_body(content = PairRequest, example = json!({"seed": 7, "num_inference_steps": 10})),
    responses(
        (status = 200, description = "Two images in random order", body = PairReply),
        (status = 404, description = "No such experiment", body = ErrorReply),
        (status = 409, description = "The two arms do not begin with the same noise", body = ErrorReply),
        (status = 429, description = "The queue is full, or too long for the deadline", body = ErrorReply),
        (status = 503, description = "An arm is not ready, or the server is shutting down", body = ErrorReply),
))]
pub(super) async fn pair(
    Caller(app): Caller,
    Extension(Received(received)): Extension<Received>,
    id: Id,
    request: Request,
) -> Result<Json<PairReply>, Problem> {
    let wire: PairRequest = body::json(&app, request).await?;
    let _in_flight = app.in_flight.token();
    let drawing = GenerationRequest::from(&wire);
    let PairRequest { num_inference_steps, scheduler, .. } = wire;
    let wire = GenerationRequest { num_inference_steps, scheduler, ..drawing };
    let experiment = app.experiments.find(&id_of(id)).await?;
    let drawn = getrandom::u64().map_err(Problem::internal)?;
    // One bit for the order, the others for the arms.
    let (swapped, [one, other]) = (drawn & 1 == 1, experiment.two_arms(drawn >> 1));
    let models = [app.arm(&experiment, one)?, app.arm(&experiment, other)?];
    let wires = [in_steps(&wire, &experiment, one)?, in_steps(&wire, &experiment, other)?];
    let plans = ParsedRequest::pair(&app.settings, models, wires, Wanted::Json, received).await?;
    if !plans[0].request.shares_noise_with(&plans[1].request) {
        let [one, other] = [&plans[0], &plans[1]].map(|plan| quoted(&plan.request.model.id));
        let message = format!(
            "{one} and {other} make images of different shapes, which tell them apart and begin with different noise; put them into different experiments"
        );
        return Err(Problem::new(StatusCode::CONFLICT, "different_shapes", message));
    }
    let running = Running::new(&app, plans, received)?;
    running.teacher.span.for_experiment(&experiment, one);
    running.student.span.for_experiment(&experiment, other);
    let mut sides = running.finish().await?;
    sides.iter().for_each(|side| side.observe(&app, Delivery::Whole));
    let mut names = [one, other].map(|arm| experiment.arms[arm].name());
    if swapped {
        sides.swap(0, 1);
        names.swap(0, 1);
    }
    let [first, second] = sides;
    let (firsts, seconds) = try_join(first.blind_data(), second.blind_data()).await?;
    let (Some(left), Some(right)) = (firsts.into_iter().next(), seconds.into_iter().next()) else {
        return Err(Problem::internal("no image"));
    };
    let pair = Pair { models: names, seed: left.seed };
    let pair_id = app.experiments.open_pair(experiment.id.clone(), pair).await?;
    Ok(Json(PairReply {
        pair_id,
        // A class that only one of them has would tell which it is.
        class_label: left.class_label.filter(|label| Some(*label) == right.class_label),
        class_name: left.class_name.filter(|name| Some(name) == right.class_name.as_ref()),
        images: [left.b64_json, right.b64_json].map(|b64_json| BlindImage { b64_json }),
    }))
}

/// Counts a vote, and tells what it was on.
///
/// A vote that is answered is on the disk. Sent again unchanged it counts once.
#[utoipa::path(post, path = "/v1/experiments/{id}/votes", tag = "experiments",
    operation_id = "vote",
    params(("id" = String, Path, description = "The experiment's id", example = "first")),
    request_body(content = VoteRequest, example = json!(
        {"pair_id": "the one of a pair that was made", "choice": 0, "idempotency_key": "my-first-vote"}
    )),
    responses(
        (status = 200, description = "It was counted before", body = VoteReply),
        (status = 201, description = "It is counted", body = VoteReply),
        (status = 404, description = "No such experiment, or no such pair waits for a vote", body = ErrorReply),
        (status = 409, description = "The key is another vote's, or the pair has its vote", body = ErrorReply),
        (status = 503, description = "Nothing can be kept", body = ErrorReply),
))]
pub(super) async fn vote(
    State(app): State<App>,
    id: Id,
    request: Request,
) -> Result<(StatusCode, Json<VoteReply>), Problem> {
    let wire: VoteRequest = body::json(&app, request).await?;
    let _in_flight = app.in_flight.token();
    let choice = wire.choice.read()?;
    let VoteRequest { pair_id, idempotency_key, .. } = wire;
    let (vote, counted) =
        app.experiments.vote(id_of(id), pair_id.clone(), choice, idempotency_key).await?;
    let status = if counted { StatusCode::CREATED } else { StatusCode::OK };
    let winner = vote.winner().map(str::to_owned);
    let Vote { pair: Pair { models, seed }, .. } = vote;
    Ok((status, Json(VoteReply { pair_id, models, winner, seed })))
}

impl ChoiceRequest {
    fn read(&self) -> Result<Choice, Problem> {
        let shown = match self {
            Self::Image(0) => return Ok(Choice::First),
            Self::Image(1) => return Ok(Choice::Second),
            Self::Neither(word) if word == "tie" => return Ok(Choice::Tie),
            Self::Image(number) => number.to_string(),
            Self::Neither(word) => quoted(word),
        };
        Err(Problem::value("choice", shown, "it takes 0, 1 or \"tie\""))
    }
}
