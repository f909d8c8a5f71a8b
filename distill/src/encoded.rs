//! Ordinary training of a latent model: pictures that an autoencoder makes latents of, noised, and the noise to be found.
//!
//! A text-to-image model is told the pictures' captions; one in ten is shown without, so that the model can be guided away from what
//! it draws after no prompt (Ho & Salimans 2022, arXiv 2207.12598). A picture's latent is the likeliest one.

use std::path::PathBuf;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use serde_json::{Map, Value};
use understudy_models::autoencoder::Encoder;
use understudy_models::schedule::ScheduleConfig;
use understudy_models::{Error, Geometry, Result};

use crate::data::Images;
use crate::estimate::blank;
use crate::generate::Captions;
use crate::noised::{Noise, check_count, check_variance, takes_classes};
use crate::prompting::{Prompting, files_sha256};
use crate::random::{self, Purpose};
use crate::training_batch::{BatchSource, Cost, TextConditions, TrainingBatch};

/// Pictures that are encoded together.
const TOGETHER: usize = 16;
/// One picture in so many is shown without its caption.
const UNCAPTIONED: usize = 10;

/// Training batches from pictures.
pub struct Encoded {
    /// Of the pictures as they were given, of their captions, and of what makes latents of them.
    sha256: [String; 3],
    images: Images,
    encoder: Encoder,
    captions: Option<(Prompting, Vec<Option<usize>>)>,
    geometry: Geometry,
    noise: Noise,
    classes: bool,
    batch: usize,
    seed: u64,
    latents: Vec<Tensor>,
    /// All of them, f32 `[N, C, H, W]` on the CPU.
    samples: Option<Tensor>,
}

impl Encoded {
    /// Training batches of `batch` pictures for a network of these shapes, told `captions`: the prompts, and which of them each picture
    /// has. The encoder comes with its files, by which a run that goes on knows it again.
    ///
    /// # Errors
    /// As [`Noised::new`](crate::noised::Noised::new), of pictures of the autoencoder's size; [`Error::Value`] for a network that takes
    /// the guidance scale as an input, which pictures do not teach.
    pub fn new(
        images: Images,
        (encoder, files): (Encoder, &[PathBuf]),
        captions: Option<(Prompting, Vec<Option<usize>>)>,
        (geometry, schedule): (Geometry, &ScheduleConfig),
        batch: usize,
        seed: u64,
    ) -> Result<Self> {
        if geometry.guidance {
            let remedy = "a network that takes the guidance scale as an input learns from a teacher (`understudy distill`); set it to null";
            return Err(Error::value("time_cond_proj_dim", "a number", remedy));
        }
        check_variance(&geometry)?;
        let sha256 = [images.sha256(), images.captions_sha256(), files_sha256(files)?];
        let [channels, height, width] = encoder.image_shape();
        let images = images.fit("data", channels, height, width)?;
        let classes = takes_classes(&images, geometry.conditioning)?;
        check_count(&images, batch)?;
        let noise = Noise::new(schedule, seed)?;
        let latents = Vec::new();
        Ok(Self {
            sha256,
            images,
            encoder,
            captions,
            geometry,
            noise,
            classes,
            batch,
            seed,
            latents,
            samples: None,
        })
    }

    /// The latents of the next pictures, f32 on the CPU; of fewer at the end.
    fn encode(&self, first: usize) -> Result<Tensor> {
        let last = self.images.len().min(first + TOGETHER);
        let numbers: Vec<usize> = (first..last).collect();
        let pictures = self.images.batch(&numbers, self.encoder.device())?;
        let latents = self.encoder.forward(&pictures.to_dtype(self.encoder.dtype())?)?;
        Ok(latents.mode().to_dtype(DType::F32)?.to_device(&Device::Cpu)?)
    }

    /// Numbers of a latent.
    fn length(&self) -> usize {
        self.geometry.in_channels * self.geometry.height * self.geometry.width
    }
}

impl BatchSource for Encoded {
    fn identity(&self) -> Map<String, Value> {
        let [images, captions, autoencoder] = &self.sha256;
        let mut identity = Map::new();
        identity.insert("images".into(), self.images.len().into());
        identity.insert("data_sha256".into(), images.clone().into());
        identity.insert("autoencoder_sha256".into(), autoencoder.clone().into());
        if let Some((prompting, _)) = &self.captions {
            identity.insert("captions_sha256".into(), captions.clone().into());
            identity.extend(prompting.identity());
        }
        identity
    }

    fn cost(&mut self) -> Result<Cost> {
        // The first of a size is slower than those after it.
        self.encode(0)?;
        let began = Instant::now();
        let rows = self.encode(0)?.dim(0)?;
        let each = began.elapsed().as_secs_f64() / rows as f64;
        let prompting = self.captions.as_ref().map(|(prompting, _)| prompting);
        let shape =
            (self.batch, self.geometry.in_channels, self.geometry.height, self.geometry.width);
        let x = Tensor::zeros(shape, DType::F32, &Device::Cpu)?;
        Ok(Cost {
            prepare_rows: 0,
            prepare_seconds: each * self.images.len() as f64
                + prompting.map_or(Ok(0.0), Prompting::seconds)?,
            batch_seconds: 0.0,
            memory_bytes: (self.images.len() * self.length() * size_of::<f32>()) as u64,
            checkpoint_bytes: 0,
            disk_bytes: prompting.map_or(0, Prompting::bytes),
            sample: TrainingBatch {
                answer: x.clone(),
                x,
                timesteps: vec![0; self.batch],
                labels: self.classes.then(|| vec![0; self.batch]),
                text: blank(&self.geometry, self.batch, &Device::Cpu)?,
                seeds: vec![0; self.batch],
            },
        })
    }

    // A resumed run encodes them anew, to the same bits.
    fn prepare(&mut self) -> Result<Option<f64>> {
        if self.samples.is_some() {
            return Ok(None);
        }
        if let Some((prompting, _)) = &self.captions {
            prompting.prepare()?;
        }
        let done = self.latents.len() * TOGETHER;
        if done < self.images.len() {
            self.latents.push(self.encode(done)?);
            let done = self.latents.len() * TOGETHER;
            return Ok(Some((done as f64 / self.images.len() as f64).min(1.0)));
        }
        self.samples = Some(Tensor::cat(&self.latents, 0)?);
        self.latents.clear();
        Ok(None)
    }

    fn training_batch(&mut self, step: u64) -> Result<TrainingBatch> {
        let Some(samples) = &self.samples else {
            return Err(Error::Weights("the pictures are not encoded yet".into()));
        };
        let drawn =
            random::distinct(self.seed, Purpose::Picture, step, self.batch, self.images.len());
        let told = |(prompting, captions): &(Prompting, Vec<Option<usize>>)| {
            let shown = |(row, &picture): (u64, &usize)| {
                let kept = random::below(self.seed, Purpose::Uncaptioned, step, row, UNCAPTIONED);
                captions[picture].filter(|_| kept > 0)
            };
            let shown: Vec<Option<usize>> = (0..).zip(&drawn).map(shown).collect();
            let prompts = prompting.of_prompts(&shown, &Device::Cpu)?;
            Ok::<_, Error>(TextConditions { prompts, guidance: None })
        };
        let labels = self.images.labels.as_ref().filter(|_| self.classes);
        Ok(TrainingBatch {
            labels: labels.map(|labels| drawn.iter().map(|&picture| labels[picture]).collect()),
            text: self.captions.as_ref().map(told).transpose()?,
            ..self.noise.batch(samples, &drawn, step)?
        })
    }

    fn captions(&self, count: usize) -> Result<Option<Captions>> {
        let captions = self.captions.as_ref();
        captions.map(|(prompting, _)| prompting.captions(count, &Device::Cpu)).transpose()
    }
}
