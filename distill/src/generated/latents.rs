//! Samples that the teacher draws, kept as its network makes them: latents, and whatever is drawn after prompts.
//!
//! A sample's prompt and its scale of guidance follow from its seed, as those of a trajectory of the pool do. The student is told
//! both, and learns what the teacher draws with them.

use std::ops::Range;
use std::path::PathBuf;
use std::rc::Rc;

use candle_core::{DType, Device, Tensor};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use understudy_models::checkpoint::{read, write_with};
use understudy_models::rollout::{self, Row};
use understudy_models::schedule::ScheduleConfig;
use understudy_models::{Error, Result};

use super::{Known, Settings};
use crate::checkpoint::Snapshot;
use crate::data::hex;
use crate::estimate::timed_evaluation;
use crate::generate::Captions;
use crate::noised::Noise;
use crate::pool::step::step;
use crate::prompting::Prompting;
use crate::random::{self, Purpose};
use crate::teacher::Teacher;
use crate::training_batch::{BatchSource, Cost, TrainingBatch};

/// Training batches from samples that the teacher draws first.
pub struct Latents<'a> {
    teacher: &'a Teacher,
    prompting: Option<Rc<Prompting>>,
    settings: Settings,
    noise: Noise,
    drawn: usize,
    known: Known,
    /// All of them once they are drawn, f32 `[N, C, H, W]` on the CPU.
    samples: Option<Tensor>,
}

impl<'a> Latents<'a> {
    /// Training batches on the student's schedule. The settings tell no captions: they are drawn from `prompting`.
    ///
    /// # Errors
    /// [`Error::Value`] for fewer samples than a batch; as [`ScheduleConfig::schedule`].
    pub fn new(
        teacher: &'a Teacher,
        prompting: Option<Rc<Prompting>>,
        settings: Settings,
        schedule: &ScheduleConfig,
    ) -> Result<Self> {
        settings.check()?;
        let noise = Noise::new(schedule, settings.seed)?;
        let known = Known { name: "samples.sha256", sha256: None };
        Ok(Self { teacher, prompting, settings, noise, drawn: 0, known, samples: None })
    }

    /// The file of the samples from number `first`: f32 in the machine's order of bytes, sample after sample.
    fn place(&self, first: usize) -> PathBuf {
        self.settings.folder.join(format!("{first:08}.f32"))
    }

    /// The numbers of the samples that are drawn together, from `first`.
    fn together(&self, first: usize) -> Range<usize> {
        first..self.settings.count.min(first + self.settings.sampling.batch)
    }

    /// Numbers of one sample.
    fn length(&self) -> usize {
        let geometry = self.teacher.geometry();
        geometry.in_channels * geometry.height * geometry.width
    }

    /// Rows of the teacher's evaluations that a step of a sample takes.
    fn rows_each(&self) -> usize {
        if self.prompting.is_some() { 2 } else { 1 }
    }

    fn seeds(&self, numbers: impl Iterator<Item = usize>) -> Vec<u64> {
        numbers.map(|number| self.settings.sampling.seed(number)).collect()
    }

    /// Draws samples, unless they are there.
    fn draw(&self, numbers: Range<usize>) -> Result<()> {
        let path = self.place(numbers.start);
        if path.exists() {
            return Ok(());
        }
        let (network, seeds) = (self.teacher.network(), self.seeds(numbers));
        let mut x = rollout::start(self.teacher.geometry(), &seeds, network.device())?;
        // Like every walk, this is by a sampler that remembers nothing.
        for (position, evaluation) in self.settings.sampling.trajectory.iter().enumerate() {
            let row = |&seed: &u64| Row { seed, position, step: evaluation.step };
            let moves: Vec<Row> = seeds.iter().map(row).collect();
            let timesteps = vec![evaluation.timestep as usize; seeds.len()];
            x = step(self.teacher, self.prompting.as_deref(), x, timesteps, &moves)?.next;
        }
        let values: Vec<f32> = x.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        let folder = &self.settings.folder;
        std::fs::create_dir_all(folder)
            .map_err(|source| Error::Io { path: folder.clone(), source })?;
        write_with(&path, |file| std::io::Write::write_all(file, bytemuck::cast_slice(&values)))
    }

    /// The samples in the folder, which must be those that were drawn; and their SHA-256.
    fn read(&self) -> Result<(Tensor, String)> {
        let remedy = "remove the folder, and they are drawn again";
        let geometry = self.teacher.geometry();
        let mut hash = Sha256::new();
        let mut values: Vec<f32> = Vec::with_capacity(self.settings.count * self.length());
        for first in (0..self.settings.count).step_by(self.settings.sampling.batch) {
            let path = self.place(first);
            let bytes = self.together(first).len() * self.length() * size_of::<f32>();
            let found = read::whole(&path, bytes as u64)?;
            if found.len() != bytes {
                let value = format!("{} bytes, not {bytes}", found.len());
                return Err(Error::value(path.display().to_string(), value, remedy));
            }
            hash.update(&found);
            values.extend(bytemuck::pod_collect_to_vec::<u8, f32>(&found));
        }
        let sha256 = hex(&hash.finalize());
        if self.known.differ(&sha256) {
            let field = format!("the teacher's samples in {}", self.settings.folder.display());
            let value = "others than the checkpoint's training batches came from";
            return Err(Error::value(field, value, remedy));
        }
        let shape = (self.settings.count, geometry.in_channels, geometry.height, geometry.width);
        Ok((Tensor::from_vec(values, shape, &Device::Cpu)?, sha256))
    }
}

impl BatchSource for Latents<'_> {
    fn identity(&self) -> Map<String, Value> {
        let mut identity = self.settings.identity(self.teacher);
        identity.extend(self.prompting.iter().flat_map(|prompting| prompting.identity()));
        identity
    }

    fn cost(&mut self) -> Result<Cost> {
        let network = self.teacher.network();
        let rows = self.rows_each() * self.settings.sampling.batch;
        timed_evaluation(network, rows)?;
        let (_, seconds) = timed_evaluation(network, rows)?;
        let (mut sample, _) = timed_evaluation(network, self.settings.batch)?;
        sample.answer = sample.x.clone();
        let batch = self.settings.batch;
        sample.text.iter_mut().for_each(|text| text.guidance = Some(vec![0.0; batch]));
        let missing = |first: usize| match self.place(first).exists() {
            true => 0,
            false => self.together(first).len(),
        };
        let missing: usize =
            (0..self.settings.count).step_by(self.settings.sampling.batch).map(missing).sum();
        let prepare_rows =
            (missing * self.rows_each() * self.settings.sampling.trajectory.len()) as u64;
        let encoding = self.prompting.as_ref().map_or(Ok(0.0), |it| it.seconds())?;
        let table = self.prompting.as_ref().map_or(0, |it| it.bytes());
        let bytes = (self.settings.count * self.length() * size_of::<f32>()) as u64;
        Ok(Cost {
            prepare_rows,
            prepare_seconds: encoding + prepare_rows as f64 * seconds / rows as f64,
            batch_seconds: 0.0,
            memory_bytes: bytes,
            checkpoint_bytes: 0,
            disk_bytes: bytes + table,
            sample,
        })
    }

    fn prepare(&mut self) -> Result<Option<f64>> {
        if let Some(prompting) = &self.prompting {
            prompting.prepare()?;
        }
        if self.drawn < self.settings.count {
            let numbers = self.together(self.drawn);
            self.draw(numbers.clone())?;
            self.drawn = numbers.end;
            return Ok(Some(self.drawn as f64 / self.settings.count as f64));
        }
        if self.samples.is_none() {
            let (samples, sha256) = self.read()?;
            (self.samples, self.known.sha256) = (Some(samples), Some(sha256));
        }
        Ok(None)
    }

    fn training_batch(&mut self, step: u64) -> Result<TrainingBatch> {
        let Some(samples) = &self.samples else {
            return Err(Error::Weights("the samples are not drawn yet".into()));
        };
        let drawn = random::distinct(
            self.settings.seed,
            Purpose::Picture,
            step,
            self.settings.batch,
            self.settings.count,
        );
        let batch = self.noise.batch(samples, &drawn, step)?;
        let trajectories = self.seeds(drawn.into_iter());
        let text = self.prompting.as_ref();
        Ok(TrainingBatch {
            labels: trajectories.iter().map(|&seed| self.teacher.label(seed)).collect(),
            text: text.map(|it| it.conditions(&trajectories, &Device::Cpu)).transpose()?,
            ..batch
        })
    }

    fn captions(&self, count: usize) -> Result<Option<Captions>> {
        let prompting = self.prompting.as_ref();
        prompting.map(|it| it.captions(count, &Device::Cpu)).transpose()
    }

    fn teacher_evaluations(&self) -> u64 {
        (self.drawn * self.rows_each() * self.settings.sampling.trajectory.len()) as u64
    }

    fn save(&self, snapshot: &mut Snapshot) -> Result<()> {
        self.known.save(snapshot);
        Ok(())
    }

    fn restore(&mut self, snapshot: &Snapshot) -> Result<()> {
        self.known.restore(snapshot);
        Ok(())
    }
}
