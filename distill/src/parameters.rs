//! The weights that are trained, and their running average.

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Device, Tensor, Var};
use rayon::prelude::*;
use understudy_models::{Result, lists};

use crate::checkpoint::Snapshot;
use crate::slices::with_f32;

/// Trained weights, in the order of their names, so that sums over them are the same in every process.
pub struct Parameters {
    vars: BTreeMap<String, Var>,
    flat: bool,
}

impl Parameters {
    /// Begins with `weights`, in f32, on the device they are on.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn new(weights: impl IntoIterator<Item = (String, Tensor)>) -> Result<Self> {
        let var = |(name, weight): (String, Tensor)| -> Result<(String, Var)> {
            Ok((name, Var::from_tensor(&weight.to_dtype(DType::F32)?.contiguous()?)?))
        };
        let vars: BTreeMap<_, _> = weights.into_iter().map(var).collect::<Result<_>>()?;
        let flat = vars.values().any(|var| !var.device().is_cpu());
        Ok(Self { vars, flat })
    }

    /// What is done to them is done in tensor operations on all of them at once, as on every device that is
    /// not the CPU, and not on plain slices, which are faster there.
    #[must_use]
    pub fn flat(self) -> Self {
        Self { flat: true, ..self }
    }

    pub(crate) fn is_flat(&self) -> bool {
        self.flat
    }

    /// Where they are; the CPU where there are none.
    pub fn device(&self) -> Device {
        self.vars.values().next().map_or(Device::Cpu, |var| var.device().clone())
    }

    /// Names and weights.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&String, &Var)> {
        self.vars.iter()
    }

    /// The weights as a network takes them, following every change.
    pub fn tensors(&self) -> HashMap<String, Tensor> {
        self.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect()
    }

    /// Takes on weights that stand one after the other, as [`joined`] has them.
    ///
    /// # Errors
    /// Another number of them; whatever the device says.
    pub(crate) fn set(&self, weights: Vec<f32>) -> Result<()> {
        let weights = parts(&Tensor::new(weights, &self.device())?, self)?;
        self.iter().zip(&weights).try_for_each(|((_, var), weight)| Ok(var.set(weight)?))
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
            var.set(&saved.to_device(var.device())?)?;
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
    weights: Averages,
}

enum Averages {
    /// By parameter.
    Host(Vec<Vec<f32>>),
    /// All in one, as [`joined`] has the parameters.
    Flat(Tensor),
}

impl Average {
    /// Begins with the weights as they are.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn new(parameters: &Parameters, decay: f64) -> Result<Self> {
        let copy = |(_, var): (&String, &Var)| with_f32(var.as_tensor(), <[f32]>::to_vec);
        let weights = if parameters.is_flat() {
            Averages::Flat(joined(parameters)?)
        } else {
            Averages::Host(parameters.iter().map(copy).collect::<candle_core::Result<_>>()?)
        };
        Ok(Self { decay, updates: 0, weights })
    }

    /// Takes the weights as they are now into the average.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn update(&mut self, parameters: &Parameters) -> Result<()> {
        self.updates += 1;
        let warm = (1.0 + self.updates as f64) / (10.0 + self.updates as f64);
        let part = (1.0 - self.decay.min(warm)) as f32;
        let averages = match &mut self.weights {
            Averages::Host(averages) => averages,
            Averages::Flat(average) => {
                let way = (joined(parameters)? - &*average)?;
                *average = (&*average + (way * f64::from(part))?)?;
                return Ok(());
            }
        };
        let pairs: Vec<_> = parameters.iter().zip(averages).collect();
        pairs.into_par_iter().try_for_each(|((_, var), average)| {
            with_f32(var.as_tensor(), |weights| {
                for (average, weight) in average.iter_mut().zip(weights) {
                    *average += part * (weight - *average);
                }
            })
        })?;
        Ok(())
    }

    /// The average as tensors on the CPU, named as the parameters are.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn tensors(&self, parameters: &Parameters) -> Result<HashMap<String, Tensor>> {
        let names = parameters.iter().map(|(name, _)| name.clone());
        let tensors: Vec<Tensor> = match &self.weights {
            Averages::Host(averages) => {
                let tensor = |((_, var), average): ((&String, &Var), &Vec<f32>)| {
                    Tensor::from_slice(average, var.dims(), &Device::Cpu)
                };
                parameters.iter().zip(averages).map(tensor).collect::<candle_core::Result<_>>()?
            }
            Averages::Flat(average) => parts(&average.to_device(&Device::Cpu)?, parameters)?,
        };
        Ok(names.zip(tensors).collect())
    }

    /// Writes the state.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn save(&self, parameters: &Parameters, snapshot: &mut Snapshot) -> Result<()> {
        let averages = self.tensors(parameters)?;
        let averages = parameters.iter().filter_map(|(name, _)| averages.get_key_value(name));
        crate::checkpoint::put_tensors(snapshot, "average", averages)?;
        snapshot.u64("average.updates", &[self.updates]);
        Ok(())
    }

    /// Reads the state back.
    ///
    /// # Errors
    /// A snapshot that holds something else.
    pub fn restore(&mut self, parameters: &Parameters, snapshot: &Snapshot) -> Result<()> {
        let mut all = Vec::with_capacity(parameters.iter().len());
        for (name, var) in parameters.iter() {
            let saved = snapshot.get_f32(&format!("average.{name}"))?;
            if saved.len() != var.elem_count() {
                return Err(snapshot.malformed(&format!("`{name}` is of another size")));
            }
            all.push(saved);
        }
        match &mut self.weights {
            Averages::Host(averages) => *averages = all,
            Averages::Flat(average) => *average = Tensor::new(all.concat(), average.device())?,
        }
        self.updates = snapshot.get_u64("average.updates")?.first().copied().unwrap_or_default();
        Ok(())
    }
}

/// The parameters one after the other, in their order: f32 `[N]`.
///
/// # Errors
/// Whatever the device says.
pub(crate) fn joined(parameters: &Parameters) -> candle_core::Result<Tensor> {
    let weights: Vec<Tensor> = parameters.iter().map(|(_, var)| var.as_detached_tensor()).collect();
    lists::join(&weights)
}

/// What of `flat` belongs to each parameter, in its shape.
///
/// # Errors
/// Whatever the device says.
pub(crate) fn parts(flat: &Tensor, parameters: &Parameters) -> candle_core::Result<Vec<Tensor>> {
    let mut begin = 0;
    let mut part = |length: usize| {
        let part = flat.narrow(0, begin, length);
        begin += length;
        part
    };
    parameters.iter().map(|(_, var)| part(var.elem_count())?.reshape(var.dims())).collect()
}
