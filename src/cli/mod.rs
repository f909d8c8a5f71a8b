//! The command line: one file per command.

mod bench;
mod compute;
mod distill;
mod evaluate;
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
    process::ExitCode,
    sync::mpsc::channel,
    thread,
    time::Duration,
};

use clap::{Parser, Subcommand};

use crate::config::models_folder;
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

    /// Threads that the numerics may use.
    pub fn threads(&self) -> NonZeroUsize {
        let asked = match &self.command {
            Some(Command::Serve(arguments)) => arguments.compute.threads,
            Some(Command::Sample(arguments)) => arguments.compute.threads,
            Some(Command::Bench(arguments)) => arguments.compute.threads,
            Some(Command::Distill(arguments)) => arguments.compute.threads,
            Some(Command::Train(arguments)) => arguments.compute.threads,
            Some(Command::Evaluate(arguments)) => arguments.compute.threads,
            Some(
                Command::Load(_)
                | Command::Import(_)
                | Command::TrainJudge(_)
                | Command::Health(_)
                | Command::Openapi,
            )
            | None => None,
        };
        // Knows of affinity and of cgroup quotas.
        let there = || std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        asked.map_or_else(there, NonZeroUsize::from)
    }

    /// Does what was asked; a failure is one screen of text on stderr.
    pub fn run(self) -> ExitCode {
        let threads = self.threads();
        let result = match self.command {
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
        };
        match result {
            Ok(()) => ExitCode::SUCCESS,
            Err(problem) => {
                tell(problem);
                ExitCode::FAILURE
            }
        }
    }
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
