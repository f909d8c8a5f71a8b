//! The trajectories that a model's samples follow: one is worked out when it is first asked for.

use std::{
    num::NonZeroUsize,
    sync::{Mutex, PoisonError},
};

use lru::LruCache;
use understudy_models::{
    Result,
    sampler::{self, Kind, Trajectory},
    schedule::ScheduleConfig,
};

/// Trajectories of a model that are kept: few clients ask for more samplers and numbers of steps.
const KEPT: NonZeroUsize = NonZeroUsize::new(16).unwrap();

/// Trajectories by sampler, steps and the bits of eta; the least recently used are forgotten.
pub(super) struct Trajectories {
    kept: Mutex<LruCache<(Kind, usize, u64), Trajectory>>,
}

impl Default for Trajectories {
    fn default() -> Self {
        Self { kept: Mutex::new(LruCache::new(KEPT)) }
    }
}

impl Trajectories {
    /// As [`sampler::trajectory`], of one schedule and one network.
    ///
    /// # Errors
    /// Those of [`sampler::trajectory`]; nothing of them is kept.
    pub(super) fn get(
        &self,
        schedule: &ScheduleConfig,
        (kind, steps, eta): (Kind, usize, f64),
        learned_variance: bool,
    ) -> Result<Trajectory> {
        let key = (kind, steps, eta.to_bits());
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.try_get_or_insert(key, || {
            sampler::trajectory(schedule, kind, steps, eta, learned_variance)
        })
        .cloned()
    }
}
