//! One step of the teacher's walk, for any slots of the pool.

use candle_core::{DType, Tensor};
use understudy_models::rollout::{self, FiniteCheck, Row};
use understudy_models::{Error, Image, Result, sampler};

use super::{Pool, Slot};
use crate::picture;
use crate::training_batch::TrainingBatch;

/// What a batch of slots went through in one evaluation.
struct Walked {
    training_batch: TrainingBatch,
    next: Tensor,
}

impl Pool<'_> {
    /// One evaluation of the teacher for `slots`, none of which is at its end: every sample advances.
    pub(super) fn advance(&mut self, slots: &[usize]) -> Result<TrainingBatch> {
        let walked = self.walk(slots)?;
        self.evaluations += slots.len() as u64;
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
        let seeds: Vec<u64> = moves.iter().map(|row| row.seed).collect();
        let labels: Option<Vec<u32>> = seeds.iter().map(|&seed| self.teacher.label(seed)).collect();
        let x = self.rows.gather(slots, device)?.reshape(shape)?;
        let mut training_batch = TrainingBatch { answer: x.clone(), x, timesteps, labels, seeds };

        let times = training_batch.times(device)?;
        let condition = training_batch.condition(device)?;
        let input = training_batch.x.to_dtype(network.dtype())?;
        let answer = network.forward(&input, &times, condition.as_ref())?;
        training_batch.answer = answer.to_dtype(DType::F32)?;
        check_finite(&training_batch)?;

        // Neither DDPM nor DDIM remembers anything.
        let (x, answer) = (&training_batch.x, &training_batch.answer);
        let memory = sampler::empty_memory(x)?;
        let advanced = rollout::advance(geometry, x, &memory, answer, &moves)?;
        Ok(Walked { training_batch, next: advanced.x })
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

fn check_finite(training_batch: &TrainingBatch) -> Result<()> {
    match FiniteCheck::new(&training_batch.answer)?.first_bad()? {
        None => Ok(()),
        Some(row) => Err(Error::value(
            "teacher's answer",
            format!(
                "not finite for the trajectory with seed {} at timestep {}",
                training_batch.seeds[row], training_batch.timesteps[row]
            ),
            "check its weights and schedule: `understudy sample` shows whether it draws at all",
        )),
    }
}
