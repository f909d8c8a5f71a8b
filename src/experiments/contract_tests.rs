//! What every store must do, whatever it keeps experiments in.
#![allow(clippy::unwrap_used)]

use super::{condition::Condition, store::Store, *};

/// Opens the same store again and again, one at a time.
pub(super) type Open<'a> = &'a mut dyn FnMut() -> Box<dyn Store>;

/// A test and its name.
type Named = (&'static str, fn(Open));

/// All of them.
pub(super) const CONTRACT: [Named; 6] = [
    ("a vote counts once", a_vote_counts_once),
    ("a deleted experiment leaves nothing behind", a_deleted_experiment_leaves_nothing_behind),
    ("votes stop an arm", votes_stop_an_arm_for_good_until_somebody_gives_it_a_weight),
    ("images and times do", images_and_times_stop_an_arm_and_its_traffic_goes_to_the_control),
    ("a ramp goes up", a_ramp_goes_up_over_restarts_and_ends_where_somebody_else_decides),
    ("arms and weights make sense", arms_and_weights_must_make_sense),
];

pub(super) fn arm(model: &str, weight: f64) -> Arm {
    Arm { model: model.into(), steps: None, weight }
}

pub(super) fn arms() -> Vec<Arm> {
    vec![arm("a", 1.0), arm("b", 1.0), arm("c", 2.0)]
}

pub(super) fn pair(models: [&str; 2]) -> Pair {
    Pair { models: models.map(str::to_owned), seed: 7 }
}

pub(super) fn condition() -> Arc<Condition> {
    Arc::new(Condition::new().unwrap())
}

/// What a store's experiments and their counts look like from outside.
pub(super) fn seen(store: &dyn Store) -> Vec<String> {
    let live = store.live();
    let live = live.read().unwrap();
    live.values()
        .map(|one| format!("{} {:?} {:?} {:?}", one.id, one.arms, one.votes, one.traffic(0)))
        .collect()
}

pub(super) fn guarded(guardrails: Guardrails) -> Plan {
    Plan { guardrails: Some(guardrails), ramp: None }
}

/// A vote of the first of two arms against the second.
pub(super) fn vote_for(store: &mut dyn Store, models: [&str; 2], key: usize) {
    let open = store.open_pair("e", &pair(models)).unwrap();
    assert!(store.vote("e", &open, Choice::First, &key.to_string()).unwrap().1);
}

pub(super) fn live(store: &dyn Store) -> Arc<Experiment> {
    Arc::clone(&store.live().read().unwrap()["e"])
}

fn a_vote_counts_once(open: Open) {
    let mut store = open();
    store.create("e", arms(), Plan::default()).unwrap();
    store.create("f", arms(), Plan::default()).unwrap();
    let first = store.open_pair("e", &pair(["c", "a"])).unwrap();
    let second = store.open_pair("e", &pair(["c", "a"])).unwrap();
    assert!(store.vote("e", &first, Choice::Second, "one").unwrap().1);
    let after = seen(store.as_ref());
    assert!(!store.vote("e", &first, Choice::Second, "one").unwrap().1);
    let key_used = Err(Error::KeyUsed("one".into()));
    assert_eq!(store.vote("e", &first, Choice::First, "one"), key_used);
    assert_eq!(store.vote("e", &second, Choice::Second, "one"), key_used);
    assert_eq!(store.vote("e", &first, Choice::Second, "two"), Err(Error::Voted(first.clone())));
    let unknown = |pair: &str| Err(Error::UnknownPair(pair.into()));
    assert_eq!(store.vote("e", "none", Choice::Tie, "two"), unknown("none"));
    assert_eq!(store.vote("f", &second, Choice::Tie, "two"), unknown(&second), "of another one");
    assert_eq!(store.vote("g", &second, Choice::Tie, "two"), Err(Error::Unknown("g".into())));
    assert_eq!(seen(store.as_ref()), after, "what is refused changes nothing");
    assert!(store.vote("f", &second, Choice::Tie, "one").is_err());
    assert!(store.vote("e", &second, Choice::Tie, "two").unwrap().1);
    let live = store.live();
    let tally = *live.read().unwrap()["e"].votes.of(0);
    assert_eq!((tally.wins, tally.losses, tally.ties), (1, 0, 1));
}

fn a_deleted_experiment_leaves_nothing_behind(open: Open) {
    let mut store = open();
    for id in ["e", "e.", "d"] {
        store.create(id, arms(), Plan::default()).unwrap();
        let voted = store.open_pair(id, &pair(["a", "b"])).unwrap();
        store.vote(id, &voted, Choice::First, "key").unwrap();
        store.open_pair(id, &pair(["a", "b"])).unwrap();
    }
    let open = store.open_pair("e", &pair(["a", "b"])).unwrap();
    store.delete("e").unwrap();
    assert_eq!(store.delete("e"), Err(Error::Unknown("e".into())));
    let again = store.create("e", vec![arm("a", 1.0), arm("z", 1.0)], Plan::default()).unwrap();
    assert_eq!(again.votes.of(0), &tally::Tally::default());
    assert!(matches!(store.vote("e", &open, Choice::Tie, "new"), Err(Error::UnknownPair(_))));
    // The pair of an experiment that is another one by now.
    assert!(matches!(store.open_pair("e", &pair(["a", "b"])), Err(Error::Unknown(_))));
    let new = store.open_pair("e", &pair(["a", "z"])).unwrap();
    assert!(store.vote("e", &new, Choice::Tie, "key").unwrap().1, "its keys are free again");
    for id in ["e.", "d"] {
        assert_eq!(store.live().read().unwrap()[id].votes.of(0).wins, 1, "{id}");
    }
}

fn votes_stop_an_arm_for_good_until_somebody_gives_it_a_weight(open: Open) {
    let mut store = open();
    let bounds = Guardrails { votes_p_value: Some(0.05), min_votes: Some(8), ..Default::default() };
    store.create("e", arms(), guarded(bounds)).unwrap();
    // The control loses, and an arm loses to another that is none: neither is stopped.
    (0..20).for_each(|key| vote_for(store.as_mut(), ["b", "a"], key));
    (20..40).for_each(|key| vote_for(store.as_mut(), ["b", "c"], key));
    assert!(
        (0..3).all(|arm| live(store.as_ref()).rollout.as_ref().unwrap().stopped(arm).is_none())
    );
    for vote in 0..8 {
        assert_eq!(live(store.as_ref()).arms, arms(), "{vote}");
        vote_for(store.as_mut(), ["a", "c"], 40 + vote);
    }
    let stopped_arms = vec![arm("a", 1.0), arm("b", 1.0), arm("c", 0.0)];
    let check = |experiment: &Experiment| {
        let stopped = *experiment.rollout.as_ref().unwrap().stopped(2).unwrap();
        let Reason { guardrail, count, bound, observed } = stopped.reason;
        assert_eq!((guardrail, count, bound), (Guardrail::VotesPValue, 8, 0.05));
        assert!(observed <= 0.05 && stopped.at > 1_700_000_000 && stopped.weight == 2.0);
        assert_eq!(experiment.arms, stopped_arms);
    };
    check(&live(store.as_ref()));
    // Killed, so that nothing more is written.
    drop(store);
    let mut store = open();
    check(&live(store.as_ref()));
    store.review("e").unwrap();
    store.reweight("e", &[arm("a", 3.0)]).unwrap();
    assert!(
        live(store.as_ref()).rollout.as_ref().unwrap().stopped(2).is_some(),
        "others' weights are others'"
    );
    store.reweight("e", &[arm("c", 2.0)]).unwrap();
    for vote in 0..8 {
        assert_eq!(live(store.as_ref()).arms[2].weight, 2.0, "what counted before does not count");
        vote_for(store.as_mut(), ["a", "c"], 60 + vote);
    }
    assert_eq!(live(store.as_ref()).arms[2].weight, 0.0);
}

fn images_and_times_stop_an_arm_and_its_traffic_goes_to_the_control(open: Open) {
    let mut store = open();
    let bounds = Guardrails {
        min_psnr_db: Some(20.0),
        min_comparisons: Some(3),
        max_latency_ratio: Some(2.0),
        min_requests: Some(5),
        ..Default::default()
    };
    let two = || vec![arm("a", 0.0), arm("b", 7.0)];
    store.create("e", two(), guarded(bounds.clone())).unwrap();
    for (image, psnr_db) in [50.0, 15.0, 30.0].into_iter().enumerate() {
        live(store.as_ref()).compare(1, psnr_db, None);
        store.review("e").unwrap();
        assert_eq!(live(store.as_ref()).arms, two(), "{image}");
    }
    // It outlives a restart, as what is observed does once it has been written down.
    store.close().unwrap();
    let mut store = open();
    live(store.as_ref()).compare(1, 19.0, None);
    store.review("e").unwrap();
    assert_eq!(live(store.as_ref()).arms, vec![arm("a", 7.0), arm("b", 0.0)]);
    let reason = live(store.as_ref()).rollout.as_ref().unwrap().stopped(1).unwrap().reason;
    assert_eq!((reason.observed, reason.count), (19.0, 3));
    // Drawn before somebody gave it a weight, compared after: of no account.
    let before = live(store.as_ref());
    store.reweight("e", &[arm("a", 1.0), arm("b", 1.0)]).unwrap();
    (0..3).for_each(|_| before.compare(1, 1.0, None));
    store.review("e").unwrap();
    assert_eq!(live(store.as_ref()).arms[1].weight, 1.0);
    assert_eq!(live(store.as_ref()).evidence(1).psnr_db, Measured::default());

    for request in 0..5 {
        live(store.as_ref()).serve(1, 1, 3.0);
        live(store.as_ref()).serve(0, 1, 1.0);
        store.review("e").unwrap();
        assert_eq!(live(store.as_ref()).arms[1].weight == 0.0, request == 4);
    }
    let reason = live(store.as_ref()).rollout.as_ref().unwrap().stopped(1).unwrap().reason;
    assert_eq!((reason.guardrail, reason.count), (Guardrail::MaxLatencyRatio, 5));
}

fn a_ramp_goes_up_over_restarts_and_ends_where_somebody_else_decides(open: Open) {
    let mut store = open();
    let bounds =
        Guardrails { min_psnr_db: Some(20.0), min_comparisons: Some(2), ..Default::default() };
    let plan = |guardrails| Plan {
        guardrails,
        ramp: Some(Ramp::new(Some(vec![0.1, 0.25, 1.0]), Some(4), Some(1))),
    };
    let two = || vec![arm("a", 0.0), arm("b", 0.0)];
    let three = Plan { guardrails: None, ..plan(None) };
    assert!(matches!(store.create("e", arms(), three), Err(Error::Value { .. })));
    store.create("e", two(), plan(Some(bounds.clone()))).unwrap();
    let seen = |store: &dyn Store| {
        let (live, ramp) =
            (live(store), live(store).rollout.as_ref().unwrap().ramp.clone().unwrap());
        ([0, 1].map(|arm| live.arms[arm].weight), ramp.stage, ramp.phase)
    };
    assert_eq!(seen(store.as_ref()), ([0.9, 0.1], 0, Phase::Running));
    let serve = |store: &mut dyn Store, key: usize| {
        live(store).serve(1, 4, 0.1);
        store.review("e").unwrap();
        vote_for(store, ["b", "a"], key);
        store.review("e").unwrap();
    };
    serve(store.as_mut(), 0);
    assert_eq!(seen(store.as_ref()).1, 0, "no image has been compared");
    (0..2).for_each(|_| live(store.as_ref()).compare(1, 30.0, None));
    store.review("e").unwrap();
    assert_eq!(seen(store.as_ref()), ([0.75, 0.25], 1, Phase::Running));
    drop(store);
    let mut store = open();
    assert_eq!(seen(store.as_ref()), ([0.75, 0.25], 1, Phase::Running));
    assert_eq!(live(store.as_ref()).of_stage(), Some([0, 0]));
    serve(store.as_mut(), 1);
    assert_eq!(seen(store.as_ref()), ([0.0, 1.0], 2, Phase::Finished));
    // Guardrails hold after it, too.
    (0..2).for_each(|_| live(store.as_ref()).compare(1, 3.0, None));
    store.review("e").unwrap();
    assert_eq!(seen(store.as_ref()), ([1.0, 0.0], 2, Phase::Stopped));
    serve(store.as_mut(), 2);
    assert_eq!(seen(store.as_ref()), ([1.0, 0.0], 2, Phase::Stopped));

    store.delete("e").unwrap();
    store.review("e").unwrap();
    store.create("e", two(), plan(None)).unwrap();
    store.reweight("e", &[arm("b", 0.9)]).unwrap();
    (0..9).for_each(|key| serve(store.as_mut(), key));
    assert_eq!(seen(store.as_ref()), ([0.9, 0.9], 0, Phase::Overridden));
}

fn arms_and_weights_must_make_sense(open: Open) {
    let mut store = open();
    let cases = [
        (vec![arm("a", 1.0)], "arms"),
        (vec![], "arms"),
        ((0..7).map(|i| arm(&i.to_string(), 1.0)).collect(), "arms"),
        (vec![arm("a", 1.0), arm("a", 1.0)], "arms[1].model"),
        (vec![arm("a", 0.0), arm("b", 0.0)], "arms"),
        (vec![arm("a", 1.0), arm("b", -1.0)], "arms[1].weight"),
        (vec![arm("a", f64::NAN), arm("b", 1.0)], "arms[0].weight"),
        (vec![arm("a", f64::INFINITY), arm("b", 1.0)], "arms[0].weight"),
        (vec![arm("a", 2e6), arm("b", 1.0)], "arms[0].weight"),
    ];
    for (arms, at) in cases {
        let refused = store.create("e", arms, Plan::default());
        assert!(matches!(&refused, Err(Error::Value { field, .. }) if field == at), "{refused:?}");
    }
    store.create("e", arms(), Plan::default()).unwrap();
    assert_eq!(store.create("e", arms(), Plan::default()).unwrap_err(), Error::Exists("e".into()));
    let changes = [
        (vec![arm("z", 1.0)], "arms[0].model"),
        (vec![arm("a", 1.0), arm("a", 2.0)], "arms[1].model"),
        (vec![arm("a", 0.0), arm("b", 0.0), arm("c", 0.0)], "arms"),
        (vec![arm("b", f64::NAN)], "arms[1].weight"),
    ];
    for (changes, at) in changes {
        let refused = store.reweight("e", &changes);
        assert!(matches!(&refused, Err(Error::Value { field, .. }) if field == at), "{refused:?}");
    }
    for number in 1..MAX_EXPERIMENTS {
        store.create(&format!("e{number}"), arms(), Plan::default()).unwrap();
    }
    assert_eq!(store.create("one-more", arms(), Plan::default()).unwrap_err(), Error::TooMany);
}
