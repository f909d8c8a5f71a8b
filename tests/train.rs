//! `understudy train` as a process: what it goes on with, what it refuses, what it publishes.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use image::{GrayImage, ImageFormat};
use serde_json::json;
use tempfile::TempDir;
use understudy_models::checkpoint::ModelFolder;

struct Home(TempDir);

impl Home {
    /// A small network for `classes` classes, and eight pictures of each of `names`.
    fn new(classes: usize, names: &[&str]) -> Self {
        let home = Self(tempfile::tempdir().unwrap());
        let config = json!({
            "_class_name": "UNet2DModel", "sample_size": 8, "in_channels": 1, "out_channels": 1,
            "block_out_channels": [8, 8], "norm_num_groups": 4, "layers_per_block": 1,
            "num_class_embeds": classes, "attention_head_dim": 4,
            "down_block_types": ["DownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "UpBlock2D"],
        });
        fs::write(home.path("config.json"), config.to_string()).unwrap();
        for (class, name) in names.iter().enumerate() {
            home.pictures(&format!("data/{name}"), 40 * class as u8);
        }
        home
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn pictures(&self, folder: &str, gray: u8) {
        let folder = self.path(folder);
        fs::create_dir_all(&folder).unwrap();
        for i in 0..8 {
            let image = GrayImage::from_fn(8, 8, |x, y| [gray + i + (x + y) as u8].into());
            image.save_with_format(folder.join(format!("{i}.png")), ImageFormat::Png).unwrap();
        }
    }

    fn command(&self, out: &str, more: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_understudy"));
        command.arg("train").arg("--data").arg(self.path("data"));
        command.arg("--config").arg(self.path("config.json")).arg("--out").arg(self.path(out));
        let always = "--batch 4 --sample-every 0 --checkpoint-every 2 --threads 1 --learning-rate-schedule constant";
        command.args(always.split(' ')).args(more.split(' '));
        command
    }

    fn run(&self, out: &str, more: &str) -> Output {
        self.command(out, more).output().unwrap()
    }

    /// Runs, and must be refused in these words.
    fn refused(&self, out: &str, more: &str, words: &[&str]) {
        let output = self.run(out, more);
        let said = said(&output);
        assert!(!output.status.success(), "{said}");
        assert!(words.iter().all(|word| said.contains(word)), "{said}");
        assert!(!said.contains("panicked"), "{said}");
    }

    fn done(&self, out: &str, more: &str) -> String {
        let output = self.run(out, more);
        assert!(output.status.success(), "{}", said(&output));
        said(&output)
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Files of a run and its model with their bytes, but for logs and what names a process.
fn files(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            files.extend(self::files(&path));
        } else if name != "lock" {
            files.push((path.clone(), fs::read(&path).unwrap()));
        }
    }
    files.sort();
    files
}

#[test]
fn a_run_goes_on_with_the_same_data_and_settings_alone() {
    let home = Home::new(2, &["boot", "coat"]);
    home.done("out", "--steps 2");
    home.refused("out", "--steps 4 --learning-rate 1e-3", &["`learning_rate`", "another run"]);
    home.refused("out", "--steps 4 --baseline-of t", &["`role`", "another run"]);
    let schedule = home.path("schedule.json");
    fs::write(&schedule, r#"{"_class_name": "DDPMScheduler", "num_train_timesteps": 50}"#).unwrap();
    let other = format!("--steps 4 --noise-schedule {}", schedule.display());
    home.refused("out", &other, &["`noise_schedule.", "another run"]);

    // As many pictures, of the same names.
    fs::rename(home.path("data"), home.path("before")).unwrap();
    home.pictures("data/boot", 90);
    home.pictures("data/coat", 40);
    home.refused("out", "--steps 4", &["`data_sha256`", "another run"]);
    // The same pictures, but boots are called coats.
    fs::remove_dir_all(home.path("data")).unwrap();
    fs::create_dir(home.path("data")).unwrap();
    fs::rename(home.path("before/boot"), home.path("data/coat")).unwrap();
    fs::rename(home.path("before/coat"), home.path("data/boot")).unwrap();
    home.refused("out", "--steps 4", &["`data_sha256`", "another run"]);
    // Other names for the same classes.
    fs::rename(home.path("data/coat"), home.path("data/a")).unwrap();
    home.refused("out", "--steps 4", &["`class_names`", "another run"]);
    // What is no picture makes no difference.
    fs::rename(home.path("data/boot"), home.path("data/b")).unwrap();
    fs::rename(home.path("data/b"), home.path("data/coat")).unwrap();
    fs::rename(home.path("data/a"), home.path("data/boot")).unwrap();
    fs::write(home.path("data/boot/.DS_Store"), "x").unwrap();
    let said = home.done("out", "--steps 4");
    assert!(said.contains("skipped 1 hidden or system file"), "{said}");
    assert!(said.contains("Resuming from the checkpoint of step 2"), "{said}");
}

#[test]
fn a_folder_has_one_run_at_a_time() {
    let home = Home::new(2, &["boot", "coat"]);
    let mut first = home
        .command("out", "--steps 1000000")
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    while !home.path("out/training/checkpoint.safetensors").exists() {
        assert!(first.try_wait().unwrap().is_none(), "it ended early");
        std::thread::yield_now();
    }
    let process = format!("in use by process {}", first.id());
    home.refused("out", "--steps 4", &[&process, "name another folder"]);
    first.kill().unwrap();
    first.wait().unwrap();
    let mut said = String::new();
    first.stderr.unwrap().read_to_string(&mut said).unwrap();
    assert!(!said.contains("error"), "{said}");
    // The lock went with the process.
    home.done("out", "--steps 2");
}

#[test]
fn a_model_that_is_not_finite_is_not_published() {
    let home = Home::new(2, &["boot", "coat"]);
    home.done("out", "--steps 2 --warmup-steps 0 --ema 0");
    let before = files(&home.path("out"));
    // An infinite weight, one that is none, and weights whose answers are none.
    for rate in ["1e300", "3e38", "1e30"] {
        let out = format!("out-{rate}");
        let more = format!("--steps 1 --warmup-steps 0 --ema 0 --learning-rate {rate}");
        home.refused(&out, &more, &["not finite", "--learning-rate"]);
        assert!(!home.path(&out).join("model_index.json").exists());
    }
    assert_eq!(files(&home.path("out")), before);
}

#[test]
fn what_could_not_be_loaded_is_not_begun() {
    let home = Home::new(2, &["red-fox", "red_fox"]);
    home.refused("out", "--steps 1", &["read the same", "red-fox", "red_fox"]);
    let home = Home::new(2, &["a", "b"]);
    fs::create_dir(home.path("data/empty")).unwrap();
    home.refused("out", "--steps 1", &["empty", "class folder without images"]);
    assert!(!home.path("out").exists(), "nothing is left of a run that was refused");
}

#[test]
fn a_finished_run_is_left_as_it_is() {
    let home = Home::new(2, &["boot", "coat"]);
    home.done("out", "--steps 3");
    let before = files(&home.path("out"));
    let modified = |name: &str| home.path(name).metadata().unwrap().modified().unwrap();
    let written = modified("out/model_index.json");
    home.done("out", "--steps 3");
    assert_eq!(files(&home.path("out")), before);
    assert_eq!(modified("out/model_index.json"), written);
    // Its last checkpoint without the model: a kill before it was published.
    fs::remove_file(home.path("out/model_index.json")).unwrap();
    home.done("out", "--steps 3");
    assert_eq!(ModelFolder::open(&home.path("out")).unwrap().card.recipe["student_steps"], 3);
}
