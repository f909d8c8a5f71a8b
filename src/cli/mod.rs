//! The command line: one file per command.

mod bench;
mod compute;
mod distill;
mod evaluate;
mod faults;
mod health;
mod import;
mod load;
mod log;
mod openapi;
mod profile;
mod progress;
mod sample;
mod serve;
mod train;
mod train_judge;
mod training;

use std::{
    io::{self, Write},
    num::NonZeroUsize,
    path::Path,
    process::ExitCode,
    sync::mpsc::channel,
    thread,
    time::Duration,
};

use clap::{Parser, Subcommand};
use understudy_distill::data::Images;

use crate::{models_folder::models_folder, names::is_id};
pub use serve::{LogFormat, ServeArgs};

/// Serves a diffusion model, and the faster student distilled from it, over HTTP.
///
/// Without a command it serves the bundled models on http://127.0.0.1:8080.
#[derive(Debug, Parser)]
#[command(version, about)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve models over HTTP.
    Serve(Box<ServeArgs>),
    Sample(Box<sample::SampleArgs>),
    Bench(Box<bench::BenchArgs>),
    Load(Box<load::LoadArgs>),
    Import(import::ImportArgs),
    Distill(Box<distill::DistillArgs>),
    Train(Box<train::TrainArgs>),
    Evaluate(Box<evaluate::EvaluateArgs>),
    TrainJudge(train_judge::TrainJudgeArgs),
    /// Ask a running server whether it is ready; for container health checks.
    #[command(hide = true)]
    Health(health::HealthArgs),
    /// Print the OpenAPI document; `openapi/openapi.json` is made with it.
    #[command(hide = true)]
    Openapi,
}

impl Cli {
    /// Reads the command line and the environment; ends the process on a mistake, or for `--help`.
    pub fn read() -> Self {
        let cli = Self::parse();
        match cli.command {
            Some(_) => cli,
            // Parsed again, so that the environment has its say.
            None => Self::parse_from(["understudy", "serve"]),
        }
    }

    /// What networks run on, where the command runs any.
    fn compute(&self) -> Option<&compute::Compute> {
        match &self.command {
            Some(Command::Serve(arguments)) => Some(&arguments.compute),
            Some(Command::Sample(arguments)) => Some(&arguments.compute),
            Some(Command::Bench(arguments)) => Some(&arguments.compute),
            Some(Command::Distill(arguments)) => Some(&arguments.compute),
            Some(Command::Train(arguments)) => Some(&arguments.compute),
            Some(Command::Evaluate(arguments)) => Some(&arguments.compute),
            Some(
                Command::Load(_)
                | Command::Import(_)
                | Command::TrainJudge(_)
                | Command::Health(_)
                | Command::Openapi,
            )
            | None => None,
        }
    }

    /// Threads that the numerics may use.
    pub fn threads(&self) -> NonZeroUsize {
        // Knows of affinity and of cgroup quotas.
        let there = || std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        let asked = self.compute().and_then(|compute| compute.threads);
        asked.map_or_else(there, NonZeroUsize::from)
    }

    /// Does what was asked; a failure is one screen of text on stderr.
    pub fn run(self) -> ExitCode {
        let threads = self.threads();
        faults::report();
        if !matches!(self.command, Some(Command::Serve(_))) {
            log();
        }
        if let Some(bytes) = self.compute().and_then(|compute| compute.max_model_bytes) {
            understudy_models::memory::limit(bytes.get());
        }
        let command = self.command;
        let result = faults::caught(|| match command {
            Some(Command::Serve(arguments)) => serve::run(*arguments, threads),
            Some(Command::Sample(arguments)) => sample::run(&arguments),
            Some(Command::Bench(arguments)) => bench::run(&arguments),
            Some(Command::Load(arguments)) => load::run(&arguments),
            Some(Command::Import(arguments)) => import::run(&arguments),
            Some(Command::Distill(arguments)) => distill::run(&arguments, threads),
            Some(Command::Train(arguments)) => train::run(&arguments, threads),
            Some(Command::Evaluate(arguments)) => evaluate::run(&arguments),
            Some(Command::TrainJudge(arguments)) => train_judge::run(&arguments),
            Some(Command::Health(arguments)) => health::run(&arguments),
            Some(Command::Openapi) => openapi::run(),
            None => Ok(()),
        });
        match result {
            Some(Ok(())) => ExitCode::SUCCESS,
            // It has been told where it happened.
            None => ExitCode::FAILURE,
            Some(Err(problem)) => {
                tell(problem);
                ExitCode::FAILURE
            }
        }
    }
}

/// Says it when `serve` would pass over the model folder that is to be made.
fn note_name(out: &Path) {
    let path = std::path::absolute(out).unwrap_or_else(|_| out.to_owned());
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    if !is_id(&name) {
        let _ = writeln!(
            io::stderr(),
            "--out {}: `serve` takes folders whose names have letters, digits, '.', '_' and '-' alone, and are not \
             auto or draft; rename it to serve it",
            out.display()
        );
    }
}

/// Reads a set of images, and says what in it was passed over; `flag` names it in errors.
///
/// # Errors
/// A sentence naming the flag and the file.
fn open_images(flag: &str, path: &Path) -> Result<Images, String> {
    let images =
        Images::open(path).map_err(|error| format!("{flag} {}: {error}", path.display()))?;
    if images.skipped > 0 {
        let skipped = images.skipped;
        let _ = writeln!(
            io::stderr(),
            "{flag} {}: skipped {skipped} hidden or system {} (.DS_Store, Thumbs.db and the like)",
            path.display(),
            if skipped == 1 { "file" } else { "files" }
        );
    }
    Ok(images)
}

/// What libraries have to say while a command runs, as plain lines on standard error; `RUST_LOG` chooses.
fn log() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| {
        tracing_subscriber::EnvFilter::new(
            "warn,understudy=info,understudy_models=info,understudy_distill=info",
        )
    });
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .without_time()
        .with_target(false)
        .with_writer(io::stderr)
        // It would tell of a line that standard error does not take on standard error, and panic.
        .log_internal_errors(false)
        .init();
}

/// Writes a line about what went wrong to standard error. Where that takes nothing, the exit code still tells, and does
/// not wait.
fn tell(problem: String) {
    let (done, told) = channel();
    thread::spawn(move || {
        let _ = writeln!(io::stderr(), "error: {problem}");
        let _ = done.send(());
    });
    let _ = told.recv_timeout(Duration::from_secs(2));
}

/// Writes a line to standard output.
///
/// # Errors
/// A sentence when nobody takes it: a full disk, a closed pipe.
fn print(line: impl std::fmt::Display) -> Result<(), String> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")
        .and_then(|()| out.flush())
        .map_err(|error| format!("standard output: {error}"))
}
