//! A blind pair, and a vote on it.

use serde::{Deserialize, Serialize};

use super::tally::Outcome;

/// Two images of one seed as somebody was shown them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pair {
    /// The arms' names, in the order shown.
    pub models: [String; 2],
    /// The images' seed.
    pub seed: u64,
}

/// Which of the two is preferred.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Choice {
    /// Image 0.
    First,
    /// Image 1.
    Second,
    /// Neither.
    Tie,
}

impl Choice {
    /// What it says of image 0.
    pub(super) fn of_first(self) -> Outcome {
        match self {
            Self::First => Outcome::Win,
            Self::Second => Outcome::Loss,
            Self::Tie => Outcome::Tie,
        }
    }
}

/// A vote that counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vote {
    /// What it was on.
    pub pair: Pair,
    /// What it said.
    pub choice: Choice,
    /// The client's name for it, under which it may be sent again.
    pub key: String,
    /// Unix seconds.
    pub at: u64,
}

impl Vote {
    /// The arm that was preferred, if one was.
    pub fn winner(&self) -> Option<&str> {
        match self.choice {
            Choice::First => Some(&self.pair.models[0]),
            Choice::Second => Some(&self.pair.models[1]),
            Choice::Tie => None,
        }
    }
}
