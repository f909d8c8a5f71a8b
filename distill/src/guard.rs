//! Numbers that are none end a run before they spoil what is on disk.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use understudy_models::checkpoint::is_finite;
use understudy_models::{Conditioning, Error, Result, noise};

use crate::estimate::blank;
use crate::student::Student;
use crate::training_batch::TrainingBatch;

const REMEDY: &str = "the last checkpoint is good; run again with another --out and a lower --learning-rate or --clip-norm";

/// Stops a run that would only spoil its weights from here on.
///
/// # Errors
/// [`Error::Value`] naming the step and the training batch's first seed.
pub(crate) fn check_finite(
    what: &str,
    value: f64,
    step: u64,
    training_batch: &TrainingBatch,
) -> Result<()> {
    if value.is_finite() {
        return Ok(());
    }
    let (seed, t) =
        (training_batch.seeds.first().copied(), training_batch.timesteps.first().copied());
    Err(Error::value(
        what,
        format!(
            "not finite at step {step} (its first sample: seed {} at timestep {})",
            seed.unwrap_or_default(),
            t.unwrap_or_default()
        ),
        REMEDY,
    ))
}

/// Refuses weights that hold NaN or infinity; `what` says which they are, `step` after which step.
///
/// # Errors
/// [`Error::Value`] naming the tensor and the step.
pub(crate) fn check_weights<'a>(
    what: &str,
    tensors: impl Iterator<Item = (&'a String, &'a Tensor)>,
    step: Option<u64>,
) -> Result<()> {
    for (name, tensor) in tensors {
        if !is_finite(tensor)? {
            let (when, remedy) = match step {
                Some(step) => (format!(" after step {step}"), REMEDY),
                None => (String::new(), "train again with another --seed"),
            };
            return Err(Error::value(
                format!("{what} {name}"),
                format!("not finite{when}"),
                remedy,
            ));
        }
    }
    Ok(())
}

/// Evaluates the network that would be published, on noise, at the first, the middle and the last time.
///
/// # Errors
/// [`Error::Value`] naming the time, when its answer is not finite.
pub(crate) fn check_answers(
    student: &Student,
    weights: HashMap<String, Tensor>,
    step: u64,
) -> Result<()> {
    let network = student.config.load(weights, DType::F32, &Device::Cpu)?;
    let geometry = network.geometry();
    let last = student.schedule.train_timesteps() - 1;
    let times = [0, last / 2, last];
    let mut x = vec![0.0; times.len() * geometry.in_channels * geometry.height * geometry.width];
    noise::normal(step, 0, &mut x);
    let shape = (times.len(), geometry.in_channels, geometry.height, geometry.width);
    let x = Tensor::from_vec(x, shape, &Device::Cpu)?;
    let batch = TrainingBatch {
        answer: x.clone(),
        x,
        timesteps: times.to_vec(),
        labels: match geometry.conditioning {
            Conditioning::Classes(_) => Some(vec![0; times.len()]),
            _ => None,
        },
        text: blank(geometry, times.len(), &Device::Cpu)?,
        seeds: vec![step; times.len()],
    };
    let answers = batch.ask(network.as_ref())?;
    for (row, t) in times.iter().enumerate() {
        if !is_finite(&answers.get(row)?)? {
            let found = format!("not finite at timestep {t} after step {step}");
            return Err(Error::value("the averaged network's answer", found, REMEDY));
        }
    }
    Ok(())
}
