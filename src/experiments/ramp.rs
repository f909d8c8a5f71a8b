//! A ramp: the second arm gets more of the first one's traffic stage by stage.

use serde::{Deserialize, Serialize};

use super::Error;

/// Shares of the traffic where a ramp names none.
const SHARES: [f64; 4] = [0.01, 0.1, 0.5, 1.0];
/// Images of a stage where a ramp says nothing else.
const IMAGES: u64 = 100;
/// The most stages.
const MAX_STAGES: usize = 16;
/// The most images or votes of a stage.
const MAX_COUNT: u64 = 1_000_000_000;

/// Where a ramp is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// On its way.
    Running,
    /// At its last stage.
    Finished,
    /// A guardrail stopped the arm.
    Stopped,
    /// Somebody changed weights by hand, which counts.
    Overridden,
}

/// The stages, and which of them it is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ramp {
    /// The second arm's shares of the traffic, rising, above 0 and up to 1.
    pub shares: Vec<f64>,
    /// The arm's images in a stage before the next.
    pub images: u64,
    /// Votes on the two arms in a stage before the next.
    pub votes: u64,
    /// The stage, from 0.
    pub stage: usize,
    /// Where it is.
    pub phase: Phase,
}

impl Ramp {
    /// At its first stage; what is `None` takes its default.
    pub fn new(shares: Option<Vec<f64>>, images: Option<u64>, votes: Option<u64>) -> Self {
        let shares = shares.unwrap_or_else(|| SHARES.to_vec());
        let phase = if shares.len() == 1 { Phase::Finished } else { Phase::Running };
        Self {
            shares,
            images: images.unwrap_or(IMAGES),
            votes: votes.unwrap_or(0),
            stage: 0,
            phase,
        }
    }

    /// The weights of the two arms at its stage.
    pub(super) fn weights(&self) -> [f64; 2] {
        let share = self.shares[self.stage];
        [1.0 - share, share]
    }

    /// The next stage, where a running one has had so many images and votes.
    pub(super) fn advanced(&self, images: u64, votes: u64) -> Option<Self> {
        let over = self.phase == Phase::Running && images >= self.images && votes >= self.votes;
        let stage = self.stage + 1;
        let last = stage + 1 == self.shares.len();
        let phase = if last { Phase::Finished } else { Phase::Running };
        (over && stage < self.shares.len()).then(|| Self { stage, phase, ..self.clone() })
    }

    /// # Errors
    /// [`Error::Value`] for shares that do not rise from above 0 up to 1, and counts that cannot be.
    pub(super) fn check(&self, arms: usize) -> Result<(), Error> {
        let refused = |field: &str, value: String, remedy: String| {
            Err(Error::Value { field: field.to_owned(), value, remedy })
        };
        if arms != 2 {
            let remedy = "a ramp leads from the first arm to the second, so the experiment has two; leave the others, or the ramp, out";
            return refused("arms", format!("a list of {arms}"), remedy.into());
        }
        if !(1..=MAX_STAGES).contains(&self.shares.len()) {
            let remedy = format!("a ramp has 1 to {MAX_STAGES} stages");
            return refused("ramp.shares", format!("a list of {}", self.shares.len()), remedy);
        }
        let mut before = 0.0;
        for (at, share) in self.shares.iter().enumerate() {
            if !(*share > before && *share <= 1.0) {
                let remedy = format!("shares rise, so it takes a number above {before}, at most 1");
                return refused(&format!("ramp.shares[{at}]"), share.to_string(), remedy);
            }
            before = *share;
        }
        for (name, count) in [("ramp.images", self.images), ("ramp.votes", self.votes)] {
            if count > MAX_COUNT {
                let remedy = format!("it takes a whole number from 0 to {MAX_COUNT}");
                return refused(name, count.to_string(), remedy);
            }
        }
        Ok(())
    }

    /// Whether a database may say so.
    pub(super) fn is_whole(&self, arms: usize) -> bool {
        self.check(arms).is_ok() && self.stage < self.shares.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_no_ramp_is_refused_by_name() {
        let of = |shares: &[f64]| Ramp::new(Some(shares.to_vec()), None, None);
        let cases = [
            (of(&[]), "ramp.shares"),
            (of(&[0.0, 1.0]), "ramp.shares[0]"),
            (of(&[0.5, 0.5]), "ramp.shares[1]"),
            (of(&[0.5, 1.5]), "ramp.shares[1]"),
            (of(&[f64::NAN]), "ramp.shares[0]"),
            (of(&[0.1; 17]), "ramp.shares"),
            (Ramp::new(None, Some(u64::MAX), None), "ramp.images"),
        ];
        for (ramp, at) in cases {
            let refused = ramp.check(2);
            assert!(
                matches!(&refused, Err(Error::Value { field, .. }) if field == at),
                "{refused:?}"
            );
        }
        let refused = Ramp::new(None, None, None).check(3);
        assert!(
            matches!(&refused, Err(Error::Value { field, .. }) if field == "arms"),
            "{refused:?}"
        );
    }

    proptest! {
        /// It goes up stage by stage, never before its counts, and ends at the last.
        #[test]
        fn a_ramp_rises_to_its_end(
            cuts in proptest::collection::btree_set(1u32..=1000, 1..=16), images in 0u64..50, votes in 0u64..50,
        ) {
            let shares: Vec<f64> = cuts.into_iter().map(|cut| f64::from(cut) / 1000.0).collect();
            let mut ramp = Ramp::new(Some(shares.clone()), Some(images), Some(votes));
            prop_assert_eq!(ramp.check(2), Ok(()));
            for (stage, share) in shares.iter().enumerate() {
                prop_assert_eq!((ramp.stage, ramp.weights()[1]), (stage, *share));
                prop_assert!(images == 0 || ramp.advanced(images - 1, votes).is_none());
                prop_assert!(votes == 0 || ramp.advanced(images, votes - 1).is_none());
                match ramp.advanced(images, votes) {
                    Some(next) => ramp = next,
                    None => prop_assert_eq!(stage + 1, shares.len()),
                }
            }
            prop_assert_eq!(ramp.phase, Phase::Finished);
            for phase in [Phase::Stopped, Phase::Overridden, Phase::Finished] {
                let still = Ramp { phase, stage: 0, ..ramp.clone() };
                prop_assert!(still.advanced(100, 100).is_none());
            }
        }
    }
}
