//! The binary against files that ask for too much, or for something else: one sentence that names file and field.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::{Value, json};
use tempfile::TempDir;
use understudy_models::{
    NetworkConfig,
    checkpoint::{Draft, ModelFolder, card::Card},
    schedule::ScheduleConfig,
};

/// A small random model whose configuration is changed by `changes`.
fn model(changes: Value) -> (TempDir, PathBuf) {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("small");
    let mut config = json!({
        "_class_name": "UNet2DModel", "sample_size": 8, "in_channels": 1, "out_channels": 1,
        "block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"], "add_attention": false,
    });
    for (field, value) in changes.as_object().unwrap() {
        config[field] = value.clone();
    }
    let network = NetworkConfig::from_json(&config, "config.json").unwrap();
    let weights = network.initial_weights(1).unwrap().into_iter().collect();
    let schedule = json!({"_class_name": "DDPMScheduler", "num_train_timesteps": 10});
    let schedule = ScheduleConfig::from_json(&schedule, "scheduler_config.json").unwrap();
    let draft = Draft::new(&path).unwrap();
    ModelFolder::write(draft, &network, &weights, &schedule, &Card::default()).unwrap();
    (home, path)
}

/// Runs a command on the model, which must be refused in one sentence.
fn refusal(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(!said.contains("panicked") && !said.contains("backtrace"), "{said}");
    assert_eq!(said.lines().filter(|line| line.starts_with("error: ")).count(), 1, "{said}");
    said
}

fn understudy(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_understudy"));
    command.args(arguments).env("RUST_BACKTRACE", "1");
    command
}

/// The commands that draw images, on a model.
fn drawing(path: &Path, home: &Path) -> Vec<Vec<String>> {
    let path = path.to_str().unwrap().to_owned();
    let out = home.join("out").to_str().unwrap().to_owned();
    let words = |text: &str| {
        text.split(' ').map(|word| word.replace("MODEL", &path).replace("OUT", &out)).collect()
    };
    vec![
        words("sample --model MODEL --n 1 --steps 1 --out OUT"),
        words("bench --model MODEL --steps 1 --seconds 0"),
        words("evaluate --model MODEL --n 200 --steps 1 --write-stats OUT"),
        words("distill --teacher MODEL --student MODEL --out OUT"),
    ]
}

#[test]
fn what_makes_no_images_is_refused_by_every_command() {
    for (changes, field) in [
        (json!({"in_channels": 6, "out_channels": 3}), "in_channels"),
        (json!({"in_channels": 4, "out_channels": 4}), "in_channels"),
        (json!({"in_channels": 3, "out_channels": 4}), "out_channels"),
    ] {
        let (home, path) = model(changes);
        for command in drawing(&path, home.path()) {
            let arguments: Vec<&str> = command.iter().map(String::as_str).collect();
            let said = refusal(&understudy(&arguments).output().unwrap());
            assert!(
                said.contains(&format!("unet/config.json: {field}` is ")),
                "{command:?}: {said}"
            );
            assert!(!home.path().join("out").exists(), "{command:?}");
        }
    }
}

/// Under a limit on its address space, as `ulimit -v` sets it in KiB.
#[cfg(target_os = "linux")]
fn limited(kib: u64, arguments: &[&str]) -> Output {
    let script = format!("ulimit -v {kib} && exec \"$@\"");
    let binary = env!("CARGO_BIN_EXE_understudy");
    let mut command = Command::new("bash");
    command.args(["-c", &script, "limited", binary]).args(arguments);
    command.output().unwrap()
}

#[cfg(target_os = "linux")]
#[test]
fn images_that_no_memory_holds_are_refused_by_field() {
    let (home, path) = model(json!({"sample_size": 8192}));
    for command in drawing(&path, home.path()).into_iter().take(2) {
        let arguments: Vec<&str> = command.iter().map(String::as_str).collect();
        let said = refusal(&limited(3_000_000, &arguments));
        assert!(said.contains("unet/config.json: sample_size` is 8192"), "{said}");
        assert!(said.contains("memory are free"), "{said}");
    }
}

#[test]
fn the_operator_bounds_what_a_model_takes() {
    let (home, path) = model(json!({}));
    let out = home.path().join("out.png");
    let arguments = ["sample", "--model", path.to_str().unwrap(), "--n", "1", "--steps", "1"];
    let run = |bytes: &str| {
        let mut command = understudy(&arguments);
        command.args(["--max-model-bytes", bytes, "--out", out.to_str().unwrap()]).output().unwrap()
    };
    let said = refusal(&run("1000"));
    assert!(said.contains("block_out_channels") && said.contains("--max-model-bytes"), "{said}");
    let said = refusal(&run("20000"));
    assert!(said.contains("--max-model-bytes allows"), "{said}");
    let fine = run("100000000");
    assert!(fine.status.success() && out.is_file(), "{}", String::from_utf8_lossy(&fine.stderr));
}

#[test]
fn a_pool_that_no_memory_holds_is_refused_by_flag() {
    let (home, path) = model(json!({}));
    let model = path.to_str().unwrap();
    let out = home.path().join("out");
    let arguments = [
        "distill",
        "--teacher",
        model,
        "--student",
        model,
        "--walk-steps",
        "10",
        "--batch",
        "60000",
    ];
    for rho in ["4000", "7000"] {
        let output =
            understudy(&arguments).args(["--rho", rho, "--out", out.to_str().unwrap()]).output();
        let said = refusal(&output.unwrap());
        assert!(said.contains("rho"), "{said}");
    }
}

#[test]
fn a_judge_that_no_memory_holds_is_refused_by_field() {
    let (home, path) = model(json!({}));
    let judge = home.path().join("judge");
    fs::create_dir(&judge).unwrap();
    fs::write(judge.join("model.safetensors"), b"never read").unwrap();
    let model = path.to_str().unwrap();
    for (changes, field) in [
        (json!({"height": 1_000_000_000}), "height"),
        (json!({"width": 0}), "width"),
        (json!({"classes": 4_294_967_295u64}), "classes"),
        (json!({"channels": 2}), "channels"),
        (
            json!({"layers": [{"channels": 8, "kernel": 1_000_000_001, "stride": 1}]}),
            "layers[0].kernel",
        ),
        (json!({"layers": [{"channels": 8, "kernel": 2, "stride": 1}]}), "layers[0].kernel"),
        (json!({"layers": [{"channels": 8, "kernel": 3, "stride": 0}]}), "layers[0].stride"),
    ] {
        let mut config = json!({
            "name": "j", "channels": 1, "height": 8, "width": 8, "classes": 2, "test_accuracy": 1.0,
            "recipe": {}, "layers": [{"channels": 8, "kernel": 3, "stride": 1}],
        });
        for (name, value) in changes.as_object().unwrap() {
            config[name] = value.clone();
        }
        fs::write(judge.join("config.json"), config.to_string()).unwrap();
        let out = home.path().join("stats.npz");
        let command =
            ["evaluate", "--model", model, "--write-stats", out.to_str().unwrap(), "--features"];
        let said = refusal(&understudy(&command).arg(&judge).output().unwrap());
        assert!(said.contains(&format!("judge/config.json: {field}` is ")), "{said}");
    }
}
