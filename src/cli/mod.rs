//! The command line: one file per command.

mod announcement;
mod bench;
mod beside;
mod completions;
mod compute;
mod distill;
mod distill_args;
mod distill_plan;
mod evaluate;
mod faults;
mod few_steps;
mod health;
mod import;
mod interrupt;
mod load;
mod log;
mod man;
mod measure;
mod models;
mod models_arg;
mod openapi;
mod port;
mod preset;
mod profile;
mod progress;
mod prompting;
mod prune;
mod quantize;
mod ranks;
mod recipe;
mod recipe_keys;
mod report;
mod sample;
mod sampled;
mod serve;
mod table;
mod throughput;
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

use clap::{
    Parser, Subcommand, ValueEnum,
    builder::{PossibleValuesParser, TypedValueParser},
};
use indicatif::HumanCount;
use serde::Serialize;
use serde_json::{Map, Value};
use understudy_distill::{
    data::Images,
    run_dir::{CHECKPOINT, RUN_DIR},
};
use understudy_models::checkpoint::write_atomically;

use crate::{model_folders::bundled, names::is_id, report::COMMAND};
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
    #[command(name = "load-test", alias = "load")]
    Load(Box<load::LoadArgs>),
    Import(import::ImportArgs),
    Models(models::ModelsArgs),
    /// Distil a model (the teacher) into a faster one (the student) without any training data.
    ///
    /// The teacher generates the noisy images itself (DKDM, CVPR 2025). The result is a model folder at --out, which
    /// `understudy serve` and diffusers read. An interrupted run goes on from its last checkpoint when the same command is
    /// given again, with the same result.
    ///
    /// On a CPU --dtype is what the teacher is evaluated in; the student learns in f32.
    Distill(recipe::Distillation),
    Prune(prune::PruneArgs),
    Quantize(quantize::QuantizeArgs),
    Train(Box<train::TrainArgs>),
    Evaluate(Box<evaluate::EvaluateArgs>),
    Report(Box<report::ReportArgs>),
    TrainJudge(train_judge::TrainJudgeArgs),
    Completions(completions::CompletionsArgs),
    Man(man::ManArgs),
    /// Ask a running server whether it is ready; for container health checks.
    #[command(hide = true)]
    Health(health::HealthArgs),
    /// Print the OpenAPI document; `openapi/openapi.json` is made with it.
    #[command(hide = true)]
    Openapi,
    #[command(hide = true)]
    RecipeSchema(recipe_keys::SchemaArgs),
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
            Some(Command::Distill(arguments)) => Some(&arguments.first().compute),
            Some(Command::Prune(arguments)) => Some(&arguments.compute),
            Some(Command::Train(arguments)) => Some(&arguments.compute),
            Some(Command::Evaluate(arguments)) => Some(&arguments.compute),
            Some(Command::Report(arguments)) => Some(&arguments.compute),
            Some(
                Command::Load(_)
                | Command::Import(_)
                | Command::Models(_)
                | Command::Quantize(_)
                | Command::TrainJudge(_)
                | Command::Completions(_)
                | Command::Man(_)
                | Command::Health(_)
                | Command::Openapi
                | Command::RecipeSchema(_),
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
            Some(Command::Models(arguments)) => models::run(&arguments),
            Some(Command::Distill(distillation)) => match distillation {
                recipe::Distillation::Run(arguments) => {
                    ranks::together(|world| distill::run(&arguments, threads, world))
                }
                recipe::Distillation::Recipe(recipe) => ranks::one_alone(
                    "a recipe is done by one process, and its stages one by one by several",
                )
                .and_then(|()| recipe.run(threads)),
            },
            Some(Command::Prune(arguments)) => prune::run(&arguments),
            Some(Command::Quantize(arguments)) => quantize::run(&arguments),
            Some(Command::Train(arguments)) => ranks::one_alone("`train` is one process")
                .and_then(|()| train::run(&arguments, threads)),
            Some(Command::Evaluate(arguments)) => evaluate::run(&arguments),
            Some(Command::Report(arguments)) => report::run(&arguments),
            Some(Command::TrainJudge(arguments)) => {
                ranks::one_alone("`train-judge` is one process")
                    .and_then(|()| train_judge::run(&arguments))
            }
            Some(Command::Health(arguments)) => health::run(&arguments),
            Some(Command::Completions(arguments)) => completions::run(&arguments),
            Some(Command::Man(arguments)) => man::run(&arguments),
            Some(Command::Openapi) => openapi::run(),
            Some(Command::RecipeSchema(arguments)) => recipe_keys::run(&arguments),
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

/// Warns of a flag that help shows no more.
fn note_retired(flag: &str, why: &str) {
    let _ = writeln!(io::stderr(), "{flag} is retired and will be removed: {why}");
}

/// Takes one of some values by its name; help lists the names, and a misspelt one is told the nearest.
fn one_of<T: Copy + Send + Sync + 'static>(
    values: impl IntoIterator<Item = T>,
    name: fn(T) -> &'static str,
) -> impl TypedValueParser<Value = T> {
    let values: Vec<T> = values.into_iter().collect();
    let names: Vec<&str> = values.iter().map(|&value| name(value)).collect();
    PossibleValuesParser::new(names).try_map(move |chosen| {
        values.iter().copied().find(|&value| name(value) == chosen).ok_or("not one of the names")
    })
}

/// The last part of a folder's path.
fn folder_name(folder: &Path) -> String {
    let path = std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned());
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The command line that serves the model in `folder`, beside its teacher where that is not one of the bundled ones, as
/// it is typed in a shell.
fn serve_command(folder: &Path, teacher: Option<&Path>) -> String {
    let parent = |folder: &Path| {
        let path = std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned());
        path.parent().map(Path::to_owned).unwrap_or(path)
    };
    let bundled = bundled().and_then(|it| std::path::absolute(it).map_err(|e| e.to_string())).ok();
    let mut folders = vec![parent(folder)];
    let teachers = teacher.map(parent).filter(|it| Some(it) != bundled.as_ref());
    folders.extend(teachers.filter(|it| *it != folders[0]));
    let mut words =
        vec![std::env::args().next().unwrap_or_else(|| "understudy".into()), "serve".into()];
    let here = std::env::current_dir().unwrap_or_default();
    for folder in folders {
        let short = folder.strip_prefix(&here).unwrap_or(&folder);
        let short = if short.as_os_str().is_empty() { Path::new(".") } else { short };
        words.extend(["--models".into(), short.display().to_string()]);
    }
    let words: Vec<_> = words.into_iter().map(|word| quoted(&word)).collect();
    words.join(" ")
}

/// Keeps the command line of a run in its folder, where that has begun, for its report.
fn write_command(out: &Path) -> Result<(), String> {
    let run = out.join(RUN_DIR);
    if !run.join(CHECKPOINT).exists() {
        return Ok(());
    }
    let words = std::env::args().enumerate().map(|(i, word)| match i {
        0 => "understudy".into(),
        _ => quoted(&word),
    });
    let line = words.collect::<Vec<_>>().join(" ");
    write_atomically(&run.join(COMMAND), format!("{line}\n").as_bytes())
        .map_err(|error| error.to_string())
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', "'\\''")),
    }
}

/// A count with its digits in groups of three.
fn grouped(count: usize) -> HumanCount {
    HumanCount(count as u64)
}

/// The fields of a value that is written as a JSON object.
fn object(value: &impl Serialize) -> Result<Map<String, Value>, String> {
    match serde_json::to_value(value) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(other) => Err(format!("not a JSON object: {other}")),
        Err(error) => Err(error.to_string()),
    }
}

/// The word for a value of a flag.
fn word(value: impl ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |word| word.get_name().to_owned())
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
