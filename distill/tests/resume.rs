//! A run that is stopped and resumed is the run that was not.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;

use common::{Blind, curve, learned_teacher, task, teacher};
use understudy_distill::run_dir::{CHECKPOINT, RUN_DIR};
use understudy_distill::train::train;

fn weights(out: &Path) -> Vec<u8> {
    fs::read(out.join("unet/diffusion_pytorch_model.safetensors")).unwrap()
}

#[test]
fn a_resumed_run_is_the_uninterrupted_one_to_the_bit() {
    let home = tempfile::tempdir().unwrap();
    for (name, teacher) in
        [("fixed", teacher(home.path())), ("learned", learned_teacher(home.path()))]
    {
        let (whole, parts) =
            (home.path().join(format!("{name}-1")), home.path().join(format!("{name}-2")));
        train(task(&teacher, &whole, 10, None), &mut Blind).unwrap();
        for steps in [4, 7, 10] {
            train(task(&teacher, &parts, steps, None), &mut Blind).unwrap();
        }
        assert_eq!(curve(&whole).len(), 10);
        assert_eq!(curve(&whole), curve(&parts));
        assert_eq!(weights(&whole), weights(&parts));
    }
}

/// What a kill leaves: lines and rows of steps after the checkpoint.
#[test]
fn steps_after_the_checkpoint_are_done_again() {
    let home = tempfile::tempdir().unwrap();
    let teacher = teacher(home.path());
    let (whole, killed) = (home.path().join("1"), home.path().join("2"));
    let (file, other) = (home.path().join("1.pool"), home.path().join("2.pool"));
    train(task(&teacher, &whole, 10, Some(file)), &mut Blind).unwrap();
    train(task(&teacher, &killed, 4, Some(other.clone())), &mut Blind).unwrap();
    let checkpoint = killed.join(RUN_DIR).join(CHECKPOINT);
    let fourth = fs::read(&checkpoint).unwrap();
    // Three steps more, of which the checkpoint is lost.
    train(task(&teacher, &killed, 7, Some(other.clone())), &mut Blind).unwrap();
    fs::write(&checkpoint, fourth).unwrap();
    let problem = train(task(&teacher, &killed, 10, Some(other)), &mut Blind);
    problem.unwrap();
    assert_eq!(curve(&whole), curve(&killed));
    assert_eq!(weights(&whole), weights(&killed));
}

#[test]
fn memory_and_file_hold_the_same_pool() {
    let home = tempfile::tempdir().unwrap();
    let teacher = teacher(home.path());
    let (memory, file) = (home.path().join("1"), home.path().join("2"));
    train(task(&teacher, &memory, 6, None), &mut Blind).unwrap();
    train(task(&teacher, &file, 6, Some(home.path().join("pool"))), &mut Blind).unwrap();
    assert_eq!(curve(&memory), curve(&file));
}

#[test]
fn another_runs_folder_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let teacher = teacher(home.path());
    let out = home.path().join("out");
    train(task(&teacher, &out, 1, None), &mut Blind).unwrap();
    let mut other = task(&teacher, &out, 2, None);
    other.identity.insert("batch".into(), 7.into());
    let problem = train(other, &mut Blind).unwrap_err().to_string();
    assert!(problem.contains("`batch`") && problem.contains("another run"), "{problem}");
}

#[test]
fn losses_fall() {
    let home = tempfile::tempdir().unwrap();
    let teacher = teacher(home.path());
    let out = home.path().join("out");
    train(task(&teacher, &out, 60, None), &mut Blind).unwrap();
    let losses: Vec<f64> = curve(&out).iter().map(|line| line["loss"].as_f64().unwrap()).collect();
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    let (first, last) = (mean(&losses[..10]), mean(&losses[50..]));
    assert!(last < 0.7 * first, "{first} → {last}");
}
