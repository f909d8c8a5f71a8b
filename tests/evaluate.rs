//! `understudy evaluate` and `train-judge` from outside, with the bundled teacher.

#![allow(clippy::unwrap_used)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::Value;
use tempfile::{TempDir, tempdir};

fn understudy(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_understudy"))
        .args(arguments)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env_remove("UNDERSTUDY_MODELS")
        .output()
        .unwrap()
}

fn evaluate(arguments: &[&str]) -> Output {
    understudy(&[&["evaluate"], arguments].concat())
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
    let mut labels = vec![0, 0, 8, 1];
    labels.extend(count.to_be_bytes());
    labels.extend((0..count).map(|i| (i % 10) as u8));
    fs::write(folder.path().join(format!("{count}-labels-idx1-ubyte")), labels).unwrap();
    path
}

/// A judge that has seen a few images, and judges badly.
fn judge(folder: &TempDir) -> PathBuf {
    let (set, out) = (images(folder, 150), folder.path().join("hasty-judge"));
    let data = ["--data", text(&set), "--test-data", text(&set), "--out", text(&out)];
    let flags = ["--epochs", "1", "--least-accuracy", "0"];
    let output = understudy(&[&["train-judge"], &data[..], &flags].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    out
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn images_are_at_no_distance_from_themselves() {
    let folder = tempdir().unwrap();
    let (set, stats) = (images(&folder, 200), folder.path().join("stats.npz"));
    let out = folder.path().join("scores.json");
    let (set, judge) = (text(&set), judge(&folder));
    let report =
        |flags: &[&str]| report(&[&["--features", text(&judge), "--json"], flags].concat());
    let written = report(&["--samples", set, "--write-stats", text(&stats)]);
    assert_eq!(written["scores"], serde_json::json!({}));
    let flags = ["--samples", set, "--reference", set, "--out", text(&out)];
    let scores = &report(&flags)["scores"];
    let distance = scores["FD-hasty-judge"].as_f64().unwrap();
    assert!(distance.abs() < 1e-6, "{distance}");
    assert_eq!((scores["precision"].as_f64(), scores["recall"].as_f64()), (Some(1.0), Some(1.0)));
    let kept: Value = serde_json::from_slice(&fs::read(out).unwrap()).unwrap();
    assert_eq!(kept["scores"], *scores);
    // Statistics alone tell the Fréchet distance alone.
    let scores = &report(&["--samples", set, "--reference", text(&stats)])["scores"];
    assert_eq!(scores["FD-hasty-judge"].as_f64(), Some(distance));
    assert!(scores.get("precision").is_none() && scores.get("inception_score").is_some());
}

#[test]
fn a_model_is_sampled_and_scored_over_several_seeds() {
    let folder = tempdir().unwrap();
    let (set, judge) = (images(&folder, 200), judge(&folder));
    let report = report(&[
        "--features",
        text(&judge),
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
    assert!(scores["FD-hasty-judge"].as_f64().unwrap() > 0.0);
    assert!(scores["FD-hasty-judge_between_seeds"].as_f64().unwrap() > 0.0);
    assert!((0.0..=1.0).contains(&scores["class_agreement"].as_f64().unwrap()));
    assert_eq!(report["num_inference_steps"], 1);
}

#[test]
fn what_cannot_be_scored_is_refused_with_the_remedy() {
    let folder = tempdir().unwrap();
    let (few, set) = (images(&folder, 20), images(&folder, 200));
    let (few, set, judge) = (text(&few), text(&set), judge(&folder));
    let in_judge = |flags: &[&str]| refusal(&[&["--features", text(&judge)], flags].concat());
    let said = in_judge(&["--samples", few, "--reference", set]);
    assert!(said.contains("`--samples` is 20 images") && said.contains("at least 129"), "{said}");
    let said = in_judge(&["--samples", set, "--reference", few]);
    assert!(said.contains("`--reference` is 20 images"), "{said}");
    let said = in_judge(&["--model", "fashion-mnist-teacher", "--n", "100", "--reference", set]);
    assert!(said.contains("`--n` is 100 images"), "{said}");
    let notes = folder.path().join("notes.txt");
    fs::write(&notes, "hello").unwrap();
    let said = in_judge(&["--samples", set, "--reference", text(&notes)]);
    assert!(said.contains("notes.txt: is no set of images"), "{said}");
    let said = refusal(&["--samples", set, "--reference", set, "--features", "inception"]);
    assert!(said.contains("needs --weights FILE"), "{said}");
    let inception = ["--features", "inception", "--weights", text(&notes)];
    let said = refusal(&[&["--samples", set, "--reference", set], &inception[..]].concat());
    assert!(said.contains("notes.txt: cannot be read"), "{said}");
    let of_colours = ["--features", "cifar10-jpeg-judge"];
    let said = refusal(&[&["--samples", set, "--reference", set], &of_colours[..]].concat());
    assert!(said.contains("the network takes 32×32 3-channel"), "{said}");
    let said = refusal(&["--samples", set, "--reference", set, "--features", "nobody"]);
    assert!(said.contains("neither a folder nor a bundled judge"), "{said}");
    for flag in ["--n", "--steps", "--seed", "--seeds", "--batch", "--guidance-scale"] {
        let said = refusal(&["--samples", set, "--reference", set, flag, "2"]);
        assert!(said.contains("cannot be used with") && said.contains(flag), "{said}");
    }
}
