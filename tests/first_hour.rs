//! The first hour as commands: what there is, what a run will cost, a student, and whether it is good.
#![allow(clippy::unwrap_used)]

#[path = "common/folder.rs"]
mod folder;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use folder::copy;
use serde_json::{Value, json};
use tempfile::TempDir;
use understudy_models::{
    NetworkConfig,
    checkpoint::{Draft, ModelFolder, card::Card},
    schedule::ScheduleConfig,
};

fn zoo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/zoo")
}

fn understudy(home: &Path, line: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_understudy"));
    command.args(line.split(' ')).current_dir(home).env("UNDERSTUDY_THREADS", "1");
    command.output().unwrap()
}

fn said(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}", text(&output.stderr));
    (text(&output.stdout), text(&output.stderr))
}

/// A folder with a small teacher in `models`, and a smaller architecture.
fn home() -> TempDir {
    let home = tempfile::tempdir().unwrap();
    let config = |channels: usize| {
        json!({
        "_class_name": "UNet2DModel", "sample_size": 8, "in_channels": 1, "out_channels": 1,
        "block_out_channels": [channels, channels], "norm_num_groups": 4, "layers_per_block": 1,
        "num_class_embeds": 3, "attention_head_dim": 4,
        "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"],
        })
    };
    let schedule = json!({
        "_class_name": "DDPMScheduler", "num_train_timesteps": 20, "beta_schedule": "squaredcos_cap_v2",
    });
    let schedule = ScheduleConfig::from_json(&schedule, "scheduler_config.json").unwrap();
    let network = NetworkConfig::from_json(&config(16), "config.json").unwrap();
    let weights = network.initial_weights(1).unwrap().into_iter().collect();
    let draft = Draft::new(&home.path().join("models/teacher")).unwrap();
    let card: Card = serde_json::from_value(json!({"class_names": ["a", "b", "c"]})).unwrap();
    ModelFolder::write(draft, &network, &weights, &schedule, &card).unwrap();
    fs::write(home.path().join("student.json"), config(8).to_string()).unwrap();
    home
}

const DISTIL: &str = "distill --teacher models/teacher --student student.json --out students/student --steps 40 --batch 4 --rho 0.2 \
                      --sample-every 10 --checkpoint-every 20";

#[test]
fn a_student_comes_with_its_cost_a_report_and_the_next_command() {
    let home = home();
    let (out, err) = said(&understudy(home.path(), &format!("{DISTIL} --dry-run")));
    assert!(out.contains("Nothing was written") && !home.path().join("students").exists());
    for words in ["Filling the sample pool", "40 steps of", "In all", "of memory", "on disk"] {
        assert!(err.contains(words), "{words} is not in {err}");
    }

    let (out, _) = said(&understudy(home.path(), DISTIL));
    let student = home.path().join("students/student");
    assert!(out.contains("Student saved to students/student"), "{out}");
    let command = out.lines().find(|line| line.contains(" serve ")).unwrap().trim();
    assert!(command.ends_with("serve --models students --models models"), "{command}");

    let page = fs::read_to_string(student.join("report/index.html")).unwrap();
    for words in ["The same seeds", "Where they differ most", "Figures", "Loss", "What to do next"]
    {
        assert!(page.contains(words), "{words}");
    }
    assert!(page.contains(&format!("understudy {DISTIL}")), "the command");
    assert!(page.contains("Samples: likeness"), "scores over steps");
    for outside in ["src=\"http", "href=\"http", "url(http", "<script", "@import"] {
        assert!(!page.contains(outside), "{outside}");
    }
    for picture in
        ["teacher.png", "student.png", "least-alike-student.png", "loss.svg", "speed.svg"]
    {
        assert!(student.join("report").join(picture).exists(), "{picture}");
    }
    // The Hub's card: its YAML, and Python.
    let readme = fs::read_to_string(student.join("README.md")).unwrap();
    assert!(readme.starts_with("---\nlibrary_name: diffusers\n"), "{readme}");
    assert!(readme.contains("A student of teacher") && readme.contains("class_labels=labels"));

    // Beside its teacher once more: the scores are in the card, and in its README.
    let line = "evaluate --model students/student --against models/teacher --n 24 --seeds 2 --steps 4 --json";
    let report: Value = serde_json::from_str(&said(&understudy(home.path(), line)).0).unwrap();
    assert_eq!(report["comparison"]["images"], 24);
    assert_eq!(report["comparison"]["psnr_db"].as_array().unwrap().len(), 2);
    assert_eq!(report["verdict"]["level"], "unknown", "there is no judge of 8×8 images");
    let card = ModelFolder::open(&student).unwrap().card;
    assert_eq!((&card.scores["samples"], card.teacher.as_deref()), (&json!(48), Some("teacher")));
    assert!(fs::read_to_string(student.join("README.md")).unwrap().contains("| samples | 48 |"));

    let (out, _) =
        said(&understudy(home.path(), "report students/student --against models/teacher --n 20"));
    assert!(out.contains("Report: students/student/report/index.html"), "{out}");
    let problem = understudy(home.path(), "report students/student --n 20");
    let problem = String::from_utf8_lossy(&problem.stderr).into_owned();
    assert!(problem.contains("--against teacher"), "{problem}");
}

#[test]
fn an_interrupted_run_says_how_to_go_on_and_does() {
    let home = home();
    let line = format!("{DISTIL} --no-report").replace("--steps 40", "--steps 1000000");
    let mut process = Command::new(env!("CARGO_BIN_EXE_understudy"))
        .args(line.split(' '))
        .current_dir(home.path())
        .env("UNDERSTUDY_THREADS", "1")
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let log = home.path().join("students/student/training/log.jsonl");
    while fs::read_to_string(&log).unwrap_or_default().lines().count() < 5 {
        assert!(process.try_wait().unwrap().is_none(), "it ended early");
        std::thread::yield_now();
    }
    let told = Command::new("kill").args(["-INT", &process.id().to_string()]).status().unwrap();
    assert!(told.success());
    let output = process.wait_with_output().unwrap();
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert!(err.contains("interrupted after step") && err.contains("same command again"), "{err}");
    let done = fs::read_to_string(&log).unwrap().lines().count();

    // The steps to go are part of what makes a run this one, so the same command goes on.
    let (out, err) = said(&understudy(home.path(), &format!("{line} --dry-run")));
    assert!(err.contains("Resuming from the checkpoint of step"), "{err}");
    assert!(err.contains(&format!("of step {done}.")), "{done} steps were done: {err}");
    assert!(out.contains("dry run"), "{out}");
}

#[test]
fn a_students_teacher_is_found_among_the_bundled_models() {
    let home = tempfile::tempdir().unwrap();
    let student = home.path().join("mine/fashion-mnist-student");
    copy(&zoo().join("fashion-mnist-student"), &student);
    fs::create_dir(home.path().join("empty")).unwrap();
    let (out, _) = said(&understudy(home.path(), "models --models mine --json"));
    let listed: Value = serde_json::from_str(&out).unwrap();
    let ids: Vec<_> =
        listed.as_array().unwrap().iter().map(|it| it["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["fashion-mnist-student", "fashion-mnist-teacher"]);
    assert_eq!(listed[0]["folder"], "mine/fashion-mnist-student");

    let (out, _) = said(&understudy(home.path(), "models --models empty"));
    assert!(out.contains("No model in empty") && out.contains("model_index.json"), "{out}");
    let refused = understudy(home.path(), "serve --port 0 --models empty");
    let problem = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(problem.contains("empty") && problem.contains("model_index.json"), "{problem}");

    // One name in two folders.
    copy(&student, &home.path().join("more/fashion-mnist-student"));
    let refused = understudy(home.path(), "models --models mine:more");
    let problem = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(problem.contains("have one name; rename"), "{problem}");

    // A folder that is there is never looked for on the Hub.
    fs::create_dir_all(home.path().join("owner/name")).unwrap();
    let refused = understudy(home.path(), "sample --model owner/name --out x.png");
    let problem = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(problem.contains("no model_index.json"), "{problem}");
    let refused = understudy(home.path(), "sample --model mine --out x.png");
    let problem = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(problem.contains("name one of them: mine/fashion-mnist-student"), "{problem}");
    let refused = understudy(home.path(), "sample --model fashion-mnist-techer --out x.png");
    let problem = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(problem.contains("did you mean fashion-mnist-teacher?"), "{problem}");
}

#[test]
fn samples_are_asked_for_by_class_name_and_written_as_png() {
    let home = home();
    let sample = |more: &str| {
        understudy(home.path(), &format!("sample --model models/teacher --n 2 --steps 2 {more}"))
    };
    said(&sample("--class B --out b.png"));
    said(&sample("--class 1 --out one.png"));
    let read = |name: &str| fs::read(home.path().join(name)).unwrap();
    assert_eq!(read("b.png"), read("one.png"));
    for (more, words) in [
        ("--class d --out x.png", "a, b, c"),
        ("--class 3 --out x.png", "0 to 2"),
        ("--out x.jpg", "PNG"),
        ("--scheduler ddmi --out x.png", "ddim"),
    ] {
        let output = sample(more);
        let problem = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && problem.contains(words), "{more}: {problem}");
    }
    assert!(!home.path().join("x.jpg").exists());
}
