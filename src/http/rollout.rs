//! Guardrails and ramps of experiments, as requests ask for them and replies tell of them.

use std::sync::Arc;

use super::{
    App,
    error::{Problem, quoted},
    repetition,
    wire::{
        GuardrailsReply, GuardrailsRequest, RampPhase, RampReply, RampRequest, StoppedReply,
        WatchedReply,
    },
};
use crate::{
    experiments::{CONTROL, Experiment, Guardrails, Phase, Ramp, Stopped},
    registry::Model,
};

/// The bounds that a request asks for.
pub(super) fn guardrails(wire: GuardrailsRequest) -> Result<Guardrails, Problem> {
    let GuardrailsRequest { min_psnr_db, min_ssim, max_latency_ratio, votes_p_value, .. } = wire;
    Ok(Guardrails {
        min_psnr_db,
        min_ssim,
        min_comparisons: count("guardrails.min_comparisons", wire.min_comparisons)?,
        max_latency_ratio,
        min_requests: count("guardrails.min_requests", wire.min_requests)?,
        votes_p_value,
        min_votes: count("guardrails.min_votes", wire.min_votes)?,
    })
}

/// The ramp that a request asks for.
pub(super) fn ramp(RampRequest { shares, images, votes }: RampRequest) -> Result<Ramp, Problem> {
    Ok(Ramp::new(shares, count("ramp.images", images)?, count("ramp.votes", votes)?))
}

fn count(field: &str, value: Option<i64>) -> Result<Option<u64>, Problem> {
    let natural = |value: i64| {
        u64::try_from(value).map_err(|_| Problem::value(field, value, "a count is 0 or more"))
    };
    value.map(natural).transpose()
}

/// Refuses bounds on images that nothing would ever compare.
pub(super) fn can_be_watched(
    app: &App,
    guardrails: &Guardrails,
    models: &[Arc<Model>],
) -> Result<(), Problem> {
    if !guardrails.compare_images() {
        return Ok(());
    }
    let (field, value) = match (guardrails.min_psnr_db, guardrails.min_ssim) {
        (Some(bound), _) => ("guardrails.min_psnr_db", bound),
        (None, bound) => ("guardrails.min_ssim", bound.unwrap_or_default()),
    };
    if app.settings.shadow_rate == 0.0 {
        let remedy = "images are compared by shadow traffic, which is off; start the server with --shadow-rate 0.1, or leave the bound out";
        return Err(Problem::value(field, value, remedy));
    }
    for (at, model) in models.iter().enumerate().filter(|(at, _)| *at != CONTROL) {
        if repetition::teacher(app, model).is_none() {
            let remedy = format!(
                "images are compared with the teacher's, and {} (arms[{at}]) is no student of a model that is ready; let it be the first arm, load its teacher, or leave the bound out",
                quoted(&model.id)
            );
            return Err(Problem::value(field, value, remedy));
        }
    }
    Ok(())
}

/// The bounds of an experiment, with what is at its default.
pub(super) fn guardrails_of(experiment: &Experiment) -> Option<GuardrailsReply> {
    let guardrails = experiment.rollout.as_ref()?.guardrails.as_ref()?;
    let Guardrails { min_psnr_db, min_ssim, max_latency_ratio, votes_p_value, .. } = *guardrails;
    Some(GuardrailsReply {
        min_psnr_db,
        min_ssim,
        min_comparisons: guardrails.compare_images().then(|| guardrails.comparisons()),
        max_latency_ratio,
        min_requests: max_latency_ratio.map(|_| guardrails.requests()),
        votes_p_value,
        min_votes: votes_p_value.map(|_| guardrails.votes()),
    })
}

/// The ramp of an experiment.
pub(super) fn ramp_of(experiment: &Experiment) -> Option<RampReply> {
    let ramp = experiment.rollout.as_ref()?.ramp.as_ref()?;
    let [stage_images, stage_votes] = experiment.of_stage()?;
    let phase = match ramp.phase {
        Phase::Running => RampPhase::Running,
        Phase::Finished => RampPhase::Finished,
        Phase::Stopped => RampPhase::Stopped,
        Phase::Overridden => RampPhase::Overridden,
    };
    let Ramp { shares, images, votes, stage, .. } = ramp.clone();
    Some(RampReply { shares, images, votes, stage: stage + 1, phase, stage_images, stage_votes })
}

/// What is seen of an arm.
pub(super) fn watched(experiment: &Experiment, arm: usize) -> Option<WatchedReply> {
    experiment.rollout.as_ref()?.guardrails.as_ref().filter(|_| arm != CONTROL)?;
    let evidence = experiment.evidence(arm);
    Some(WatchedReply {
        comparisons: evidence.psnr_db.count,
        psnr_db: evidence.psnr_db.value,
        ssim: evidence.ssim.value,
        requests: evidence.latency_ratio.count,
        latency_ratio: evidence.latency_ratio.value,
        wins: evidence.votes.wins,
        losses: evidence.votes.losses,
        p_value: evidence.votes.p_value(),
    })
}

/// Why an arm was stopped.
pub(super) fn stopped(experiment: &Experiment, arm: usize) -> Option<StoppedReply> {
    let Stopped { reason, at, weight } = *experiment.rollout.as_ref()?.stopped(arm)?;
    Some(StoppedReply {
        guardrail: reason.guardrail.name(),
        reason: reason.to_string(),
        observed: reason.observed,
        bound: reason.bound,
        count: reason.count,
        at,
        weight,
    })
}
