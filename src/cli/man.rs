//! `understudy man`: the help as manual pages.

use std::{fs, path::PathBuf};

use clap::CommandFactory;

use super::Cli;

/// Write manual pages, such as `understudy man ~/.local/share/man/man1`.
#[derive(Debug, clap::Args)]
pub(super) struct ManArgs {
    /// The folder for them, made when it is not there.
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

/// Runs the command.
///
/// # Errors
/// A sentence naming the folder.
pub(super) fn run(args: &ManArgs) -> Result<(), String> {
    let folder = &args.folder;
    let shown =
        |error: std::io::Error| format!("{}: {error}; name another folder", folder.display());
    fs::create_dir_all(folder).map_err(shown)?;
    clap_mangen::generate_to(Cli::command(), folder).map_err(shown)
}
