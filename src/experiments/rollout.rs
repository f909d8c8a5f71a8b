//! What is watched of an experiment, and what came of it: guardrails, a ramp, and the arms that were stopped.

use serde::{Deserialize, Serialize};

use super::{
    Error,
    arms::Arm,
    guardrails::{Guardrails, Measured, Reason},
    ramp::{Phase, Ramp},
    tally::{Outcome, Tally},
    traffic::Traffic,
};

/// The arm that the others are held against.
pub const CONTROL: usize = 0;

/// Guardrails and ramp of an experiment, as of the last decision.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rollout {
    /// What stops an arm.
    pub guardrails: Option<Guardrails>,
    /// How the second arm gets more traffic.
    pub ramp: Option<Ramp>,
    /// What every arm had served when the weights last changed: before, traffic was split in another way, and may have
    /// been other traffic.
    since: Vec<Traffic>,
    /// Votes on the second arm when the ramp's stage began.
    votes_since: u64,
    arms: Vec<Watched>,
}

/// An arm, since it is watched.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
struct Watched {
    /// How often it has been watched anew.
    #[serde(default)]
    round: u64,
    /// Votes on it and the control, seen from it.
    votes: Tally,
    stopped: Option<Stopped>,
}

/// An arm that a guardrail stopped.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Stopped {
    /// Why.
    pub reason: Reason,
    /// Unix seconds when it was decided.
    pub at: u64,
    /// The weight that it had.
    pub weight: f64,
}

/// Something that was decided.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Change {
    /// An arm's weight is 0 now.
    Stopped(usize, Reason),
    /// The second arm has that share of the traffic now.
    Advanced(f64),
}

impl Rollout {
    /// Of a new experiment of so many arms; `None` where nothing is to be watched.
    ///
    /// # Errors
    /// [`Error::Value`].
    pub(super) fn new(
        guardrails: Option<Guardrails>,
        ramp: Option<Ramp>,
        arms: usize,
    ) -> Result<Option<Self>, Error> {
        if guardrails.is_none() && ramp.is_none() {
            return Ok(None);
        }
        guardrails.iter().try_for_each(Guardrails::check)?;
        ramp.iter().try_for_each(|ramp| ramp.check(arms))?;
        let (since, watched) = (vec![Traffic::default(); arms], vec![Watched::default(); arms]);
        Ok(Some(Self { guardrails, ramp, since, votes_since: 0, arms: watched }))
    }

    /// Whether a database may say so of an experiment of so many arms.
    pub(super) fn is_whole(&self, arms: usize) -> bool {
        [self.since.len(), self.arms.len()] == [arms; 2]
            && self.since.iter().all(Traffic::is_whole)
            && self.arms.get(1).is_some_and(|arm| self.votes_since <= arm.votes.votes())
            && self.ramp.as_ref().is_none_or(|ramp| ramp.is_whole(arms))
    }

    /// Why an arm was stopped, where it was.
    pub fn stopped(&self, arm: usize) -> Option<&Stopped> {
        self.arms[arm].stopped.as_ref()
    }

    /// How often an arm has been watched anew: what was observed in an earlier round does not count.
    pub(super) fn round(&self, arm: usize) -> u64 {
        self.arms[arm].round
    }

    /// Votes on an arm and the control since it is watched, seen from the arm.
    pub(super) fn votes(&self, arm: usize) -> Tally {
        self.arms[arm].votes
    }

    /// The median time of an arm ÷ the control's, since the weights last changed.
    pub(super) fn latency_ratio(&self, arm: usize, served: &[Traffic]) -> Measured {
        let [arm, control] = [arm, CONTROL].map(|at| served[at].since(&self.since[at]));
        let medians = (arm.quantile(0.5), control.quantile(0.5));
        let value = match medians {
            (Some(arm), Some(control)) if control > 0.0 => Some(arm / control),
            _ => None,
        };
        Measured { count: arm.requests().min(control.requests()), value }
    }

    /// Images and votes of the ramp's stage.
    pub(super) fn of_stage(&self, served: &[Traffic]) -> [u64; 2] {
        let images = served[1].since(&self.since[1]).images;
        [images, self.arms[1].votes.votes() - self.votes_since]
    }

    /// Counts a vote on two arms, by what it says of the first.
    pub(super) fn count(&mut self, arms: [usize; 2], outcome: Outcome) {
        match arms {
            [arm, CONTROL] => self.arms[arm].votes.count(outcome),
            [CONTROL, arm] => self.arms[arm].votes.count(outcome.reversed()),
            _ => {}
        }
    }

    /// Takes an arm's weight away; its traffic goes to the others by theirs, and to the control where they have none.
    pub(super) fn stop(
        &mut self,
        arms: &mut [Arm],
        arm: usize,
        reason: Reason,
        at: u64,
        served: &[Traffic],
    ) {
        let weight = std::mem::take(&mut arms[arm].weight);
        if arms.iter().all(|arm| arm.weight == 0.0) {
            arms[CONTROL].weight = weight;
        }
        self.arms[arm].stopped = Some(Stopped { reason, at, weight });
        if let Some(ramp) = &mut self.ramp {
            ramp.phase = Phase::Stopped;
        }
        self.split_anew(served);
    }

    /// Goes on to the ramp's next stage, where it is due; says the second arm's new share.
    pub(super) fn advance(&mut self, arms: &mut [Arm], served: &[Traffic]) -> Option<f64> {
        let [images, votes] = self.of_stage(served);
        let next = self.ramp.as_ref()?.advanced(images, votes)?;
        let weights = next.weights();
        arms.iter_mut().zip(weights).for_each(|(arm, weight)| arm.weight = weight);
        self.ramp = Some(next);
        self.split_anew(served);
        Some(weights[1])
    }

    /// Somebody changed weights: the ramp is over, and a stopped arm that has a weight again is watched from now on.
    /// Returns the arms that are.
    pub(super) fn overridden(&mut self, arms: &[Arm], served: &[Traffic]) -> Vec<usize> {
        if let Some(ramp) = &mut self.ramp {
            ramp.phase = Phase::Overridden;
        }
        let again = |arm: &usize| arms[*arm].weight > 0.0 && self.arms[*arm].stopped.is_some();
        let again: Vec<usize> = (0..arms.len()).filter(again).collect();
        for arm in &again {
            let round = self.arms[*arm].round + 1;
            self.arms[*arm] = Watched { round, ..Watched::default() };
        }
        self.split_anew(served);
        again
    }

    fn split_anew(&mut self, served: &[Traffic]) {
        self.since = served.to_vec();
        self.votes_since = self.arms[1].votes.votes();
    }
}
