//! `understudy distill` as a process: killed, out of disk, and resumed.
#![allow(clippy::unwrap_used)]

mod mlflow;
mod recipes;
mod shards;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;
use understudy_models::NetworkConfig;
use understudy_models::checkpoint::{Draft, ModelFolder, card::Card};
use understudy_models::schedule::ScheduleConfig;

pub(crate) struct Home(TempDir);

impl Home {
    /// A small teacher, and a smaller student's architecture.
    pub(crate) fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        let config = |channels: usize, classes: usize| {
            json!({
                "_class_name": "UNet2DModel", "sample_size": 8, "in_channels": 1, "out_channels": 1,
                "block_out_channels": [channels, channels], "norm_num_groups": 4,
                "layers_per_block": 1, "num_class_embeds": classes, "attention_head_dim": 4,
                "down_block_types": ["DownBlock2D", "DownBlock2D"],
                "up_block_types": ["UpBlock2D", "UpBlock2D"],
            })
        };
        let schedule = json!({
            "_class_name": "DDPMScheduler", "num_train_timesteps": 20,
            "beta_schedule": "squaredcos_cap_v2",
        });
        let schedule = ScheduleConfig::from_json(&schedule, "scheduler_config.json").unwrap();
        let network = NetworkConfig::from_json(&config(16, 3), "config.json").unwrap();
        let weights = network.initial_weights(1).unwrap().into_iter().collect();
        let draft = Draft::new(&home.path().join("teacher")).unwrap();
        ModelFolder::write(draft, &network, &weights, &schedule, &Card::default()).unwrap();
        for (name, classes) in [("student.json", 3), ("other.json", 4)] {
            fs::write(home.path().join(name), config(8, classes).to_string()).unwrap();
        }
        Self(home)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn arguments(&self, student: &str, out: &str, steps: usize) -> Vec<String> {
        let path = |name: &str| self.path(name).display().to_string();
        let more = "--batch 4 --walk-steps 10 --checkpoint-every 10 --sample-every 0 --threads 1 --no-report --learning-rate-schedule constant";
        let (teacher, student, out, steps) =
            (path("teacher"), path(student), path(out), steps.to_string());
        let first = ["distill", "--teacher", &teacher, "--student", &student, "--out", &out];
        let steps = ["--steps", &steps];
        first.into_iter().chain(steps).chain(more.split(' ')).map(String::from).collect()
    }

    /// As [`Home::arguments`], for a student of few steps.
    pub(crate) fn few(
        &self,
        student: &str,
        out: &str,
        evaluations: usize,
        steps: usize,
    ) -> Vec<String> {
        let mut arguments = self.arguments(student, out, steps);
        arguments.extend(["--rho", "0.2", "--evaluations"].map(String::from));
        arguments.push(evaluations.to_string());
        arguments
    }

    pub(crate) fn run(&self, student: &str, out: &str, steps: usize) -> Output {
        let arguments = self.arguments(student, out, steps);
        Command::new(env!("CARGO_BIN_EXE_understudy")).args(arguments).output().unwrap()
    }
}

/// Every line but its times.
pub(crate) fn curve(out: &Path) -> Vec<Value> {
    let line = |line: &str| {
        let mut line: Value = serde_json::from_str(line).ok()?;
        line.as_object_mut()?
            .retain(|name, _| !["images_per_second", "seconds"].contains(&&name[..]));
        Some(line)
    };
    let log = fs::read_to_string(out.join("training/log.jsonl")).unwrap_or_default();
    log.lines().filter_map(line).collect()
}

pub(crate) fn weights(out: &Path) -> Vec<u8> {
    fs::read(out.join("unet/diffusion_pytorch_model.safetensors")).unwrap()
}

#[test]
fn a_killed_run_goes_on_as_if_it_had_not_been() {
    let home = Home::new();
    let whole = home.run("student.json", "whole", 60);
    assert!(whole.status.success(), "{}", String::from_utf8_lossy(&whole.stderr));

    // Killed some steps after a checkpoint, and again before the end.
    for lines in [14, 37] {
        let mut process = Command::new(env!("CARGO_BIN_EXE_understudy"))
            .args(home.arguments("student.json", "killed", 60))
            .stderr(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        while curve(&home.path("killed")).len() < lines {
            assert!(process.try_wait().unwrap().is_none(), "it ended before it could be killed");
            std::thread::yield_now();
        }
        process.kill().unwrap();
        process.wait().unwrap();
        assert!(!home.path("killed/model_index.json").exists());
    }
    let resumed = home.run("student.json", "killed", 60);
    let said = String::from_utf8_lossy(&resumed.stderr).into_owned();
    assert!(resumed.status.success() && said.contains("Resuming from the checkpoint"), "{said}");
    assert_eq!(curve(&home.path("whole")), curve(&home.path("killed")));
    assert_eq!(weights(&home.path("whole")), weights(&home.path("killed")));

    let folder = ModelFolder::open(&home.path("killed")).unwrap();
    assert_eq!(folder.card.teacher.as_deref(), Some("teacher"));
    assert_eq!(folder.card.recipe["student_steps"], 60);
}

/// A limit on the size of files stands in for a full disk: both fail a write in the middle.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_the_last_checkpoint() {
    let home = Home::new();
    assert!(home.run("student.json", "whole", 30).status.success());
    assert!(home.run("student.json", "full", 10).status.success());
    let stopped = Command::new("sh")
        .arg("-c")
        .arg("trap '' XFSZ; ulimit -f 20; exec \"$0\" \"$@\"")
        .arg(env!("CARGO_BIN_EXE_understudy"))
        .args(home.arguments("student.json", "full", 30))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&stopped.stderr).into_owned();
    assert!(!stopped.status.success() && said.contains("checkpoint"), "{said}");
    let left: Vec<_> = fs::read_dir(home.path("full/training"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    assert!(!left.iter().any(|name| name.contains("partial")), "{left:?}");
    assert!(home.run("student.json", "full", 30).status.success());
    assert_eq!(curve(&home.path("whole")), curve(&home.path("full")));
}

#[test]
fn what_cannot_work_is_refused_at_the_start() {
    let home = Home::new();
    let refused = |student: &str, out: &str, words: &[&str]| {
        let output = home.run(student, out, 1);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{said}");
        assert!(words.iter().all(|word| said.contains(word)), "{said}");
    };
    refused("other.json", "out", &["num_class_embeds to 3", "is 4", "are 3"]);
    refused("missing.json", "out", &["--student", "missing.json"]);
    assert!(!home.path("out").exists(), "nothing is left of a run that was refused");
    assert!(home.run("student.json", "taken", 1).status.success());
    let mut arguments = home.arguments("student.json", "taken", 2);
    arguments.extend(["--seed".into(), "9".into()]);
    let output = Command::new(env!("CARGO_BIN_EXE_understudy")).args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("another run") && said.contains("`seed`"), "{said}");
    // A model that is not a run.
    refused("student.json", "teacher", &["out", "not of an unfinished run"]);
}

fn understudy(arguments: &[String]) -> (bool, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_understudy")).args(arguments).output().unwrap();
    (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn flags_that_would_do_nothing_are_refused() {
    let home = Home::new();
    assert!(home.run("student.json", "first", 1).status.success());
    let baseline = ["--method", "data-free-baseline"];
    for (student, more, said) in [
        ("student.json", &["--samples", "8"][..], "--samples 8: counts for --method data-free"),
        ("student.json", &["--schedule", "iterative", "--rho", "0.1"], "--rho 0.1: counts for a"),
        ("student.json", &["--schedule", "shuffled", "--pool-file", "x"], "--pool-file x: counts"),
        ("first", &["--init", "random"], "first: has weights, which --init random would leave"),
    ] {
        refuses(&home, student, more, said);
    }
    for (more, said) in [
        (&["--rho", "0.1"][..], "--rho 0.1: counts for a pool"),
        (&["--schedule", "dynamic"], "--schedule dynamic: counts for --method dkdm"),
        (&["--keep-samples", "kept"], "--keep-samples kept: counts for walks"),
        (&["--samples", "3"], "a batch has 4; draw more"),
        (&["--samples", "0"], "1..=10000000"),
        (&["--seed", "2097152"], "--seed 2097152: with --method data-free-baseline"),
    ] {
        refuses(&home, "student.json", &[&baseline[..], more].concat(), said);
    }
}

/// A run of which nothing is left.
fn refuses(home: &Home, student: &str, more: &[&str], words: &str) {
    let mut arguments = home.arguments(student, "refused", 1);
    arguments.extend(more.iter().map(|word| (*word).to_owned()));
    let (done, said) = understudy(&arguments);
    assert!(!done && said.contains(words), "{more:?}: {said}");
    assert!(!home.path("refused").exists(), "{more:?}");
}

/// A walk must divide the teacher's timesteps.
#[test]
fn a_walk_that_cannot_be_leaves_no_folder() {
    let home = Home::new();
    let arguments = home.arguments("student.json", "out", 1);
    let arguments: Vec<String> =
        arguments.into_iter().map(|word| if word == "10" { "7".into() } else { word }).collect();
    let (well, said) = understudy(&arguments);
    assert!(!well && said.contains('7') && said.contains("20"), "{said}");
    assert!(!home.path("out").exists());
}

/// From a DKDM student to 2 steps and from these to 1, and what each folder says.
#[test]
fn students_of_few_steps_go_on_from_one_another() {
    let home = Home::new();
    let first = home.run("student.json", "first", 20);
    assert!(first.status.success(), "{}", String::from_utf8_lossy(&first.stderr));
    for (student, out, evaluations, listed) in
        [("first", "two", 2, vec![2, 1]), ("two", "one", 1, vec![1])]
    {
        let (done, said) = understudy(&home.few(student, out, evaluations, 20));
        assert!(done, "{said}");
        let folder = ModelFolder::open(&home.path(out)).unwrap();
        assert_eq!(folder.card.evaluations, listed);
        assert_eq!(folder.card.defaults.num_inference_steps, Some(evaluations));
        assert_eq!(folder.card.defaults.scheduler.as_deref(), Some("ddim"));
        assert_eq!(folder.card.recipe["method"], "segment-regression");
        assert_eq!(folder.card.recipe["evaluations"], evaluations);
        assert_eq!(folder.card.recipe["initialisation"], format!("weights of {student}"));
        assert_eq!(folder.schedule.to_json()["timestep_spacing"], "trailing");
        let readme = fs::read_to_string(home.path(out).join("README.md")).unwrap();
        assert!(readme.contains(&format!("set_timesteps({evaluations})")), "{readme}");
    }
    // Without --student it is the teacher's student among the models.
    let mut arguments = home.few("first", "usual", 2, 5);
    let at = arguments.iter().position(|argument| argument == "--student").unwrap();
    arguments.drain(at..at + 2);
    arguments.extend(["--models".into(), home.0.path().display().to_string()]);
    let (done, said) = understudy(&arguments);
    assert!(done, "{said}");
    let folder = ModelFolder::open(&home.path("usual")).unwrap();
    assert_eq!(folder.card.recipe["initialisation"], "weights of first");
}

/// After regression, from the student among the models that needs so few steps; killed between two checkpoints.
#[test]
fn distribution_matching_goes_on_from_a_student_of_as_many_steps() {
    let home = Home::new();
    assert!(home.run("student.json", "first", 1).status.success());
    let (done, said) = understudy(&home.few("first", "two", 2, 5));
    assert!(done, "{said}");
    let arguments = |out: &str, steps: usize| {
        let mut arguments = home.few("two", out, 2, steps);
        let at = arguments.iter().position(|argument| argument == "--student").unwrap();
        arguments.drain(at..at + 2);
        let models = home.0.path().display().to_string();
        arguments.extend(["--models".into(), models, "--method".into()]);
        arguments.push("distribution-matching".into());
        arguments
    };
    let (done, said) = understudy(&arguments("whole", 12));
    assert!(done, "{said}");
    for steps in [7, 12] {
        let (done, said) = understudy(&arguments("parts", steps));
        assert!(done, "{said}");
    }
    assert_eq!(curve(&home.path("whole")), curve(&home.path("parts")));
    assert_eq!(weights(&home.path("whole")), weights(&home.path("parts")));
    let folder = ModelFolder::open(&home.path("whole")).unwrap();
    assert_eq!(folder.card.recipe["method"], "distribution-matching");
    assert_eq!(folder.card.recipe["initialisation"], "weights of two");
    assert_eq!(folder.card.evaluations, [2, 1]);
    assert_eq!(folder.schedule.to_json()["_class_name"], "DDIMScheduler");
    // Where none needs so few, one is to be made first.
    let mut nobody = arguments("out", 1);
    let at = nobody.iter().position(|argument| argument == "--evaluations").unwrap();
    nobody[at + 1] = "5".into();
    let (done, said) = understudy(&nobody);
    assert!(!done && said.contains("of 5 evaluations is among the models"), "{said}");
    assert!(!home.path("out").exists());
}

#[test]
fn few_steps_that_cannot_work_are_refused_at_the_start() {
    let home = Home::new();
    assert!(home.run("student.json", "first", 1).status.success());
    assert!(understudy(&home.few("first", "two", 2, 1)).0);
    let mut eps = home.arguments("student.json", "eps", 1);
    eps.extend(["--prediction".into(), "epsilon".into()]);
    assert!(understudy(&eps).0);
    let refused = |arguments: Vec<String>, more: &[&str], words: &[&str]| {
        let arguments: Vec<_> =
            arguments.into_iter().chain(more.iter().map(|more| (*more).to_owned())).collect();
        let (done, said) = understudy(&arguments);
        assert!(!done, "{arguments:?}");
        assert!(words.iter().all(|word| said.contains(word)), "{said}");
    };
    let few = |evaluations| home.few("first", "out", evaluations, 1);
    refused(few(3), &[], &["`--evaluations` is 3", "divide the teacher's 20"]);
    refused(few(4), &[], &["`--walk-steps` is 10", "multiple of --evaluations 4"]);
    refused(few(10), &[], &["`--walk-steps` is 10", "larger"]);
    refused(home.few("eps", "out", 2, 1), &[], &["epsilon", "--prediction v_prediction"]);
    refused(few(2), &["--prediction", "epsilon"], &["--prediction epsilon", "leave the flag out"]);
    refused(few(2), &["--walk-sampler", "ddpm"], &["--walk-sampler ddpm", "ddim"]);
    refused(few(2), &["--schedule", "iterative"], &["--schedule iterative", "pool"]);
    refused(few(2), &["--pool-file", "pool"], &["--pool-file pool", "another walk"]);
    refused(few(2), &["--keep-samples", "kept"], &["--keep-samples kept", "leave the flag out"]);
    refused(few(2), &["--weighting", "velocity"], &["--weighting", "in v already"]);
    refused(few(2), &["--method", "dkdm"], &["--method dkdm", "segment-regression"]);
    let mut nothing = few(2);
    let rho = nothing.iter().position(|argument| argument == "--rho").unwrap();
    nothing[rho + 1] = "0".into();
    refused(nothing, &[], &["--rho 0", "above 0"]);
    let method = ["--method", "segment-regression"];
    refused(home.arguments("first", "out", 1), &method, &["--evaluations 4"]);
    // A teacher of few steps itself.
    let mut teacher = few(2);
    teacher[2] = home.path("two").display().to_string();
    refused(teacher, &[], &["made for 2 evaluations", "distilled from, teacher"]);
    // Distribution matching alone says nothing of how many steps, and is another run than regression.
    let matching = ["--method", "distribution-matching"];
    refused(home.arguments("first", "out", 1), &matching, &["--evaluations 4"]);
    refused(home.few("first", "two", 2, 2), &matching, &["another run"]);
    refused(home.few("eps", "out", 2, 1), &matching, &["epsilon", "--prediction v_prediction"]);
    // Nobody to go on from.
    let empty = tempfile::tempdir().unwrap();
    let mut nobody = few(2);
    nobody.drain(3..5);
    let models = empty.path().display().to_string();
    refused(nobody, &["--models", &models], &["--student", "distil one first", "--student 0.5x"]);
    assert!(!home.path("out").exists(), "nothing is left of a run that was refused");
    // Another number of steps in the same folder.
    refused(
        home.few("first", "two", 1, 2),
        &[],
        &["another run", "`evaluations` is 2 there and 1 here"],
    );
}
