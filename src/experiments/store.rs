//! What keeps experiments and votes, whatever it is: a file of one server, or a database that several share.
//!
//! What is asked often stands in memory as well ([`Live`]), and changes there only after the commit.

use std::{
    collections::BTreeMap,
    sync::{Arc, RwLock},
};

use super::{
    Error,
    arms::Arm,
    ballot::{Choice, Pair, Vote},
    experiment::{Experiment, Plan},
    rollout::Change,
};

/// Experiments by id, as of the last commit.
pub(super) type Live = Arc<RwLock<BTreeMap<String, Arc<Experiment>>>>;

/// Most experiments at a time: each is a row of every panel.
pub const MAX_EXPERIMENTS: usize = 16;

/// A pair that nobody has voted on for so long is forgotten.
pub const PAIR_MILLISECONDS: u64 = 24 * 60 * 60 * 1000;

/// Most pairs that wait for a vote, over all experiments; beyond it the oldest is forgotten.
pub const MAX_OPEN_PAIRS: u64 = 10_000;

/// The one who reads and writes what is kept. A change that fails changed nothing, but for what its store says.
pub(super) trait Store: Send {
    /// What it has read and written.
    fn live(&self) -> Live;

    /// Begins an experiment.
    fn create(&mut self, id: &str, arms: Vec<Arm>, plan: Plan) -> Result<Arc<Experiment>, Error>;

    /// Changes the weights of the arms in `changes`.
    fn reweight(&mut self, id: &str, changes: &[Arm]) -> Result<Arc<Experiment>, Error>;

    /// Does what an experiment's guardrails and ramp say by now. A stop that could not be kept is none: it is decided anew
    /// with what is observed later.
    fn review(&mut self, id: &str) -> Result<(), Error>;

    /// Removes an experiment and all that was voted in it.
    fn delete(&mut self, id: &str) -> Result<(), Error>;

    /// Keeps a pair until it is voted on, and returns its id. Pairs that are too old or too many go.
    fn open_pair(&mut self, id: &str, pair: &Pair) -> Result<String, Error>;

    /// Counts a vote once; the same vote under the same key is told again, with `false`.
    fn vote(
        &mut self,
        id: &str,
        pair_id: &str,
        choice: Choice,
        key: &str,
    ) -> Result<(Vote, bool), Error>;

    /// Writes what the arms have served since the last time.
    fn save_traffic(&mut self) -> Result<(), Error>;

    /// Reads what others have written since the last time, where others can.
    fn refresh(&mut self) -> Result<(), Error> {
        Ok(())
    }

    /// Leaves nothing to be repaired when it is opened again.
    fn close(&mut self) -> Result<(), Error>;

    /// Lets go of what is open without another word to it, so that it is opened anew.
    fn forget(&mut self);
}

/// Logs what was decided, once it is kept.
pub(super) fn tell(experiment: &Experiment, changes: &[Change]) {
    for change in changes {
        let id = &experiment.id;
        match change {
            Change::Stopped(arm, reason) => {
                let (arm, guardrail) = (experiment.arms[*arm].name(), reason.guardrail.name());
                tracing::warn!(experiment = id, arm, guardrail, %reason, "arm stopped by a guardrail");
            }
            Change::Advanced(share) => {
                let arm = experiment.arms[1].name();
                tracing::info!(experiment = id, arm, share, "arm advanced by its ramp");
            }
        }
    }
}
