//! Which channels of a network stand or fall together, for making a narrower network out of it.

use std::collections::BTreeMap;

/// Channels that several weights share: the residual stream of a level, the inside of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChannelSet {
    /// How many there are.
    pub width: usize,
    /// Parts of equal size that a norm or the heads of an attention divide them into.
    pub parts: usize,
    /// How a narrower set is made.
    pub choice: Choice,
}

/// How a narrower set is made of a wider one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// Any channels of each part may be left out.
    Any,
    /// Sines and cosines of falling frequencies, in two halves: those whose frequencies the narrower set
    /// has too must be kept.
    Frequencies,
}

/// The channel sets of a network, and which weights have them along which dimension.
///
/// Two networks of one topology and different widths have the same `weights`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Channels {
    /// The sets.
    pub sets: Vec<ChannelSet>,
    /// For each weight and each of its dimensions the sets that lie along it, one behind the other; none
    /// where the dimension belongs to no set (pixels of a kernel, channels of the image, classes).
    pub weights: BTreeMap<String, Vec<Vec<usize>>>,
}
