//! Ordinary training: images, noised, and the noise to be found (Ho et al. 2020, Algorithm 1).

use std::time::Instant;

use candle_core::{Device, Tensor};
use serde_json::{Map, Value};
use understudy_models::schedule::{Class, ScheduleConfig};
use understudy_models::{Conditioning, Error, Geometry, NetworkConfig, Result, noise};

use crate::data::Images;
use crate::random::{self, Purpose};
use crate::training_batch::{BatchSource, Cost, TrainingBatch};

/// Training batches from images: `x_t = sqrt(alpha_bar_t)·x0 + sqrt(1 − alpha_bar_t)·eps`, t uniform, and eps the
/// answer. Draws are a function of the run's seed and the step, so there is no state.
pub struct Noised {
    /// Of the images as they were given.
    sha256: String,
    images: Images,
    noise: Noise,
    classes: bool,
    batch: usize,
    seed: u64,
}

impl Noised {
    /// Training batches of `batch` images, which are padded to the network's size.
    ///
    /// # Errors
    /// [`Error::Value`] for images that do not fit the network; for a class-conditional network, images
    /// without classes or with more than it has; for fewer images than a batch.
    pub fn new(
        images: Images,
        network: &NetworkConfig,
        schedule: &ScheduleConfig,
        batch: usize,
        seed: u64,
    ) -> Result<Self> {
        let geometry = network.geometry();
        check_variance(&geometry)?;
        let sha256 = images.sha256();
        let images = images.fit("data", geometry.in_channels, geometry.height, geometry.width)?;
        let classes = takes_classes(&images, geometry.conditioning)?;
        check_count(&images, batch)?;
        Ok(Self { sha256, images, noise: Noise::new(schedule, seed)?, classes, batch, seed })
    }
}

/// The noise of a run's training batches.
pub(crate) struct Noise {
    /// sqrt(alpha_bar) and sqrt(1 − alpha_bar) of every timestep.
    levels: Vec<(f32, f32)>,
    seed: u64,
}

/// What was done to clean samples, by row.
struct Noising {
    timesteps: Vec<usize>,
    /// The noise, row after row.
    eps: Vec<f32>,
    /// Its seeds.
    seeds: Vec<u64>,
}

impl Noise {
    /// That of a schedule's timesteps and a run's seed.
    ///
    /// # Errors
    /// As [`ScheduleConfig::schedule`].
    pub(crate) fn new(schedule: &ScheduleConfig, seed: u64) -> Result<Self> {
        let level = |alpha_bar: &f64| (alpha_bar.sqrt() as f32, (1.0 - alpha_bar).sqrt() as f32);
        let levels = schedule.schedule(Class::Ddpm)?.alpha_bar.iter().map(level).collect();
        Ok(Self { levels, seed })
    }

    /// The training batch of iteration `step` of these of some clean samples, f32 `[N, C, H, W]` on the CPU, told nothing.
    ///
    /// # Errors
    /// Numbers of samples that there are not.
    pub(crate) fn batch(
        &self,
        samples: &Tensor,
        numbers: &[usize],
        step: u64,
    ) -> Result<TrainingBatch> {
        let rows: Vec<u32> = numbers.iter().map(|&number| number as u32).collect();
        let clean = samples.index_select(&Tensor::new(rows, &Device::Cpu)?, 0)?;
        let shape = clean.dims().to_vec();
        let length = shape[1..].iter().product();
        let mut x: Vec<f32> = clean.flatten_all()?.to_vec1()?;
        let Noising { timesteps, eps, seeds } = self.onto(&mut x, length, step);
        Ok(TrainingBatch {
            x: Tensor::from_vec(x, &shape[..], &Device::Cpu)?,
            timesteps,
            labels: None,
            text: None,
            answer: Tensor::from_vec(eps, &shape[..], &Device::Cpu)?,
            seeds,
        })
    }

    /// Noises the clean samples of iteration `step`, rows of `length` numbers.
    fn onto(&self, x: &mut [f32], length: usize, step: u64) -> Noising {
        let mut eps = vec![0.0; x.len()];
        let (mut timesteps, mut seeds) = (Vec::new(), Vec::new());
        let rows = x.chunks_exact_mut(length).zip(eps.chunks_exact_mut(length));
        for (row, (x, eps)) in (0..).zip(rows) {
            let t = random::below(self.seed, Purpose::Timestep, step, row, self.levels.len());
            let noise_seed = random::number(self.seed, Purpose::Noise, step, row);
            noise::normal(noise_seed, 0, eps);
            let (alpha, s) = self.levels[t];
            x.iter_mut().zip(eps).for_each(|(x, eps)| *x = alpha * *x + s * *eps);
            timesteps.push(t);
            seeds.push(noise_seed);
        }
        Noising { timesteps, eps, seeds }
    }
}

/// Refuses a network that tells a variance, which images do not teach.
pub(crate) fn check_variance(geometry: &Geometry) -> Result<()> {
    if geometry.out_channels == geometry.in_channels {
        return Ok(());
    }
    let remedy = format!("training on images needs {}, a fixed variance", geometry.in_channels);
    Err(Error::value("out_channels", geometry.out_channels, remedy))
}

/// Whether a network is told the images' classes.
///
/// # Errors
/// [`Error::Value`] for images without classes or with more than it has, and for a network that is told something else.
pub(crate) fn takes_classes(images: &Images, conditioning: Conditioning) -> Result<bool> {
    let (field, value) = match conditioning {
        Conditioning::None => return Ok(false),
        Conditioning::Classes(classes) => return check_classes(images, classes).map(|()| true),
        Conditioning::TextTime { .. } => ("addition_embed_type", "text_time"),
        Conditioning::Timestep | Conditioning::Embedding(_) => {
            ("class_embed_type", "a number or an embedding")
        }
    };
    Err(Error::value(field, value, "train one that is unconditional or conditioned on classes"))
}

/// Refuses fewer images than a batch has.
pub(crate) fn check_count(images: &Images, batch: usize) -> Result<()> {
    if images.len() >= batch {
        return Ok(());
    }
    Err(Error::value(
        "data",
        format!("{} images", images.len()),
        format!("a batch has {batch}; take more images or a smaller --batch"),
    ))
}

fn check_classes(images: &Images, classes: usize) -> Result<()> {
    let (found, remedy) = match &images.labels {
        None => ("without classes".to_string(), "give each class a subfolder"),
        Some(_) if images.classes() > classes => (
            format!("of {} classes", images.classes()),
            "raise num_class_embeds, or leave some out",
        ),
        Some(_) => return Ok(()),
    };
    Err(Error::value("data", found, format!("the network has {classes} classes; {remedy}")))
}

impl BatchSource for Noised {
    fn identity(&self) -> Map<String, Value> {
        [
            ("images".into(), self.images.len().into()),
            ("data_sha256".into(), self.sha256.clone().into()),
        ]
        .into_iter()
        .collect()
    }

    fn cost(&mut self) -> Result<Cost> {
        let began = Instant::now();
        let sample = self.training_batch(1)?;
        Ok(Cost {
            prepare_rows: 0,
            prepare_seconds: 0.0,
            batch_seconds: began.elapsed().as_secs_f64(),
            memory_bytes: 0,
            checkpoint_bytes: 0,
            disk_bytes: 0,
            sample,
        })
    }

    fn prepare(&mut self) -> Result<Option<f64>> {
        Ok(None)
    }

    fn training_batch(&mut self, step: u64) -> Result<TrainingBatch> {
        let Self { seed, batch, .. } = *self;
        let drawn = random::distinct(seed, Purpose::Picture, step, batch, self.images.len());
        let mut x: Vec<f32> = self.images.batch(&drawn, &Device::Cpu)?.flatten_all()?.to_vec1()?;
        let length = x.len() / batch;
        let Noising { timesteps, eps, seeds } = self.noise.onto(&mut x, length, step);
        let labels = self.images.labels.as_ref().filter(|_| self.classes);
        let labels = labels.map(|labels| drawn.iter().map(|&index| labels[index]).collect());
        let geometry = (batch, self.images.channels, self.images.height, self.images.width);
        Ok(TrainingBatch {
            x: Tensor::from_vec(x, geometry, &Device::Cpu)?,
            timesteps,
            labels,
            text: None,
            answer: Tensor::from_vec(eps, geometry, &Device::Cpu)?,
            seeds,
        })
    }
}
