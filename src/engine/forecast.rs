//! When samples are predicted to be done: the planner, asked what it would do next until they are.

use std::collections::{BTreeMap, BTreeSet};

use super::batcher::{Batch, Batcher, Costs, SampleKey};

/// Evaluations that a forecast looks ahead, since others wait for admission meanwhile; what is not done then is taken to be done after
/// all that is left.
const HORIZON: usize = 4_000;

/// When `watched` samples are done, in seconds on the planner's clock, if nothing arrives any more.
///
/// `running` is the evaluation under way and when it ends; it is not repeated.
pub fn finishes(
    mut batcher: Batcher,
    running: Option<(Batch, f64)>,
    mut now: f64,
    watched: &[SampleKey],
    costs: &impl Costs,
) -> BTreeMap<SampleKey, f64> {
    let mut left: BTreeSet<SampleKey> = watched.iter().copied().collect();
    let mut done = BTreeMap::new();
    // The end of an evaluation; whether all that is watched is done.
    let mut end = |batcher: &mut Batcher, batch: &Batch, seconds: f64, now: f64| {
        batcher.ran(batch, seconds);
        for &sample in &batch.samples {
            if batcher.scheduled(batch.model, sample).is_some_and(|work| work.is_done()) {
                batcher.leave(batch.model, sample);
                if left.remove(&sample) {
                    done.insert(sample, now);
                }
            }
        }
        left.is_empty()
    };
    let mut over = watched.is_empty();
    if let Some((batch, ends)) = running {
        now = now.max(ends);
        over = end(&mut batcher, &batch, costs.seconds(batch.model, batch.stage, batch.rows), now);
    }
    for _ in 0..HORIZON {
        if over {
            break;
        }
        let Some(batch) = batcher.next(now, costs) else { break };
        let seconds = costs.seconds(batch.model, batch.stage, batch.rows);
        now += seconds;
        over = end(&mut batcher, &batch, seconds, now);
    }
    if !over {
        let rest =
            batcher.work().filter(|(_, _, rows, _)| *rows > 0).map(|(model, stage, rows, work)| {
                costs.seconds(model, stage, rows) * work as f64 / rows as f64
            });
        let last = now + rest.sum::<f64>();
        for &sample in watched {
            done.entry(sample).or_insert(last);
        }
    }
    done
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::engine::batcher::{ModelKey, Part, ScheduledWork, Urgency};
    use crate::engine::stage::{PerStage, Stage};

    /// Seconds of an evaluation: a part per evaluation and a part per row, by model.
    struct Linear(Vec<(f64, f64)>);

    impl Costs for Linear {
        fn seconds(&self, model: ModelKey, _: Stage, rows: usize) -> f64 {
            let (fixed, per_row) = self.0[model.0 as usize];
            fixed + per_row * rows as f64
        }
        fn margin(&self) -> f64 {
            1.0
        }
    }

    fn work(evaluations: usize, urgency: Urgency) -> ScheduledWork {
        ScheduledWork::denoising(1, evaluations, urgency)
    }

    #[test]
    fn one_sample_takes_its_evaluations_after_the_one_under_way() {
        let mut batcher = Batcher::default();
        batcher.join(
            ModelKey(0),
            SampleKey(0),
            work(10, Urgency::Ordinary(0.0)),
            PerStage::new(|_| 8),
        );
        let costs = Linear(vec![(0.0, 0.5)]);
        let alone = finishes(batcher.clone(), None, 100.0, &[SampleKey(0)], &costs);
        assert_eq!(alone[&SampleKey(0)], 105.0);
        let running = batcher.next(100.0, &costs).map(|batch| (batch, 100.25));
        let later = finishes(batcher, running, 100.0, &[SampleKey(0)], &costs);
        assert_eq!(later[&SampleKey(0)], 104.75);
    }

    #[test]
    fn all_stages_of_a_sample_take_their_time() {
        struct ByStage;
        impl Costs for ByStage {
            fn seconds(&self, _: ModelKey, stage: Stage, _: usize) -> f64 {
                [0.25, 0.5, 1.0, 7.0][stage as usize]
            }
            fn margin(&self) -> f64 {
                1.0
            }
        }
        let once = Part { rows: 1, evaluations: 1 };
        let mut whole = work(4, Urgency::Ordinary(0.0));
        whole.parts[Stage::Encode] = once;
        whole.parts[Stage::Embed] = once;
        whole.parts[Stage::Decode] = once;
        let mut batcher = Batcher::default();
        batcher.join(ModelKey(0), SampleKey(0), whole, PerStage::new(|_| 8));
        let found = finishes(batcher, None, 0.0, &[SampleKey(0)], &ByStage);
        assert_eq!(found[&SampleKey(0)], 11.75);
    }

    #[test]
    fn beyond_the_horizon_the_rest_is_added_up() {
        let mut batcher = Batcher::default();
        batcher.join(
            ModelKey(0),
            SampleKey(0),
            work(3 * HORIZON, Urgency::Ordinary(0.0)),
            PerStage::new(|_| 8),
        );
        let found = finishes(batcher, None, 0.0, &[SampleKey(0)], &Linear(vec![(0.0, 0.5)]));
        assert!((found[&SampleKey(0)] - 1.5 * HORIZON as f64).abs() < 1e-6);
    }

    proptest! {
        /// Deadlines that the planner itself foresees to meet stay met whatever ordinary work arrives,
        /// up to the evaluation that is under way when they become urgent.
        #[test]
        fn deadlines_are_met_through_later_arrivals(
            accepted in prop::collection::vec((0u64..2, 1usize..20, 1.0f64..1.5), 1..4),
            early in prop::collection::vec((0u64..2, 1usize..20), 0..6),
            late in prop::collection::vec((0u64..2, 1usize..20, 0.0f64..20.0), 0..20),
        ) {
            let costs = Linear(vec![(0.0, 0.2), (0.0, 0.1)]);
            let longest = costs.seconds(ModelKey(0), Stage::Denoise, 4);
            let mut batcher = Batcher::default();
            let mut key = 0;
            let mut join = |batcher: &mut Batcher, model, evaluations, urgency| {
                key += 1;
                batcher.join(ModelKey(model), SampleKey(key), work(evaluations, urgency), PerStage::new(|_| 4));
                SampleKey(key)
            };
            for (model, evaluations) in early {
                join(&mut batcher, model, evaluations, Urgency::Ordinary(0.0));
            }
            // As admission does: accepted at what is foreseen when it has no precedence.
            let mut dues = BTreeMap::new();
            for (model, evaluations, slack) in accepted {
                let mut trial = batcher.clone();
                let newest = join(&mut trial, model, evaluations, Urgency::Ordinary(0.0));
                let due = finishes(trial, None, 0.0, &[newest], &costs)[&newest] * slack + 2.0 * longest;
                let own = ScheduledWork::denoising(1, evaluations, Urgency::Deadline { due, from: f64::INFINITY });
                batcher.join(ModelKey(model), newest, own, PerStage::new(|_| 4));
                dues.insert(newest, due);
            }
            let mut late = late;
            late.sort_by(|a, b| b.2.total_cmp(&a.2));
            let mut now = 0.0;
            while !dues.is_empty() {
                while late.last().is_some_and(|arrival| arrival.2 <= now) {
                    let (model, evaluations, _) = late.pop().unwrap();
                    join(&mut batcher, model, evaluations, Urgency::Ordinary(0.0));
                }
                let batch = batcher.next(now, &costs).unwrap();
                let seconds = costs.seconds(batch.model, batch.stage, batch.rows);
                now += seconds;
                batcher.ran(&batch, seconds);
                for sample in batch.samples.clone() {
                    if batcher.scheduled(batch.model, sample).unwrap().is_done() {
                        batcher.leave(batch.model, sample);
                        if let Some(due) = dues.remove(&sample) {
                            prop_assert!(now <= due + 1e-9, "due {due}, done {now}");
                        }
                    }
                }
            }
        }
    }
}
