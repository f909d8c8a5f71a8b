//! AdamW (Loshchilov & Hutter 2019, Algorithm 2), clipping and warm-up, as PyTorch has them.

use std::sync::{Mutex, PoisonError};

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, InplaceOp2, Layout, Result, Tensor, bail};
use rayon::prelude::*;

use crate::checkpoint::Snapshot;
use crate::parameters::Parameters;
use crate::slices::with_f32;

/// How weights are changed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// Learning rate after the warm-up.
    pub learning_rate: f64,
    /// Iterations over which the learning rate rises from nothing, linearly.
    pub warmup_steps: u64,
    /// The iteration, counted from the first, at which it has fallen to nothing again, along half a cosine
    /// (Loshchilov & Hutter 2017, Equation 5, without restarts); constant without.
    pub decay_steps: Option<u64>,
    /// Decoupled weight decay, times the learning rate.
    pub weight_decay: f64,
    /// The largest norm of all gradients together; larger ones are scaled down to it.
    pub clip_norm: f64,
}

const BETA1: f64 = 0.9;
const BETA2: f64 = 0.999;
const EPS: f64 = 1e-8;

/// The optimizer and its state: the gradients' running means and mean squares.
pub struct AdamW {
    settings: Settings,
    moments: Vec<Moments>,
    steps: u64,
}

struct Moments {
    first: Vec<f32>,
    second: Vec<f32>,
}

/// Gradients of all parameters, in their order.
pub struct Gradients(Vec<Option<Tensor>>);

impl Gradients {
    /// Takes those of the parameters out of a backward pass; a parameter that had no part in the loss has
    /// none.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn take(parameters: &Parameters, store: &mut GradStore) -> Result<Self> {
        let take = |(_, var): (_, &candle_core::Var)| -> Result<Option<Tensor>> {
            store.remove(var.as_tensor()).map(|gradient| gradient.detach().contiguous()).transpose()
        };
        parameters.iter().map(take).collect::<Result<_>>().map(Self)
    }

    /// Adds those of another part of the batch.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn add(&mut self, other: Self) -> Result<()> {
        for (sum, part) in self.0.iter_mut().zip(other.0) {
            *sum = match (sum.take(), part) {
                (Some(sum), Some(part)) => Some((sum + part)?),
                (sum, part) => sum.or(part),
            };
        }
        Ok(())
    }

    /// The norm of all together. Sums are over one parameter at a time, in order, so no number of threads
    /// changes them.
    ///
    /// # Errors
    /// A gradient that is not f32 in host memory.
    pub fn norm(&self) -> Result<f64> {
        let square = |gradient: &Tensor| with_f32(gradient, sum_of_squares);
        let sums: Result<Vec<f64>> = self.0.par_iter().flatten().map(square).collect();
        Ok(sums?.iter().sum::<f64>().sqrt())
    }
}

fn sum_of_squares(values: &[f32]) -> f64 {
    // In sixteen lanes, so that the compiler may vectorise it.
    let mut lanes = [0.0_f64; 16];
    for chunk in values.chunks(16) {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(value) * f64::from(value);
        }
    }
    lanes.iter().sum()
}

impl AdamW {
    /// An optimizer that has seen nothing yet.
    pub fn new(parameters: &Parameters, settings: Settings) -> Self {
        let moments = parameters.iter().map(|(_, var)| {
            let zeros = vec![0.0; var.elem_count()];
            Moments { first: zeros.clone(), second: zeros }
        });
        Self { settings, moments: moments.collect(), steps: 0 }
    }

    /// The learning rate of the next step.
    pub fn learning_rate(&self) -> f64 {
        let Settings { learning_rate, warmup_steps, decay_steps, .. } = self.settings;
        let risen = ((self.steps + 1) as f64 / warmup_steps.max(1) as f64).min(1.0);
        let kept = decay_steps.map_or(1.0, |end| {
            let past = self.steps.saturating_sub(warmup_steps) as f64;
            let part = past / end.saturating_sub(warmup_steps).max(1) as f64;
            0.5 * (1.0 + (std::f64::consts::PI * part.min(1.0)).cos())
        });
        learning_rate * risen * kept
    }

    /// Changes every parameter that has a gradient, and gives the gradients' norm before clipping.
    ///
    /// # Errors
    /// Parameters or gradients that are not f32 in host memory.
    pub fn step(&mut self, parameters: &Parameters, gradients: &Gradients) -> Result<f64> {
        let norm = gradients.norm()?;
        let rate = self.learning_rate();
        self.steps += 1;
        let steps = self.steps.min(i32::MAX as u64) as i32;
        let update = Update {
            // As torch.nn.utils.clip_grad_norm_.
            scale: (self.settings.clip_norm / (norm + 1e-6)).min(1.0) as f32,
            keep: (1.0 - rate * self.settings.weight_decay) as f32,
            rate: (rate / (1.0 - BETA1.powi(steps))) as f32,
            root: (1.0 - BETA2.powi(steps)).sqrt() as f32,
        };
        let all: Vec<_> = parameters.iter().zip(&gradients.0).zip(&mut self.moments).collect();
        all.into_par_iter().try_for_each(|(((_, var), gradient), moments)| match gradient {
            None => Ok(()),
            Some(gradient) => {
                var.inplace_op2(gradient, &InPlace { update, moments: Mutex::new(moments) })
            }
        })?;
        Ok(norm)
    }

    /// Writes the state.
    pub fn save(&self, parameters: &Parameters, snapshot: &mut Snapshot) {
        for ((name, var), moments) in parameters.iter().zip(&self.moments) {
            snapshot.f32(&format!("adamw.first.{name}"), var.dims(), &moments.first);
            snapshot.f32(&format!("adamw.second.{name}"), var.dims(), &moments.second);
        }
        snapshot.u64("adamw.steps", &[self.steps]);
    }

    /// Reads the state back.
    ///
    /// # Errors
    /// A snapshot that holds something else.
    pub fn restore(
        &mut self,
        parameters: &Parameters,
        snapshot: &Snapshot,
    ) -> understudy_models::Result<()> {
        for ((name, var), moments) in parameters.iter().zip(&mut self.moments) {
            let first = snapshot.get_f32(&format!("adamw.first.{name}"))?;
            let second = snapshot.get_f32(&format!("adamw.second.{name}"))?;
            if [first.len(), second.len()] != [var.elem_count(); 2] {
                return Err(snapshot.malformed(&format!("`{name}` is of another size")));
            }
            *moments = Moments { first, second };
        }
        self.steps = snapshot.get_u64("adamw.steps")?.first().copied().unwrap_or_default();
        Ok(())
    }
}

/// One step's numbers.
#[derive(Clone, Copy)]
struct Update {
    /// Of gradients, from clipping.
    scale: f32,
    /// What weight decay leaves of a weight.
    keep: f32,
    /// Learning rate over the first moment's bias correction.
    rate: f32,
    /// Root of the second moment's.
    root: f32,
}

impl Update {
    fn apply(self, weights: &mut [f32], gradients: &[f32], moments: &mut Moments) {
        let (beta1, beta2, eps) = (BETA1 as f32, BETA2 as f32, EPS as f32);
        let each = weights.iter_mut().zip(gradients);
        for ((weight, gradient), (first, second)) in
            each.zip(moments.first.iter_mut().zip(&mut moments.second))
        {
            let gradient = gradient * self.scale;
            *first += (1.0 - beta1) * (gradient - *first);
            *second = beta2 * *second + (1.0 - beta2) * gradient * gradient;
            let root = second.sqrt() / self.root + eps;
            *weight = *weight * self.keep - self.rate * *first / root;
        }
    }
}

/// The update as candle runs it on a parameter's own memory. It hands an operation to us by shared
/// reference, hence the lock, which nobody waits for.
struct InPlace<'a> {
    update: Update,
    moments: Mutex<&'a mut Moments>,
}

impl InplaceOp2 for InPlace<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(
        &self,
        weights: &mut CpuStorage,
        weights_at: &Layout,
        gradients: &CpuStorage,
        gradients_at: &Layout,
    ) -> Result<()> {
        let (CpuStorage::F32(weights), CpuStorage::F32(gradients)) = (weights, gradients) else {
            bail!("weights and their gradients must be f32 to be trained")
        };
        let (Some(weights_at), Some(gradients_at)) =
            (weights_at.contiguous_offsets(), gradients_at.contiguous_offsets())
        else {
            bail!("weights and their gradients must be contiguous to be trained")
        };
        let mut moments = self.moments.lock().unwrap_or_else(PoisonError::into_inner);
        self.update.apply(
            &mut weights[weights_at.0..weights_at.1],
            &gradients[gradients_at.0..gradients_at.1],
            &mut moments,
        );
        Ok(())
    }
}
