//! What every feature network answers.

use candle_core::{Result, Tensor};

/// What a network sees in a batch of images, f32.
#[derive(Debug, Clone)]
pub struct Observed {
    /// `[B, width]`: what distances are measured in.
    pub features: Tensor,
    /// `[B, classes]`: scores before the softmax.
    pub logits: Tensor,
}

/// A network whose inner features tell images apart.
pub trait FeatureNetwork: Send + Sync {
    /// Its name, which is in statistics files and in the distance's name.
    fn name(&self) -> &str;

    /// The name of the Fréchet distance in its features: `FID` for the Inception network that this name
    /// belongs to, `FD-…` for every other.
    fn distance(&self) -> String {
        format!("FD-{}", self.name())
    }

    /// Features per image.
    fn width(&self) -> usize;

    /// Channels, height and width of the images it takes; smaller ones are padded, see
    /// [`crate::data::Images::fit`]. `None`: gray or RGB, of any size, which it resizes itself.
    fn input(&self) -> Option<(usize, usize, usize)>;

    /// How many classes it knows, where they are those that images are conditioned on.
    fn classes(&self) -> Option<usize> {
        None
    }

    /// Images to look at together: enough to be fast, few enough for its patches to fit in memory.
    fn batch(&self) -> usize;

    /// Looks at images f32 `[B, C, H, W]`, `byte/127.5 − 1`.
    ///
    /// # Errors
    /// Another shape, and whatever the device says.
    fn observe(&self, images: &Tensor) -> Result<Observed>;
}
