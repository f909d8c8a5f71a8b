//! One denoising step of a batch of samples: where they start, what each makes of the network's answer, and whether that
//! answer is made of numbers.
//!
//! Whoever has samples in flight (a server, a pool, a generator) asks the network between two steps as it likes; what
//! happens to a sample is the same everywhere, and does not depend on the others.

use candle_core::{Device, Result, Tensor};

use crate::sampler::{self, Advanced, Step};
use crate::{Geometry, noise};

/// A sample about to take a step.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// Of its noise.
    pub seed: u64,
    /// Steps that it has taken.
    pub position: usize,
    /// What it does with the answer.
    pub step: Step,
}

/// A step that no trajectory is as long as.
const VARIATION: u64 = (1 << 63) - 1;

/// Where samples with these seeds start: f32 `[B, in_channels, height, width]`, N(0, I).
///
/// # Errors
/// Whatever the device says.
pub fn start(geometry: &Geometry, seeds: &[u64], device: &Device) -> Result<Tensor> {
    // Step 0 of a sample's noise is where it starts.
    draw(geometry, seeds.iter().map(|&seed| Some((seed, 0))), device)
}

/// What the latents of images vary by, of samples with these seeds: f32 `[B, in_channels, height, width]`, N(0, I), none of
/// which any step draws.
///
/// # Errors
/// Whatever the device says.
pub fn variation(geometry: &Geometry, seeds: &[u64], device: &Device) -> Result<Tensor> {
    draw(geometry, seeds.iter().map(|&seed| Some((seed, VARIATION))), device)
}

/// Every sample after its step; `x` is f32 `[B, in_channels, height, width]`, `memory` what [`sampler::empty_memory`]
/// gave or the last step, `answer` f32 `[B, out_channels, height, width]`. Noise is drawn for the samples whose step adds some.
///
/// # Errors
/// Tensors that do not fit; whatever the device says.
pub fn advance(
    geometry: &Geometry,
    x: &Tensor,
    memory: &Tensor,
    answer: &Tensor,
    rows: &[Row],
) -> Result<Advanced> {
    let steps: Vec<Step> = rows.iter().map(|row| row.step).collect();
    let noise = match steps.iter().any(Step::needs_noise) {
        true => {
            let of_row =
                |row: &Row| row.step.needs_noise().then_some((row.seed, row.position as u64 + 1));
            Some(draw(geometry, rows.iter().map(of_row), x.device())?)
        }
        false => None,
    };
    sampler::advance(x, memory, answer, noise.as_ref(), &steps)
}

/// The noise of each sample at a step of its; zeros where it has none.
fn draw(
    geometry: &Geometry,
    steps: impl ExactSizeIterator<Item = Option<(u64, u64)>>,
    device: &Device,
) -> Result<Tensor> {
    let Geometry { in_channels, height, width, .. } = *geometry;
    let shape = (steps.len(), in_channels, height, width);
    let elements = in_channels * height * width;
    let mut values = vec![0.0; steps.len() * elements];
    for (step, values) in steps.zip(values.chunks_exact_mut(elements)) {
        if let Some((seed, step)) = step {
            noise::normal(seed, step, values);
        }
    }
    Tensor::from_vec(values, shape, device)
}

/// What tells whether the rows of a tensor are numbers. A device may not have worked it out yet.
#[derive(Debug, Clone)]
pub struct FiniteCheck(Tensor);

impl FiniteCheck {
    /// Of f32 `[B, …]`.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn new(rows: &Tensor) -> Result<Self> {
        // NaN and infinity survive a sum.
        Ok(Self(rows.flatten_from(1)?.sum(1)?))
    }

    /// Waits for the device: whether each row is finite.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn rows(&self) -> Result<Vec<bool>> {
        let sums: Vec<f32> = self.0.to_vec1()?;
        Ok(sums.into_iter().map(f32::is_finite).collect())
    }

    /// Waits for the device: the first row that is not finite.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn first_bad(&self) -> Result<Option<usize>> {
        Ok(self.rows()?.iter().position(|finite| !finite))
    }
}
