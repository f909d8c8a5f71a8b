//! One step of the teacher's walk, for any slots of the pool.

use understudy_models::rollout::Row;
use understudy_models::{Error, Image, Result};

use super::step::step;
use super::walked::Walked;
use super::{Pool, Slot};
use crate::picture;
use crate::training_batch::TrainingBatch;

impl Pool<'_> {
    /// One evaluation of the teacher for `slots`, none of which is at its end: every sample advances.
    pub(super) fn advance(&mut self, slots: &[usize]) -> Result<TrainingBatch> {
        let walked = self.walk(slots)?;
        self.evaluations += (slots.len() * self.rows_each()) as u64;
        self.rows.scatter(slots, &walked.next.flatten_from(1)?)?;
        for &slot in slots {
            self.slots[slot].position += 1;
        }
        self.collect(slots, &walked)?;
        Ok(walked.training_batch)
    }

    /// What [`Pool::advance`] works out, without a change to the pool.
    fn walk(&self, slots: &[usize]) -> Result<Walked> {
        let (network, geometry) = (self.teacher.network(), self.teacher.geometry());
        let (rows, device) = (slots.len(), network.device());
        let shape = (rows, geometry.in_channels, geometry.height, geometry.width);

        let mut moves = Vec::with_capacity(rows);
        let mut timesteps = Vec::with_capacity(rows);
        for &slot in slots {
            let Slot { offset, position, seed, .. } = self.slots[slot];
            let at = self.walks.evaluation(offset as usize, position as usize);
            let at = at.ok_or_else(|| Error::Weights(format!("slot {slot} is past its end")))?;
            moves.push(Row { seed, position: position as usize, step: at.step });
            timesteps.push(at.timestep as usize);
        }
        let x = self.rows.gather(slots, device)?.reshape(shape)?;
        step(self.teacher, self.prompting.as_deref(), x, timesteps, &moves)
    }

    /// Counts the samples that reached their end, and keeps them where that is wanted. Their names follow
    /// from their seeds, so a resumed run writes the same files again.
    fn collect(&mut self, slots: &[usize], walked: &Walked) -> Result<()> {
        let steps = self.walks.steps() as u32;
        for (row, &slot) in slots.iter().enumerate() {
            if self.slots[slot].position < steps {
                continue;
            }
            self.finished += 1;
            if let Some(folder) = &self.settings.finished {
                let class = walked.training_batch.labels.as_ref().map(|labels| labels[row]);
                let images = Image::from_batch(&walked.next.narrow(0, row, 1)?)?;
                for image in &images {
                    let path = picture::place(folder, class, self.slots[slot].seed);
                    picture::write_new(&path, image)?;
                }
            }
        }
        Ok(())
    }
}
