//! The planner as a pure function: random arrivals, departures and costs.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

/// What has no deadline.
struct Free;

impl Costs for Free {
    fn seconds(&self, _: ModelKey, _: Stage, _: usize) -> f64 {
        0.0
    }
    fn margin(&self) -> f64 {
        1.0
    }
}

/// A second for every evaluation.
struct Second;

impl Costs for Second {
    fn seconds(&self, _: ModelKey, _: Stage, _: usize) -> f64 {
        1.0
    }
    fn margin(&self) -> f64 {
        1.0
    }
}

fn ordinary(rows: usize) -> ScheduledWork {
    ScheduledWork::denoising(rows, 10, Urgency::Ordinary(0.0))
}

/// A sample of the simulation.
#[derive(Debug, Clone)]
struct Arrival {
    /// After which evaluation it arrives.
    at: usize,
    model: u64,
    rows: usize,
    evaluations: usize,
    /// It disconnects after so many of its evaluations.
    cancelled_after: Option<usize>,
}

fn arrivals() -> impl Strategy<Value = Vec<Arrival>> {
    let arrival = (0usize..60, 0u64..4, 1usize..3, 1usize..12, prop::option::of(0usize..12))
        .prop_map(|(at, model, rows, evaluations, cancelled_after)| Arrival {
            at,
            model,
            rows,
            evaluations,
            cancelled_after,
        });
    prop::collection::vec(arrival, 1..60)
}

proptest! {
    #[test]
    fn every_sample_gets_exactly_its_evaluations_in_order_within_the_limits(
        mut arrivals in arrivals(),
        limits in prop::array::uniform4(1usize..9),
        costs in prop::array::uniform4(0.001f64..1.0),
    ) {
        arrivals.sort_by_key(|a| a.at);
        let mut batcher = Batcher::default();
        let mut done: BTreeMap<SampleKey, usize> = BTreeMap::new();
        let mut live: BTreeSet<SampleKey> = BTreeSet::new();
        let mut next_arrival = 0;
        let mut tick = 0;
        loop {
            while next_arrival < arrivals.len() && (arrivals[next_arrival].at <= tick || batcher.is_empty()) {
                let a = &arrivals[next_arrival];
                let key = SampleKey(next_arrival as u64);
                batcher.join(ModelKey(a.model), key, ordinary(a.rows), PerStage::new(|_| limits[a.model as usize]));
                live.insert(key);
                done.insert(key, 0);
                next_arrival += 1;
            }
            let Some(batch) = batcher.next(0.0, &Free) else { break };
            let limit = limits[batch.model.0 as usize];
            let rows: usize = batch.samples.iter().map(|s| arrivals[s.0 as usize].rows).sum();
            prop_assert_eq!(rows, batch.rows);
            prop_assert!(rows <= limit || batch.samples.len() == 1);
            prop_assert!(batch.samples.windows(2).all(|w| w[0] < w[1]), "oldest first, nobody twice");
            // Nobody of the model is passed over: whoever is left out is younger than all taken.
            let youngest = *batch.samples.last().unwrap();
            for s in &live {
                if arrivals[s.0 as usize].model == batch.model.0 && !batch.samples.contains(s) {
                    prop_assert!(*s > youngest);
                }
            }
            batcher.ran(&batch, costs[batch.model.0 as usize]);
            for s in batch.samples {
                prop_assert!(live.contains(&s), "nobody runs after leaving");
                let a = &arrivals[s.0 as usize];
                prop_assert_eq!(a.model, batch.model.0);
                let count = done.get_mut(&s).unwrap();
                *count += 1;
                if *count == a.evaluations || Some(*count) == a.cancelled_after {
                    batcher.leave(ModelKey(a.model), s);
                    live.remove(&s);
                }
            }
            tick += 1;
        }
        prop_assert!(live.is_empty(), "nothing is lost");
        prop_assert_eq!(done.len(), arrivals.len());
        for (s, count) in done {
            let a = &arrivals[s.0 as usize];
            let expected = a.cancelled_after.filter(|&c| c > 0).map_or(a.evaluations, |c| c.min(a.evaluations));
            prop_assert_eq!(count, expected);
        }
    }

    #[test]
    fn busy_models_share_the_device_by_time(costs in prop::collection::vec(0.001f64..1.0, 2..5)) {
        let mut batcher = Batcher::default();
        for model in 0..costs.len() as u64 {
            batcher.join(ModelKey(model), SampleKey(model), ordinary(1), PerStage::new(|_| 8));
        }
        let mut used = vec![0.0; costs.len()];
        for _ in 0..2_000 {
            let batch = batcher.next(0.0, &Free).unwrap();
            let cost = costs[batch.model.0 as usize];
            batcher.ran(&batch, cost);
            used[batch.model.0 as usize] += cost;
        }
        let most = used.iter().copied().fold(0.0, f64::max);
        let least = used.iter().copied().fold(f64::INFINITY, f64::min);
        prop_assert!(most - least <= 1.0, "no two busy models are apart by more than one evaluation: {used:?}");
    }
}

#[test]
fn who_arrives_waits_for_one_evaluation_and_has_no_credit_for_its_idle_past() {
    let (teacher, student) = (ModelKey(1), ModelKey(2));
    let mut batcher = Batcher::default();
    batcher.join(teacher, SampleKey(0), ordinary(1), PerStage::new(|_| 8));
    for _ in 0..50 {
        let batch = batcher.next(0.0, &Free).unwrap();
        assert_eq!(batch.model, teacher);
        batcher.ran(&batch, 0.1);
    }
    batcher.join(student, SampleKey(1), ordinary(1), PerStage::new(|_| 8));
    let mut student_turns = 0;
    for _ in 0..22 {
        let batch = batcher.next(0.0, &Free).unwrap();
        student_turns += usize::from(batch.model == student);
        batcher.ran(&batch, if batch.model == student { 0.01 } else { 0.1 });
    }
    assert!(
        (19..=21).contains(&student_turns),
        "ten cheap evaluations to each dear one, got {student_turns}"
    );
}

#[test]
fn leaving_and_coming_back_pays_no_debt() {
    let (steady, dear) = (ModelKey(1), ModelKey(2));
    let mut batcher = Batcher::default();
    batcher.join(steady, SampleKey(0), ordinary(1), PerStage::new(|_| 8));
    let mut used = BTreeMap::from([(steady, 0.0), (dear, 0.0)]);
    let mut newest = 0;
    for _ in 0..1_000 {
        // One-evaluation requests for the dear model, one at a time.
        if newest == 0 {
            newest += 1;
            batcher.join(dear, SampleKey(newest), ordinary(1), PerStage::new(|_| 8));
        }
        let batch = batcher.next(0.0, &Free).unwrap();
        let cost = if batch.model == dear { 1.0 } else { 0.1 };
        *used.get_mut(&batch.model).unwrap() += cost;
        batcher.ran(&batch, cost);
        if batch.model == dear {
            batcher.leave(dear, batch.samples[0]);
            newest += 1;
            batcher.join(dear, SampleKey(newest), ordinary(1), PerStage::new(|_| 8));
        }
    }
    assert!((used[&dear] - used[&steady]).abs() <= 1.1, "equal shares: {used:?}");
}

#[test]
fn an_idle_planner_plans_nothing() {
    assert_eq!(Batcher::default().next(0.0, &Free), None);
}

#[test]
fn a_deadline_waits_its_turn_until_it_must_not() {
    let (one, other) = (ModelKey(1), ModelKey(2));
    let mut batcher = Batcher::default();
    batcher.join(one, SampleKey(0), ordinary(1), PerStage::new(|_| 1));
    let urgency = Urgency::Deadline { due: 30.0, from: f64::INFINITY };
    batcher.join(one, SampleKey(1), ScheduledWork::denoising(1, 4, urgency), PerStage::new(|_| 1));
    batcher.join(other, SampleKey(2), ordinary(1), PerStage::new(|_| 1));
    let next = |batcher: &Batcher, now| batcher.next(now, &Second).unwrap().samples;
    assert_eq!(next(&batcher, 0.0), [SampleKey(0)]);
    assert_eq!(next(&batcher, 25.0), [SampleKey(0)], "one more second leaves four");
    assert_eq!(next(&batcher, 25.5), [SampleKey(1)]);
    // A deadline that cannot be met any more is no reason to hold the others up.
    assert_eq!(next(&batcher, 26.5), [SampleKey(0)]);
    // The others have let it pass for long enough.
    let urgency = Urgency::Deadline { due: 40.0, from: f64::INFINITY };
    batcher.join(one, SampleKey(3), ScheduledWork::denoising(1, 4, urgency), PerStage::new(|_| 1));
    assert_eq!(next(&batcher, 35.5), [SampleKey(0)]);
    batcher.leave(one, SampleKey(0));
    batcher.leave(other, SampleKey(2));
    let late = ScheduledWork { urgency: Urgency::Ordinary(20.0), ..ordinary(1) };
    batcher.join(other, SampleKey(4), late, PerStage::new(|_| 1));
    assert_eq!(next(&batcher, 35.5), [SampleKey(3)]);
}

#[test]
fn background_work_runs_when_nothing_else_does_and_is_nobodys_debt() {
    let model = ModelKey(1);
    let mut batcher = Batcher::default();
    let background = ScheduledWork::denoising(1, 9, Urgency::Background);
    batcher.join(model, SampleKey(0), background, PerStage::new(|_| 8));
    assert!(batcher.is_empty(), "no client waits");
    let batch = batcher.next(0.0, &Second).unwrap();
    assert_eq!(batch.samples, [SampleKey(0)]);
    batcher.ran(&batch, 100.0);
    assert_eq!(
        batcher.scheduled(model, SampleKey(0)).unwrap().parts[Stage::Denoise].evaluations,
        8
    );
    batcher.join(model, SampleKey(1), ordinary(1), PerStage::new(|_| 8));
    batcher.join(ModelKey(2), SampleKey(2), ordinary(1), PerStage::new(|_| 8));
    let batch = batcher.next(0.0, &Second).unwrap();
    assert_eq!((batch.model, &batch.samples[..]), (model, &[SampleKey(1)][..]), "it owes nothing");
    batcher.leave(model, SampleKey(1));
    batcher.leave(ModelKey(2), SampleKey(2));
    assert_eq!(batcher.next(0.0, &Second).unwrap().samples, [SampleKey(0)], "it goes on");
    batcher.leave(model, SampleKey(0));
    assert_eq!(batcher.next(0.0, &Second), None);
}

/// An image of a text-to-image model: its prompt, so many steps, its decoding.
fn prompted(rows: usize, steps: usize) -> ScheduledWork {
    let once = Part { rows: 1, evaluations: 1 };
    let parts = PerStage::new(|stage| match stage {
        Stage::Encode | Stage::Decode => once,
        Stage::Embed => Part::default(),
        Stage::Denoise => Part { rows, evaluations: steps },
    });
    ScheduledWork { parts, urgency: Urgency::Ordinary(0.0) }
}

proptest! {
    /// Every sample goes through its stages in their order, each batch is of one stage and within its limit, and nobody waits
    /// for ever.
    #[test]
    fn stages_follow_one_another(
        arrivals in prop::collection::vec((0usize..30, 1usize..3, 1usize..6, prop::bool::ANY), 1..12),
        limits in [1usize..4, 1usize..3, 1usize..5, 1usize..3],
    ) {
        let limits = PerStage::new(|stage| limits[stage as usize].max(if stage == Stage::Denoise { 2 } else { 1 }));
        let mut batcher = Batcher::default();
        let mut ran: BTreeMap<SampleKey, Vec<Stage>> = BTreeMap::new();
        let total: usize = arrivals.iter().map(|(_, _, steps, _)| steps + 3).sum();
        let mut waiting: Vec<_> = arrivals.iter().enumerate().collect();
        for evaluation in 0..30 + total {
            waiting.retain(|(key, (at, rows, steps, begins_with_image))| {
                let comes = *at <= evaluation;
                if comes {
                    let mut work = prompted(*rows, *steps);
                    if *begins_with_image {
                        work.parts[Stage::Embed] = Part { rows: 1, evaluations: 1 };
                    }
                    batcher.join(ModelKey(0), SampleKey(*key as u64), work, limits);
                }
                !comes
            });
            let Some(batch) = batcher.next(0.0, &Free) else { continue };
            prop_assert!(batch.rows <= limits[batch.stage]);
            batcher.ran(&batch, 1.0);
            for sample in &batch.samples {
                ran.entry(*sample).or_default().push(batch.stage);
                if batcher.scheduled(batch.model, *sample).unwrap().is_done() {
                    batcher.leave(batch.model, *sample);
                }
            }
        }
        prop_assert!(batcher.is_empty());
        for (key, (_, _, steps, begins_with_image)) in arrivals.iter().enumerate() {
            let mut expected = vec![Stage::Encode];
            expected.extend(begins_with_image.then_some(Stage::Embed));
            expected.extend(vec![Stage::Denoise; *steps]);
            expected.push(Stage::Decode);
            prop_assert_eq!(&ran[&SampleKey(key as u64)], &expected);
        }
    }
}

#[test]
fn a_deadline_counts_what_is_to_be_decoded() {
    /// Decoding takes ten seconds, all else one.
    struct Slow;
    impl Costs for Slow {
        fn seconds(&self, _: ModelKey, stage: Stage, _: usize) -> f64 {
            if stage == Stage::Decode { 10.0 } else { 1.0 }
        }
        fn margin(&self) -> f64 {
            1.0
        }
    }
    let (one, other) = (ModelKey(1), ModelKey(2));
    let due = |due| {
        let urgency = Urgency::Deadline { due, from: f64::INFINITY };
        ScheduledWork { urgency, ..prompted(1, 3) }
    };
    let limits = PerStage::new(|_| 1);
    // Prompt, three steps and decoding take 14 seconds: with 14.5 there is no time for anything else first.
    for (seconds, first) in [(14.5, SampleKey(2)), (100.0, SampleKey(1))] {
        let mut batcher = Batcher::default();
        batcher.join(one, SampleKey(1), ordinary(1), limits);
        batcher.join(other, SampleKey(2), due(seconds), limits);
        assert_eq!(batcher.next(0.0, &Slow).unwrap().samples, [first], "{seconds}");
    }
}

/// An image that is decoded in so many parts.
fn decoded_in(parts: usize, steps: usize) -> ScheduledWork {
    let mut work = prompted(1, steps);
    work.parts[Stage::Decode] = Part { rows: 1, evaluations: parts };
    work
}

proptest! {
    /// Whatever is decoded, another model that has something to do waits for no more than one evaluation, or part, beside
    /// what it owes for its own last one; and no more than one decode of a model is ever half done.
    #[test]
    fn a_decode_in_parts_holds_the_device_for_one_of_them_at_a_time(
        arrivals in prop::collection::vec((0usize..40, 1usize..6), 1..8),
        parts in 2usize..12,
        part in 0.1f64..1.0,
        step in 0.1f64..1.0,
        other in 0.01f64..1.0,
    ) {
        let mut limits = PerStage::new(|_| 4);
        limits[Stage::Decode] = 1;
        let (model, neighbour) = (ModelKey(0), ModelKey(1));
        let mut batcher = Batcher::default();
        let endless = ScheduledWork::denoising(1, usize::MAX, Urgency::Ordinary(0.0));
        batcher.join(neighbour, SampleKey(1000), endless, limits);
        let mut waiting: Vec<_> = arrivals.iter().enumerate().collect();
        let mut begun: BTreeMap<SampleKey, usize> = BTreeMap::new();
        let (mut waited, mut left) = (0.0, arrivals.len());
        for evaluation in 0.. {
            waiting.retain(|(key, (at, steps))| {
                let comes = *at <= evaluation;
                if comes {
                    batcher.join(model, SampleKey(*key as u64), decoded_in(parts, *steps), limits);
                }
                !comes
            });
            if left == 0 && waiting.is_empty() {
                break;
            }
            prop_assert!(evaluation < 100_000, "nothing is starved");
            let batch = batcher.next(0.0, &Free).unwrap();
            if batch.model == neighbour {
                batcher.ran(&batch, other);
                waited = 0.0;
                continue;
            }
            let seconds = if batch.stage == Stage::Decode { part } else { step };
            waited += seconds;
            prop_assert!(waited <= other + part.max(step) + 1e-9, "{waited}");
            batcher.ran(&batch, seconds);
            for sample in &batch.samples {
                if batch.stage == Stage::Decode {
                    prop_assert_eq!(batch.samples.len(), 1);
                    *begun.entry(*sample).or_default() += 1;
                }
                if batcher.scheduled(model, *sample).unwrap().is_done() {
                    prop_assert_eq!(begun.remove(sample), Some(parts));
                    batcher.leave(model, *sample);
                    left -= 1;
                }
            }
            prop_assert!(begun.len() <= 1, "{begun:?}");
        }
    }
}

#[test]
fn a_deadline_of_the_same_model_passes_between_the_parts_of_a_decode() {
    let model = ModelKey(1);
    let mut limits = PerStage::new(|_| 4);
    limits[Stage::Decode] = 1;
    let mut batcher = Batcher::default();
    batcher.join(model, SampleKey(0), decoded_in(10, 1), limits);
    let mut now = 0.0;
    let mut run = |batcher: &mut Batcher| {
        let batch = batcher.next(now, &Second).unwrap();
        now += 1.0;
        batcher.ran(&batch, 1.0);
        (batch.samples[0].0, batch.stage)
    };
    let stages: Vec<_> = (0..5).map(|_| run(&mut batcher)).collect();
    let decode = (0, Stage::Decode);
    assert_eq!(stages, [(0, Stage::Encode), (0, Stage::Denoise), decode, decode, decode]);
    // Two seconds of work, due in three: the decode has seven parts left.
    let urgency = Urgency::Deadline { due: 8.0, from: f64::INFINITY };
    batcher.join(model, SampleKey(1), ScheduledWork::denoising(1, 2, urgency), limits);
    assert_eq!(run(&mut batcher), decode);
    assert_eq!(run(&mut batcher), (1, Stage::Denoise));
    assert_eq!(run(&mut batcher), (1, Stage::Denoise));
    batcher.leave(model, SampleKey(1));
    assert!((0..6).all(|_| run(&mut batcher) == decode));
    assert!(batcher.scheduled(model, SampleKey(0)).unwrap().is_done());
}
