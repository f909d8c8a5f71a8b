//! Three servers that share their experiments through a PostgreSQL, with one killed and the database started anew meanwhile.
//! `tests/postgres/run.sh` starts one and runs this.
#![allow(clippy::unwrap_used)]

use std::{
    env,
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    sync::{
        Mutex, RwLock,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use understudy::experiments::tally::{Outcome, Tally};

const ARMS: [&str; 2] = ["fashion-mnist-teacher", "fashion-mnist-student"];
const SERVERS: usize = 3;
/// Pairs that every server draws; the others are put into the database, since images take longer than votes.
const DRAWN: usize = 20;
/// All pairs. Each vote is sent to every server.
const PAIRS: usize = 9_990;
/// Voters at every server.
const VOTERS: usize = 3;
/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// The binary over two of the bundled models.
struct Server {
    child: Child,
    base: String,
}

impl Server {
    fn start(database: &str) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_understudy"));
        command.args(["serve", "--port", "0"]).current_dir(env!("CARGO_MANIFEST_DIR"));
        command.env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR"));
        command.env("UNDERSTUDY_DATABASE_URL", database);
        for model in ARMS {
            command.arg("--model").arg(format!("{model}=models/zoo/{model}"));
        }
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let said: Vec<String> = lines.take_while(|line| !line.starts_with("Ready after")).collect();
        let address = said[0].split_once("serves on ").unwrap().1.split(' ').next().unwrap();
        Self { child, base: address.to_owned() }
    }
}

/// kill -9.
impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a server answered: status, seconds of `Retry-After`, body.
struct Reply {
    status: u16,
    retry_after: Option<u64>,
    body: Value,
}

fn agent() -> ureq::Agent {
    ureq::Agent::config_builder().http_status_as_error(false).build().into()
}

/// `None` where there was no answer.
fn ask(agent: &ureq::Agent, method: &str, url: &str, body: Option<&Value>) -> Option<Reply> {
    let reply = match (method, body) {
        ("POST", Some(body)) => agent.post(url).send_json(body),
        ("PATCH", Some(body)) => agent.patch(url).send_json(body),
        _ => agent.get(url).call(),
    };
    let mut reply = reply.ok()?;
    let after = reply.headers().get("retry-after");
    let retry_after = after.and_then(|after| after.to_str().ok()?.parse().ok());
    let status = reply.status().as_u16();
    Some(Reply { status, retry_after, body: reply.body_mut().read_json().ok()? })
}

fn post(base: &str, path: &str, body: Value) -> Reply {
    ask(&agent(), "POST", &format!("{base}{path}"), Some(&body)).unwrap()
}

fn experiment(base: &str) -> Reply {
    ask(&agent(), "GET", &format!("{base}/v1/experiments/e"), None).unwrap()
}

/// Has the database stopped or started.
fn control(action: &str) {
    let control = env::var("UNDERSTUDY_TEST_DATABASE_CONTROL").unwrap();
    assert!(Command::new(control).arg(action).status().unwrap().success(), "{action}");
}

fn sql(url: &str, sql: &str) -> Vec<Vec<String>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (client, connection) =
            tokio_postgres::connect(url, tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        let messages = client.simple_query(sql).await.unwrap();
        let rows = messages.iter().filter_map(|message| match message {
            tokio_postgres::SimpleQueryMessage::Row(row) => {
                Some((0..row.len()).map(|at| row.get(at).unwrap().to_owned()).collect())
            }
            _ => None,
        });
        rows.collect()
    })
}

/// Waits until all servers say so.
fn all_say(bases: &[String], what: impl Fn(&Value) -> bool) -> Duration {
    let began = Instant::now();
    for base in bases {
        loop {
            let reply = experiment(base);
            if reply.status == 200 && what(&reply.body) {
                break;
            }
            assert!(began.elapsed() < PATIENCE, "{base}: {} {}", reply.status, reply.body);
            thread::yield_now();
        }
    }
    began.elapsed()
}

fn choice(number: usize) -> Value {
    match understudy_models::noise::uniform_u64(3, number as u64) % 20 {
        0..10 => json!(0),
        10..18 => json!(1),
        _ => json!("tie"),
    }
}

#[test]
#[ignore = "needs PostgreSQL: tests/postgres/run.sh"]
fn replicas_lose_no_vote_and_count_none_twice() {
    let server = env::var("UNDERSTUDY_TEST_DATABASE_URL").unwrap();
    let name = format!("understudy_replicas_{}", std::process::id());
    sql(&server, &format!("CREATE DATABASE {name}"));
    let database = format!("{}/{name}", server.rsplit_once('/').unwrap().0);

    let servers: Vec<_> = thread::scope(|scope| {
        let start = |_| scope.spawn(|| Server::start(&database));
        let starting: Vec<_> = (0..SERVERS).map(start).collect();
        starting.into_iter().map(|server| server.join().unwrap()).collect()
    });
    let servers = RwLock::new(servers);
    let bases = || -> Vec<String> {
        servers.read().unwrap().iter().map(|server| server.base.clone()).collect()
    };
    let first = bases()[0].clone();

    // What one begins the others know at once.
    let arms = ARMS.map(|model| json!({"model": model, "weight": 1}));
    assert_eq!(post(&first, "/v1/experiments", json!({"id": "e", "arms": arms})).status, 201);
    assert!(bases().iter().all(|base| experiment(base).status == 200));

    let mut pairs = Vec::new();
    for base in bases() {
        for _ in 0..DRAWN {
            let reply = post(&base, "/v1/experiments/e/pairs", json!({"num_inference_steps": 1}));
            assert_eq!(reply.status, 200, "{}", reply.body);
            pairs.push(reply.body["pair_id"].as_str().unwrap().to_owned());
        }
    }
    let [one, other] = ARMS;
    let put = format!(
        "INSERT INTO understudy_open_pairs (pair, experiment, first, second, seed)
         SELECT lpad(to_hex((extract(epoch FROM now()) * 1000)::bigint), 12, '0') || lpad(at::text, 16, '0'),
            number, CASE at % 2 WHEN 0 THEN '{one}' ELSE '{other}' END,
            CASE at % 2 WHEN 0 THEN '{other}' ELSE '{one}' END, at
         FROM understudy_experiments, generate_series(1, {}) AS at RETURNING pair",
        PAIRS - pairs.len()
    );
    pairs.extend(sql(&database, &put).into_iter().flatten());
    assert_eq!(pairs.len(), PAIRS);

    // Every vote to all servers at once, again until it is acknowledged.
    let began = Instant::now();
    let (acknowledged, refused) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let counted = Mutex::new(vec![0; PAIRS]);
    thread::scope(|scope| {
        for at in 0..SERVERS {
            for voter in 0..VOTERS {
                let (pairs, servers) = (&pairs, &servers);
                let (acknowledged, refused, counted) = (&acknowledged, &refused, &counted);
                scope.spawn(move || {
                    let agent = agent();
                    for number in (voter..PAIRS).step_by(VOTERS) {
                        let vote = json!({
                            "pair_id": pairs[number], "choice": choice(number),
                            "idempotency_key": format!("key-{number}")
                        });
                        let began = Instant::now();
                        loop {
                            let base = servers.read().unwrap()[at].base.clone();
                            let url = format!("{base}/v1/experiments/e/votes");
                            match ask(&agent, "POST", &url, Some(&vote)) {
                                Some(Reply { status: 201, .. }) => {
                                    counted.lock().unwrap()[number] += 1;
                                    break;
                                }
                                Some(Reply { status: 200, .. }) => break,
                                Some(Reply { status: 503, retry_after, body }) => {
                                    let code = &body["error"]["code"];
                                    assert_eq!(code, "experiments_unreachable", "{body}");
                                    refused.fetch_add(1, Ordering::Relaxed);
                                    thread::sleep(Duration::from_secs(retry_after.unwrap()));
                                }
                                Some(Reply { status, body, .. }) => panic!("{status}: {body}"),
                                // Killed; until it is back.
                                None => thread::sleep(Duration::from_millis(100)),
                            }
                            assert!(began.elapsed() < PATIENCE, "vote {number}");
                        }
                        acknowledged.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        }
        let reached = |part: usize| {
            while acknowledged.load(Ordering::Relaxed) < SERVERS * PAIRS * part / 4 {
                assert!(began.elapsed() < 5 * PATIENCE);
                thread::sleep(Duration::from_millis(10));
            }
        };
        reached(1);
        let mut killed = servers.read().unwrap().len() - 1;
        eprintln!("{:?}: kill -9 of server {killed}", began.elapsed());
        // Votes go on to the others while it is away.
        let pid = servers.read().unwrap()[killed].child.id().to_string();
        assert!(Command::new("kill").args(["-9", &pid]).status().unwrap().success());
        let anew = Server::start(&database);
        servers.write().unwrap()[killed] = anew;
        reached(2);
        eprintln!("{:?}: the database is started anew", began.elapsed());
        control("restart");
        reached(3);
        killed = 0;
        eprintln!("{:?}: kill -9 of server {killed}", began.elapsed());
        let pid = servers.read().unwrap()[killed].child.id().to_string();
        assert!(Command::new("kill").args(["-9", &pid]).status().unwrap().success());
        let anew = Server::start(&database);
        servers.write().unwrap()[killed] = anew;
    });
    let (acknowledged, took) = (acknowledged.into_inner(), began.elapsed());
    eprintln!(
        "{acknowledged} votes acknowledged in {took:?}, {:.0}/s; {} refused meanwhile",
        acknowledged as f64 / took.as_secs_f64(),
        refused.into_inner()
    );
    assert_eq!(acknowledged, SERVERS * PAIRS);

    // Each is counted once, and told to be new at most once.
    let counted = counted.into_inner().unwrap();
    assert!(counted.iter().all(|times| *times <= 1));
    let votes = sql(&database, "SELECT first, choice, pair FROM understudy_votes ORDER BY number");
    assert_eq!(votes.len(), PAIRS);
    let mut tallies = [Tally::default(); 2];
    for vote in &votes {
        let outcome = match vote[1].as_str() {
            "first" => Outcome::Win,
            "second" => Outcome::Loss,
            _ => Outcome::Tie,
        };
        let at = usize::from(vote[0] == other);
        tallies[at].count(outcome);
        tallies[1 - at].count(outcome.reversed());
    }
    let as_replayed = |experiment: &Value| {
        tallies.iter().zip(experiment["arms"].as_array().unwrap()).all(|(tally, arm)| {
            let counts = ["wins", "losses", "ties"].map(|name| arm[name].as_u64().unwrap());
            let p_value = arm["p_value"].as_f64().unwrap();
            counts == [tally.wins, tally.losses, tally.ties]
                && (p_value / tally.p_value() - 1.0).abs() < 1e-12
        })
    };
    let seen = all_say(&bases(), as_replayed);
    let [tally, _] = tallies;
    eprintln!(
        "{} wins, {} losses, {} ties, p = {:e}: the replay's, at all servers after {seen:?}",
        tally.wins,
        tally.losses,
        tally.ties,
        tally.p_value()
    );

    // A change of weights.
    let change = json!({"arms": [{"weight": 3}, {"weight": 1}]});
    let url = format!("{}/v1/experiments/e", bases()[1]);
    assert_eq!(ask(&agent(), "PATCH", &url, Some(&change)).unwrap().status, 200);
    let seen = all_say(&bases(), |experiment| experiment["arms"][0]["weight"] == 3.0);
    eprintln!("a PATCH was seen by all after {seen:?}");
    assert!(seen < Duration::from_secs(1), "{seen:?}");

    // Users stay with their arm whichever server they come to, also while the database is away; votes are refused then.
    let image = |base: &str, user: usize| {
        let body = json!({"model": "experiment:e", "user": format!("user-{user}"), "num_inference_steps": 1});
        let reply = post(base, "/v1/images/generations", body);
        assert_eq!(reply.status, 200, "{}", reply.body);
        reply.body["model"].as_str().unwrap().to_owned()
    };
    const USERS: usize = 16;
    let assigned: Vec<String> = (0..USERS).map(|user| image(&bases()[0], user)).collect();
    assert!(ARMS.iter().all(|arm| assigned.iter().any(|model| model == arm)));
    control("stop");
    for base in &bases()[1..] {
        for (user, arm) in assigned.iter().enumerate() {
            assert_eq!(&image(base, user), arm);
        }
        let vote = json!({"pair_id": pairs[0], "choice": choice(0), "idempotency_key": "key-0"});
        for _ in 0..2 {
            let reply = post(base, "/v1/experiments/e/votes", vote.clone());
            assert_eq!((reply.status, reply.retry_after), (503, Some(1)), "{}", reply.body);
            assert_eq!(reply.body["error"]["code"], "experiments_unreachable");
        }
        // Nobody can say that it is not there.
        let body = json!({"model": "experiment:other", "user": "u"});
        assert_eq!(post(base, "/v1/images/generations", body).status, 503);
    }
    control("start");
    // What each served is counted at all, once.
    let requests = |experiment: &Value| {
        let arms = experiment["arms"].as_array().unwrap().iter();
        arms.map(|arm| arm["requests"].as_u64().unwrap()).sum::<u64>() as usize
    };
    let seen = all_say(&bases(), |experiment| requests(experiment) == SERVERS * USERS);
    eprintln!("{} requests were counted at all servers after {seen:?}", SERVERS * USERS);
}
