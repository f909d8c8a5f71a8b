//! A grid of the student's samples: always the same seeds, so that one sees it learn.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use understudy_models::autoencoder::Decoder;
use understudy_models::checkpoint::{ModelFolder, card::Card};
use understudy_models::sampler::{self, Kind};
use understudy_models::schedule::ScheduleConfig;
use understudy_models::{Conditioning, Denoiser, Image, Result};

use crate::generate::{Captions, Classes, Sampling};
use crate::picture;
use crate::student::Student;

/// DDIM steps of a sample, of a model that is not made for fewer.
const STEPS: usize = 20;
const ROWS: usize = 2;

/// Most columns of samples after prompts.
pub(crate) const GRID_CAPTIONS: usize = 8;

/// Two rows of samples, a column per class (at most ten) or per caption; nothing of a network whose answers are no
/// pictures. With the same classes and captions every network gets the same noise. Latents are made pictures of by `decoder`.
///
/// # Errors
/// Samples that are not finite, and whatever the device says.
pub fn sample_grid(
    network: &dyn Denoiser,
    decoder: Option<&Decoder>,
    captions: Option<Captions>,
    (schedule, card): (&ScheduleConfig, &Card),
) -> Result<Option<Image>> {
    let columns = match (&captions, network.geometry().conditioning) {
        (Some(captions), _) => captions.texts.len(),
        (None, Conditioning::Classes(classes)) => classes.clamp(1, 10),
        (None, _) => GRID_CAPTIONS,
    };
    let sampling = Sampling { captions, ..sampling(network, schedule, card, columns)? };
    let mut images = Vec::new();
    for batch in sampling.batches(network, 0..ROWS * columns) {
        images.extend(batch?.images(decoder)?);
    }
    // Latents of more channels are no pictures.
    Ok(picture::grid(&images, columns).filter(|grid| matches!(grid.channels, 1 | 3)))
}

/// How samples that are looked at are made, `columns` together.
fn sampling(
    network: &dyn Denoiser,
    schedule: &ScheduleConfig,
    card: &Card,
    columns: usize,
) -> Result<Sampling> {
    let geometry = network.geometry();
    let steps = card.evaluations.first().copied().unwrap_or(STEPS).min(schedule.train_timesteps());
    let learned = geometry.learned_variance();
    Ok(Sampling {
        trajectory: sampler::trajectory(schedule, Kind::Ddim, steps, 0.0, learned)?,
        classes: Classes::all(geometry.conditioning, card.null_class)?,
        captions: None,
        first_seed: 0,
        batch: columns,
    })
}

/// Writes the samples of a student with these weights to `path`: after `captions`, where it draws after text.
pub(crate) fn grid(
    student: &Student,
    weights: HashMap<String, Tensor>,
    card: &Card,
    captions: Option<Captions>,
    device: &Device,
    path: &Path,
) -> Result<()> {
    // Weights without gradients: the network is compiled.
    let network = student.config.load(weights, DType::F32, device)?;
    let network = network.as_ref();
    let decoder = match &student.around {
        Some(around) => ModelFolder::open(around)?.decoder(DType::F32, device)?,
        None => None,
    };
    let grid = sample_grid(network, decoder.as_ref(), captions, (&student.schedule, card));
    match grid? {
        Some(grid) => picture::write(path, &grid),
        None => Ok(()),
    }
}
