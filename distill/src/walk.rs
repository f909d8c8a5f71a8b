//! The trajectories on which the teacher walks from noise to image.

use understudy_models::sampler::{self, Evaluation, Kind, NoiseScale, Trajectory};
use understudy_models::schedule::{ScheduleConfig, TimestepSpacing};
use understudy_models::{Error, Result};

/// Trajectories of equally many steps that together visit every training timestep once: number `o` is at
/// the timesteps `o`, `o + stride`, `o + 2·stride` …, highest first, with `stride = T / steps`.
///
/// With `steps = T` there is one, the paper's; with fewer a sample reaches its end sooner, and a pool of
/// samples with different `o` still shows the student every timestep.
#[derive(Debug, Clone)]
pub struct Walks {
    tables: Vec<Trajectory>,
    steps: usize,
}

impl Walks {
    /// The walks of `kind` ([`Kind::Ddpm`], ancestral, or [`Kind::Ddim`], deterministic) over `steps` steps.
    /// As in the paper the last step of each adds no noise. `learned_variance` says whether the network
    /// answers with twice its input's channels.
    ///
    /// # Errors
    /// [`Error::Value`] for another kind, for `steps` that do not divide the number of training
    /// timesteps, and whatever of the schedule the sampler cannot honour.
    pub fn new(
        schedule: &ScheduleConfig,
        kind: Kind,
        steps: usize,
        learned_variance: bool,
    ) -> Result<Self> {
        if !matches!(kind, Kind::Ddpm | Kind::Ddim) {
            return Err(Error::value("walk-sampler", kind, "use ddpm or ddim"));
        }
        let timesteps = schedule.train_timesteps();
        if steps == 0 || !timesteps.is_multiple_of(steps) {
            return Err(Error::value(
                "--walk-steps",
                steps,
                format!(
                    "must divide the teacher's {timesteps} training timesteps, so that every timestep is \
                     visited; {} does",
                    Self::nearest_steps(timesteps, steps)
                ),
            ));
        }
        let table = |offset: usize| -> Result<Trajectory> {
            let mut schedule = schedule.clone();
            schedule.timestep_spacing = Some(TimestepSpacing::Leading);
            schedule.steps_offset = Some(offset);
            let walk = sampler::trajectory(&schedule, kind, steps, 0.0, learned_variance)?;
            let mut walk: Vec<Evaluation> = walk.to_vec();
            if let Some(last) = walk.last_mut() {
                last.step.d = NoiseScale::Fixed(0.0);
            }
            Ok(walk.into())
        };
        let tables = (0..timesteps / steps).map(table).collect::<Result<_>>()?;
        Ok(Self { tables, steps })
    }

    /// The one walk of DDIM with `trailing` timesteps, from the last one down to `alpha_bar = 1`: number 0. With `steps`
    /// a multiple of K it visits every timestep of the same sampler with K steps.
    ///
    /// # Errors
    /// As [`Walks::new`].
    pub fn trailing(schedule: &ScheduleConfig, steps: usize) -> Result<Self> {
        let timesteps = schedule.train_timesteps();
        if steps == 0 || !timesteps.is_multiple_of(steps) {
            let remedy = format!(
                "must divide the teacher's {timesteps} training timesteps; {} does",
                Self::nearest_steps(timesteps, steps)
            );
            return Err(Error::value("--walk-steps", steps, remedy));
        }
        let mut schedule = schedule.clone();
        schedule.timestep_spacing = Some(TimestepSpacing::Trailing);
        schedule.set_alpha_to_one = Some(true);
        let table = sampler::trajectory(&schedule, Kind::Ddim, steps, 0.0, false)?;
        Ok(Self { tables: vec![table], steps })
    }

    /// The number of steps nearest to `wanted` that [`Walks::new`] takes for a schedule of `timesteps`.
    pub fn nearest_steps(timesteps: usize, wanted: usize) -> usize {
        let divisors = (1..=timesteps).filter(|divisor| timesteps.is_multiple_of(*divisor));
        divisors.min_by_key(|divisor| divisor.abs_diff(wanted)).unwrap_or(1)
    }

    /// How many walks there are.
    pub fn offsets(&self) -> usize {
        self.tables.len()
    }

    /// Steps of each.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// What a sample on walk `offset` does next when it has done `position` steps; nothing at the end.
    pub fn evaluation(&self, offset: usize, position: usize) -> Option<&Evaluation> {
        self.tables.get(offset)?.get(position)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use understudy_models::schedule::Class;

    #[test]
    fn walks_visit_every_timestep_once_and_end_without_noise() {
        let config = ScheduleConfig::new(Class::Ddpm);
        for (kind, steps) in [(Kind::Ddpm, 1000), (Kind::Ddpm, 20), (Kind::Ddim, 50)] {
            let walks = Walks::new(&config, kind, steps, false).unwrap();
            let mut seen = Vec::new();
            for offset in 0..walks.offsets() {
                let walk: Vec<_> =
                    (0..steps).map(|at| walks.evaluation(offset, at).unwrap()).collect();
                assert!(walks.evaluation(offset, steps).is_none());
                assert!(walk.is_sorted_by(|a, b| a.timestep > b.timestep));
                assert!(!walk[steps - 1].step.needs_noise());
                seen.extend(walk.iter().map(|evaluation| evaluation.timestep as usize));
            }
            seen.sort_unstable();
            assert_eq!(seen, (0..1000).collect::<Vec<_>>());
        }
    }

    #[test]
    fn steps_that_leave_timesteps_out_are_refused_with_some_that_do_not() {
        let config = ScheduleConfig::new(Class::Ddpm);
        let problem = Walks::new(&config, Kind::Ddpm, 300, false).unwrap_err().to_string();
        assert!(problem.contains("250 does"), "{problem}");
        assert!(Walks::new(&config, Kind::Euler, 50, false).is_err());
    }
}
