//! `understudy load` against a real server on a real port.

use std::{
    net::TcpListener as StdListener,
    process::{Child, Command, Output, Stdio},
};

use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::oneshot};
use tower::ServiceExt;
use understudy::http;

use crate::server::{CLASSES, ENDLESS, STUDENT, Server, TEXT, post};

/// The address of `server`, which serves until the sender is dropped.
async fn listen(server: &Server) -> (String, oneshot::Sender<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (stop, stopped) = oneshot::channel::<()>();
    let stopped = async move { drop(stopped.await) };
    tokio::spawn(http::serve(listener, server.app.clone(), stopped, http::Shutdown::default()));
    (url, stop)
}

fn load(url: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_understudy"));
    command.args(["load", "--url", url]).args(arguments);
    command.env_remove("UNDERSTUDY_API_KEY").stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

async fn output(mut command: Command) -> Output {
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

fn failure(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && !said.contains("panicked"), "{said}");
    said
}

#[tokio::test(flavor = "multi_thread")]
async fn latencies_counts_table_and_picture_of_a_real_server() {
    let server = Server::pair_with(|settings| settings.api_keys = vec!["key".into()]).await;
    let (url, _stop) = listen(&server).await;
    let folder = tempfile::tempdir().unwrap();
    let [csv, svg] = ["load.csv", "load.svg"].map(|name| folder.path().join(name));
    let rates = ["--rate", "40,80", "--duration", "1", "--n", "2", "--steps", "2", "--seed", "3"];
    let files = ["--csv", csv.to_str().unwrap(), "--svg", svg.to_str().unwrap()];
    let mixes = ["--mix", "teacher=1,student=3", "--mix", "plain", "--api-key", "key", "--json"];
    let arguments = [&rates[..], &files, &mixes].concat();
    let output = output(load(&url, &arguments)).await;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    // Whether the queue fills up depends on what else the machine does.
    assert!(said.contains("73/73  plain at 80/s, "), "progress: {said}");

    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["request"], json!({"num_inference_steps": 2, "n": 2}));
    let runs = report["runs"].as_array().unwrap();
    let turns: Vec<_> = runs.iter().map(|run| (&run["mix"], &run["rate"])).collect();
    let [both, plain] = [json!("teacher=1,student=3"), json!("plain")];
    let [slow, fast] = [json!(40.0), json!(80.0)];
    assert_eq!(turns, [(&both, &slow), (&plain, &slow), (&both, &fast), (&plain, &fast)]);
    // Two for each of the three tries.
    let mut images = 6;
    for run in runs {
        for model in run["models"].as_array().unwrap() {
            let id = match model["name"].as_str().unwrap() {
                "teacher" => CLASSES,
                name => name,
            };
            let accepted = model["accepted"].as_u64().unwrap();
            assert!(accepted > 0, "{run}");
            images += 2 * accepted;
            assert_eq!(model["served_by"][id], accepted);
            for count in ["refused_other", "failed"] {
                assert_eq!(model[count], 0, "{model}");
            }
            let latency = |name: &str| model["latency_ms"][name].as_f64().unwrap();
            assert!(latency("p50") > 0.0 && latency("p50") <= latency("p99"), "{model}");
            assert!(latency("p99") <= latency("max"), "{model}");
            let accepted = 2.0 * accepted as f64;
            assert!(model["images_per_second"].as_f64().unwrap() <= accepted, "{model}");
        }
    }
    // The server counts the same.
    let made: u64 = [CLASSES, STUDENT, "plain"]
        .map(|id| server.metrics.images.with_label_values(&[id]).get())
        .iter()
        .sum();
    assert_eq!(made, images);
    assert_eq!(std::fs::read_to_string(csv).unwrap().lines().count(), 1 + 6);
    let svg = std::fs::read_to_string(svg).unwrap();
    for name in ["teacher of teacher=1,student=3 p99", "plain p50"] {
        assert!(svg.lines().any(|line| line == name), "{svg}");
    }
}

/// Each prompt has its turn: all of them, and no other, come to hidden states that are kept.
#[tokio::test(flavor = "multi_thread")]
async fn prompts_take_turns() {
    let server = Server::with_text().await;
    let (url, _stop) = listen(&server).await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompts.txt");
    std::fs::write(&file, "a house\n\n  a dog \n").unwrap();
    let flags = ["--mix", TEXT, "--rate", "10", "--duration", "2", "--steps", "1", "--json"];
    let prompts =
        ["--prompt", "red apple", "--prompt", "a cat", "--prompts", file.to_str().unwrap()];
    let output = output(load(&url, &[&flags[..], &prompts].concat())).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let text = &report["runs"][0]["models"][0];
    assert_eq!((&text["refused_other"], &text["failed"]), (&json!(0), &json!(0)), "{report}");
    let accepted = text["accepted"].as_u64().unwrap();
    let count = |outcome: &str| server.metrics.prompts.with_label_values(&[TEXT, outcome]).get();
    // A guided image is told two prompts, and one image was tried before.
    assert_eq!(count("hit") + count("miss"), 2 * (accepted + 1), "{report}");
    for prompt in ["red apple", "a cat", "a house", "a dog"] {
        let before = count("miss");
        let body = json!({"model": TEXT, "prompt": prompt, "num_inference_steps": 1});
        assert_eq!(server.generate(body).await.status, 200);
        assert_eq!(count("miss"), before, "{prompt} is known: {report}");
    }
    std::fs::write(&file, "\n").unwrap();
    let prompts = ["--prompts", file.to_str().unwrap()];
    let said = failure(&self::output(load(&url, &prompts)).await);
    assert!(said.contains("holds no prompt; write one on each line"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_is_counted_apart_and_nothing_measured_is_no_success() {
    let server = Server::start().await;
    let (url, _stop) = listen(&server).await;
    // Two requests take all eight places, for as long as the test lasts.
    let endless = json!({"n": 4, "num_inference_steps": ENDLESS}).to_string();
    for _ in 0..2 {
        let request = post("/v1/images/generations", endless.clone());
        tokio::spawn(server.router().oneshot(request));
    }
    let waiting =
        |server: &Server| server.metrics.samples_waiting.with_label_values(&[CLASSES]).get();
    let taken = |server: &Server| server.running() + waiting(server);
    server.until("all places are taken", |server| taken(server) == 8).await;
    let flags = ["--mix", "teacher", "--rate", "60", "--duration", "0.5", "--json"];
    let output = output(load(&url, &flags)).await;
    assert!(failure(&output).contains("no request had images: 429"));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let teacher = &report["runs"][0]["models"][0];
    assert!(teacher["refused_429"].as_u64().unwrap() > 10, "{teacher}");
    for count in ["accepted", "refused_other", "failed"] {
        assert_eq!(teacher[count], 0, "{teacher}");
    }
    assert_eq!(teacher["latency_ms"], Value::Null);
}

/// Starts a load, and lets it make some images.
async fn under_way(server: &Server, url: &str, arguments: &[&str]) -> Child {
    let child = load(url, arguments).spawn().unwrap();
    let made = |server: &Server| server.metrics.images.with_label_values(&[CLASSES]).get();
    server.until("images are made", |server| made(server) > 3).await;
    child
}

async fn ended(child: Child) -> Output {
    tokio::task::spawn_blocking(move || child.wait_with_output().unwrap()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_goes_away_costs_the_rest_of_the_requests() {
    let server = Server::start().await;
    let (url, stop) = listen(&server).await;
    let flags = ["--mix", "teacher", "--rate", "30", "--duration", "2"];
    let child = under_way(&server, &url, &flags).await;
    drop(stop);
    let output = ended(child).await;
    let table = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(table.contains("first problem: ") && table.contains("teacher at 30/s"), "{table}");
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn interrupted_it_tells_what_there_is() {
    let server = Server::start().await;
    let (url, _stop) = listen(&server).await;
    let flags = ["--mix", "teacher", "--rate", "30,60", "--duration", "600"];
    let child = under_way(&server, &url, &flags).await;
    let interrupt = format!("kill -INT {}", child.id());
    assert!(Command::new("sh").args(["-c", &interrupt]).status().unwrap().success());
    let output = ended(child).await;
    assert!(failure(&output).contains("interrupted"));
    let table = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(table.contains("teacher at 30/s") && !table.contains("at 60/s"), "{table}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_asked_is_told_before_anything_is_measured() {
    let server = Server::start().await;
    let (url, _stop) = listen(&server).await;
    for (flags, parts) in [
        (&["--mix", "nobody"][..], &["nobody: 404", "no such model"][..]),
        (&["--mix", "student"], &["--mix student", CLASSES]),
        (&["--mix", "teacher", "--scheduler", "best"], &["--scheduler", "possible values: ddpm"]),
        (&["--mix", "teacher", "--n", "99"], &["400", "`n` is 99"]),
        (&["--mix", "a=0"], &["--mix", "weight of a"]),
        (&["--rate", "0"], &["--rate", "from 0.001"]),
        (&["--rate", "1,nan"], &["--rate", "nan"]),
        (&["--rate", "100000", "--duration", "60"], &["--rate 100000", "6000000 requests"]),
        (&["--duration", "soon"], &["--duration", "86400"]),
    ] {
        let said = failure(&output(load(&url, flags)).await);
        for part in parts {
            assert!(said.contains(part), "{flags:?}: {said}");
        }
        assert!(said.lines().count() < 10, "{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_not_there_is_told() {
    let free = StdListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", free.local_addr().unwrap());
    drop(free);
    let said = failure(&output(load(&url, &[])).await);
    assert!(said.contains(&url) && said.contains("refused") && said.contains("serve"), "{said}");
}
