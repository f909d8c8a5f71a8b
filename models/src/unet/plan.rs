//! What a U-Net consists of, whichever configuration describes it.

use serde::{Deserialize, Serialize};

use crate::graph::{Map, Size};
use crate::kernels::Function;

/// A U-Net, without the time embedding.
#[derive(Debug)]
pub(super) struct Plan {
    /// The noisy sample.
    pub(super) sample: Size,
    /// Whether it is `2·x − 1` that goes in.
    pub(super) centered: bool,
    /// Channels of the answer.
    pub(super) outputs: usize,
    /// Pixels of the sides of the first and the last convolution's kernels.
    pub(super) kernels: [usize; 2],
    /// The one with the largest map first.
    pub(super) levels: Vec<Level>,
    pub(super) middle: Middle,
    /// What is added to by the residual blocks of the middle is divided by this.
    pub(super) middle_scale: f64,
    /// Groups of a norm, and what it adds to a variance.
    pub(super) norm: (usize, f64),
    /// What follows a norm.
    pub(super) function: Function,
    /// What follows the last norm.
    pub(super) last_function: Function,
    /// Whether the time scales and shifts norms, instead of being added.
    pub(super) modulated: bool,
    /// Zeros above and left of a map that a convolution halves: 0 or 1.
    pub(super) padding: usize,
    /// Whether the answer is divided by the time.
    pub(super) divided: bool,
}

/// A size of map.
#[derive(Debug)]
pub(super) struct Level {
    pub(super) channels: usize,
    /// Residual blocks on the way down; there is one more on the way up.
    pub(super) layers: usize,
    pub(super) down: Block,
    pub(super) up: Block,
}

/// What a level consists of on one way.
#[derive(Debug, Clone)]
pub(super) struct Block {
    pub(super) after: After,
    pub(super) resample: Resample,
}

/// What follows each residual block.
#[derive(Debug, Clone)]
pub(super) enum After {
    Nothing,
    /// Attention of the pixels to each other, normalised in so many groups or not at all.
    Attention {
        heads: usize,
        groups: Option<usize>,
    },
    /// Blocks of a transformer, which see a prompt.
    Transformer(Transformer),
}

/// A transformer over the pixels of a map (`Transformer2DModel`).
#[derive(Debug, Clone)]
pub(super) struct Transformer {
    pub(super) heads: usize,
    /// Blocks after each residual block.
    pub(super) depths: Vec<usize>,
    /// Whether what goes in and out is kept as matrices, instead of kernels of one pixel.
    pub(super) linear: bool,
    /// Whether the first attention of a block sees the prompt, too, instead of the pixels.
    pub(super) only_prompt: bool,
    pub(super) prompt: Map,
}

/// What changes a map's size at the end of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Resample {
    /// A convolution.
    Conv,
    /// A residual block.
    Resnet,
}

/// What happens to the smallest map between the two ways.
#[derive(Debug)]
pub(super) enum Middle {
    Nothing,
    /// One residual block.
    One,
    /// Two, the first of which is followed by this.
    Two(After),
}
