//! The store: what is kept, what is refused, what is forgotten.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use redb::{Database, ReadableDatabase, TableDefinition};

use super::{
    contract_tests::{CONTRACT, arm, arms, condition, live, pair, seen},
    file::{FileStore, failed},
    store::Store,
    *,
};

#[test]
fn a_file_keeps_the_contract() {
    for (name, test) in CONTRACT {
        eprintln!("{name}");
        let folder = tempfile::tempdir().unwrap();
        test(&mut || Box::new(FileStore::open(folder.path(), false, condition()).unwrap()));
    }
}

#[test]
fn everything_is_there_when_the_file_is_opened_again() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = FileStore::open(folder.path(), false, condition()).unwrap();
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

    let mut store = FileStore::open(folder.path(), false, condition()).unwrap();
    assert_eq!(seen(&store), before);
    assert_eq!(store.vote("e", &voted, Choice::First, "key"), Ok((vote, false)));
    assert!(store.vote("e", &open.unwrap(), Choice::Tie, "other").unwrap().1);
}

#[test]
fn pairs_are_forgotten_when_they_are_too_old() {
    const OPEN: TableDefinition<&str, (&str, u64, &[u8])> = TableDefinition::new("open_pairs");
    let folder = tempfile::tempdir().unwrap();
    let mut store = FileStore::open(folder.path(), false, condition()).unwrap();
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

    let mut store = FileStore::open(folder.path(), false, condition()).unwrap();
    assert_eq!(store.vote("e", &old, Choice::Tie, "k"), Err(Error::UnknownPair(old)));
    store.open_pair("e", &pair(["a", "b"])).unwrap();
    drop(store);
    let database = Database::open(&file).unwrap();
    let table = database.begin_read().unwrap().open_table(OPEN).unwrap();
    assert_eq!(redb::ReadableTableMetadata::len(&table).unwrap(), 1);
}

/// Files of the releases before there were guardrails.
#[test]
fn records_without_a_rollout_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = FileStore::open(folder.path(), false, condition()).unwrap();
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

/// What cannot be used is told with the file's name and the way out.
#[test]
fn files_that_cannot_be_used_are_told() {
    let refused = |folder: &Path| match FileStore::open(folder, true, condition()) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("opened"),
    };
    let folder = tempfile::tempdir().unwrap();
    let open = FileStore::open(folder.path(), true, condition()).unwrap();
    let said = refused(folder.path());
    assert!(said.contains("experiments.redb") && said.contains("another server"), "{said}");
    drop(open);
    drop(FileStore::open(folder.path(), true, condition()).unwrap());

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
    let mut store = FileStore::open(&data, true, Arc::clone(&condition)).unwrap();
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
    drop(FileStore::open(&data, true, self::condition()).unwrap());
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
    let mut store = FileStore::open(folder.path(), true, condition()).unwrap();
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
