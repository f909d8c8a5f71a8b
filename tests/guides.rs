//! The guides' commands work as they stand: every block of shell in README.md and docs/ says what runs it, and those that
//! name this file are run here, on the small budgets of `tests/guides/understudy`. They need bash and curl.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

use std::{
    env, fs,
    io::{BufRead, BufReader, Lines},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
};

use image::{GrayImage, Luma};

const PROGRAM: &str = env!("CARGO_BIN_EXE_understudy");
/// Where the guides' server is.
const SERVER: &str = "http://127.0.0.1:8080";
/// This file, as the guides name it.
const HERE: &str = "tests/guides.rs";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Commands of a guide, and the file that runs them.
struct Block {
    run_by: String,
    commands: String,
}

/// A guide's blocks of shell. Each is run by what the last comment before it names.
fn blocks(guide: &Path) -> Vec<Block> {
    let text = fs::read_to_string(guide).unwrap();
    let (mut blocks, mut run_by, mut open) = (Vec::new(), String::new(), None);
    for line in text.lines() {
        if let Some(commands) = &mut open {
            if line != "```" {
                *commands += line;
                *commands += "\n";
                continue;
            }
            blocks.push(Block { run_by: run_by.clone(), commands: open.take().unwrap() });
        } else if line == "```sh" {
            assert!(!run_by.is_empty(), "{}: nothing runs what follows", guide.display());
            open = Some(String::new());
        } else if let Some(named) = line.strip_prefix("<!-- run by ") {
            run_by = named.split([' ', ',', ':']).next().unwrap().to_owned();
        }
    }
    blocks
}

fn guides() -> Vec<PathBuf> {
    let docs = fs::read_dir(root().join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let is_guide = |path: &PathBuf| path.extension().is_some_and(|it| it == "md");
    docs.filter(is_guide).chain([root().join("README.md")]).collect()
}

#[test]
fn what_runs_a_command_is_there_and_has_it() {
    for guide in guides() {
        for Block { run_by, commands } in blocks(&guide) {
            let script = fs::read_to_string(root().join(&run_by))
                .unwrap_or_else(|error| panic!("{}: {run_by}: {error}", guide.display()));
            if run_by != "tests/first_hour/run.sh" {
                continue;
            }
            for command in commands.lines().filter(|line| line.starts_with("understudy ")) {
                let command = command.split(" #").next().unwrap().trim();
                assert!(script.contains(command), "{}: {run_by} lacks {command}", guide.display());
            }
        }
    }
}

#[test]
fn what_a_guide_links_to_is_there() {
    for guide in guides() {
        let text = fs::read_to_string(&guide).unwrap();
        for link in text.split("](").skip(1) {
            let target = link.split([')', '#']).next().unwrap();
            let there = target.is_empty() || guide.parent().unwrap().join(target).exists();
            assert!(target.starts_with("http") || there, "{}: {target}", guide.display());
        }
    }
}

#[test]
fn the_first_page_is_short() {
    let words = fs::read_to_string(root().join("README.md")).unwrap().split_whitespace().count();
    assert!(words <= 1000, "README.md has {words} words");
}

/// A server of the bundled models, on a port of its own.
struct Server {
    child: Child,
    base: String,
    /// Kept, so that the server has somewhere to write to.
    _lines: Lines<BufReader<ChildStdout>>,
}

impl Server {
    fn start(home: &Path) -> Self {
        let mut command = Command::new(PROGRAM);
        command.args(["serve", "--port", "0", "--data-dir"]).arg(home.join("kept"));
        command.env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR"));
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let address = |line: String| {
            let at = line.find("http://")?;
            line[at..].split(' ').next().map(str::to_owned)
        };
        let base = lines.by_ref().map_while(Result::ok).find_map(address).unwrap();
        Self { child, base, _lines: lines }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Copies a bundled model.
fn copy(name: &str, to: &Path) {
    for part in ["", "unet", "scheduler"] {
        fs::create_dir_all(to.join(part)).unwrap();
        for entry in fs::read_dir(root().join("models/zoo").join(name).join(part)).unwrap() {
            let from = entry.unwrap().path();
            if from.is_file() {
                fs::copy(&from, to.join(part).join(from.file_name().unwrap())).unwrap();
            }
        }
    }
}

/// A gray patch of a size and brightness of its own.
fn patch(number: u32) -> GrayImage {
    let (reach, bright) = (4 + number % 23, (40 + number * 7 % 200) as u8);
    GrayImage::from_fn(28, 28, |x, y| Luma([if x < reach && y < 28 - reach { bright } else { 0 }]))
}

/// Pictures in a folder per class.
fn pictures(folder: &Path, count: u32) {
    for number in 0..count {
        let class = folder.join(format!("class-{}", number % 2));
        fs::create_dir_all(&class).unwrap();
        patch(number).save(class.join(format!("{number}.png"))).unwrap();
    }
}

/// As MNIST's files: images, and labels of ten classes.
fn idx(folder: &Path, count: u32) {
    let (mut images, mut labels) = (vec![0, 0, 8, 3], vec![0, 0, 8, 1]);
    for size in [count, 28, 28] {
        images.extend(size.to_be_bytes());
    }
    labels.extend(count.to_be_bytes());
    for number in 0..count {
        images.extend(patch(number).into_raw());
        labels.push((number % 10) as u8);
    }
    fs::write(folder.join("train-images-idx3-ubyte.gz"), images).unwrap();
    fs::write(folder.join("train-labels-idx1-ubyte.gz"), labels).unwrap();
}

/// Runs a guide's blocks, one after another, in a folder of their own, in which `prepare` puts what the guide takes to be
/// there. Every command must succeed, and every answer of a server be one of 2xx.
fn run(guide: &str, prepare: impl FnOnce(&Path)) {
    let home = tempfile::tempdir().unwrap();
    for part in ["configs", "distill"] {
        symlink(root().join(part), home.path().join(part)).unwrap();
    }
    prepare(home.path());
    let mut script = String::from(
        "set -euo pipefail\ncurl() { command curl --fail-with-body --show-error --max-time 120 \"$@\"; }\n",
    );
    let mut commands = String::new();
    for block in blocks(&root().join(guide)).iter().filter(|block| block.run_by == HERE) {
        commands += &block.commands;
    }
    assert!(!commands.is_empty(), "{guide} has no commands to run here");
    let server = commands.contains(SERVER).then(|| Server::start(home.path()));
    if let Some(Server { base, .. }) = &server {
        // Until its models are ready.
        script +=
            &format!("curl -s --retry 120 --retry-delay 1 --retry-all-errors {base}/health\n");
        commands = commands.replace(SERVER, base);
    }
    // Each is told as it runs, so that a failure shows where.
    script += "set -v\n";
    script += &commands;
    let path = env::var("PATH").unwrap_or_default();
    let output = Command::new("bash")
        .args(["-c", &script])
        .current_dir(home.path())
        .env("PATH", format!("{}:{path}", root().join("tests/guides").display()))
        .env("UNDERSTUDY_PROGRAM", PROGRAM)
        .env("XDG_STATE_HOME", home.path().join("state"))
        .env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR"))
        .output()
        .expect("bash");
    let end = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes);
        text.chars().skip(text.chars().count().saturating_sub(3000)).collect::<String>()
    };
    assert!(output.status.success(), "{guide}: {}\n{}", end(&output.stdout), end(&output.stderr));
}

#[test]
fn the_first_page() {
    run("README.md", |home| {
        copy("fashion-mnist-teacher", &home.join("my-models/teacher"));
        adm(home);
    });
}

#[test]
fn the_api_guide() {
    run("docs/api.md", |_| ());
}

#[test]
fn the_guide_to_serving() {
    run("docs/serving.md", |home| {
        copy("fashion-mnist-teacher", &home.join("my-models/teacher"));
        copy("fashion-mnist-student", &home.join("my-models/student"));
        adm(home);
    });
}

#[test]
fn the_guide_to_distillation() {
    run("docs/distillation.md", |home| {
        copy("fashion-mnist-teacher", &home.join("my-models/teacher"));
        idx(home, 40);
    });
}

#[test]
fn the_guide_to_distilling_text_to_image() {
    run("docs/distilling-text-to-image.md", |home| {
        let (folder, mut captions) = (home.join("pictures"), String::new());
        fs::create_dir(&folder).unwrap();
        for number in 0..4 {
            let picture = image::RgbImage::from_pixel(64, 64, [60 * number, 90, 20].into());
            picture.save(folder.join(format!("{number}.png"))).unwrap();
            captions +=
                &format!("{{\"file_name\": \"{number}.png\", \"text\": \"patch {number}\"}}\n");
        }
        fs::write(folder.join("metadata.jsonl"), captions).unwrap();
    });
}

#[test]
fn the_guide_to_evaluation() {
    run("docs/evaluation.md", |home| {
        copy("fashion-mnist-student", &home.join("my-models/student"));
        idx(home, 200);
        for folder in ["some/images", "more/images", "birds/train", "birds/test"] {
            pictures(&home.join(folder), 150);
        }
    });
}

#[test]
fn the_guide_to_deployment() {
    run("docs/deployment.md", |_| ());
}

#[test]
fn the_guide_to_trouble() {
    run("docs/troubleshooting.md", |_| ());
}

/// A checkpoint of guided-diffusion, and the flags that trained it.
fn adm(home: &Path) {
    let golden = root().join("models/tests/golden/adm");
    fs::copy(golden.join("one_level.pt"), home.join("64x64_diffusion.pt")).unwrap();
    fs::copy(golden.join("one_level.json"), home.join("flags.json")).unwrap();
}
