//! `understudy completions`: what shells need to complete commands and flags.

use std::io::Write;

use clap::CommandFactory;
use clap_complete::{Shell, generate};

use super::Cli;

/// Print a completion script, such as `understudy completions bash > /etc/bash_completion.d/understudy`.
#[derive(Debug, clap::Args)]
pub(super) struct CompletionsArgs {
    /// The shell.
    #[arg(value_enum)]
    shell: Shell,
}

/// Runs the command.
///
/// # Errors
/// A sentence when nobody takes it.
pub(super) fn run(args: &CompletionsArgs) -> Result<(), String> {
    let mut script = Vec::new();
    generate(args.shell, &mut Cli::command(), "understudy", &mut script);
    let mut out = std::io::stdout().lock();
    out.write_all(&script)
        .and_then(|()| out.flush())
        .map_err(|error| format!("standard output: {error}"))
}
