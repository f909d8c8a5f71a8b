//! One value for every level of a network, or one for each.

use serde::{Deserialize, Serialize};

/// How a configuration writes it: the value, or a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "must be one value, or a list with one for each")]
pub(crate) enum Each<T> {
    /// One for each.
    One(Vec<T>),
    /// The same for all.
    All(T),
}

impl<T> Each<T> {
    /// The value of one; nothing after the end of a list.
    pub(crate) fn at(&self, index: usize) -> Option<&T> {
        match self {
            Self::One(values) => values.get(index),
            Self::All(value) => Some(value),
        }
    }

    /// Entries of a list.
    pub(crate) fn len(&self) -> Option<usize> {
        match self {
            Self::One(values) => Some(values.len()),
            Self::All(_) => None,
        }
    }
}
