//! The store: what is kept, what is refused, what is forgotten.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use redb::{Database, ReadableDatabase, TableDefinition};

use super::{
    condition::Condition,
    store::{Store, failed},
    *,
};

fn arm(model: &str, weight: f64) -> Arm {
    Arm { model: model.into(), steps: None, weight }
}

fn arms() -> Vec<Arm> {
    vec![arm("a", 1.0), arm("b", 1.0), arm("c", 2.0)]
}

fn pair(models: [&str; 2]) -> Pair {
    Pair { models: models.map(str::to_owned), seed: 7 }
}

fn condition() -> Arc<Condition> {
    Arc::new(Condition::new().unwrap())
}

/// What a store's experiments and their counts look like from outside.
fn seen(store: &Store) -> Vec<String> {
    let live = store.live();
    let live = live.read().unwrap();
    live.values()
        .map(|one| format!("{} {:?} {:?} {:?}", one.id, one.arms, one.votes, one.traffic(0)))
        .collect()
}

#[test]
fn everything_is_there_when_the_file_is_opened_again() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = Store::open(folder.path(), false, condition()).unwrap();
    assert_eq!(folder.path().read_dir().unwrap().count(), 0, "nothing is made before it is needed");
    store.create("e", arms(), Plan::default()).unwrap();
    store.create("f", arms(), Plan::default()).unwrap();
    store.reweight("e", &[arm("c", 0.5)]).unwrap();
    store.delete("f").unwrap();
    let (voted, open) =
        (store.open_pair("e", &pair(["b", "a"])).unwrap(), store.open_pair("e", &pair(["a", "c"])));
    let (vote, counted) = store.vote("e", &voted, Choice::First, "key").unwrap();
    assert!(counted && vote.winner() == Some("b"));
    store.live().read().unwrap()["e"].serve(0, 3, 0.25);
    store.close().unwrap();
    let before = seen(&store);
    drop(store);

    let mut store = Store::open(folder.path(), false, condition()).unwrap();
    assert_eq!(seen(&store), before);
    assert_eq!(store.vote("e", &voted, Choice::First, "key"), Ok((vote, false)));
    assert!(store.vote("e", &open.unwrap(), Choice::Tie, "other").unwrap().1);
}

#[test]
fn a_vote_counts_once() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = Store::open(folder.path(), false, condition()).unwrap();
    store.create("e", arms(), Plan::default()).unwrap();
    store.create("f", arms(), Plan::default()).unwrap();
    let first = store.open_pair("e", &pair(["c", "a"])).unwrap();
    let second = store.open_pair("e", &pair(["c", "a"])).unwrap();
    assert!(store.vote("e", &first, Choice::Second, "one").unwrap().1);
    let after = seen(&store);
    assert!(!store.vote("e", &first, Choice::Second, "one").unwrap().1);
    let key_used = Err(Error::KeyUsed("one".into()));
    assert_eq!(store.vote("e", &first, Choice::First, "one"), key_used);
    assert_eq!(store.vote("e", &second, Choice::Second, "one"), key_used);
    assert_eq!(store.vote("e", &first, Choice::Second, "two"), Err(Error::Voted(first.clone())));
    let unknown = |pair: &str| Err(Error::UnknownPair(pair.into()));
    assert_eq!(store.vote("e", "none", Choice::Tie, "two"), unknown("none"));
    assert_eq!(store.vote("f", &second, Choice::Tie, "two"), unknown(&second), "of another one");
    assert_eq!(store.vote("g", &second, Choice::Tie, "two"), Err(Error::Unknown("g".into())));
    assert_eq!(seen(&store), after, "what is refused changes nothing");
    assert!(store.vote("f", &second, Choice::Tie, "one").is_err());
    assert!(store.vote("e", &second, Choice::Tie, "two").unwrap().1);
    let live = store.live();
    let tally = *live.read().unwrap()["e"].votes.of(0);
    assert_eq!((tally.wins, tally.losses, tally.ties), (1, 0, 1));
}

#[test]
fn a_deleted_experiment_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = Store::open(folder.path(), false, condition()).unwrap();
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

#[test]
fn pairs_are_forgotten_when_they_are_too_old() {
    const OPEN: TableDefinition<&str, (&str, u64, &[u8])> = TableDefinition::new("open_pairs");
    let folder = tempfile::tempdir().unwrap();
    let mut store = Store::open(folder.path(), false, condition()).unwrap();
    store.create("e", arms(), Plan::default()).unwrap();
    drop(store);
    let old = format!("{:012x}{:016x}", 1, 2);
    let file = folder.path().join("experiments.redb");
    let database = Database::open(&file).unwrap();
    let transaction = database.begin_write().unwrap();
    let json = serde_json::to_vec(&pair(["a", "b"])).unwrap();
    let mut table = transaction.open_table(OPEN).unwrap();
    table.insert(old.as_str(), ("e", 1, json.as_slice())).unwrap();
    drop(table);
    transaction.commit().unwrap();
    drop(database);

    let mut store = Store::open(folder.path(), false, condition()).unwrap();
    assert_eq!(store.vote("e", &old, Choice::Tie, "k"), Err(Error::UnknownPair(old)));
    store.open_pair("e", &pair(["a", "b"])).unwrap();
    drop(store);
    let database = Database::open(&file).unwrap();
    let table = database.begin_read().unwrap().open_table(OPEN).unwrap();
    assert_eq!(redb::ReadableTableMetadata::len(&table).unwrap(), 1);
}

fn guarded(guardrails: Guardrails) -> Plan {
    Plan { guardrails: Some(guardrails), ramp: None }
}

/// A vote of the first of two arms against the second.
fn vote_for(store: &mut Store, models: [&str; 2], key: usize) {
    let open = store.open_pair("e", &pair(models)).unwrap();
    assert!(store.vote("e", &open, Choice::First, &key.to_string()).unwrap().1);
}

fn live(store: &Store) -> Arc<Experiment> {
    Arc::clone(&store.live().read().unwrap()["e"])
}

#[test]
fn votes_stop_an_arm_for_good_until_somebody_gives_it_a_weight() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = Store::open(folder.path(), false, condition()).unwrap();
    let bounds = Guardrails { votes_p_value: Some(0.05), min_votes: Some(8), ..Default::default() };
    store.create("e", arms(), guarded(bounds)).unwrap();
    // The control loses, and an arm loses to another that is none: neither is stopped.
    (0..20).for_each(|key| vote_for(&mut store, ["b", "a"], key));
    (20..40).for_each(|key| vote_for(&mut store, ["b", "c"], key));
    assert!((0..3).all(|arm| live(&store).rollout.as_ref().unwrap().stopped(arm).is_none()));
    for vote in 0..8 {
        assert_eq!(live(&store).arms, arms(), "{vote}");
        vote_for(&mut store, ["a", "c"], 40 + vote);
    }
    let stopped_arms = vec![arm("a", 1.0), arm("b", 1.0), arm("c", 0.0)];
    let check = |experiment: &Experiment| {
        let stopped = *experiment.rollout.as_ref().unwrap().stopped(2).unwrap();
        let Reason { guardrail, count, bound, observed } = stopped.reason;
        assert_eq!((guardrail, count, bound), (Guardrail::VotesPValue, 8, 0.05));
        assert!(observed <= 0.05 && stopped.at > 1_700_000_000 && stopped.weight == 2.0);
        assert_eq!(experiment.arms, stopped_arms);
    };
    check(&live(&store));
    // Killed, so that nothing more is written.
    drop(store);
    let mut store = Store::open(folder.path(), false, condition()).unwrap();
    check(&live(&store));
    store.review("e").unwrap();
    store.reweight("e", &[arm("a", 3.0)]).unwrap();
    assert!(
        live(&store).rollout.as_ref().unwrap().stopped(2).is_some(),
        "others' weights are others'"
    );
    store.reweight("e", &[arm("c", 2.0)]).unwrap();
    for vote in 0..8 {
        assert_eq!(live(&store).arms[2].weight, 2.0, "what counted before does not count");
        vote_for(&mut store, ["a", "c"], 60 + vote);
    }
    assert_eq!(live(&store).arms[2].weight, 0.0);
}

#[test]
fn images_and_times_stop_an_arm_and_its_traffic_goes_to_the_control() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = Store::open(folder.path(), false, condition()).unwrap();
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
        live(&store).compare(1, psnr_db, None);
        store.review("e").unwrap();
        assert_eq!(live(&store).arms, two(), "{image}");
    }
    // It outlives a restart, as what is observed does once it has been written down.
    store.close().unwrap();
    let mut store = Store::open(folder.path(), false, condition()).unwrap();
    live(&store).compare(1, 19.0, None);
    store.review("e").unwrap();
    assert_eq!(live(&store).arms, vec![arm("a", 7.0), arm("b", 0.0)]);
    let reason = live(&store).rollout.as_ref().unwrap().stopped(1).unwrap().reason;
    assert_eq!((reason.observed, reason.count), (19.0, 3));
    // Drawn before somebody gave it a weight, compared after: of no account.
    let before = live(&store);
    store.reweight("e", &[arm("a", 1.0), arm("b", 1.0)]).unwrap();
    (0..3).for_each(|_| before.compare(1, 1.0, None));
    store.review("e").unwrap();
    assert_eq!(live(&store).arms[1].weight, 1.0);
    assert_eq!(live(&store).evidence(1).psnr_db, Measured::default());

    for request in 0..5 {
        live(&store).serve(1, 1, 3.0);
        live(&store).serve(0, 1, 1.0);
        store.review("e").unwrap();
        assert_eq!(live(&store).arms[1].weight == 0.0, request == 4);
    }
    let reason = live(&store).rollout.as_ref().unwrap().stopped(1).unwrap().reason;
    assert_eq!((reason.guardrail, reason.count), (Guardrail::MaxLatencyRatio, 5));
}

#[test]
fn a_ramp_goes_up_over_restarts_and_ends_where_somebody_else_decides() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = Store::open(folder.path(), false, condition()).unwrap();
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
    let seen = |store: &Store| {
        let (live, ramp) =
            (live(store), live(store).rollout.as_ref().unwrap().ramp.clone().unwrap());
        ([0, 1].map(|arm| live.arms[arm].weight), ramp.stage, ramp.phase)
    };
    assert_eq!(seen(&store), ([0.9, 0.1], 0, Phase::Running));
    let serve = |store: &mut Store, key: usize| {
        live(store).serve(1, 4, 0.1);
        store.review("e").unwrap();
        vote_for(store, ["b", "a"], key);
        store.review("e").unwrap();
    };
    serve(&mut store, 0);
    assert_eq!(seen(&store).1, 0, "no image has been compared");
    (0..2).for_each(|_| live(&store).compare(1, 30.0, None));
    store.review("e").unwrap();
    assert_eq!(seen(&store), ([0.75, 0.25], 1, Phase::Running));
    drop(store);
    let mut store = Store::open(folder.path(), false, condition()).unwrap();
    assert_eq!(seen(&store), ([0.75, 0.25], 1, Phase::Running));
    assert_eq!(live(&store).of_stage(), Some([0, 0]));
    serve(&mut store, 1);
    assert_eq!(seen(&store), ([0.0, 1.0], 2, Phase::Finished));
    // Guardrails hold after it, too.
    (0..2).for_each(|_| live(&store).compare(1, 3.0, None));
    store.review("e").unwrap();
    assert_eq!(seen(&store), ([1.0, 0.0], 2, Phase::Stopped));
    serve(&mut store, 2);
    assert_eq!(seen(&store), ([1.0, 0.0], 2, Phase::Stopped));

    store.delete("e").unwrap();
    store.review("e").unwrap();
    store.create("e", two(), plan(None)).unwrap();
    store.reweight("e", &[arm("b", 0.9)]).unwrap();
    (0..9).for_each(|key| serve(&mut store, key));
    assert_eq!(seen(&store), ([0.9, 0.9], 0, Phase::Overridden));
}

/// Files of the releases before there were guardrails.
#[test]
fn records_without_a_rollout_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = Store::open(folder.path(), false, condition()).unwrap();
    store.create("e", arms(), Plan::default()).unwrap();
    let json = serde_json::to_value(live(&store).record()).unwrap();
    let fields: Vec<_> = json.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(fields, ["arms", "created", "served", "votes"]);
    let read = Experiment::from_record("e".into(), serde_json::from_value(json).unwrap()).unwrap();
    assert_eq!(read.rollout, None);
    live(&store).compare(1, 3.0, None);
    store.review("e").unwrap();
    assert_eq!(live(&store).arms, arms());
}

#[test]
fn arms_and_weights_must_make_sense() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = Store::open(folder.path(), false, condition()).unwrap();
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

/// What cannot be used is told with the file's name and the way out.
#[test]
fn files_that_cannot_be_used_are_told() {
    let refused = |folder: &Path| match Store::open(folder, true, condition()) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("opened"),
    };
    let folder = tempfile::tempdir().unwrap();
    let open = Store::open(folder.path(), true, condition()).unwrap();
    let said = refused(folder.path());
    assert!(said.contains("experiments.redb") && said.contains("another server"), "{said}");
    drop(open);
    drop(Store::open(folder.path(), true, condition()).unwrap());

    let other = tempfile::tempdir().unwrap();
    std::fs::write(other.path().join("experiments.redb"), "not a database at all").unwrap();
    let said = refused(other.path());
    assert!(said.contains("move the file away"), "{said}");
    let said = refused(&other.path().join("experiments.redb"));
    assert!(said.contains("--data-dir"), "{said}");

    let file = folder.path().join("experiments.redb");
    let database = Database::open(&file).unwrap();
    let transaction = database.begin_write().unwrap();
    let meta: TableDefinition<&str, u64> = TableDefinition::new("meta");
    transaction.open_table(meta).unwrap().insert("format", 2).unwrap();
    transaction.commit().unwrap();
    drop(database);
    let said = refused(folder.path());
    assert!(said.contains("format is 2") && said.contains("reads 1"), "{said}");
}

#[tokio::test]
async fn without_a_place_there_are_no_experiments() {
    let none = Experiments::unavailable("no home".into());
    let reason = Error::Unavailable("no home".into());
    assert_eq!(none.list().unwrap_err(), reason);
    assert_eq!(none.get("e").unwrap_err(), reason);
    assert_eq!(none.create("e".into(), arms(), Plan::default()).await.unwrap_err(), reason);
    assert_eq!(none.close().await, Ok(()));
}

#[tokio::test]
async fn a_panic_ends_what_was_asked_alone_and_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let experiments = Experiments::open(folder.path(), true).unwrap();
    experiments.create("e".into(), arms(), Plan::default()).await.unwrap();
    assert_eq!(experiments.trouble(), None);
    for _ in 0..2 {
        let panicked = experiments.run::<()>(|_| panic!("a damaged page")).await;
        assert!(matches!(panicked, Err(Error::Damaged(_))), "{panicked:?}");
        let trouble = experiments.trouble().unwrap();
        assert!(trouble.damaged && trouble.problem.contains("a damaged page"), "{trouble:?}");
    }
    let series = || {
        let metrics = prometheus::Registry::new();
        metrics.register(experiments.series().unwrap()).unwrap();
        prometheus::TextEncoder::new().encode_to_string(&metrics.gather()).unwrap()
    };
    assert!(series().contains("understudy_experiments_failing 1"), "{}", series());
    assert!(series().contains("understudy_experiments_panics_total 2"), "{}", series());
    // The thread lives, and has opened the file anew.
    experiments.reweight("e".into(), vec![arm("a", 3.0)]).await.unwrap();
    assert_eq!(experiments.get("e").unwrap().arms[0].weight, 3.0);
    assert_eq!(experiments.trouble(), None);
    assert!(series().contains("understudy_experiments_failing 0"), "{}", series());
    // What a client got wrong is no trouble.
    assert!(experiments.create("e".into(), arms(), Plan::default()).await.is_err());
    assert_eq!(experiments.trouble(), None);
}

#[test]
fn a_vote_into_a_folder_that_is_gone_is_not_acknowledged() {
    let folder = tempfile::tempdir().unwrap();
    let (data, away) = (folder.path().join("data"), folder.path().join("away"));
    let condition = condition();
    let mut store = Store::open(&data, true, Arc::clone(&condition)).unwrap();
    store.create("e", arms(), Plan::default()).unwrap();
    let open = store.open_pair("e", &pair(["a", "b"])).unwrap();
    std::fs::rename(&data, &away).unwrap();
    let before = seen(&store);
    for _ in 0..2 {
        let lost = store.vote("e", &open, Choice::First, "key").unwrap_err();
        assert!(matches!(&lost, Error::Removed(file) if file.contains("data")), "{lost}");
        assert_eq!(seen(&store), before);
        assert!(condition.trouble().unwrap().problem.contains("removed"));
    }
    assert!(!data.exists(), "nothing is made in its place");
    // Another file in its place is not it, either.
    drop(Store::open(&data, true, self::condition()).unwrap());
    assert!(matches!(store.vote("e", &open, Choice::First, "key"), Err(Error::Removed(_))));
    std::fs::remove_dir_all(&data).unwrap();
    std::fs::rename(&away, &data).unwrap();
    assert!(store.vote("e", &open, Choice::First, "key").unwrap().1);
    assert_eq!(condition.trouble(), None);
}

#[test]
fn a_full_disk_is_told_as_one() {
    use std::io::{Error as Io, ErrorKind};
    for kind in [ErrorKind::StorageFull, ErrorKind::QuotaExceeded, ErrorKind::FileTooLarge] {
        let error = failed(redb::Error::Io(Io::from(kind)));
        assert!(matches!(error, Error::Full(_)) && error.to_string().contains("--data-dir"));
    }
    assert!(matches!(failed(redb::Error::Io(Io::from(ErrorKind::Other))), Error::Storage(_)));
    assert!(matches!(failed(redb::Error::Corrupted("a page".into())), Error::Damaged(_)));
}

/// Every page in turn, at the start and beneath a server that has the file open.
#[tokio::test]
async fn damaged_pages_are_told_and_end_nothing() {
    const PAGE: usize = 4096;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("experiments.redb");
    let mut store = Store::open(folder.path(), true, condition()).unwrap();
    store.create("e", arms(), Plan::default()).unwrap();
    let pairs: Vec<_> = (0..40).map(|_| store.open_pair("e", &pair(["a", "b"])).unwrap()).collect();
    for (number, pair) in pairs[..20].iter().enumerate() {
        store.vote("e", pair, Choice::First, &number.to_string()).unwrap();
    }
    store.close().unwrap();
    drop(store);
    let whole = std::fs::read(&file).unwrap();
    let damage = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at..at + PAGE].fill(0xa5);
        std::fs::write(&file, bytes).unwrap();
    };
    let (mut refused, mut served) = (0, 0);
    for at in (PAGE..whole.len()).step_by(PAGE) {
        damage(at);
        match Experiments::open(folder.path(), false) {
            Err(problem) => {
                assert!(problem.contains("move the file away"), "{at}: {problem}");
                refused += 1;
            }
            Ok(experiments) => {
                let vote = || {
                    let (pair, key) = (pairs[30].clone(), "a key".to_owned());
                    experiments.vote("e".into(), pair, Choice::First, key)
                };
                let first = vote().await;
                // What was acknowledged is there; what was not is told.
                match &first {
                    Ok((_, counted)) => assert!(counted, "{at}"),
                    Err(_) => assert!(experiments.trouble().unwrap().damaged, "{at}: {first:?}"),
                }
                assert_eq!(vote().await.is_ok(), first.is_ok(), "{at}");
                let _ = experiments.close().await;
                served += 1;
            }
        }
    }
    assert!(refused > 0 && served > 0, "{refused} {served}");
    // The file is what it was, and so are its votes.
    std::fs::write(&file, &whole).unwrap();
    let experiments = Experiments::open(folder.path(), false).unwrap();
    let vote = experiments.vote("e".into(), pairs[0].clone(), Choice::First, "0".into()).await;
    assert!(!vote.unwrap().1);
}
