//! The weights that are trained, and their running average.

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Tensor, Var};
use rayon::prelude::*;
use understudy_models::Result;

use crate::checkpoint::Snapshot;
use crate::slices::with_f32;

/// Trained weights, in the order of their names, so that sums over them are the same in every process.
pub struct Parameters(BTreeMap<String, Var>);

impl Parameters {
    /// Begins with `weights`, in f32.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn new(weights: impl IntoIterator<Item = (String, Tensor)>) -> Result<Self> {
        let var = |(name, weight): (String, Tensor)| -> Result<(String, Var)> {
            Ok((name, Var::from_tensor(&weight.to_dtype(DType::F32)?.contiguous()?)?))
        };
        weights.into_iter().map(var).collect::<Result<_>>().map(Self)
    }

    /// Names and weights.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&String, &Var)> {
        self.0.iter()
    }

    /// The weights as a network takes them, following every change.
    pub fn tensors(&self) -> HashMap<String, Tensor> {
        self.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect()
    }

    /// Writes the weights.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn save(&self, snapshot: &mut Snapshot) -> Result<()> {
        let tensors = self.iter().map(|(name, var)| (name, var.as_tensor()));
        crate::checkpoint::put_tensors(snapshot, "student", tensors)
    }

    /// Reads the weights back.
    ///
    /// # Errors
    /// A snapshot that holds something else.
    pub fn restore(&self, snapshot: &Snapshot) -> Result<()> {
        for (name, var) in self.iter() {
            let saved = snapshot.tensor(&format!("student.{name}"))?;
            if saved.dims() != var.dims() {
                return Err(snapshot.malformed(&format!("`{name}` is of another shape")));
            }
            var.set(&saved)?;
        }
        Ok(())
    }
}

/// The exponential moving average of the weights, which is what a run ends with.
///
/// The decay rises to its limit as `(1 + n)/(10 + n)`, so that a short run is not an average over its own
/// beginning (TensorFlow's `ExponentialMovingAverage` with `num_updates`).
pub struct Average {
    decay: f64,
    updates: u64,
    weights: Vec<Vec<f32>>,
}

impl Average {
    /// Begins with the weights as they are.
    ///
    /// # Errors
    /// Weights that are not f32 in host memory.
    pub fn new(parameters: &Parameters, decay: f64) -> Result<Self> {
        let copy = |(_, var): (&String, &Var)| with_f32(var.as_tensor(), <[f32]>::to_vec);
        let weights = parameters.iter().map(copy).collect::<candle_core::Result<_>>()?;
        Ok(Self { decay, updates: 0, weights })
    }

    /// Takes the weights as they are now into the average.
    ///
    /// # Errors
    /// Weights that are not f32 in host memory.
    pub fn update(&mut self, parameters: &Parameters) -> Result<()> {
        self.updates += 1;
        let warm = (1.0 + self.updates as f64) / (10.0 + self.updates as f64);
        let part = (1.0 - self.decay.min(warm)) as f32;
        let pairs: Vec<_> = parameters.iter().zip(&mut self.weights).collect();
        pairs.into_par_iter().try_for_each(|((_, var), average)| {
            with_f32(var.as_tensor(), |weights| {
                for (average, weight) in average.iter_mut().zip(weights) {
                    *average += part * (weight - *average);
                }
            })
        })?;
        Ok(())
    }

    /// The average as tensors, named as the parameters are.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn tensors(&self, parameters: &Parameters) -> Result<HashMap<String, Tensor>> {
        let tensor = |((name, var), average): ((&String, &Var), &Vec<f32>)| {
            Ok((name.clone(), Tensor::from_slice(average, var.dims(), var.device())?))
        };
        parameters.iter().zip(&self.weights).map(tensor).collect()
    }

    /// Writes the state.
    pub fn save(&self, parameters: &Parameters, snapshot: &mut Snapshot) {
        for ((name, var), average) in parameters.iter().zip(&self.weights) {
            snapshot.f32(&format!("average.{name}"), var.dims(), average);
        }
        snapshot.u64("average.updates", &[self.updates]);
    }

    /// Reads the state back.
    ///
    /// # Errors
    /// A snapshot that holds something else.
    pub fn restore(&mut self, parameters: &Parameters, snapshot: &Snapshot) -> Result<()> {
        for ((name, _), average) in parameters.iter().zip(&mut self.weights) {
            let saved = snapshot.get_f32(&format!("average.{name}"))?;
            if saved.len() != average.len() {
                return Err(snapshot.malformed(&format!("`{name}` is of another size")));
            }
            *average = saved;
        }
        self.updates = snapshot.get_u64("average.updates")?.first().copied().unwrap_or_default();
        Ok(())
    }
}
