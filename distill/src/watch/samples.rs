//! A grid of the student's samples: always the same seeds, so that one sees it learn.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use understudy_models::checkpoint::card::Card;
use understudy_models::sampler::{self, Kind};
use understudy_models::schedule::ScheduleConfig;
use understudy_models::{Conditioning, Denoiser, Image, Result};

use crate::generate::{Classes, Sampling};
use crate::picture;
use crate::student::Student;

/// DDIM steps of a sample, of a model that is not made for fewer.
const STEPS: usize = 20;
const ROWS: usize = 2;

/// Two rows of samples, a column per class (at most ten); nothing of a network whose answers are no pictures. With the
/// same classes every network gets the same noise.
///
/// # Errors
/// Samples that are not finite, and whatever the device says.
pub fn sample_grid(
    network: &dyn Denoiser,
    schedule: &ScheduleConfig,
    card: &Card,
) -> Result<Option<Image>> {
    let geometry = network.geometry();
    let columns = match geometry.conditioning {
        Conditioning::Classes(classes) => classes.clamp(1, 10),
        _ => 8,
    };
    let steps = card.evaluations.first().copied().unwrap_or(STEPS).min(schedule.train_timesteps());
    let learned = geometry.learned_variance();
    let sampling = Sampling {
        trajectory: sampler::trajectory(schedule, Kind::Ddim, steps, 0.0, learned)?,
        classes: Classes::all(geometry.conditioning, card.null_class)?,
        first_seed: 0,
        batch: columns,
    };
    let mut images = Vec::new();
    for batch in sampling.batches(network, 0..ROWS * columns) {
        images.extend(batch?.images()?);
    }
    // Latents of more channels are no pictures.
    Ok(picture::grid(&images, columns).filter(|grid| matches!(grid.channels, 1 | 3)))
}

/// Writes the samples of a student with these weights to `path`.
pub(crate) fn grid(
    student: &Student,
    weights: HashMap<String, Tensor>,
    card: &Card,
    device: &Device,
    path: &Path,
) -> Result<()> {
    // Weights without gradients: the network is compiled.
    let network = student.config.load(weights, DType::F32, device)?;
    match sample_grid(network.as_ref(), &student.schedule, card)? {
        Some(grid) => picture::write(path, &grid),
        None => Ok(()),
    }
}
