//! The stages of an image: its prompt is read, the image that it begins with becomes a latent, its latent is denoised, what
//! comes of it decoded.

use std::ops::{Index, IndexMut};

use serde::{Deserialize, Serialize};

/// What an evaluation is of. A model without a text encoder or an autoencoder leaves those stages out, and so does an image that
/// begins with none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The text encoder's, of prompts.
    Encode,
    /// The autoencoder's, of images that samples begin with.
    Embed,
    /// The network's, of noisy samples.
    Denoise,
    /// The decoder's, of clean latents.
    Decode,
}

impl Stage {
    /// All, in their order.
    pub const ALL: [Self; 4] = [Self::Encode, Self::Embed, Self::Denoise, Self::Decode];

    /// The name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Encode => "encode",
            Self::Embed => "embed",
            Self::Denoise => "denoise",
            Self::Decode => "decode",
        }
    }
}

/// One thing for each stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PerStage<T>([T; 4]);

impl<T> PerStage<T> {
    /// What `of` says of each.
    pub fn new(of: impl FnMut(Stage) -> T) -> Self {
        Self(Stage::ALL.map(of))
    }

    /// Each with its stage, in their order.
    pub fn iter(&self) -> impl Iterator<Item = (Stage, &T)> {
        Stage::ALL.into_iter().zip(&self.0)
    }
}

impl<T> Index<Stage> for PerStage<T> {
    type Output = T;

    fn index(&self, stage: Stage) -> &T {
        &self.0[stage as usize]
    }
}

impl<T> IndexMut<Stage> for PerStage<T> {
    fn index_mut(&mut self, stage: Stage) -> &mut T {
        &mut self.0[stage as usize]
    }
}
