//! `understudy import`: other checkpoint formats to a model folder.

use std::path::PathBuf;

use understudy_models::checkpoint::adm;

/// Convert an OpenAI guided-diffusion or improved-diffusion checkpoint to a model folder.
#[derive(Debug, clap::Args)]
pub(super) struct ImportArgs {
    /// The checkpoint: a state dict as torch.save writes it (.pt).
    from: PathBuf,
    /// JSON with the flags that trained it, under guided-diffusion's own names, such as
    /// {"image_size": 64, "num_channels": 192, "learn_sigma": true}.
    #[arg(long, value_name = "FILE")]
    arch: PathBuf,
    /// The model folder to make; must not exist yet.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// Runs the command.
///
/// # Errors
/// A sentence naming the file, flag or tensor to mend.
pub(super) fn run(args: &ImportArgs) -> Result<(), String> {
    super::note_name(&args.out);
    adm::import(&args.from, &args.arch, &args.out).map_err(|error| error.to_string())?;
    super::print(format!(
        "Model saved to {}. Serve it:\n  {}",
        args.out.display(),
        super::serve_command(&args.out, None)
    ))
}
