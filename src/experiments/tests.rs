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
    store.create("e", arms()).unwrap();
    store.create("f", arms()).unwrap();
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
    store.create("e", arms()).unwrap();
    store.create("f", arms()).unwrap();
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
        store.create(id, arms()).unwrap();
        let voted = store.open_pair(id, &pair(["a", "b"])).unwrap();
        store.vote(id, &voted, Choice::First, "key").unwrap();
        store.open_pair(id, &pair(["a", "b"])).unwrap();
    }
    let open = store.open_pair("e", &pair(["a", "b"])).unwrap();
    store.delete("e").unwrap();
    assert_eq!(store.delete("e"), Err(Error::Unknown("e".into())));
    let again = store.create("e", vec![arm("a", 1.0), arm("z", 1.0)]).unwrap();
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
    store.create("e", arms()).unwrap();
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
        let refused = store.create("e", arms);
        assert!(matches!(&refused, Err(Error::Value { field, .. }) if field == at), "{refused:?}");
    }
    store.create("e", arms()).unwrap();
    assert_eq!(store.create("e", arms()).unwrap_err(), Error::Exists("e".into()));
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
        store.create(&format!("e{number}"), arms()).unwrap();
    }
    assert_eq!(store.create("one-more", arms()).unwrap_err(), Error::TooMany);
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
    assert_eq!(none.create("e".into(), arms()).await.unwrap_err(), reason);
    assert_eq!(none.close().await, Ok(()));
}

#[tokio::test]
async fn a_panic_ends_what_was_asked_alone_and_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let experiments = Experiments::open(folder.path(), true).unwrap();
    experiments.create("e".into(), arms()).await.unwrap();
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
    assert!(experiments.create("e".into(), arms()).await.is_err());
    assert_eq!(experiments.trouble(), None);
}

#[test]
fn a_vote_into_a_folder_that_is_gone_is_not_acknowledged() {
    let folder = tempfile::tempdir().unwrap();
    let (data, away) = (folder.path().join("data"), folder.path().join("away"));
    let condition = condition();
    let mut store = Store::open(&data, true, Arc::clone(&condition)).unwrap();
    store.create("e", arms()).unwrap();
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
    store.create("e", arms()).unwrap();
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
