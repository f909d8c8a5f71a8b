//! Times and levels of noise at which a student's samples are looked at.

use std::ops::RangeInclusive;

use understudy_models::Result;
use understudy_models::sampler::{self, Kind, Trajectory};
use understudy_models::schedule::{Class, ScheduleConfig};

/// The student's own steps, and the noise schedule.
pub(super) struct Levels {
    alpha_bar: Vec<f64>,
    /// The student's table of DDIM.
    pub(super) steps: Trajectory,
}

impl Levels {
    /// Of a student of `evaluations` steps on its schedule.
    ///
    /// # Errors
    /// A schedule that DDIM cannot honour.
    pub(super) fn new(schedule: &ScheduleConfig, evaluations: usize) -> Result<Self> {
        let alpha_bar = schedule.schedule(Class::Ddpm)?.alpha_bar;
        let steps = sampler::trajectory(schedule, Kind::Ddim, evaluations, 0.0, false)?;
        Ok(Self { alpha_bar, steps })
    }

    /// Steps of the student.
    pub(super) fn evaluations(&self) -> usize {
        self.steps.len()
    }

    /// ᾱ of a timestep.
    pub(super) fn alpha_bar(&self, timestep: usize) -> f64 {
        self.alpha_bar[timestep]
    }

    /// The timestep at which step `segment` begins.
    pub(super) fn start(&self, segment: usize) -> usize {
        self.steps[segment].timestep as usize
    }

    /// ᾱ where step `segment` ends.
    pub(super) fn end_alpha_bar(&self, segment: usize) -> f64 {
        self.steps.get(segment + 1).map_or(1.0, |next| self.alpha_bar[next.timestep as usize])
    }

    /// The timesteps to which the end of a segment is noised again: within the segment, a hundredth of all timesteps away
    /// from its ends, since with no noise between there is nothing to learn; and nowhere below a fiftieth of all timesteps or
    /// above 95 of a hundred, where the teacher's answer says little (Luo et al. 2025's code has 20 and 950 of 1000).
    pub(super) fn renoised(&self, segment: usize) -> RangeInclusive<usize> {
        let all = self.alpha_bar.len();
        let apart = (all / 100).max(1);
        let end = self.steps.get(segment + 1).map(|next| next.timestep as usize);
        let most = self.start(segment).saturating_sub(apart).min(95 * all / 100);
        // A segment that is shorter than all that, or above it, has what lies next to its end: there must be noise between.
        let most = most.max(end.map_or(0, |end| end + 1));
        let least = end.map_or(0, |end| end + apart).max(all / 50).min(most);
        least..=most
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn segments_are_noised_again_within_themselves() {
        use understudy_models::schedule::TimestepSpacing;
        let mut schedule = ScheduleConfig::new(Class::Ddim);
        schedule.timestep_spacing = Some(TimestepSpacing::Trailing);
        schedule.set_alpha_to_one = Some(true);
        let ranges = |evaluations: usize| {
            let levels = Levels::new(&schedule, evaluations).unwrap();
            (0..evaluations).map(|segment| levels.renoised(segment)).collect::<Vec<_>>()
        };
        assert_eq!(ranges(1), [20..=950]);
        assert_eq!(ranges(2), [509..=950, 20..=489]);
        assert_eq!(ranges(4), [759..=950, 509..=739, 259..=489, 20..=239]);
        // Of segments that are shorter than what is left out something is left, noisier than their ends.
        for evaluations in [20, 25, 50, 100, 200, 500, 1000] {
            let levels = Levels::new(&schedule, evaluations).unwrap();
            for (segment, range) in ranges(evaluations).into_iter().enumerate() {
                let least = levels.alpha_bar(*range.start());
                assert!(
                    !range.is_empty() && least < levels.end_alpha_bar(segment),
                    "{evaluations}"
                );
            }
        }
        let levels = Levels::new(&schedule, 2).unwrap();
        assert_eq!([levels.start(0), levels.start(1)], [999, 499]);
        assert_eq!(levels.end_alpha_bar(0), levels.alpha_bar(499));
        assert_eq!(levels.end_alpha_bar(1), 1.0);
    }
}
