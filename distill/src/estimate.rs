//! What a run is going to cost, measured before it begins.

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use understudy_models::{Conditioning, Denoiser, Geometry, Result, memory, rollout};

use crate::training_batch::{TextConditions, TrainingBatch};

/// What is left of a run.
#[derive(Debug, Clone)]
pub struct Estimate {
    /// Evaluations of the teacher, in rows, before the first training batch.
    pub prepare_rows: u64,
    /// What they take.
    pub prepare_seconds: f64,
    /// Steps to go.
    pub steps: u64,
    /// What a step takes: its training batch, the student's answer and its gradients. The optimizer's part is small
    /// beside them and not in it.
    pub step_seconds: f64,
    /// Most memory that the process will have taken, without what is on a GPU; nothing where the system does not tell.
    pub memory_bytes: Option<u64>,
    /// Most room that the run will take on the disk.
    pub disk_bytes: u64,
}

impl Estimate {
    /// Time to the end.
    pub fn seconds(&self) -> f64 {
        self.prepare_seconds + self.steps as f64 * self.step_seconds
    }
}

/// Most memory that the process has had so far.
pub(crate) fn peak_memory(device: &Device) -> Option<u64> {
    device.is_cpu().then(memory::peak).flatten()
}

/// An evaluation of `rows` samples of noise, as a training batch, and the seconds that it took. The first of a size is
/// slower than those after it.
///
/// # Errors
/// Whatever the device says.
pub fn timed_evaluation(network: &dyn Denoiser, rows: usize) -> Result<(TrainingBatch, f64)> {
    let (geometry, device) = (network.geometry(), network.device());
    let seeds: Vec<u64> = (0..rows as u64).collect();
    let x = rollout::start(geometry, &seeds, device)?;
    let labels = match geometry.conditioning {
        Conditioning::Classes(classes) => {
            Some((0..rows).map(|row| (row % classes) as u32).collect())
        }
        _ => None,
    };
    let text = blank(geometry, rows, device)?;
    let timesteps = vec![0; rows];
    let mut batch = TrainingBatch { answer: x.clone(), x, timesteps, labels, text, seeds };
    let began = Instant::now();
    let answer = batch.ask(network)?;
    wait(&answer)?;
    let seconds = began.elapsed().as_secs_f64();
    batch.answer = answer.to_dtype(DType::F32)?;
    Ok((batch, seconds))
}

/// Prompts and scales of zeros, for a network that takes some.
///
/// # Errors
/// Whatever the device says.
pub(crate) fn blank(
    geometry: &Geometry,
    rows: usize,
    device: &Device,
) -> Result<Option<TextConditions>> {
    let Some(prompt) = geometry.prompt else { return Ok(None) };
    let prompts = Tensor::zeros((rows, prompt.tokens, prompt.width), DType::F32, device)?;
    Ok(Some(TextConditions { prompts, guidance: geometry.guidance.then(|| vec![0.0; rows]) }))
}

/// Waits for an answer: other devices than the CPU are done only when it is asked for.
fn wait(answer: &Tensor) -> Result<()> {
    answer.narrow(0, 0, 1)?.to_device(&Device::Cpu)?;
    Ok(())
}
