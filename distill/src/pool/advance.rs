//! One step of the teacher's walk, for any slots of the pool.

use candle_core::{DType, Tensor};
use understudy_models::sampler::{self, Step};
use understudy_models::{Error, Image, Result, noise};

use super::{Pool, Slot};
use crate::lesson::Lesson;
use crate::picture;

/// What a batch of slots went through in one evaluation.
struct Walked {
    lesson: Lesson,
    next: Tensor,
}

impl Pool<'_> {
    /// One evaluation of the teacher for `slots`, none of which is at its end: every sample advances.
    pub(super) fn advance(&mut self, slots: &[usize]) -> Result<Lesson> {
        let walked = self.walk(slots)?;
        self.evaluations += slots.len() as u64;
        self.rows.scatter(slots, &walked.next.flatten_from(1)?)?;
        for &slot in slots {
            self.slots[slot].position += 1;
        }
        self.collect(slots, &walked)?;
        Ok(walked.lesson)
    }

    /// What [`Pool::advance`] works out, without a change to the pool.
    fn walk(&self, slots: &[usize]) -> Result<Walked> {
        let (network, geometry) = (self.teacher.network(), self.teacher.geometry());
        let (rows, length, device) = (slots.len(), self.length, network.device());
        let shape = (rows, geometry.in_channels, geometry.height, geometry.width);

        let mut steps: Vec<Step> = Vec::with_capacity(rows);
        let mut timesteps = Vec::with_capacity(rows);
        for &slot in slots {
            let Slot { offset, position, .. } = self.slots[slot];
            let at = self.walks.evaluation(offset as usize, position as usize);
            let at = at.ok_or_else(|| Error::Weights(format!("slot {slot} is past its end")))?;
            steps.push(at.step);
            timesteps.push(at.timestep as usize);
        }
        let seeds: Vec<u64> = slots.iter().map(|&slot| self.slots[slot].seed).collect();
        let labels: Option<Vec<u32>> = seeds.iter().map(|&seed| self.teacher.label(seed)).collect();
        let x = self.rows.gather(slots, device)?.reshape(shape)?;
        let mut lesson = Lesson { answer: x.clone(), x, timesteps, labels, seeds };

        let times = lesson.times(device)?;
        let condition = lesson.condition(device)?;
        let input = lesson.x.to_dtype(network.dtype())?;
        let answer = network.forward(&input, &times, condition.as_ref())?;
        lesson.answer = answer.to_dtype(DType::F32)?;
        check_finite(&lesson)?;

        let noise = if steps.iter().any(Step::needs_noise) {
            let mut values = vec![0.0; rows * length];
            for ((&slot, step), values) in
                slots.iter().zip(&steps).zip(values.chunks_exact_mut(length))
            {
                if step.needs_noise() {
                    let Slot { seed, position, .. } = self.slots[slot];
                    noise::normal(seed, u64::from(position) + 1, values);
                }
            }
            Some(Tensor::from_vec(values, shape, device)?)
        } else {
            None
        };
        // Neither DDPM nor DDIM remembers anything.
        let memory = Tensor::zeros(shape, DType::F32, device)?;
        let advanced =
            sampler::advance(&lesson.x, &memory, &lesson.answer, noise.as_ref(), &steps)?;
        Ok(Walked { lesson, next: advanced.x })
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
                let class = walked.lesson.labels.as_ref().map(|labels| labels[row]);
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

/// NaN and infinity survive a sum.
fn check_finite(lesson: &Lesson) -> Result<()> {
    let sums: Vec<f32> = lesson.answer.flatten_from(1)?.sum(1)?.to_vec1()?;
    match sums.iter().position(|sum| !sum.is_finite()) {
        None => Ok(()),
        Some(row) => Err(Error::value(
            "teacher's answer",
            format!(
                "not finite for the trajectory with seed {} at timestep {}",
                lesson.seeds[row], lesson.timesteps[row]
            ),
            "check its weights and schedule: `understudy sample` shows whether it draws at all",
        )),
    }
}
