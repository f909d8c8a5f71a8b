//! Votes outlive the server, however it ends.
#![allow(clippy::unwrap_used)]

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc,
};

use serde_json::{Value, json};

const PAIRS: usize = 24;
/// The server is killed once so many votes have been acknowledged, while others are under way.
const ACKNOWLEDGED: usize = 8;

/// The binary over the bundled models.
struct Server {
    child: Child,
    base: String,
}

impl Server {
    /// A server that keeps what it keeps in `data`.
    fn start(data: &Path) -> Self {
        Self::run(serve().arg("--data-dir").arg(data))
    }

    fn run(command: &mut Command) -> Self {
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

fn serve() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_understudy"));
    command.args(["serve", "--port", "0"]).current_dir(env!("CARGO_MANIFEST_DIR"));
    command.env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR"));
    command
}

/// An experiment `e` between the models that the server has.
fn begin(base: &str) -> Option<(u16, Value)> {
    let models = ask(base, "/v1/models", None).unwrap().1["data"].clone();
    // The arms of an experiment make images of one shape.
    let ids = models.as_array().unwrap().iter().filter_map(|model| model["id"].as_str());
    let arms =
        ids.filter(|id| id.starts_with("fashion")).map(|id| json!({"model": id, "weight": 1}));
    let body = json!({"id": "e", "arms": arms.collect::<Vec<_>>()});
    ask(base, "/v1/experiments", Some(body))
}

/// Status and body of a reply; `None` where there was none.
fn ask(base: &str, path: &str, body: Option<Value>) -> Option<(u16, Value)> {
    let agent: ureq::Agent =
        ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let url = format!("{base}{path}");
    let reply = match body {
        Some(body) => agent.post(&url).send_json(body),
        None => agent.get(&url).call(),
    };
    let mut reply = reply.ok()?;
    Some((reply.status().as_u16(), reply.body_mut().read_json().ok()?))
}

fn vote(pair_id: &str, choice: usize) -> Value {
    json!({"pair_id": pair_id, "choice": choice, "idempotency_key": format!("key-{pair_id}")})
}

#[test]
fn a_vote_that_was_acknowledged_survives_kill_9() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::start(data.path());
    assert_eq!(begin(&server.base).unwrap().0, 201);
    let drawn = (0..PAIRS).map(|_| {
        let body = json!({"num_inference_steps": 1});
        let (status, pair) = ask(&server.base, "/v1/experiments/e/pairs", Some(body)).unwrap();
        assert_eq!(status, 200, "{pair}");
        pair["pair_id"].as_str().unwrap().to_owned()
    });
    let pairs: Vec<String> = drawn.collect();

    // Four voters at once; what the server answered before it was killed is what counts.
    // None of them goes on before its answer has been taken, so the rest is not over when the server is.
    let (sender, answers) = mpsc::sync_channel(0);
    let acknowledged = std::thread::scope(|scope| {
        for voter in pairs.chunks(PAIRS / 4) {
            let (sender, base) = (sender.clone(), server.base.clone());
            scope.spawn(move || {
                for (at, pair) in voter.iter().enumerate() {
                    match ask(&base, "/v1/experiments/e/votes", Some(vote(pair, at % 2))) {
                        Some((201, reply)) => drop(sender.send((pair.clone(), at % 2, reply))),
                        Some((status, reply)) => panic!("{status}: {reply}"),
                        None => return,
                    }
                }
            });
        }
        drop(sender);
        let mut acknowledged: Vec<_> = answers.iter().take(ACKNOWLEDGED).collect();
        drop(server);
        acknowledged.extend(answers.iter());
        acknowledged
    });
    assert!((ACKNOWLEDGED..PAIRS).contains(&acknowledged.len()), "{}", acknowledged.len());

    let server = Server::start(data.path());
    let experiment = ask(&server.base, "/v1/experiments/e", None).unwrap().1;
    let votes: u64 = experiment["arms"]
        .as_array()
        .unwrap()
        .iter()
        .map(|arm| arm["wins"].as_u64().unwrap())
        .sum();
    // One of each voter may have been written and not answered.
    let known = acknowledged.len() as u64;
    assert!((known..=known + 4).contains(&votes), "{votes} of {known}");
    for (pair, choice, reply) in &acknowledged {
        let again = ask(&server.base, "/v1/experiments/e/votes", Some(vote(pair, *choice)));
        assert_eq!(again.unwrap(), (200, reply.clone()), "{pair}");
        let other = ask(&server.base, "/v1/experiments/e/votes", Some(vote(pair, 1 - choice)));
        assert_eq!(other.unwrap().0, 409, "{pair}");
    }
    // A pair shown before still takes its vote.
    let open = pairs.last().unwrap();
    let (status, _) = ask(&server.base, "/v1/experiments/e/votes", Some(vote(open, 1))).unwrap();
    assert!([200, 201].contains(&status), "{status}");
}

#[test]
fn a_folder_that_cannot_be_used_is_told_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let output = serve().arg("--data-dir").arg(&file).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.starts_with("error: --data-dir: ") && said.contains("file"), "{said}");
}

#[test]
fn without_a_folder_named_the_users_own_is_used_by_one_server() {
    let states = tempfile::tempdir().unwrap();
    let start = || Server::run(serve().env("XDG_STATE_HOME", states.path()));
    let first = start();
    assert_eq!(states.path().read_dir().unwrap().count(), 0, "nothing is made before it is needed");
    assert_eq!(begin(&first.base).unwrap().0, 201);
    assert!(states.path().join("understudy/experiments.redb").is_file());

    // The second serves images, and says why it has no experiments.
    let second = start();
    let image = json!({"num_inference_steps": 1});
    assert_eq!(ask(&second.base, "/v1/images/generations", Some(image)).unwrap().0, 200);
    let (status, refused) = ask(&second.base, "/v1/experiments", None).unwrap();
    assert_eq!((status, &refused["error"]["code"]), (503, &json!("experiments_unavailable")));
    let message = refused["error"]["message"].as_str().unwrap();
    assert!(message.contains("another server") && message.contains("--data-dir"), "{message}");
}
