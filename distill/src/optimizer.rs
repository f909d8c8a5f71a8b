//! AdamW (Loshchilov & Hutter 2019, Algorithm 2), clipping and warm-up, as PyTorch has them: on plain slices
//! on the CPU, and in tensor operations over all parameters at once on any other device.

use std::sync::{Mutex, PoisonError};

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, InplaceOp2, Layout, Result, Tensor, bail};
use rayon::prelude::*;
use understudy_models::lists;

use crate::checkpoint::Snapshot;
use crate::parameters::{self, Parameters};
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
    /// Decay of the gradients' running mean, [`BETA1`] usually.
    pub beta1: f64,
}

/// Decay of the gradients' running mean where nothing speaks for another.
pub const BETA1: f64 = 0.9;
const BETA2: f64 = 0.999;
const EPS: f64 = 1e-8;

/// The optimizer and its state: the gradients' running means and mean squares.
pub struct AdamW {
    settings: Settings,
    state: State,
    steps: u64,
}

enum State {
    /// By parameter.
    Host(Vec<Moments<Vec<f32>>>),
    /// All in one, as [`joined`] has the parameters.
    Flat(Moments<Tensor>),
}

struct Moments<T> {
    first: T,
    second: T,
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

    /// The values of all, one parameter after the other, zero where there is none, and `more` after them: f32 `[length]`.
    ///
    /// # Errors
    /// Whatever the device says.
    pub(crate) fn values(&self, parameters: &Parameters, more: &[f32]) -> Result<Tensor> {
        let mut all = self.each(parameters)?;
        all.push(Tensor::new(more, &parameters.device())?);
        lists::join(&all)
    }

    /// The same parameters' gradients with other values, as [`Gradients::values`] has them, with nothing after them.
    ///
    /// # Errors
    /// Another number of them; whatever the device says.
    pub(crate) fn with_values(self, parameters: &Parameters, values: &Tensor) -> Result<Self> {
        let parts = parameters::parts(values, parameters)?;
        let taken = self.0.into_iter().zip(parts);
        // Parts of one tensor: the optimizer wants each contiguous, which they are.
        Ok(Self(taken.map(|(had, part)| had.map(|_| part)).collect()))
    }

    /// All in one, zero where there is none.
    fn joined(&self, parameters: &Parameters) -> Result<Tensor> {
        lists::join(&self.each(parameters)?)
    }

    /// Of each parameter, zeros where there is none.
    fn each(&self, parameters: &Parameters) -> Result<Vec<Tensor>> {
        let own = self.0.iter().zip(parameters.iter()).map(|(gradient, (_, var))| match gradient {
            Some(gradient) => Ok(gradient.clone()),
            None => var.as_tensor().zeros_like(),
        });
        own.collect()
    }

    /// The norm of all together. Sums are over one parameter at a time, in order, so no number of threads
    /// changes them.
    fn norm(&self) -> Result<f64> {
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
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn new(parameters: &Parameters, settings: Settings) -> Result<Self> {
        let state = if parameters.is_flat() {
            let zeros = parameters::joined(parameters)?.zeros_like()?;
            State::Flat(Moments { first: zeros.clone(), second: zeros })
        } else {
            let moments = parameters.iter().map(|(_, var)| {
                let zeros = vec![0.0; var.elem_count()];
                Moments { first: zeros.clone(), second: zeros }
            });
            State::Host(moments.collect())
        };
        Ok(Self { settings, state, steps: 0 })
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

    /// Changes every parameter that has a gradient, and gives the gradients' norm before clipping. Off the
    /// CPU a parameter without a gradient is taken to have one of zeros.
    ///
    /// # Errors
    /// Parameters or gradients that are not f32, and whatever the device says.
    pub fn step(&mut self, parameters: &Parameters, gradients: &Gradients) -> Result<f64> {
        let joined = match &self.state {
            State::Host(_) => None,
            State::Flat(_) => Some(gradients.joined(parameters)?),
        };
        let norm = match &joined {
            None => gradients.norm()?,
            Some(joined) => f64::from(joined.sqr()?.sum_all()?.to_scalar::<f32>()?).sqrt(),
        };
        let rate = self.learning_rate();
        self.steps += 1;
        let steps = self.steps.min(i32::MAX as u64) as i32;
        let update = Update {
            // As torch.nn.utils.clip_grad_norm_.
            scale: (self.settings.clip_norm / (norm + 1e-6)).min(1.0) as f32,
            keep: (1.0 - rate * self.settings.weight_decay) as f32,
            rate: (rate / (1.0 - self.settings.beta1.powi(steps))) as f32,
            beta1: self.settings.beta1,
            root: (1.0 - BETA2.powi(steps)).sqrt() as f32,
        };
        let moments = match (&mut self.state, joined) {
            (State::Host(moments), _) => moments,
            (State::Flat(moments), given) => {
                let gradients = given.map_or_else(|| gradients.joined(parameters), Ok)?;
                let weights =
                    update.apply_flat(parameters::joined(parameters)?, gradients, moments)?;
                let vars: Vec<&candle_core::Var> = parameters.iter().map(|(_, var)| var).collect();
                lists::part(&weights, &vars)?;
                return Ok(norm);
            }
        };
        let all: Vec<_> = parameters.iter().zip(&gradients.0).zip(moments).collect();
        all.into_par_iter().try_for_each(|(((_, var), gradient), moments)| match gradient {
            None => Ok(()),
            Some(gradient) => {
                var.inplace_op2(gradient, &InPlace { update, moments: Mutex::new(moments) })
            }
        })?;
        Ok(norm)
    }

    /// Writes the state.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn save(&self, parameters: &Parameters, snapshot: &mut Snapshot) -> Result<()> {
        let mut put = |(name, var): (&String, &candle_core::Var), first: &[f32], second: &[f32]| {
            snapshot.f32(&format!("adamw.first.{name}"), var.dims(), first);
            snapshot.f32(&format!("adamw.second.{name}"), var.dims(), second);
        };
        match &self.state {
            State::Host(moments) => {
                for (parameter, moments) in parameters.iter().zip(moments) {
                    put(parameter, &moments.first, &moments.second);
                }
            }
            State::Flat(moments) => {
                let (first, second): (Vec<f32>, Vec<f32>) =
                    (moments.first.to_vec1()?, moments.second.to_vec1()?);
                let mut begin = 0;
                for (name, var) in parameters.iter() {
                    let range = begin..begin + var.elem_count();
                    put((name, var), &first[range.clone()], &second[range.clone()]);
                    begin = range.end;
                }
            }
        }
        snapshot.u64("adamw.steps", &[self.steps]);
        Ok(())
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
        let mut all = Vec::with_capacity(parameters.iter().len());
        for (name, var) in parameters.iter() {
            let first = snapshot.get_f32(&format!("adamw.first.{name}"))?;
            let second = snapshot.get_f32(&format!("adamw.second.{name}"))?;
            if [first.len(), second.len()] != [var.elem_count(); 2] {
                return Err(snapshot.malformed(&format!("`{name}` is of another size")));
            }
            all.push(Moments { first, second });
        }
        match &mut self.state {
            State::Host(moments) => *moments = all,
            State::Flat(moments) => {
                let join = |part: fn(&Moments<Vec<f32>>) -> &Vec<f32>| {
                    let values: Vec<f32> = all.iter().flat_map(part).copied().collect();
                    Tensor::new(values, moments.first.device())
                };
                *moments = Moments { first: join(|m| &m.first)?, second: join(|m| &m.second)? };
            }
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
    /// Decay of the first moment.
    beta1: f64,
}

impl Update {
    fn apply(self, weights: &mut [f32], gradients: &[f32], moments: &mut Moments<Vec<f32>>) {
        let (beta1, beta2, eps) = (self.beta1 as f32, BETA2 as f32, EPS as f32);
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

    /// The same in tensor operations; gives the new weights.
    fn apply_flat(
        self,
        weights: Tensor,
        gradients: Tensor,
        moments: &mut Moments<Tensor>,
    ) -> Result<Tensor> {
        let gradient = (gradients * f64::from(self.scale))?;
        let first = (&moments.first + ((&gradient - &moments.first)? * (1.0 - self.beta1))?)?;
        let second = ((&moments.second * BETA2)? + (gradient.sqr()? * (1.0 - BETA2))?)?;
        let root = ((second.sqrt()? / f64::from(self.root))? + EPS)?;
        let step = ((&first * f64::from(self.rate))? / root)?;
        *moments = Moments { first, second };
        (weights * f64::from(self.keep))? - step
    }
}

/// The update as candle runs it on a parameter's own memory. It hands an operation to us by shared
/// reference, hence the lock, which nobody waits for.
struct InPlace<'a> {
    update: Update,
    moments: Mutex<&'a mut Moments<Vec<f32>>>,
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
