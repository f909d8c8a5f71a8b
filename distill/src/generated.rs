//! DKDM's data-free baseline: the teacher draws a set of images, and the student is trained on them as if
//! they were data.

use std::path::PathBuf;

use understudy_models::schedule::ScheduleConfig;
use understudy_models::{NetworkConfig, Result};

use crate::checkpoint::Snapshot;
use crate::data::Images;
use crate::generate::Sampling;
use crate::lesson::{Curriculum, Lesson};
use crate::noised::Noised;
use crate::picture;
use crate::teacher::Teacher;

/// Lessons from images that the teacher draws first.
pub struct Generated<'a> {
    teacher: &'a Teacher,
    sampling: Sampling,
    count: usize,
    folder: PathBuf,
    student: NetworkConfig,
    schedule: ScheduleConfig,
    batch: usize,
    seed: u64,
    drawn: usize,
    lessons: Option<Noised>,
}

impl<'a> Generated<'a> {
    /// Lessons of `batch` images for `student`, from `count` images that `teacher` draws as `sampling` says
    /// and keeps in `folder` as 8-bit pictures; those already there are not drawn again.
    pub fn new(
        teacher: &'a Teacher,
        sampling: Sampling,
        count: usize,
        folder: PathBuf,
        student: (NetworkConfig, ScheduleConfig),
        batch: usize,
        seed: u64,
    ) -> Self {
        let (student, schedule) = student;
        let (drawn, lessons) = (0, None);
        Self { teacher, sampling, count, folder, student, schedule, batch, seed, drawn, lessons }
    }

    /// Draws the images with the numbers in `range`, unless they are all there.
    fn draw(&self, range: std::ops::Range<usize>) -> Result<()> {
        let path = |index: usize| {
            let seed = self.sampling.seed(index);
            picture::place(&self.folder, self.sampling.classes.label(index, seed), seed)
        };
        if range.clone().all(|index| path(index).exists()) {
            return Ok(());
        }
        for batch in self.sampling.batches(self.teacher.network(), range.clone()) {
            let images = batch?.images()?;
            for (index, image) in range.clone().zip(&images) {
                picture::write_new(&path(index), image)?;
            }
        }
        Ok(())
    }
}

impl Curriculum for Generated<'_> {
    fn prepare(&mut self) -> Result<Option<f64>> {
        if self.drawn < self.count {
            let end = self.count.min(self.drawn + self.sampling.batch);
            self.draw(self.drawn..end)?;
            self.drawn = end;
            return Ok(Some(self.drawn as f64 / self.count as f64));
        }
        if self.lessons.is_none() {
            let images = Images::open(&self.folder)?;
            let lessons =
                Noised::new(images, &self.student, &self.schedule, self.batch, self.seed)?;
            self.lessons = Some(lessons);
        }
        Ok(None)
    }

    fn lesson(&mut self, step: u64) -> Result<Lesson> {
        match &mut self.lessons {
            Some(lessons) => lessons.lesson(step),
            None => Err(understudy_models::Error::Weights("the images are not drawn yet".into())),
        }
    }

    fn teacher_evaluations(&self) -> u64 {
        (self.drawn * self.sampling.trajectory.len()) as u64
    }

    // The pictures on disk are the state.
    fn save(&self, _: &mut Snapshot) -> Result<()> {
        Ok(())
    }

    fn keep(&mut self) {}

    fn restore(&mut self, _: &Snapshot) -> Result<()> {
        Ok(())
    }
}
