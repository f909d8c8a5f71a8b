//! `understudy evaluate` from outside, with the bundled teacher and judge.

#![allow(clippy::unwrap_used)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::Value;
use tempfile::{TempDir, tempdir};

fn evaluate(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_understudy"))
        .arg("evaluate")
        .args(arguments)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env_remove("UNDERSTUDY_MODELS")
        .output()
        .unwrap()
}

fn report(arguments: &[&str]) -> Value {
    let output = evaluate(arguments);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn refusal(arguments: &[&str]) -> String {
    let output = evaluate(arguments);
    assert!(!output.status.success() && output.stdout.is_empty());
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.starts_with("error: ") && text.lines().count() < 10, "{text}");
    text
}

/// An idx file of 28×28 images, each a patch of its own size and brightness.
fn images(folder: &TempDir, count: u32) -> PathBuf {
    let mut bytes = vec![0, 0, 8, 3];
    for size in [count, 28, 28] {
        bytes.extend(size.to_be_bytes());
    }
    for i in 0..count {
        let (reach, bright) = (4 + i % 23, 40 + i * 7 % 200);
        let pixel =
            |at: u32| if at % 28 < reach && at / 28 < 28 - reach { bright as u8 } else { 0 };
        bytes.extend((0..28 * 28).map(pixel));
    }
    let path = folder.path().join(format!("{count}-images-idx3-ubyte"));
    fs::write(&path, bytes).unwrap();
    path
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn images_are_at_no_distance_from_themselves() {
    let folder = tempdir().unwrap();
    let (set, stats) = (images(&folder, 200), folder.path().join("stats.npz"));
    let out = folder.path().join("scores.json");
    let set = text(&set);
    let written = report(&["--samples", set, "--write-stats", text(&stats), "--json"]);
    assert_eq!(written["scores"], serde_json::json!({}));
    let flags = ["--samples", set, "--reference", set, "--json", "--out", text(&out)];
    let scores = &report(&flags)["scores"];
    let distance = scores["FD-fashion-mnist-judge"].as_f64().unwrap();
    assert!(distance.abs() < 1e-6, "{distance}");
    assert_eq!((scores["precision"].as_f64(), scores["recall"].as_f64()), (Some(1.0), Some(1.0)));
    let kept: Value = serde_json::from_slice(&fs::read(out).unwrap()).unwrap();
    assert_eq!(kept["scores"], *scores);
    // Statistics alone tell the Fréchet distance alone.
    let scores = &report(&["--samples", set, "--reference", text(&stats), "--json"])["scores"];
    assert_eq!(scores["FD-fashion-mnist-judge"].as_f64(), Some(distance));
    assert!(scores.get("precision").is_none() && scores.get("inception_score").is_some());
}

#[test]
fn a_model_is_sampled_and_scored_over_several_seeds() {
    let folder = tempdir().unwrap();
    let set = images(&folder, 200);
    let report = report(&[
        "--model",
        "fashion-mnist-teacher",
        "--reference",
        text(&set),
        "--n",
        "130",
        "--steps",
        "1",
        "--seeds",
        "2",
        "--json",
    ]);
    let scores = &report["scores"];
    assert!(scores["FD-fashion-mnist-judge"].as_f64().unwrap() > 0.0);
    assert!(scores["FD-fashion-mnist-judge_between_seeds"].as_f64().unwrap() > 0.0);
    assert!((0.0..=1.0).contains(&scores["class_agreement"].as_f64().unwrap()));
    assert_eq!(report["num_inference_steps"], 1);
}

#[test]
fn what_cannot_be_scored_is_refused_with_the_remedy() {
    let folder = tempdir().unwrap();
    let (few, set) = (images(&folder, 20), images(&folder, 200));
    let (few, set) = (text(&few), text(&set));
    let said = refusal(&["--samples", few, "--reference", set]);
    assert!(said.contains("`--samples` is 20 images") && said.contains("at least 129"), "{said}");
    let said = refusal(&["--samples", set, "--reference", few]);
    assert!(said.contains("`--reference` is 20 images"), "{said}");
    let said = refusal(&["--model", "fashion-mnist-teacher", "--n", "100", "--reference", set]);
    assert!(said.contains("`--n` is 100 images"), "{said}");
    let notes = folder.path().join("notes.txt");
    fs::write(&notes, "hello").unwrap();
    let said = refusal(&["--samples", set, "--reference", text(&notes)]);
    assert!(said.contains("notes.txt: is no set of images"), "{said}");
    let said = refusal(&["--samples", set, "--reference", set, "--features", "inception"]);
    assert!(said.contains("needs --weights FILE"), "{said}");
    let inception = ["--features", "inception", "--weights", text(&notes)];
    let said = refusal(&[&["--samples", set, "--reference", set], &inception[..]].concat());
    assert!(said.contains("notes.txt: cannot be read"), "{said}");
    let said = refusal(&["--samples", set, "--reference", set, "--features", "nobody"]);
    assert!(said.contains("use judge, inception or a judge's folder"), "{said}");
}
