//! Images that the teacher draws, kept as pictures.

use std::path::PathBuf;

use serde_json::{Map, Value};
use understudy_models::schedule::ScheduleConfig;
use understudy_models::{Error, NetworkConfig, Result};

use super::{Known, Settings};
use crate::checkpoint::Snapshot;
use crate::data::Images;
use crate::estimate::timed_evaluation;
use crate::noised::Noised;
use crate::picture;
use crate::teacher::Teacher;
use crate::training_batch::{BatchSource, Cost, TrainingBatch};

/// Training batches from images that the teacher draws first.
pub struct Pictures<'a> {
    teacher: &'a Teacher,
    settings: Settings,
    student: NetworkConfig,
    schedule: ScheduleConfig,
    drawn: usize,
    known: Known,
    batches: Option<Noised>,
}

impl<'a> Pictures<'a> {
    /// Training batches for `student` on its schedule. Images are kept with 8 bits.
    ///
    /// # Errors
    /// [`Error::Value`] for fewer samples than a batch.
    pub fn new(
        teacher: &'a Teacher,
        settings: Settings,
        student: NetworkConfig,
        schedule: ScheduleConfig,
    ) -> Result<Self> {
        settings.check()?;
        let known = Known { name: "pictures.sha256", sha256: None };
        Ok(Self { teacher, settings, student, schedule, drawn: 0, known, batches: None })
    }

    /// The file of image number `index`.
    fn place(&self, index: usize) -> PathBuf {
        let seed = self.settings.sampling.seed(index);
        picture::place(
            &self.settings.folder,
            self.settings.sampling.classes.label(index, seed),
            seed,
        )
    }

    /// Draws the images with the numbers in `range`, unless they are all there.
    fn draw(&self, range: std::ops::Range<usize>) -> Result<()> {
        if range.clone().all(|index| self.place(index).exists()) {
            return Ok(());
        }
        for batch in self.settings.sampling.batches(self.teacher.network(), range.clone()) {
            let images = batch?.images(None)?;
            for (index, image) in range.clone().zip(&images) {
                picture::write_new(&self.place(index), image)?;
            }
        }
        Ok(())
    }

    /// The pictures in the folder, which must be those that were drawn.
    fn read(&self) -> Result<Images> {
        let mut images = Images::open(&self.settings.folder)?;
        // A class that no seed drew has no folder, and its number is no other's.
        let numbers: Vec<u32> =
            images.class_names.drain(..).filter_map(|name| name.parse().ok()).collect();
        for label in images.labels.iter_mut().flatten() {
            *label = numbers.get(*label as usize).copied().unwrap_or(*label);
        }
        let remedy = "remove the folder, and they are drawn again";
        let changed = self.known.differ(&images.sha256());
        if images.len() != self.settings.count || changed {
            let found = match changed {
                true => {
                    "other pictures than the checkpoint's training batches came from".to_owned()
                }
                false => format!("{} pictures, not {}", images.len(), self.settings.count),
            };
            let field = format!("the teacher's samples in {}", self.settings.folder.display());
            return Err(Error::value(field, found, remedy));
        }
        Ok(images)
    }
}

impl BatchSource for Pictures<'_> {
    fn identity(&self) -> Map<String, Value> {
        self.settings.identity(self.teacher)
    }

    fn cost(&mut self) -> Result<Cost> {
        let network = self.teacher.network();
        let geometry = network.geometry();
        // The student learns the noise, so what it is shown has its input's channels.
        let (mut sample, _) = timed_evaluation(network, self.settings.batch)?;
        sample.answer = sample.x.clone();
        let (_, seconds) = timed_evaluation(network, self.settings.sampling.batch)?;
        let missing =
            (0..self.settings.count).filter(|&index| !self.place(index).exists()).count() as u64;
        let prepare_rows = missing * self.settings.sampling.trajectory.len() as u64;
        // At most: pictures are compressed.
        let pixels = (geometry.in_channels * geometry.height * geometry.width) as u64;
        Ok(Cost {
            prepare_rows,
            prepare_seconds: prepare_rows as f64 * seconds / self.settings.sampling.batch as f64,
            batch_seconds: 0.0,
            memory_bytes: self.settings.count as u64 * pixels,
            checkpoint_bytes: 0,
            disk_bytes: self.settings.count as u64 * pixels,
            sample,
        })
    }

    fn prepare(&mut self) -> Result<Option<f64>> {
        if self.drawn < self.settings.count {
            let end = self.settings.count.min(self.drawn + self.settings.sampling.batch);
            self.draw(self.drawn..end)?;
            self.drawn = end;
            return Ok(Some(self.drawn as f64 / self.settings.count as f64));
        }
        if self.batches.is_none() {
            let images = self.read()?;
            self.known.sha256 = Some(images.sha256());
            let batches = Noised::new(
                images,
                &self.student,
                &self.schedule,
                self.settings.batch,
                self.settings.seed,
            )?;
            self.batches = Some(batches);
        }
        Ok(None)
    }

    fn training_batch(&mut self, step: u64) -> Result<TrainingBatch> {
        match &mut self.batches {
            Some(batches) => batches.training_batch(step),
            None => Err(understudy_models::Error::Weights("the images are not drawn yet".into())),
        }
    }

    fn teacher_evaluations(&self) -> u64 {
        (self.drawn * self.settings.sampling.trajectory.len()) as u64
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
