//! `understudy distill` of a text-to-image teacher, as a process: what it makes, resumed, and what it refuses.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use candle_core::{Device, Tensor};
use serde_json::{Value, json};
use tempfile::TempDir;
use understudy_distill::evaluate::judge::{self, JudgeConfig};
use understudy_models::NetworkConfig;
use understudy_models::checkpoint::card::{Card, Defaults, Role};
use understudy_models::checkpoint::{Draft, ModelFolder};
use understudy_models::schedule::ScheduleConfig;

struct Home(TempDir);

/// A small network over the bundled autoencoder's latents, after the bundled text encoder's prompts.
fn network(channels: usize, more: &Value) -> Value {
    let mut config = json!({
        "_class_name": "UNet2DConditionModel", "sample_size": 16, "in_channels": 4, "out_channels": 4,
        "block_out_channels": [channels, channels], "norm_num_groups": 4, "layers_per_block": 1,
        "attention_head_dim": 2, "cross_attention_dim": 128,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    });
    for (name, value) in more.as_object().unwrap() {
        config[name] = value.clone();
    }
    config
}

impl Home {
    fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        let bundled = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/zoo/emoji-text-to-image");
        let bundled = ModelFolder::open(&bundled).unwrap();
        let schedule = json!({
            "_class_name": "DDIMScheduler", "num_train_timesteps": 20, "beta_start": 0.001,
            "beta_end": 0.2, "beta_schedule": "scaled_linear", "clip_sample": false,
        });
        let schedule = ScheduleConfig::from_json(&schedule, "scheduler_config.json").unwrap();
        let teacher = NetworkConfig::from_json(&network(16, &json!({})), "config.json").unwrap();
        let weights = teacher.initial_weights(1).unwrap().into_iter().collect();
        let card = Card {
            defaults: Defaults { guidance_scale: Some(3.0), ..Defaults::default() },
            ..Card::default()
        };
        let draft = Draft::new(&home.path().join("teacher")).unwrap();
        ModelFolder::write_around(draft, &teacher, &weights, &schedule, &card, Some(&bundled))
            .unwrap();
        for (name, more) in [
            ("student.json", json!({})),
            ("guided.json", json!({"time_cond_proj_dim": 16})),
            ("context.json", json!({"cross_attention_dim": 64})),
            ("latent.json", json!({"in_channels": 3, "out_channels": 3})),
        ] {
            fs::write(home.path().join(name), network(8, &more).to_string()).unwrap();
        }
        fs::write(home.path().join("prompts.txt"), "red apple\nhouse, flat style\ndog\n").unwrap();
        Self(home)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run(&self, student: &str, out: &str, steps: usize, more: &[&str]) -> Output {
        let batch: &[&str] = if more.contains(&"--batch") { &[] } else { &["--batch", "4"] };
        let pool: &[&str] =
            if more.contains(&"data-free-baseline") { &[] } else { &["--rho", "0.2"] };
        let usual = "--walk-steps 10 --checkpoint-every 3 --sample-every 4 --threads 1 \
                     --learning-rate-schedule constant --warmup-steps 1 --no-report";
        Command::new(env!("CARGO_BIN_EXE_understudy"))
            .current_dir(self.0.path())
            .args(["distill", "--teacher", "teacher", "--student", student, "--out", out])
            .args(["--steps", &steps.to_string()])
            .args(batch)
            .args(pool)
            .args(usual.split_whitespace())
            .args(more)
            .output()
            .unwrap()
    }
}

impl Home {
    /// Runs a line and more.
    fn call(&self, line: &str, more: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_understudy"))
            .current_dir(self.0.path())
            .args(line.split_whitespace())
            .args(more)
            .output()
            .unwrap()
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The losses.
fn curve(out: &Path) -> Vec<Value> {
    let log = fs::read_to_string(out.join("training/log.jsonl")).unwrap();
    let line = |line: &str| serde_json::from_str::<Value>(line).unwrap()["loss"].clone();
    log.lines().map(line).collect()
}

fn weights(out: &Path) -> Vec<u8> {
    fs::read(out.join("unet/diffusion_pytorch_model.safetensors")).unwrap()
}

/// Runs until `all` steps at once, and in two sessions, which must come to the same bits; gives the first's folder.
fn in_sessions(
    home: &Home,
    [some, all]: [usize; 2],
    run: impl Fn(&str, usize) -> Output,
) -> PathBuf {
    for (out, steps) in [("whole", all), ("parts", some), ("parts", all)] {
        let output = run(out, steps);
        assert!(output.status.success(), "{}", said(&output));
    }
    let [whole, parts] = ["whole", "parts"].map(|out| home.path(out));
    assert_eq!(curve(&whole), curve(&parts));
    assert_eq!(weights(&whole), weights(&parts));
    whole
}

/// A run in two sessions is one in one, to the bit, and what it makes is a whole pipeline.
#[test]
fn a_student_that_keeps_guidance_is_a_pipeline_of_its_own() {
    let home = Home::new();
    let prompts = ["--prompts", "prompts.txt", "--guidance", "keep"];
    let whole =
        in_sessions(&home, [4, 8], |out, steps| home.run("student.json", out, steps, &prompts));

    let model = ModelFolder::open_for_images(&whole).unwrap();
    assert!(model.autoencoder.is_some() && model.reads_text());
    assert_eq!(model.card.teacher.as_deref(), Some("teacher"));
    assert_eq!(model.card.defaults.guidance_scale, Some(3.0));
    assert_eq!(model.card.recipe["guidance"], "keep");
    assert_eq!(model.card.recipe["prompts"], 3);
    let index: Value =
        serde_json::from_slice(&fs::read(whole.join("model_index.json")).unwrap()).unwrap();
    assert_eq!(index["_class_name"], "StableDiffusionPipeline");
    assert_eq!(index["safety_checker"], json!([null, null]));
    for part in ["text_encoder/model.safetensors", "vae/config.json", "tokenizer/tokenizer.json"] {
        assert_eq!(
            fs::read(whole.join(part)).unwrap(),
            fs::read(home.path("teacher").join(part)).unwrap()
        );
    }
    assert!(fs::read_to_string(whole.join("README.md")).unwrap().contains("text-to-image"));
    // A grid of samples: three prompts, two seeds, 64 pixels each and the lines between them.
    let grid = image::open(whole.join("training/samples-0000004.png")).unwrap();
    assert!(grid.width() >= 3 * 64 && grid.height() >= 2 * 64, "{}", grid.width());

    let other = home.run("student.json", "whole", 9, &["--prompts", "{red|blue} apple"]);
    assert!(
        !other.status.success() && said(&other).contains("from other prompts"),
        "{}",
        said(&other)
    );
    let drawn = Command::new(env!("CARGO_BIN_EXE_understudy"))
        .current_dir(home.0.path())
        .args(["sample", "--model", "whole", "--prompt", "dog", "--n", "1", "--steps", "2"])
        .args(["--out", "dog.png", "--threads", "1"])
        .output()
        .unwrap();
    assert!(drawn.status.success(), "{}", said(&drawn));
}

/// The baseline of a latent teacher: a run in two sessions is one in one, and goes on from the samples it began with alone.
#[test]
fn a_baseline_learns_from_latents_that_the_teacher_draws() {
    let home = Home::new();
    let more = [
        "--prompts",
        "prompts.txt",
        "--guidance",
        "distil",
        "1..2",
        "--method",
        "data-free-baseline",
        "--samples",
        "6",
        "--walk-sampler",
        "ddim",
    ];
    let whole = in_sessions(&home, [3, 6], |out, steps| home.run("guided.json", out, steps, &more));
    let model = ModelFolder::open_for_images(&whole).unwrap();
    assert_eq!(model.card.role, Role::Baseline);
    assert_eq!(model.card.guidance_range, Some([1.0, 2.0]));
    // Six samples of ten steps, with the prompt and without.
    assert_eq!(model.card.recipe["teacher_evaluations"], 120);

    let samples = home.path("parts/training/teacher-samples/00000000.f32");
    let mut bytes = fs::read(&samples).unwrap();
    bytes[0] ^= 1;
    fs::write(&samples, bytes).unwrap();
    let output = home.run("guided.json", "parts", 9, &more);
    let said = said(&output);
    assert!(!output.status.success() && said.contains("others than the checkpoint's"), "{said}");
}

impl Home {
    /// Eight pictures, with these captions in turn.
    fn pictures(&self, captions: &[&str]) {
        let folder = self.path("pictures");
        fs::create_dir_all(&folder).unwrap();
        let mut lines = String::new();
        for (number, caption) in captions.iter().cycle().take(8).enumerate() {
            let picture = image::RgbImage::from_fn(64, 64, |x, y| {
                [(4 * x) as u8, (4 * y) as u8, 30 * number as u8].into()
            });
            picture.save(folder.join(format!("{number}.png"))).unwrap();
            let line = json!({"file_name": format!("{number}.png"), "text": caption});
            lines += &format!("{line}\n");
        }
        fs::write(folder.join("metadata.jsonl"), lines).unwrap();
    }

    fn train(&self, out: &str, steps: usize, more: &str) -> Output {
        let batch = if more.contains("--batch") { "" } else { "--batch 4" };
        let usual = "train --data pictures --sample-every 4 --checkpoint-every 3 --threads 1 \
                     --learning-rate-schedule constant --warmup-steps 1";
        self.call(&format!("{usual} {batch} --steps {steps} --out {out} {more}"), &[])
    }
}

/// What is trained on captioned pictures is a pipeline; a run in two sessions is one in one, and goes on from what it made.
#[test]
fn a_text_to_image_model_is_trained_on_captioned_pictures() {
    let home = Home::new();
    home.pictures(&["red apple", "house", ""]);
    let new = "--config student.json --components teacher --baseline-of teacher";
    let whole = in_sessions(&home, [3, 6], |out, steps| home.train(out, steps, new));
    let model = ModelFolder::open_for_images(&whole).unwrap();
    assert!(model.autoencoder.is_some() && model.reads_text());
    assert_eq!(model.card.role, Role::Baseline);
    assert_eq!(model.card.defaults.guidance_scale, Some(3.0));
    assert_eq!(model.card.recipe["images"], 8);
    assert_eq!(model.card.recipe["prompts"], 2);
    let grid = image::open(whole.join("training/samples-0000004.png")).unwrap();
    assert!(grid.width() >= 2 * 64 && grid.height() >= 2 * 64, "{}", grid.width());

    let output = home.train("more", 2, "--init whole");
    assert!(output.status.success(), "{}", said(&output));
    let model = ModelFolder::open_for_images(&home.path("more")).unwrap();
    assert_eq!(model.card.recipe["initialisation"], "weights of whole");
    let drawn =
        home.call("sample --model more --prompt house --n 1 --steps 2 --out house.png", &[]);
    assert!(drawn.status.success(), "{}", said(&drawn));

    for (more, words) in [
        ("--config guided.json --components teacher", &["time_cond_proj_dim", "distill"][..]),
        ("--config context.json --components teacher", &["cross_attention_dim", "64", "128"]),
        ("--config student.json", &["student.json", "draws after prompts", "--components"]),
        ("--config student.json --components nowhere", &["nowhere"]),
        ("--init whole --batch 9", &["8 images", "a batch has 9"]),
    ] {
        let output = home.train("refused", 2, more);
        let said = said(&output);
        assert!(!output.status.success(), "{more}");
        assert!(words.iter().all(|word| said.contains(word)), "{more}: {said}");
        assert!(!home.path("refused").exists(), "{more}");
    }
    home.pictures(&["red apple", &"apple house ".repeat(20)]);
    let output = home.train("refused", 2, new);
    assert!(said(&output).contains("caption of picture 2"), "{}", said(&output));
    // Other captions are other data.
    home.pictures(&["red apple", "", "house"]);
    let output = home.train("whole", 9, new);
    assert!(
        !output.status.success() && said(&output).contains("captions_sha256"),
        "{}",
        said(&output)
    );
    fs::remove_file(home.path("pictures/metadata.jsonl")).unwrap();
    let output = home.train("refused", 2, new);
    assert!(said(&output).contains("has no captions"), "{}", said(&output));
    assert!(!home.path("refused").exists());
}

/// A latent model that reads nothing learns from pictures alone, and its student from what it draws.
#[test]
fn latents_without_prompts_are_trained_and_drawn() {
    let home = Home::new();
    let golden = "models/tests/golden/pipeline/latent_diffusion";
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join(golden);
    let model = ModelFolder::open_for_images(&golden).unwrap();
    let [channels, height, width] = model.image_shape();
    assert_eq!(channels, 3);
    fs::create_dir(home.path("pictures")).unwrap();
    for number in 0..4 {
        let pixel = [60 * number, 90, 20].into();
        let picture = image::RgbImage::from_pixel(width as u32, height as u32, pixel);
        picture.save(home.path(&format!("pictures/{number}.png"))).unwrap();
    }
    let golden = golden.to_str().unwrap();
    let output = home.train("trained", 3, &format!("--init {golden}"));
    assert!(output.status.success(), "{}", said(&output));
    let trained = ModelFolder::open_for_images(&home.path("trained")).unwrap();
    assert!(trained.autoencoder.is_some());
    assert!(trained.card.recipe.get("captions_sha256").is_none());

    let line = format!(
        "distill --teacher {golden} --student {golden}/unet/config.json --out drawn --steps 3"
    );
    let more = "--batch 4 --method data-free-baseline --samples 4 --walk-steps 5 --walk-sampler ddim --threads 1 --no-report";
    let output = home.call(&format!("{line} {more}"), &[]);
    assert!(output.status.success(), "{}", said(&output));
    let drawn = ModelFolder::open_for_images(&home.path("drawn")).unwrap();
    assert_eq!(drawn.card.recipe["teacher_evaluations"], 20);
}

/// A student that takes the scale is found for a share of its teacher's time, and begins with its channels.
#[test]
fn a_student_of_distilled_guidance_takes_the_scale() {
    let home = Home::new();
    let more = ["--prompts", "{red|blue} {apple|house}", "--guidance", "distil", "1..2"];
    for steps in [2, 4] {
        let more = [&more[..], &["--init", "pruned"]].concat();
        let output = home.run("guided.json", "out", steps, &more);
        assert!(output.status.success(), "{}", said(&output));
    }
    let model = ModelFolder::open_for_images(&home.path("out")).unwrap();
    assert!(model.network.geometry().guidance);
    // Also where the run was resumed.
    assert_eq!(model.card.recipe["initialisation"], "the teacher's most important channels");
    assert_eq!(model.card.guidance_range, Some([1.0, 2.0]));
    // The teacher's 3 is not among what it has learned.
    assert_eq!(model.card.defaults.guidance_scale, Some(2.0));
    assert_eq!(model.card.recipe["guidance_scale"], json!([1.0, 2.0]));
    // A row of the student for two of its teacher.
    assert_eq!(model.card.recipe["teacher_evaluations"].as_u64().unwrap() % 2, 0);

    let output =
        home.call("evaluate --model out --against teacher --prompts prompts.txt --json", &SMALL);
    assert!(output.status.success(), "{}", said(&output));
    let compared = &serde_json::from_slice::<Value>(&output.stdout).unwrap()["comparison"];
    assert_eq!(compared["images"], 6);
    assert!(compared["psnr_db"][0].as_f64().unwrap() > 0.0, "{compared}");
    assert!(compared["speed"][0]["decode_ms"].as_f64().unwrap() > 0.0, "{compared}");
    let output = home.call("report out --prompts prompts.txt", &SMALL);
    assert!(output.status.success(), "{}", said(&output));
    let page = fs::read_to_string(home.path("out/report/index.html")).unwrap();
    assert!(page.contains("house, flat style"));
    for (more, words) in [
        ("", "--prompts: out draws after text; give a file"),
        ("--prompts prompts.txt --guidance-scale 3", "has learned scales from 1 to 2"),
    ] {
        let output = home.call(&format!("evaluate --model out --against teacher {more}"), &SMALL);
        assert!(!output.status.success() && said(&output).contains(words), "{}", said(&output));
    }
}

/// Few steps: a student that goes on from one of distilled guidance, in two sessions.
#[test]
fn a_student_of_few_steps_has_the_guidance_in_it() {
    let home = Home::new();
    let guided = ["--prompts", "prompts.txt", "--guidance", "distil", "1..2"];
    let few = [&guided[..], &["--evaluations", "2"]].concat();
    let run = |out: &str, steps: usize| {
        let output = home.run("guided.json", out, steps, &few);
        assert!(output.status.success(), "{}", said(&output));
    };
    run("whole", 8);
    run("parts", 4);
    run("parts", 8);
    let (whole, parts) = (home.path("whole"), home.path("parts"));
    assert_eq!(curve(&whole), curve(&parts));
    assert_eq!(weights(&whole), weights(&parts));
    let model = ModelFolder::open_for_images(&whole).unwrap();
    assert_eq!((model.card.evaluations, model.card.guidance_range), (vec![2, 1], Some([1.0, 2.0])));
    assert_eq!(model.card.defaults.num_inference_steps, Some(2));
    assert!(whole.join("training/samples-0000004.png").exists());
}

/// What is measured, and how little.
const SMALL: [&str; 8] = ["--n", "6", "--steps", "2", "--seeds", "1", "--threads", "1"];

/// Pictures of a folder, their captions, and a small judge for them.
fn pictures(home: &Home) {
    let folder = home.path("pictures");
    fs::create_dir(&folder).unwrap();
    let mut lines = String::new();
    for (number, text) in ["red apple", "house, flat style", "dog", "cat", "sun"].iter().enumerate()
    {
        let gray = image::Rgb([50 * number as u8; 3]);
        image::RgbImage::from_pixel(64, 64, gray)
            .save(folder.join(format!("{number}.png")))
            .unwrap();
        lines += &format!("{}\n", json!({"file_name": format!("{number}.png"), "text": text}));
    }
    fs::write(folder.join("metadata.jsonl"), lines).unwrap();
    let config: JudgeConfig = serde_json::from_value(json!({
        "name": "small", "channels": 3, "height": 64, "width": 64, "classes": 2, "test_accuracy": 1.0, "recipe": {},
        "layers": [{"channels": 3, "kernel": 3, "stride": 4}],
    }))
    .unwrap();
    let tensor = |len: usize, shape: &[usize]| {
        let values: Vec<f32> = (0..len).map(|i| (i as f32).sin()).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    };
    let tensors = [
        ("conv.0.weight", tensor(81, &[3, 3, 3, 3])),
        ("conv.0.bias", tensor(3, &[3])),
        ("head.weight", tensor(6, &[2, 3])),
        ("head.bias", tensor(2, &[2])),
    ];
    let tensors = tensors.map(|(name, tensor)| (name.to_owned(), tensor)).into_iter().collect();
    judge::write(Draft::new(&home.path("judge")).unwrap(), &config, &tensors).unwrap();
}

#[test]
fn a_text_to_image_model_is_scored_against_captioned_pictures() {
    let home = Home::new();
    pictures(&home);
    let command = "evaluate --model teacher --prompts prompts.txt --reference pictures --features judge --json";
    let output = home.call(command, &SMALL);
    assert!(output.status.success(), "{}", said(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["samples"], &report["guidance_scale"]), (&json!(6), &json!(3.0)));
    let adherence = report["scores"]["prompt_adherence"].as_f64().unwrap();
    // Two images of each of three prompts.
    assert!((adherence * 6.0).fract() == 0.0 && (0.0..=1.0).contains(&adherence), "{report}");
    let output = home.call(&command.replace("prompts.txt", "{fish|pizza}"), &SMALL);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["scores"]["prompt_adherence"], Value::Null, "no picture has these captions");
}

#[test]
fn what_cannot_work_is_refused_before_anything_is_made() {
    let home = Home::new();
    for (name, bytes) in [
        ("blank.txt", &b"apple\n\ndog\n"[..]),
        ("twice.txt", b"apple\ndog\napple\n"),
        ("bytes.txt", b"apple\nd\xffg\n"),
        ("long.txt", format!("apple\n{}\n", "apple house ".repeat(20)).as_bytes()),
    ] {
        fs::write(home.path(name), bytes).unwrap();
    }
    let usual = ["--prompts", "prompts.txt"];
    let with = |more: &[&'static str]| [&usual[..], more].concat();
    for (student, more, words) in [
        ("student.json", vec![], &["--prompts", "one prompt a line"][..]),
        ("student.json", vec!["--prompts", "blank.txt"], &["blank.txt, line 2", "blank"]),
        ("student.json", vec!["--prompts", "twice.txt"], &["twice.txt, line 3", "line 1"]),
        ("student.json", vec!["--prompts", "bytes.txt"], &["bytes.txt, line 2", "UTF-8"]),
        (
            "student.json",
            vec!["--prompts", "long.txt"],
            &["long.txt, line 2", "tokens", "at most 22"],
        ),
        ("student.json", vec!["--prompts", "nowhere.txt"], &["nowhere.txt"]),
        ("student.json", with(&["--guidance", "distil", "1..8"]), &["time_cond_proj_dim"]),
        ("guided.json", with(&["--guidance", "distil", "8..1"]), &["8..1"]),
        ("guided.json", with(&["--guidance", "distil", "0..4"]), &["0..4"]),
        ("guided.json", with(&["--guidance", "distil"]), &["1..8"]),
        ("guided.json", with(&["--guidance", "keep"]), &["time_cond_proj_dim"]),
        ("student.json", with(&["--guidance", "lose"]), &["lose", "keep"]),
        ("student.json", with(&["--guidance-scale", "0"]), &["--guidance-scale", "from 1"]),
        ("student.json", with(&["--batch", "5"]), &["--batch 5", "even"]),
        ("context.json", with(&[]), &["cross_attention_dim", "64", "128"]),
        ("latent.json", with(&[]), &["in_channels", "3", "4"]),
        (
            "student.json",
            with(&["--method", "data-free-baseline"]),
            &["data-free-baseline", "add --guidance distil"],
        ),
        (
            "guided.json",
            with(&[
                "--method",
                "data-free-baseline",
                "--guidance",
                "distil",
                "1..2",
                "--samples",
                "3",
            ]),
            &["--samples", "3", "a batch has 4"],
        ),
        (
            "student.json",
            with(&["--evaluations", "4"]),
            &["--evaluations 4", "add --guidance distil"],
        ),
    ] {
        let output = home.run(student, "refused", 4, &more);
        let said = said(&output);
        assert!(!output.status.success(), "{more:?}");
        assert!(words.iter().all(|word| said.contains(word)), "{more:?}: {said}");
        assert!(!home.path("refused").exists(), "{more:?}");
    }
}

/// States that another text encoder made are not taken for this one's.
#[test]
fn a_table_of_another_text_encoder_is_refused() {
    let home = Home::new();
    let prompts = ["--prompts", "prompts.txt"];
    assert!(home.run("student.json", "out", 3, &prompts).status.success());
    let config = home.path("teacher/text_encoder/config.json");
    let mut text: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    text["hidden_act"] = "gelu".into();
    // Not into the file, which others may share.
    fs::remove_file(&config).unwrap();
    fs::write(&config, text.to_string()).unwrap();
    let output = home.run("student.json", "out", 6, &prompts);
    let said = said(&output);
    assert!(!output.status.success() && said.contains("another text encoder"), "{said}");
}
