//! Which training timesteps a trajectory visits: `set_timesteps` of the classes.

use super::tables::linspace;
use super::{Class, Schedule, TimestepSpacing};
use crate::{Error, Result};

impl Schedule {
    /// The timesteps of a trajectory of `steps` steps, highest first: whole numbers, except that Euler
    /// and Heun visit fractional ones with `linspace` spacing and respaced sigmas (rounded to f32, as diffusers hands
    /// them to the network), and flow matching always.
    ///
    /// There are `steps` of them, or fewer where `lambda_min_clipped` cuts a `trailing` trajectory
    /// short. Where diffusers is visibly wrong, this is not: `trailing` spacing never appends the
    /// timestep −1 that a rounding error in its range gives for some step counts (61 of 1000, say).
    ///
    /// # Errors
    /// [`Error::Value`] when `steps` is not in 1 to the number of training timesteps, or
    /// `steps_offset` pushes the first timestep past the last training timestep.
    pub fn timesteps(&self, steps: usize) -> Result<Vec<f64>> {
        Ok(self.nodes(steps)?.into_iter().map(|node| node.timestep).collect())
    }

    /// The same, before sigmas are respaced.
    pub(super) fn spaced_timesteps(&self, steps: usize) -> Result<Vec<f64>> {
        let count = self.train_timesteps();
        if steps == 0 || steps > count {
            let remedy = format!("use 1 to {count}, the number of training timesteps");
            return Err(Error::value("num_inference_steps", steps, remedy));
        }
        let timesteps = match self.class {
            Class::DpmSolverMultistep => self.dpm_solver_timesteps(steps)?,
            Class::Lcm | Class::Tcd => return self.consistency_timesteps(steps),
            _ => self.evenly_spaced_timesteps(steps),
        };
        let last = (count - 1) as f64;
        match timesteps.first() {
            Some(&first) if first > last && self.steps_offset >= count => Err(Error::value(
                format!("{}: steps_offset", self.file),
                self.steps_offset,
                format!(
                    "puts every timestep past the last training timestep, {last}; 0 or 1 is usual"
                ),
            )),
            Some(&first) if first > last => Err(Error::value(
                "num_inference_steps",
                steps,
                format!(
                    "with steps_offset {} the first timestep would be {first}, past the last \
                     training timestep {last}; use fewer steps",
                    self.steps_offset
                ),
            )),
            _ => Ok(timesteps),
        }
    }

    fn evenly_spaced_timesteps(&self, steps: usize) -> Vec<f64> {
        let count = self.train_timesteps();
        match self.timestep_spacing {
            TimestepSpacing::Linspace => {
                let fractional =
                    matches!(self.class, Class::Euler | Class::EulerAncestral | Class::Heun);
                let snap = |t: f64| {
                    if fractional { t as f32 as f64 } else { t.round_ties_even() }
                };
                descending(linspace(0.0, (count - 1) as f64, steps).map(snap))
            }
            TimestepSpacing::Leading => {
                let ratio = count / steps;
                descending((0..steps).map(|i| (i * ratio + self.steps_offset) as f64))
            }
            TimestepSpacing::Trailing => trailing(count, count, steps),
        }
    }

    /// Some of the `original_inference_steps` timesteps that a consistency model was distilled at.
    fn consistency_timesteps(&self, steps: usize) -> Result<Vec<f64>> {
        let (count, original) = (self.train_timesteps(), self.original_inference_steps);
        if steps > original {
            let remedy =
                format!("use 1 to {original}, the original_inference_steps of {}", self.file);
            return Err(Error::value("num_inference_steps", steps, remedy));
        }
        let stride = original as f64 / steps as f64;
        let place = |i: usize| original - (i as f64 * stride).floor() as usize;
        Ok((0..steps).map(|i| (place(i) * (count / original) - 1) as f64).collect())
    }

    /// How many timesteps `lambda_min_clipped` leaves: all, except for DPM-Solver++.
    pub(super) fn kept_timesteps(&self) -> Result<usize> {
        if self.class != Class::DpmSolverMultistep {
            return Ok(self.train_timesteps());
        }
        let lambda = |alpha_bar: f64| 0.5 * (alpha_bar / (1.0 - alpha_bar)).ln();
        let keeps = |alpha_bar: &&f64| lambda(**alpha_bar) >= self.lambda_min_clipped;
        match self.alpha_bar.iter().filter(keeps).count() {
            0 => {
                let remedy = "no timestep of the schedule is left; use a smaller value";
                Err(self.refuse("lambda_min_clipped", self.lambda_min_clipped, remedy))
            }
            kept => Ok(kept),
        }
    }

    /// DPM-Solver++ places one timestep more and leaves the lowest out, so that the last step, to
    /// sigma 0, is not a tiny one.
    fn dpm_solver_timesteps(&self, steps: usize) -> Result<Vec<f64>> {
        let count = self.train_timesteps();
        let kept = self.kept_timesteps()?;
        Ok(match self.timestep_spacing {
            TimestepSpacing::Linspace => descending(
                linspace(0.0, (kept - 1) as f64, steps + 1).skip(1).map(f64::round_ties_even),
            ),
            TimestepSpacing::Leading => {
                // With as many steps as timesteps diffusers divides to a ratio of 0, and to NaN later.
                let ratio = (kept / (steps + 1)).max(1);
                let place = |i: usize| (i * ratio).min(kept - 1) + self.steps_offset;
                descending((1..=steps).map(|i| place(i) as f64))
            }
            TimestepSpacing::Trailing => trailing(count, kept, steps),
        })
    }
}

fn descending(ascending: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut timesteps: Vec<f64> = ascending.collect();
    timesteps.reverse();
    timesteps
}

/// `round(from − i·count/steps) − 1` down to 0, to the bit as numpy's `arange` computes it.
fn trailing(count: usize, from: usize, steps: usize) -> Vec<f64> {
    let (count, from) = (count as f64, from as f64);
    let ratio = count / steps as f64;
    let stride = (from - ratio) - from;
    let length = ((from / ratio).ceil() as usize).min(steps);
    (0..length).map(|i| (from + i as f64 * stride).round_ties_even() - 1.0).collect()
}
