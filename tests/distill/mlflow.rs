//! Runs told to MLflow: to a server in this process, to one that is down, to one that never answers.
//! `tests/mlflow/check.py` does the first with MLflow's own server.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    process::{Command, Output, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use serde_json::{Value, json};

use crate::{Home, curve};

/// A tracking server of one experiment and one run.
struct Server {
    url: String,
    calls: Arc<Mutex<Vec<(String, Value)>>>,
    /// Whether it knows the experiment.
    known: Arc<AtomicBool>,
}

impl Server {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let server = Self { url, calls: Arc::default(), known: Arc::default() };
        let (calls, known) = (Arc::clone(&server.calls), Arc::clone(&server.known));
        thread::spawn(move || {
            for stream in listener.incoming() {
                answer(stream.unwrap(), &calls, &known);
            }
        });
        server
    }

    /// The bodies of the calls to a path, in their order.
    fn told(&self, path: &str) -> Vec<Value> {
        let calls = self.calls.lock().unwrap();
        calls.iter().filter(|(to, _)| to == path).map(|(_, body)| body.clone()).collect()
    }

    /// Values of a metric by step.
    fn metric(&self, key: &str) -> Vec<(u64, f64)> {
        let batches = self.told("POST /api/2.0/mlflow/runs/log-batch");
        let metrics = batches.iter().filter_map(|batch| batch["metrics"].as_array()).flatten();
        let named = metrics.filter(|metric| metric["key"] == key);
        named.map(|it| (it["step"].as_u64().unwrap(), it["value"].as_f64().unwrap())).collect()
    }

    fn statuses(&self) -> Vec<String> {
        let updates = self.told("POST /api/2.0/mlflow/runs/update");
        updates.iter().map(|update| update["status"].as_str().unwrap().to_owned()).collect()
    }
}

fn answer(stream: TcpStream, calls: &Mutex<Vec<(String, Value)>>, known: &AtomicBool) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let (mut line, mut length) = (String::new(), 0);
    reader.read_line(&mut line).unwrap();
    let call = line.trim_end().trim_end_matches(" HTTP/1.1").to_owned();
    while line.trim() != "" {
        line.clear();
        reader.read_line(&mut line).unwrap();
        let header = line.to_ascii_lowercase();
        if let Some(value) = header.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let (status, reply) = match call.split(['?']).next().unwrap() {
        "GET /api/2.0/mlflow/experiments/get-by-name" if !known.load(Ordering::SeqCst) => {
            (404, json!({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "none"}))
        }
        "GET /api/2.0/mlflow/experiments/get-by-name" => {
            (200, json!({"experiment": {"experiment_id": "7"}}))
        }
        "POST /api/2.0/mlflow/experiments/create" => {
            known.store(true, Ordering::SeqCst);
            (200, json!({"experiment_id": "7"}))
        }
        "POST /api/2.0/mlflow/runs/create" => {
            (200, json!({"run": {"info": {"run_id": "abc", "artifact_uri": "/somewhere"}}}))
        }
        "POST /api/2.0/mlflow/runs/update" => (200, json!({"run_info": {"run_id": "abc"}})),
        _ => (200, json!({})),
    };
    calls.lock().unwrap().push((call, body));
    let reply = reply.to_string();
    let head =
        format!("HTTP/1.1 {status} x\r\ncontent-type: application/json\r\nconnection: close\r\n");
    let mut stream = stream;
    let _ = write!(stream, "{head}content-length: {}\r\n\r\n{reply}", reply.len());
}

fn distil(home: &Home, out: &str, steps: usize, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_understudy"));
    command.args(home.arguments("student.json", out, steps)).args(more);
    command
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_run_is_told_with_its_parameters_its_metrics_and_its_end() {
    let (home, server) = (Home::new(), Server::start());
    let flags = ["--mlflow", &server.url, "--mlflow-experiment", "emoji & more"];
    let ran = distil(&home, "out", 120, &flags).output().unwrap();
    assert!(ran.status.success() && !said(&ran).contains("mlflow"), "{}", said(&ran));

    let asked = "GET /api/2.0/mlflow/experiments/get-by-name?experiment_name=emoji%20%26%20more";
    assert_eq!(server.told(asked).len(), 1, "{:?}", server.calls.lock().unwrap());
    assert_eq!(
        server.told("POST /api/2.0/mlflow/experiments/create"),
        [json!({"name": "emoji & more"})]
    );
    let created = &server.told("POST /api/2.0/mlflow/runs/create")[0];
    assert_eq!((&created["experiment_id"], &created["run_name"]), (&json!("7"), &json!("out")));
    let batches = server.told("POST /api/2.0/mlflow/runs/log-batch");
    let parameters = batches[0]["params"].as_array().unwrap();
    let of = |key: &str| &parameters.iter().find(|it| it["key"] == key).unwrap()["value"];
    assert_eq!(
        (of("batch"), of("method"), of("teacher")),
        (&json!("4"), &json!("dkdm"), &json!("teacher"))
    );

    // The loss is the mean of the steps since the last line, as the run's own log has them.
    let log = curve(&home.path("out"));
    let mean = |from: usize, to: usize| {
        let losses = log[from..to].iter().map(|line| line["simple"].as_f64().unwrap());
        losses.sum::<f64>() / (to - from) as f64
    };
    let losses = server.metric("loss");
    assert_eq!(losses.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [50, 100, 120]);
    for ((_, loss), expected) in losses.iter().zip([mean(0, 50), mean(50, 100), mean(100, 120)]) {
        assert!((loss - expected).abs() < 1e-6, "{loss} {expected}");
    }
    let rates = server.metric("learning_rate");
    assert_eq!(rates[1].1, log[99]["learning_rate"].as_f64().unwrap());
    assert_eq!(server.metric("images_per_second").len(), 3);
    assert_eq!(server.statuses(), ["FINISHED"]);
    assert!(server.told("POST /api/2.0/mlflow/runs/update")[0]["end_time"].as_u64().is_some());
}

#[cfg(unix)]
#[test]
fn a_run_that_goes_on_is_the_same_there() {
    let (home, server) = (Home::new(), Server::start());
    let flags = ["--mlflow", server.url.as_str()];
    let mut process = distil(&home, "out", 100_000, &flags)
        .stderr(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    while server.metric("loss").is_empty() {
        assert!(process.try_wait().unwrap().is_none(), "it ended before it was stopped");
        thread::yield_now();
    }
    let stopped = Command::new("kill").arg("-INT").arg(process.id().to_string()).status().unwrap();
    assert!(stopped.success() && !process.wait().unwrap().success());
    assert_eq!(server.statuses(), ["KILLED"]);
    let steps = curve(&home.path("out")).len() + 60;
    let ran = distil(&home, "out", steps, &flags).output().unwrap();
    assert!(ran.status.success(), "{}", said(&ran));
    assert_eq!(server.told("POST /api/2.0/mlflow/runs/create").len(), 1);
    assert_eq!(server.statuses(), ["KILLED", "RUNNING", "FINISHED"]);
    assert_eq!(server.metric("loss").last().unwrap().0, steps as u64);
    // Done: nothing begins, so nothing is told.
    let calls = server.calls.lock().unwrap().len();
    assert!(distil(&home, "out", steps, &flags).output().unwrap().status.success());
    assert_eq!(server.calls.lock().unwrap().len(), calls);
    assert!(
        distil(&home, "dry", 5, &[flags[0], flags[1], "--dry-run"])
            .output()
            .unwrap()
            .status
            .success()
    );
    assert_eq!(server.calls.lock().unwrap().len(), calls);
}

#[test]
fn a_server_that_is_down_is_told_once_and_changes_nothing() {
    let home = Home::new();
    assert!(distil(&home, "alone", 120, &[]).output().unwrap().status.success());
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let url = format!("http://{closed}");
    let ran = distil(&home, "out", 120, &["--mlflow", &url]).output().unwrap();
    assert!(ran.status.success(), "{}", said(&ran));
    assert_eq!(said(&ran).matches(&url).count(), 1, "{}", said(&ran));
    assert!(said(&ran).contains("goes on without it"), "{}", said(&ran));
    assert_eq!(curve(&home.path("out")), curve(&home.path("alone")));

    let refused = distil(&home, "none", 1, &["--mlflow", "file:/tmp/mlruns"]).output().unwrap();
    assert!(
        !refused.status.success() && said(&refused).contains("http://localhost:5000"),
        "{}",
        said(&refused)
    );
    assert!(!home.path("none").exists());
}

/// It is connected to and never answers: the training is over long before whoever talks to it gives up.
#[test]
fn a_server_that_hangs_holds_nothing_up() {
    let home = Home::new();
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", silent.local_addr().unwrap());
    let mut process =
        distil(&home, "out", 120, &["--mlflow", &url]).stderr(Stdio::piped()).spawn().unwrap();
    // Kept open and unanswered until the model is there.
    let _held = silent.accept().unwrap();
    while !home.path("out/model_index.json").exists() {
        assert!(process.try_wait().unwrap().is_none(), "it waits for the end to be told");
        thread::yield_now();
    }
    let ran = process.wait_with_output().unwrap();
    assert!(ran.status.success() && said(&ran).contains("goes on without it"), "{}", said(&ran));
}
