//! What votes said, and what follows from it.

use serde::{Deserialize, Serialize};

use super::{sequential, wilson};

/// What a vote says of one of its two sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It was preferred.
    Win,
    /// The other was.
    Loss,
    /// Neither.
    Tie,
}

impl Outcome {
    /// What the same vote says of the other side.
    pub fn reversed(self) -> Self {
        match self {
            Self::Win => Self::Loss,
            Self::Loss => Self::Win,
            Self::Tie => Self::Tie,
        }
    }
}

/// Votes counted from one side. A tie is counted and told, and says nothing about which side is preferred:
/// win rate, interval and p-value are of the decisive votes.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Tally {
    /// Votes for it.
    pub wins: u64,
    /// Votes for the other side.
    pub losses: u64,
    /// Votes for neither.
    pub ties: u64,
    /// The largest mixture likelihood ratio so far, its logarithm; at no votes it is 0.
    largest_ln_likelihood_ratio: f64,
}

impl Tally {
    /// Counts a vote.
    pub fn count(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Win => self.wins += 1,
            Outcome::Loss => self.losses += 1,
            Outcome::Tie => self.ties += 1,
        }
        let now = sequential::ln_likelihood_ratio(self.wins, self.losses);
        self.largest_ln_likelihood_ratio = self.largest_ln_likelihood_ratio.max(now);
    }

    /// All of them.
    pub fn votes(&self) -> u64 {
        self.wins + self.losses + self.ties
    }

    /// Wins ÷ decisive votes, 0 to 1; `None` without any.
    pub fn win_rate(&self) -> Option<f64> {
        let decisive = self.wins + self.losses;
        (decisive > 0).then(|| self.wins as f64 / decisive as f64)
    }

    /// Wilson's 95 % interval of the win rate.
    pub fn interval(&self) -> Option<[f64; 2]> {
        wilson::interval(self.wins, self.wins + self.losses)
    }

    /// The always-valid p-value of "neither side is preferred", 0 to 1.
    pub fn p_value(&self) -> f64 {
        sequential::p_value(self.largest_ln_likelihood_ratio)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn after(outcomes: &[(Outcome, usize)]) -> Tally {
        let mut tally = Tally::default();
        for (outcome, times) in outcomes {
            (0..*times).for_each(|_| tally.count(*outcome));
        }
        tally
    }

    #[test]
    fn ties_are_counted_and_decide_nothing() {
        let none = Tally::default();
        assert_eq!((none.win_rate(), none.interval(), none.p_value()), (None, None, 1.0));
        let ties = after(&[(Outcome::Tie, 50)]);
        assert_eq!((ties.win_rate(), ties.interval(), ties.p_value()), (None, None, 1.0));
        let decisive = after(&[(Outcome::Win, 9), (Outcome::Loss, 3)]);
        let with_ties = after(&[(Outcome::Win, 9), (Outcome::Loss, 3), (Outcome::Tie, 40)]);
        assert_eq!(decisive.win_rate(), Some(0.75));
        assert_eq!(decisive.win_rate(), with_ties.win_rate());
        assert_eq!(decisive.interval(), with_ties.interval());
        assert_eq!(decisive.p_value(), with_ties.p_value());
    }

    #[test]
    fn evidence_once_seen_is_not_taken_back() {
        let strong = after(&[(Outcome::Win, 12)]);
        assert!(strong.p_value() < 0.01);
        let weaker = after(&[(Outcome::Win, 12), (Outcome::Loss, 12)]);
        assert_eq!(weaker.p_value(), strong.p_value());
    }

    /// A tally is read and written at every vote: serde_json's usual reading may be off by the last bit, which would add up.
    #[test]
    fn what_is_kept_is_read_to_the_bit() {
        for number in 0..100_000 {
            let ratio = f64::from_bits(understudy_models::noise::uniform_u64(1, number));
            if ratio.is_finite() {
                let tally = Tally { largest_ln_likelihood_ratio: ratio, ..Tally::default() };
                let text = serde_json::to_string(&tally).unwrap();
                let read: Tally = serde_json::from_str(&text).unwrap();
                assert_eq!(read.largest_ln_likelihood_ratio.to_bits(), ratio.to_bits(), "{text}");
            }
        }
    }

    #[test]
    fn both_sides_are_equally_sure() {
        let one = after(&[(Outcome::Win, 7), (Outcome::Loss, 2), (Outcome::Tie, 1)]);
        let other = after(&[
            (Outcome::Win.reversed(), 7),
            (Outcome::Loss.reversed(), 2),
            (Outcome::Tie.reversed(), 1),
        ]);
        assert_eq!(one.p_value(), other.p_value());
        let ([low, high], [other_low, other_high]) =
            (one.interval().unwrap(), other.interval().unwrap());
        assert!((low + other_high - 1.0).abs() < 1e-12 && (high + other_low - 1.0).abs() < 1e-12);
    }
}
