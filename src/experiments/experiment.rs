//! One experiment: its arms, what they served, what was voted.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use serde::{Deserialize, Serialize};

use super::{
    Error,
    arms::{self, Arm},
    compared::Compared,
    guardrails::{Evidence, Guardrails, Verdict},
    ledger::{Ledger, Sum},
    ramp::Ramp,
    rollout::{CONTROL, Change, Rollout},
    split,
    tally::Outcome,
    traffic::Traffic,
    votes::Votes,
};

/// An experiment as it stands; a change makes another, which goes on counting in the same traffic.
#[derive(Debug, Clone)]
pub struct Experiment {
    /// Its id.
    pub id: String,
    /// Unix seconds when it was created.
    pub created: u64,
    /// Two or more; they stay, their weights may change.
    pub arms: Vec<Arm>,
    /// What was voted.
    pub votes: Votes,
    /// What stops an arm or gives it more traffic; `None` where nothing does.
    pub rollout: Option<Rollout>,
    served: Arc<Served>,
    /// Every arm's last images beside its teacher's. An arm that is watched anew has another, so that what was drawn
    /// before does not count.
    compared: Vec<Arc<Mutex<Ledger<Compared>>>>,
}

#[derive(Debug)]
struct Served {
    arms: Vec<Mutex<Ledger<Traffic>>>,
    /// Whether something was counted that is not in the database.
    unsaved: AtomicBool,
    /// Whether the thread that owns the database was asked to decide and has not yet.
    to_review: AtomicBool,
}

/// What is to be watched of a new experiment.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Plan {
    /// What stops an arm.
    pub guardrails: Option<Guardrails>,
    /// How the second arm gets more traffic; then the arms' weights are the ramp's.
    pub ramp: Option<Ramp>,
}

impl Experiment {
    /// A new one.
    ///
    /// # Errors
    /// [`Error::Value`].
    pub(super) fn new(
        id: String,
        created: u64,
        mut arms: Vec<Arm>,
        Plan { guardrails, ramp }: Plan,
    ) -> Result<Self, Error> {
        let rollout = Rollout::new(guardrails, ramp, arms.len())?;
        if let Some(Rollout { ramp: Some(ramp), .. }) = &rollout {
            arms.iter_mut().zip(ramp.weights()).for_each(|(arm, weight)| arm.weight = weight);
        }
        arms::check(&arms)?;
        let served = Arc::new(Served::of(vec![Traffic::default(); arms.len()]));
        let compared = arms.iter().map(|_| Arc::default()).collect();
        Ok(Self { id, created, votes: Votes::none(arms.len()), arms, rollout, served, compared })
    }

    /// The same with other weights.
    ///
    /// # Errors
    /// [`Error::Value`].
    pub(super) fn reweighted(&self, changes: &[Arm]) -> Result<Self, Error> {
        let mut changed = Self { arms: arms::reweighted(&self.arms, changes)?, ..self.clone() };
        if let Some(rollout) = &mut changed.rollout {
            for arm in rollout.overridden(&changed.arms, &self.all_traffic()) {
                changed.compared[arm] = Arc::default();
            }
        }
        Ok(changed)
    }

    /// What was observed of an arm beside the control; nothing where nothing is watched.
    pub fn evidence(&self, arm: usize) -> Evidence {
        let Some(rollout) = &self.rollout else { return Evidence::default() };
        let compared = self.alike(arm);
        Evidence {
            psnr_db: compared.psnr_db(),
            ssim: compared.ssim(),
            latency_ratio: rollout.latency_ratio(arm, &self.all_traffic()),
            votes: rollout.votes(arm),
        }
    }

    /// The second arm's images and the votes in the ramp's stage.
    pub fn of_stage(&self) -> Option<[u64; 2]> {
        self.rollout.as_ref().map(|rollout| rollout.of_stage(&self.all_traffic()))
    }

    /// The experiment after what its guardrails and its ramp say now, at `now` Unix seconds, and what that was; `None` where
    /// they say nothing new.
    pub(super) fn reviewed(&self, now: u64) -> Option<(Self, Vec<Change>)> {
        let watched = self.rollout.as_ref()?;
        let guarded = |arm: &usize| self.arms[*arm].weight > 0.0 && watched.stopped(*arm).is_none();
        let arms = (0..self.arms.len()).filter(|arm| *arm != CONTROL).filter(guarded);
        let judge = |arm| match &watched.guardrails {
            Some(guardrails) => guardrails.judge(&self.evidence(arm)),
            None => Verdict::Fine,
        };
        let verdicts: Vec<_> = arms.map(|arm| (arm, judge(arm))).collect();

        let (mut next, served) = (self.clone(), self.all_traffic());
        let Self { arms, rollout: Some(rollout), .. } = &mut next else { return None };
        let mut changes = Vec::new();
        for (arm, verdict) in &verdicts {
            if let Verdict::Stop(reason) = verdict {
                rollout.stop(arms, *arm, *reason, now, &served);
                changes.push(Change::Stopped(*arm, *reason));
            }
        }
        // A stage is not over before everything that bounds the arm could be judged.
        if verdicts.iter().all(|(_, verdict)| *verdict == Verdict::Fine) {
            changes.extend(rollout.advance(arms, &served).map(Change::Advanced));
        }
        (!changes.is_empty()).then_some((next, changes))
    }

    /// The arm of that name.
    pub fn arm(&self, name: &str) -> Option<usize> {
        self.arms.iter().position(|arm| arm.name() == name)
    }

    /// The arm that a key belongs to.
    pub fn arm_of(&self, key: &[u8]) -> usize {
        let names: Vec<_> = self.arms.iter().map(|arm| (arm.name(), arm.weight)).collect();
        split::arm_of(&self.id, names.iter().map(|(name, weight)| (name.as_str(), *weight)), key)
    }

    /// An arm's part of the traffic, 0 to 1.
    pub fn share(&self, arm: usize) -> f64 {
        self.arms[arm].weight / self.arms.iter().map(|arm| arm.weight).sum::<f64>()
    }

    /// Two arms, the lower first, each two as likely as any others whatever their weights; `drawn` is a
    /// uniform number.
    pub fn two_arms(&self, drawn: u64) -> [usize; 2] {
        let mut pairs = self.votes.pairs().map(|(arms, _)| arms);
        let count = self.arms.len() * (self.arms.len() - 1) / 2;
        pairs.nth((drawn % count as u64) as usize).unwrap_or([0, 1])
    }

    /// Counts a vote on two arms, by their names and by what it says of the first; says whether both are arms.
    pub(super) fn count(&mut self, models: [&str; 2], outcome: Outcome) -> bool {
        let (Some(one), Some(other)) = (self.arm(models[0]), self.arm(models[1])) else {
            return false;
        };
        self.votes.count([one, other], outcome);
        if let Some(rollout) = &mut self.rollout {
            rollout.count([one, other], outcome);
        }
        true
    }

    /// Counts an answered request that an arm served.
    pub(super) fn serve(&self, arm: usize, images: usize, seconds: f64) {
        self.traffic_of(arm).open().count(images as u64, seconds);
        self.mark_unsaved();
    }

    /// Counts an image that an arm drew and its teacher repeated.
    pub(super) fn compare(&self, arm: usize, psnr_db: f64, ssim: Option<f64>) {
        let Some(most) = self.comparisons() else { return };
        self.compared_of(arm).open().count(psnr_db, ssim, most);
        self.mark_unsaved();
    }

    /// Whether something is to be decided that nobody was asked to decide yet; whoever is told so asks.
    pub(super) fn take_review(&self) -> bool {
        self.rollout.is_some() && !self.served.to_review.swap(true, Ordering::AcqRel)
    }

    /// What is observed from now on is to be decided on again.
    pub(super) fn end_review(&self) {
        self.served.to_review.store(false, Ordering::Release);
    }

    /// What an arm served.
    pub fn traffic(&self, arm: usize) -> Traffic {
        self.traffic_of(arm).total()
    }

    /// Images that a median is of; `None` where nothing is bounded.
    fn comparisons(&self) -> Option<u64> {
        let guardrails = self.rollout.as_ref()?.guardrails.as_ref()?;
        Some(guardrails.comparisons())
    }

    /// An arm's last images beside its teacher's.
    fn alike(&self, arm: usize) -> Compared {
        let mut compared = self.compared_of(arm).total();
        compared.keep_last(self.comparisons().unwrap_or_default());
        compared
    }

    /// Whether traffic was counted since the last time this was asked.
    pub(super) fn take_unsaved(&self) -> bool {
        self.served.unsaved.swap(false, Ordering::AcqRel)
    }

    pub(super) fn mark_unsaved(&self) {
        self.served.unsaved.store(true, Ordering::Release);
    }

    /// Goes on counting where another state of the same experiment counts.
    pub(super) fn continuing(self, other: &Self) -> Self {
        if self.created == other.created && self.arms.len() == other.arms.len() {
            let (served, compared) = (Arc::clone(&other.served), other.compared.clone());
            return Self { served, compared, ..self };
        }
        self
    }

    /// What the database is to add to what others have counted; the same again until [`Self::in_place_of`] says that it did.
    pub(super) fn to_add(&self) -> Addition {
        let arm = |arm| Added {
            traffic: self.traffic_of(arm).send(),
            compared: self.compared_of(arm).send(),
            round: self.round(arm),
        };
        Addition((0..self.arms.len()).map(arm).collect())
    }

    /// Adds what a server counted. What it compared before the arm was watched anew is of no account.
    pub(super) fn add(&self, Addition(arms): &Addition) {
        for (arm, added) in arms.iter().enumerate().take(self.arms.len()) {
            self.traffic_of(arm).open().add(&added.traffic);
            if added.round == self.round(arm) {
                self.compared_of(arm).open().add(&added.compared);
            }
        }
    }

    /// This state, which a database has, in the place of another of the same experiment: requests that hold the other one go on
    /// counting here. `arrived` says whether what [`Self::to_add`] told is in it.
    pub(super) fn in_place_of(mut self, other: &Self, arrived: bool) -> Self {
        if self.arms.len() != other.arms.len() {
            return self;
        }
        for arm in 0..self.arms.len() {
            other.traffic_of(arm).settle(self.traffic(arm), arrived);
            if self.round(arm) == other.round(arm) {
                other.compared_of(arm).settle(self.alike(arm), arrived);
                self.compared[arm] = Arc::clone(&other.compared[arm]);
            }
        }
        self.served = Arc::clone(&other.served);
        // What was sent may have been older than what is to be saved.
        let more = |arm| self.traffic_of(arm).has_more() || self.compared_of(arm).has_more();
        if (0..self.arms.len()).any(more) {
            self.mark_unsaved();
        }
        self
    }

    fn round(&self, arm: usize) -> u64 {
        self.rollout.as_ref().map_or(0, |rollout| rollout.round(arm))
    }

    /// As the database keeps it.
    pub(super) fn record(&self) -> Record {
        let (served, votes, rollout) =
            (self.all_traffic(), self.votes.clone(), self.rollout.clone());
        let compared = match rollout {
            Some(_) => (0..self.arms.len()).map(|arm| self.alike(arm)).collect(),
            None => Vec::new(),
        };
        let arms = self.arms.iter().map(|arm| (arm.name(), arm.weight)).collect();
        Record { created: self.created, arms, votes, served, rollout, compared }
    }

    /// From what the database keeps; `None` where its parts do not fit each other.
    pub(super) fn from_record(id: String, record: Record) -> Option<Self> {
        let Record { created, arms, votes, served, rollout, mut compared } = record;
        let arms: Vec<Arm> =
            arms.into_iter().map(|(name, weight)| Arm::of_name(name, weight)).collect();
        let fits = arms::check(&arms).is_ok()
            && [votes.arms(), served.len()] == [arms.len(); 2]
            && served.iter().all(Traffic::is_whole)
            && rollout.as_ref().is_none_or(|rollout| rollout.is_whole(arms.len()));
        compared.resize_with(arms.len(), Compared::default);
        let compared =
            compared.into_iter().map(|kept| Arc::new(Mutex::new(Ledger::of(kept)))).collect();
        let served = Arc::new(Served::of(served));
        fits.then_some(Self { id, created, arms, votes, rollout, served, compared })
    }

    fn all_traffic(&self) -> Vec<Traffic> {
        (0..self.arms.len()).map(|arm| self.traffic(arm)).collect()
    }

    fn compared_of(&self, arm: usize) -> MutexGuard<'_, Ledger<Compared>> {
        self.compared[arm].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn traffic_of(&self, arm: usize) -> MutexGuard<'_, Ledger<Traffic>> {
        self.served.arms[arm].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Served {
    fn of(arms: Vec<Traffic>) -> Self {
        let arms = arms.into_iter().map(|kept| Mutex::new(Ledger::of(kept))).collect();
        Self { arms, unsaved: AtomicBool::new(false), to_review: AtomicBool::new(false) }
    }
}

/// What a server counted of an experiment, to be added in a database.
#[derive(Debug, Clone)]
pub(super) struct Addition(Vec<Added>);

/// Of one arm.
#[derive(Debug, Clone)]
struct Added {
    traffic: Traffic,
    compared: Compared,
    /// The round that was compared in.
    round: u64,
}

/// An experiment as the database keeps it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Record {
    created: u64,
    arms: Vec<(String, f64)>,
    votes: Votes,
    served: Vec<Traffic>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rollout: Option<Rollout>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    compared: Vec<Compared>,
}
