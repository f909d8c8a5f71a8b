//! What a student is shown in one iteration.

use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor};
use serde_json::{Map, Value};
use understudy_models::{Conditions, Denoiser};

use crate::checkpoint::Snapshot;
use crate::generate::Captions;

/// Noisy samples, each at its own time, and the answers that are to be learned.
#[derive(Debug, Clone)]
pub struct TrainingBatch {
    /// x_t, f32 `[B, C, H, W]`.
    pub x: Tensor,
    /// t of each row, whole training timesteps.
    pub timesteps: Vec<usize>,
    /// The class of each row, for class-conditional networks.
    pub labels: Option<Vec<u32>>,
    /// What text-to-image networks are told.
    pub text: Option<TextConditions>,
    /// The teacher's raw answer, `[B, C, H, W]`, or `[B, 2C, H, W]` with the variance half second.
    pub answer: Tensor,
    /// The seed each row came from, for messages.
    pub seeds: Vec<u64>,
}

/// What text-to-image networks are told beside the noisy sample and its time.
#[derive(Debug, Clone)]
pub struct TextConditions {
    /// The states of each row's prompt, f32 `[B, tokens, width]`.
    pub prompts: Tensor,
    /// How far each row is guided, for networks that take a scale: the scale less one.
    pub guidance: Option<Vec<f32>>,
}

impl TextConditions {
    /// Those of some rows.
    ///
    /// # Errors
    /// Rows that there are not.
    pub(crate) fn part(&self, rows: Range<usize>) -> Result<Self> {
        let prompts = self.prompts.narrow(0, rows.start, rows.len())?;
        Ok(Self { prompts, guidance: self.guidance.as_ref().map(|scales| scales[rows].to_vec()) })
    }
}

impl TrainingBatch {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.timesteps.len()
    }

    /// The timesteps as a network takes them, f32 `[B]`.
    pub fn times(&self, device: &Device) -> Result<Tensor> {
        let times: Vec<f32> = self.timesteps.iter().map(|&t| t as f32).collect();
        Tensor::new(times, device)
    }

    /// The classes as a network takes them, u32 `[B]`.
    pub fn condition(&self, device: &Device) -> Result<Option<Tensor>> {
        self.labels.as_ref().map(|labels| Tensor::new(&labels[..], device)).transpose()
    }

    /// A network's raw answer, in its own type; the batch is on its device.
    ///
    /// # Errors
    /// Conditions that the network does not take; whatever the device says.
    pub fn ask(&self, network: &dyn Denoiser) -> Result<Tensor> {
        let device = network.device();
        let (times, condition) = (self.times(device)?, self.condition(device)?);
        let text = self.text.as_ref();
        let guidance = text.and_then(|text| text.guidance.as_ref());
        let guidance = guidance.map(|scales| Tensor::new(&scales[..], device)).transpose()?;
        let conditions = Conditions {
            condition: condition.as_ref(),
            prompt: text.map(|text| &text.prompts),
            guidance: guidance.as_ref(),
        };
        network.evaluate(&self.x.to_dtype(network.dtype())?, &times, conditions)
    }

    /// What a network that takes no scale answers, f32 `[B, C, H, W]`, told each of two prompts a row, f32 `[B, tokens, width]`:
    /// `2·B` rows, those of the first prompts first.
    ///
    /// # Errors
    /// As [`TrainingBatch::ask`].
    pub(crate) fn ask_both(&self, network: &dyn Denoiser, prompts: [&Tensor; 2]) -> Result<Self> {
        let x = Tensor::cat(&[&self.x, &self.x], 0)?;
        let mut both = Self {
            answer: x.clone(),
            x,
            timesteps: self.timesteps.repeat(2),
            labels: None,
            text: Some(TextConditions { prompts: Tensor::cat(&prompts, 0)?, guidance: None }),
            seeds: self.seeds.repeat(2),
        };
        both.answer = both.ask(network)?.to_dtype(DType::F32)?;
        Ok(both)
    }

    /// The same training batch on a device.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let (x, answer) = (self.x.to_device(device)?, self.answer.to_device(device)?);
        let mut text = self.text.clone();
        if let Some(text) = &mut text {
            text.prompts = text.prompts.to_device(device)?;
        }
        Ok(Self { x, answer, text, ..self.clone() })
    }

    /// Part `index` of `parts` of equal size.
    ///
    /// # Errors
    /// Rows that `parts` does not divide.
    pub fn part(&self, index: usize, parts: usize) -> Result<Self> {
        let rows = self.rows() / parts;
        let range = index * rows..(index + 1) * rows;
        Ok(Self {
            text: self.text.as_ref().map(|text| text.part(range.clone())).transpose()?,
            x: self.x.narrow(0, range.start, rows)?,
            timesteps: self.timesteps[range.clone()].to_vec(),
            labels: self.labels.as_ref().map(|labels| labels[range.clone()].to_vec()),
            answer: self.answer.narrow(0, range.start, rows)?,
            seeds: self.seeds[range].to_vec(),
        })
    }
}

/// What training batches take.
#[derive(Debug, Clone)]
pub struct Cost {
    /// Evaluations of the teacher, in rows, before the first one.
    pub prepare_rows: u64,
    /// What they take.
    pub prepare_seconds: f64,
    /// What each takes.
    pub batch_seconds: f64,
    /// Memory that they are going to take and have not yet.
    pub memory_bytes: u64,
    /// What they add to a checkpoint.
    pub checkpoint_bytes: u64,
    /// What they keep on the disk beside it.
    pub disk_bytes: u64,
    /// One like them, which teaches nothing.
    pub sample: TrainingBatch,
}

/// Where training batches come from. Its state goes into checkpoints, so that a resumed run sees the same ones.
pub trait BatchSource {
    /// What the training batches are made from, by content: another value means other training batches.
    fn identity(&self) -> Map<String, Value>;

    /// Tells what the training batches take, as measured here.
    ///
    /// # Errors
    /// As [`BatchSource::training_batch`].
    fn cost(&mut self) -> understudy_models::Result<Cost>;

    /// Does a part of what must be done before the first training batch, and tells how much of all is done, from
    /// 0 to 1; nothing once everything is.
    ///
    /// # Errors
    /// As [`BatchSource::training_batch`].
    fn prepare(&mut self) -> understudy_models::Result<Option<f64>>;

    /// The training batch of iteration `step`, of `rows` rows.
    ///
    /// # Errors
    /// What the teacher's evaluation says; a teacher's answer that is not finite, with its seed.
    fn training_batch(&mut self, step: u64) -> understudy_models::Result<TrainingBatch>;

    /// What samples that are looked at are told, once everything is prepared: `count` captions at most; nothing of a source
    /// without text.
    ///
    /// # Errors
    /// As [`BatchSource::training_batch`].
    fn captions(&self, _count: usize) -> understudy_models::Result<Option<Captions>> {
        Ok(None)
    }

    /// Images that the teacher drew of late, `count` at most: f32 `[N, C, H, W]`, and the seed of each; nothing of a source
    /// that has none.
    ///
    /// # Errors
    /// Whatever the device says.
    fn images(&self, _count: usize) -> understudy_models::Result<Option<(Tensor, Vec<u64>)>> {
        Ok(None)
    }

    /// Network evaluations of the teacher so far, counted in rows; none of a source without a teacher.
    fn teacher_evaluations(&self) -> u64 {
        0
    }

    /// Writes the state; nothing of a source whose training batches follow from the iteration alone.
    ///
    /// # Errors
    /// When it cannot be brought to disk.
    fn save(&self, _snapshot: &mut Snapshot) -> understudy_models::Result<()> {
        Ok(())
    }

    /// Tells that the snapshot last saved to is on disk.
    fn keep(&mut self) {}

    /// Reads the state back.
    ///
    /// # Errors
    /// A snapshot that holds something else.
    fn restore(&mut self, _snapshot: &Snapshot) -> understudy_models::Result<()> {
        Ok(())
    }
}
