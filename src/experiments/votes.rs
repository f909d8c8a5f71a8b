//! All votes of an experiment, counted for every arm and for every two of them.

use serde::{Deserialize, Serialize};

use super::tally::{Outcome, Tally};

/// Tallies of an experiment's arms. An arm's own counts all of its pairs, whoever the other was; where
/// there are more than two arms, the tallies of every two tell whom it was preferred to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Votes {
    /// Of every arm.
    arms: Vec<Tally>,
    /// Of every two arms, seen from the first: those of (0, 1), (0, 2), (1, 2), (0, 3), …
    pairs: Vec<Tally>,
}

impl Votes {
    /// None yet.
    pub(super) fn none(arms: usize) -> Self {
        Self {
            arms: vec![Tally::default(); arms],
            pairs: vec![Tally::default(); arms * (arms - 1) / 2],
        }
    }

    /// The arms they are of.
    pub(super) fn arms(&self) -> usize {
        self.arms.len()
    }

    /// Counts a vote on two arms by what it says of the first.
    pub(super) fn count(&mut self, [one, other]: [usize; 2], outcome: Outcome) {
        self.arms[one].count(outcome);
        self.arms[other].count(outcome.reversed());
        let of_first = if one < other { outcome } else { outcome.reversed() };
        self.pairs[place(one.min(other), one.max(other))].count(of_first);
    }

    /// All votes on pairs with that arm.
    pub fn of(&self, arm: usize) -> &Tally {
        &self.arms[arm]
    }

    /// Every two arms, the lower first, with the votes on them seen from it.
    pub fn pairs(&self) -> impl Iterator<Item = ([usize; 2], &Tally)> {
        let all = (1..self.arms.len()).flat_map(|high| (0..high).map(move |low| [low, high]));
        all.zip(&self.pairs)
    }
}

/// Where the tally of two arms stands.
fn place(low: usize, high: usize) -> usize {
    high * (high - 1) / 2 + low
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vote_counts_for_both_arms_and_for_the_two_together() {
        let mut votes = Votes::none(4);
        votes.count([2, 1], Outcome::Win);
        votes.count([1, 2], Outcome::Tie);
        votes.count([0, 3], Outcome::Loss);
        let counts = |tally: &Tally| (tally.wins, tally.losses, tally.ties);
        let of = |arm| counts(votes.of(arm));
        assert_eq!([0, 1, 2, 3].map(of), [(0, 1, 0), (0, 1, 1), (1, 0, 1), (1, 0, 0)]);
        let pairs: Vec<_> = votes.pairs().map(|(arms, tally)| (arms, counts(tally))).collect();
        let none = (0, 0, 0);
        let expected = [
            ([0, 1], none),
            ([0, 2], none),
            ([1, 2], (0, 1, 1)),
            ([0, 3], (0, 1, 0)),
            ([1, 3], none),
            ([2, 3], none),
        ];
        assert_eq!(pairs, expected);
    }
}
