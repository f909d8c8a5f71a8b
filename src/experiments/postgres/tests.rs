//! What several servers do to one database. They need a PostgreSQL: `tests/postgres/run.sh` starts one and runs them.
#![allow(clippy::unwrap_used)]

use std::{
    env,
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

use super::*;
use crate::experiments::{
    Experiments, Guardrails, Phase, Ramp,
    contract_tests::{CONTRACT, arm, arms, condition, guarded, live, pair},
    tally::{Outcome, Tally},
};

/// The address of a PostgreSQL whose user may make databases.
const SERVER: &str = "UNDERSTUDY_TEST_DATABASE_URL";

/// A database that nobody else uses.
struct Database {
    config: Config,
}

impl Database {
    fn new() -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("understudy_{}_{number}", std::process::id());
        let server = address(&env::var(SERVER).unwrap_or_else(|_| panic!("{SERVER} is not set")));
        let mut config = server.unwrap();
        asked(&config, &format!("CREATE DATABASE {name}"));
        config.dbname(&name);
        Self { config }
    }

    fn store(&self) -> PostgresStore {
        PostgresStore::open(self.config.clone(), condition()).unwrap()
    }

    fn ask(&self, sql: &str) -> Vec<String> {
        asked(&self.config, sql)
    }
}

/// The first column of what a database answers, as text.
fn asked(config: &Config, sql: &str) -> Vec<String> {
    let runtime = runtime().unwrap();
    runtime.block_on(async {
        let client = connection::open(config).await.unwrap();
        let messages = client.simple_query(sql).await.unwrap();
        let rows = messages.iter().filter_map(|message| match message {
            tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
            _ => None,
        });
        rows.collect()
    })
}

fn requests(store: &PostgresStore) -> u64 {
    live(store).traffic(0).requests()
}

#[test]
#[ignore = "needs PostgreSQL: tests/postgres/run.sh"]
fn a_database_keeps_the_contract() {
    for (name, test) in CONTRACT {
        eprintln!("{name}");
        let database = Database::new();
        test(&mut || Box::new(database.store()));
    }
}

#[test]
#[ignore = "needs PostgreSQL: tests/postgres/run.sh"]
fn pairs_are_forgotten_when_they_are_too_old_or_too_many() {
    let database = Database::new();
    let mut store = database.store();
    store.create("e", arms(), Plan::default()).unwrap();
    let old = store.open_pair("e", &pair(["a", "b"])).unwrap();
    database.ask("UPDATE understudy_open_pairs SET opened = opened - interval '25 hours', pair = '0' || substr(pair, 2)");
    let old = format!("0{}", &old[1..]);
    assert_eq!(store.vote("e", &old, Choice::Tie, "k"), Err(Error::UnknownPair(old)));
    database.ask(&format!(
        "INSERT INTO understudy_open_pairs (pair, experiment, first, second, seed)
         SELECT pair || lpad(number::text, 5, '0'), experiment, first, second, seed
         FROM understudy_open_pairs, generate_series(1, {MAX_OPEN_PAIRS}) AS number"
    ));
    let new = store.open_pair("e", &pair(["a", "b"])).unwrap();
    let count = database.ask("SELECT count(*) FROM understudy_open_pairs");
    assert_eq!(count, [MAX_OPEN_PAIRS.to_string()]);
    assert!(store.vote("e", &new, Choice::Tie, "k").unwrap().1);
}

#[test]
#[ignore = "needs PostgreSQL: tests/postgres/run.sh"]
fn servers_that_start_at_once_make_the_tables_once() {
    let database = Database::new();
    thread::scope(|scope| {
        for server in 0..8 {
            let database = &database;
            scope.spawn(move || {
                let mut store = database.store();
                let created = store.create("e", arms(), Plan::default());
                assert!(matches!(created, Ok(_) | Err(Error::Exists(_))), "{server}: {created:?}");
                // The limit holds for all together.
                for number in 0..MAX_EXPERIMENTS {
                    let created =
                        store.create(&format!("{server}-{number}"), arms(), Plan::default());
                    assert!(matches!(created, Ok(_) | Err(Error::TooMany)), "{created:?}");
                }
            });
        }
    });
    let count = database.ask("SELECT count(*) FROM understudy_experiments");
    assert_eq!(count, [MAX_EXPERIMENTS.to_string()]);
}

#[test]
#[ignore = "needs PostgreSQL: tests/postgres/run.sh"]
fn a_database_that_cannot_be_used_is_told() {
    let told = |config: &Config| Experiments::shared(config).err().unwrap();
    let database = Database::new();
    drop(database.store());
    database.ask("UPDATE understudy_format SET format = 2");
    let said = told(&database.config);
    assert!(said.contains("format is 2") && said.contains("reads 1"), "{said}");

    let other = Database::new();
    let role = format!("{}_reader", other.config.get_dbname().unwrap());
    other.ask(&format!("REVOKE ALL ON SCHEMA public FROM PUBLIC; CREATE ROLE {role} LOGIN"));
    let mut config = other.config.clone();
    config.user(&role).password("secret");
    let said = told(&config);
    assert!(said.contains("right to create tables") && !said.contains("secret"), "{said}");

    config.user("nobody at all").dbname("none");
    let said = told(&config);
    assert!(said.contains("nobody at all@") && !said.contains("secret"), "{said}");
}

/// Everything that one does is the other's, too.
#[test]
#[ignore = "needs PostgreSQL: tests/postgres/run.sh"]
fn two_servers_see_the_same() {
    let database = Database::new();
    let (mut one, mut other) = (database.store(), database.store());
    one.create("e", arms(), Plan::default()).unwrap();
    other.refresh().unwrap();
    other.reweight("e", &[arm("c", 0.1 + 0.2)]).unwrap();
    let open = other.open_pair("e", &pair(["a", "b"])).unwrap();
    let (vote, counted) = one.vote("e", &open, Choice::First, "key").unwrap();
    assert!(counted);
    // Also by one who does not know the experiment yet.
    let mut third = database.store();
    third.live.write().unwrap().clear();
    third.read.clear();
    assert_eq!(third.vote("e", &open, Choice::First, "key"), Ok((vote.clone(), false)));
    assert_eq!(other.vote("e", &open, Choice::First, "key"), Ok((vote, false)));
    assert_eq!(other.vote("e", &open, Choice::First, "other"), Err(Error::Voted(open.clone())));
    other.refresh().unwrap();
    assert_eq!(live(&one).arms, live(&other).arms);
    assert_eq!(live(&one).votes, live(&other).votes);

    // Keys go to the same arms.
    for key in 0..100_000u32 {
        let key = format!("user-{key}");
        let [here, there] = [&one, &other].map(|store| live(store).arm_of(key.as_bytes()));
        assert_eq!(here, there, "{key}");
    }

    // What is deleted and made again is another, for whoever still holds the first.
    let before = live(&other);
    one.delete("e").unwrap();
    one.create("e", vec![arm("a", 1.0), arm("z", 1.0)], Plan::default()).unwrap();
    before.serve(0, 1, 0.1);
    other.save_traffic().unwrap();
    other.refresh().unwrap();
    assert_eq!(live(&other).arms, live(&one).arms);
    assert_eq!(requests(&other), 0);
}

#[test]
#[ignore = "needs PostgreSQL: tests/postgres/run.sh"]
fn what_servers_served_adds_up_whatever_becomes_of_their_connections() {
    let database = Database::new();
    let (mut one, mut other) = (database.store(), database.store());
    one.create("e", arms(), Plan::default()).unwrap();
    other.refresh().unwrap();
    (0..3).for_each(|_| live(&one).serve(0, 1, 0.1));
    (0..4).for_each(|_| live(&other).serve(0, 1, 0.1));
    assert_eq!([&one, &other].map(requests), [3, 4]);
    one.save_traffic().unwrap();
    other.save_traffic().unwrap();
    one.refresh().unwrap();
    assert_eq!([&one, &other].map(requests), [7, 7]);

    // The connection broke after the commit, before the answer; and before the commit.
    for committed in [true, false] {
        let before = requests(&other);
        live(&one).serve(0, 1, 0.1);
        let (addition, mut transaction) = (live(&one).to_add(), String::new());
        let ended = other.change("e", async |locked| {
            locked.experiment.add(&addition);
            let xid = "SELECT pg_current_xact_id()::text";
            transaction = locked.transaction.query_one(xid, &[]).await?.get(0);
            if committed { Ok(()) } else { Err(Error::Voted("not committed".into())) }
        });
        assert_eq!(ended.is_ok(), committed);
        let number = one.read["e"].number;
        one.unsure.insert(number, transaction);
        one.client = None;
        live(&one).serve(0, 1, 0.1);
        one.refresh().unwrap();
        assert_eq!(requests(&one), before + 2, "{committed}");
        one.save_traffic().unwrap();
        live(&one).mark_unsaved();
        one.save_traffic().unwrap();
        other.refresh().unwrap();
        assert_eq!([&one, &other].map(requests), [before + 2; 2], "{committed}");
        assert!(one.unsure.is_empty());
    }

    // What a vote that had been counted took along, and did not write, is older than what is served after it.
    let open = one.open_pair("e", &pair(["a", "b"])).unwrap();
    assert!(one.vote("e", &open, Choice::Tie, "key").unwrap().1);
    assert!(!one.vote("e", &open, Choice::Tie, "key").unwrap().1);
    let before = requests(&one);
    live(&one).serve(0, 1, 0.1);
    one.save_traffic().unwrap();
    one.save_traffic().unwrap();
    other.refresh().unwrap();
    assert_eq!([&one, &other].map(requests), [before + 1; 2]);

    // A connection that is ended is replaced, at the latest by the next who asks.
    database.ask("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()");
    live(&one).serve(0, 1, 0.1);
    one.save_traffic().or_else(|_| one.save_traffic()).unwrap();
    other.refresh().or_else(|_| other.refresh()).unwrap();
    assert_eq!(requests(&one), requests(&other));
}

/// Of what several servers saw together, each part too little, one decision is made, and made once.
#[test]
#[ignore = "needs PostgreSQL: tests/postgres/run.sh"]
fn servers_decide_together_and_once() {
    let database = Database::new();
    let (mut one, mut other) = (database.store(), database.store());
    let bounds =
        Guardrails { min_psnr_db: Some(20.0), min_comparisons: Some(4), ..Default::default() };
    let two = || vec![arm("a", 1.0), arm("b", 1.0)];
    one.create("e", two(), guarded(bounds)).unwrap();
    other.refresh().unwrap();
    for store in [&mut one, &mut other] {
        (0..2).for_each(|_| live(store).compare(1, 10.0, None));
        store.review("e").unwrap();
        assert_eq!(live(store).arms, two(), "alone it has seen too little");
    }
    one.save_traffic().unwrap();
    other.save_traffic().unwrap();
    one.refresh().unwrap();
    let stopped =
        |store: &PostgresStore| *live(store).rollout.as_ref().unwrap().stopped(1).unwrap();
    assert_eq!(stopped(&one), stopped(&other));
    assert_eq!((stopped(&one).reason.count, stopped(&one).weight), (4, 1.0));
    let decided = stopped(&one);
    // Whoever decides late finds it decided.
    live(&one).compare(1, 1.0, None);
    one.save_traffic().unwrap();
    assert_eq!(stopped(&one), decided);

    // What the other had seen before the arm was watched anew is of no account.
    (0..4).for_each(|_| live(&other).compare(1, 1.0, None));
    one.reweight("e", &[arm("b", 1.0)]).unwrap();
    other.save_traffic().unwrap();
    assert_eq!(live(&other).arms[1].weight, 1.0);
    assert_eq!(live(&other).evidence(1).psnr_db.count, 0);
    one.delete("e").unwrap();

    // A ramp: three servers at once, many requests, each stage once.
    let ramp = Ramp::new(Some(vec![0.1, 0.2, 0.4, 1.0]), Some(30), None);
    one.create("e", two(), Plan { guardrails: None, ramp: Some(ramp) }).unwrap();
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let mut store = database.store();
                for _ in 0..30 {
                    live(&store).serve(1, 1, 0.1);
                    store.review("e").unwrap();
                    store.save_traffic().unwrap();
                }
            });
        }
    });
    one.refresh().unwrap();
    let ramp = live(&one).rollout.as_ref().unwrap().ramp.clone().unwrap();
    assert_eq!((ramp.stage, ramp.phase), (3, Phase::Finished));
    assert_eq!(live(&one).traffic(1).images, 90);
    assert_eq!(live(&one).of_stage(), Some([0, 0]), "no image counted for two stages");
}

/// Votes by what they say, in the order of their commits, as one server counts them.
fn replayed(votes: &[String], arms: usize) -> Vec<Tally> {
    let mut tallies = vec![Tally::default(); arms];
    for vote in votes {
        let [first, second, choice] = vote.split(' ').collect::<Vec<_>>().try_into().unwrap();
        let outcome = match choice {
            "first" => Outcome::Win,
            "second" => Outcome::Loss,
            _ => Outcome::Tie,
        };
        let at = |name: &str| usize::from(name.as_bytes()[0] - b'a');
        tallies[at(first)].count(outcome);
        tallies[at(second)].count(outcome.reversed());
    }
    tallies
}

const IN_ORDER: &str =
    "SELECT first || ' ' || second || ' ' || choice FROM understudy_votes ORDER BY number";

/// Tens of thousands of votes by four servers at once: each counted once, and in the order of their commits.
#[test]
#[ignore = "needs PostgreSQL: tests/postgres/run.sh"]
fn many_votes_at_once_are_those_of_a_serial_replay() {
    const SERVERS: usize = 4;
    const EACH: usize = 2_500;
    let database = Database::new();
    let mut first = database.store();
    first.create("e", arms(), Plan::default()).unwrap();
    thread::scope(|scope| {
        for server in 0..SERVERS {
            let mut store = database.store();
            scope.spawn(move || {
                let models = [["a", "b"], ["b", "c"], ["c", "a"]];
                for number in 0..EACH {
                    let random =
                        understudy_models::noise::uniform_u64(server as u64, number as u64);
                    let choice = match random % 10 {
                        0..5 => Choice::First,
                        5..9 => Choice::Second,
                        _ => Choice::Tie,
                    };
                    let open = store.open_pair("e", &pair(models[number % 3])).unwrap();
                    let key = format!("{server}-{number}");
                    assert!(store.vote("e", &open, choice, &key).unwrap().1);
                }
            });
        }
    });
    first.refresh().unwrap();
    let votes = database.ask(IN_ORDER);
    assert_eq!(votes.len(), SERVERS * EACH);
    let replayed = replayed(&votes, 3);
    for (arm, tally) in replayed.iter().enumerate() {
        // To the bit, the sequential statistic included.
        assert_eq!(live(&first).votes.of(arm), tally, "{arm}");
        assert!(tally.p_value() > 0.0);
    }
}

/// Weights change by a notice, at once; an unknown experiment is asked for.
#[test]
#[ignore = "needs PostgreSQL: tests/postgres/run.sh"]
fn changes_by_others_are_heard_of() {
    let (database, runtime) = (Database::new(), runtime().unwrap());
    let open = || Experiments::shared(&database.config).unwrap();
    let (one, other) = (open(), open());
    runtime.block_on(one.create("e".into(), arms(), Plan::default())).unwrap();
    assert_eq!(runtime.block_on(other.find("e")).unwrap().arms, arms());
    let unknown = Error::Unknown("f".into());
    assert_eq!(runtime.block_on(other.find("f")).unwrap_err(), unknown);
    runtime.block_on(one.reweight("e".into(), vec![arm("a", 7.0)])).unwrap();
    let changed = Instant::now();
    while other.get("e").unwrap().arms[0].weight != 7.0 {
        assert!(changed.elapsed() < Duration::from_secs(60));
        thread::yield_now();
    }
    eprintln!("a change of weights was seen after {:?}", changed.elapsed());
    runtime.block_on(one.delete("e".into())).unwrap();
    while other.get("e").is_ok() {
        assert!(changed.elapsed() < Duration::from_secs(60));
        thread::yield_now();
    }
}

/// Without a server there is a sentence; these need none.
#[test]
fn an_address_that_cannot_be_used_is_told_without_its_password() {
    let refused = |url: &str| address(url).unwrap_err();
    for url in ["", "postgres:///db", "postgres://u:secret@h:port/db", "user=u password=secret"] {
        let said = refused(url);
        assert!(said.contains("postgres://USER:PASSWORD@HOST"), "{url}: {said}");
        assert!(!said.contains("secret"), "{said}");
    }
    let said = refused("postgres://u:secret@h/db?sslmode=require");
    assert!(said.contains("sslmode=require is not supported"), "{said}");
    let config = address("postgres://u:secret@one:1,two:2/db").unwrap();
    assert_eq!(place(&config), "postgres://u@one:1,two:2/db");

    // A port that nobody listens on.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let config = address(&format!("postgres://u:secret@127.0.0.1:{port}/db")).unwrap();
    let said = Experiments::shared(&config).err().unwrap();
    assert!(
        said.contains(&format!("postgres://u@127.0.0.1:{port}/db cannot be reached")),
        "{said}"
    );
    assert!(!said.contains("secret"), "{said}");
}
