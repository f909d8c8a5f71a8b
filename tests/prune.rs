//! `understudy prune` as a process, and the student that goes on from what it makes.
#![allow(clippy::unwrap_used)]

#[path = "common/program.rs"]
mod program;

use std::path::Path;

use understudy_models::checkpoint::{ModelFolder, card::Role};

fn done(arguments: &[&str]) -> String {
    program::done(program::understudy(arguments, &[]))
}

fn refused(arguments: &[&str], code: i32) -> String {
    program::refused(&program::understudy(arguments, &[]), code)
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

#[test]
fn a_pruned_model_is_a_folder_that_a_student_goes_on_from() {
    let home = tempfile::tempdir().unwrap();
    let model = text(&home.path().join("pruned"));
    let prune = ["prune", "--model", "fashion-mnist-teacher", "--time", "0.9x", "--rows", "32"];
    let prune = [&prune[..], &["--out", &model]].concat();
    let said = done(&prune);
    assert!(said.contains("of 1,806,401 parameters") && said.contains("--student"), "{said}");

    let folder = ModelFolder::open(Path::new(&model)).unwrap();

    assert_eq!(folder.card.role, Role::Student);
    assert_eq!(folder.card.teacher.as_deref(), Some("fashion-mnist-teacher"));
    assert!(folder.card.scores.is_empty());
    let told = &folder.card.recipe["pruning"];
    assert_eq!(told["from"], "fashion-mnist-teacher");
    assert!(told["measured_time"].as_f64().unwrap() <= 0.9, "{told}");
    let error = |which: &str| told["error_in_v"][which].as_f64().unwrap();
    assert!(error("fitted").max(error("narrowed")) < 0.1, "{told}");

    let said = refused(&prune, 1);
    assert!(said.contains("--out") && said.contains("exists"), "{said}");
    let out = text(&home.path().join("distilled"));
    let distill = ["distill", "--teacher", "fashion-mnist-teacher", "--student", &model];
    let less = ["--steps", "1", "--batch", "2", "--rho", "0.001", "--no-report", "--out", &out];
    done(&[&distill[..], &less].concat());
    let student = ModelFolder::open(Path::new(&out)).unwrap();
    assert_eq!(student.network, folder.network);
    assert_eq!(student.card.recipe["initialisation"], "weights of pruned");
}

#[test]
fn what_cannot_be_pruned_is_refused_with_the_remedy() {
    let home = tempfile::tempdir().unwrap();
    let out = text(&home.path().join("model"));
    let prune = |model: &str, time: &str, code| {
        refused(&["prune", "--model", model, "--time", time, "--out", &out], code)
    };
    for time in ["0.25", "0x", "1x", "NaNx", "infx", "x", ""] {
        let said = prune("fashion-mnist-student", time, 2);
        assert!(said.contains("--time") && said.contains("0.5x"), "{time}: {said}");
    }
    let said = prune("fashion-mnist-student", "0.001x", 1);
    // What it takes is the machine's to say.
    let told = said.contains("ask for at least 0.") || said.contains("nothing can be gained");
    assert!(said.contains("is 0.001x: the smallest network") && told, "{said}");
    let said = prune("emoji-text-to-image", "0.5x", 1);
    assert!(said.contains("UNet2DConditionModel") && said.contains("--student"), "{said}");
    let said = prune("fashion-mnist-student-4", "0.5x", 1);
    assert!(said.contains("the student that it went on from"), "{said}");
    assert!(!Path::new(&out).exists());
}
