//! A grid of the student's samples: always the same seeds, so that one sees it learn.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use understudy_models::sampler::{self, Kind};
use understudy_models::{Conditioning, Result};

use crate::generate::{Classes, Sampling};
use crate::picture;
use crate::student::Student;

/// DDIM steps of a sample.
const STEPS: usize = 20;
const ROWS: usize = 2;

/// Draws `ROWS` rows, a column per class (at most ten), and writes them to `path`.
pub(crate) fn grid(
    student: &Student,
    weights: HashMap<String, Tensor>,
    null_class: Option<u32>,
    device: &Device,
    path: &Path,
) -> Result<()> {
    // Weights without gradients: the network is compiled.
    let network = student.config.load(weights, DType::F32, device)?;
    let geometry = network.geometry();
    let columns = match geometry.conditioning {
        Conditioning::Classes(classes) => classes.clamp(1, 10),
        _ => 8,
    };
    let steps = STEPS.min(student.schedule.train_timesteps());
    let learned = geometry.learned_variance();
    let sampling = Sampling {
        trajectory: sampler::trajectory(&student.schedule, Kind::Ddim, steps, 0.0, learned)?,
        classes: Classes::all(geometry.conditioning, null_class)?,
        first_seed: 0,
        batch: columns,
    };
    let mut images = Vec::new();
    for batch in sampling.batches(network.as_ref(), 0..ROWS * columns) {
        images.extend(batch?.images()?);
    }
    match picture::grid(&images, columns) {
        // Latents of more channels are no pictures.
        Some(grid) if matches!(grid.channels, 1 | 3) => picture::write(path, &grid),
        _ => Ok(()),
    }
}
