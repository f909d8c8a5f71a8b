//! One experiment: its arms, what they served, what was voted.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use serde::{Deserialize, Serialize};

use super::{
    Error,
    arms::{self, Arm},
    split,
    tally::Outcome,
    traffic::{BOUNDS, Traffic},
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
    served: Arc<Served>,
}

#[derive(Debug)]
struct Served {
    arms: Vec<Mutex<Traffic>>,
    /// Whether something was counted that is not in the database.
    unsaved: AtomicBool,
}

impl Experiment {
    /// A new one.
    ///
    /// # Errors
    /// [`Error::Value`].
    pub(super) fn new(id: String, created: u64, arms: Vec<Arm>) -> Result<Self, Error> {
        arms::check(&arms)?;
        let (votes, served) = (Votes::none(arms.len()), vec![Traffic::default(); arms.len()]);
        Ok(Self { id, created, arms, votes, served: Arc::new(Served::new(served)) })
    }

    /// The same with other weights.
    ///
    /// # Errors
    /// [`Error::Value`].
    pub(super) fn reweighted(&self, changes: &[Arm]) -> Result<Self, Error> {
        Ok(Self { arms: arms::reweighted(&self.arms, changes)?, ..self.clone() })
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
        true
    }

    /// Counts an answered request that an arm served.
    pub fn serve(&self, arm: usize, images: usize, seconds: f64) {
        self.traffic_of(arm).count(images as u64, seconds);
        self.mark_unsaved();
    }

    /// What an arm served.
    pub fn traffic(&self, arm: usize) -> Traffic {
        self.traffic_of(arm).clone()
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
            return Self { served: Arc::clone(&other.served), ..self };
        }
        self
    }

    /// As the database keeps it.
    pub(super) fn record(&self) -> Record {
        let served = (0..self.arms.len()).map(|arm| self.traffic(arm)).collect();
        let arms = self.arms.iter().map(|arm| (arm.name(), arm.weight)).collect();
        Record { created: self.created, arms, votes: self.votes.clone(), served }
    }

    /// From what the database keeps; `None` where its parts do not fit each other.
    pub(super) fn from_record(id: String, record: Record) -> Option<Self> {
        let Record { created, arms, votes, served } = record;
        let arms: Vec<Arm> =
            arms.into_iter().map(|(name, weight)| Arm::of_name(name, weight)).collect();
        let fits = arms::check(&arms).is_ok()
            && [votes.arms(), served.len()] == [arms.len(); 2]
            && served.iter().all(|traffic| traffic.buckets.len() == BOUNDS.len() + 1);
        fits.then(|| Self { id, created, arms, votes, served: Arc::new(Served::new(served)) })
    }

    fn traffic_of(&self, arm: usize) -> MutexGuard<'_, Traffic> {
        self.served.arms[arm].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Served {
    fn new(arms: Vec<Traffic>) -> Self {
        let arms = arms.into_iter().map(Mutex::new).collect();
        Self { arms, unsaved: AtomicBool::new(false) }
    }
}

/// An experiment as the database keeps it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Record {
    created: u64,
    arms: Vec<(String, f64)>,
    votes: Votes,
    served: Vec<Traffic>,
}
