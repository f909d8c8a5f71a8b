//! The guides' commands work as they stand: every block of shell in README.md and docs/ says what runs it, and those that
//! name this file are run here, on the small budgets of `tests/guides/understudy`. They need bash and curl.
#![allow(clippy::unwrap_used)]

use std::{
    env, fs,
    io::{BufRead, BufReader, Lines},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
};

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

/// Runs a guide's blocks, one after another, in a folder of their own. Every command must succeed, and every answer of a
/// server be one of 2xx.
fn run(guide: &str) {
    let home = tempfile::tempdir().unwrap();
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
        .output()
        .expect("bash");
    let end = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes);
        text.chars().skip(text.chars().count().saturating_sub(3000)).collect::<String>()
    };
    assert!(output.status.success(), "{guide}: {}\n{}", end(&output.stdout), end(&output.stderr));
}

#[test]
fn the_api_guide() {
    run("docs/api.md");
}
