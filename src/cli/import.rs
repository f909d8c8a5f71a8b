//! `understudy import`: other checkpoint formats to a model folder.

use std::path::PathBuf;

use understudy_models::{
    checkpoint::{adm, single_file},
    schedule::PredictionType,
};

/// Convert a checkpoint of another format to a model folder: Stable Diffusion in one file, or OpenAI's guided-diffusion
/// and improved-diffusion.
#[derive(Debug, clap::Args)]
pub(super) struct ImportArgs {
    /// The checkpoint: Stable Diffusion 1, 2 or XL (.safetensors, .ckpt), or with --arch a state dict of guided-diffusion (.pt).
    from: PathBuf,
    /// JSON with the flags that trained a guided-diffusion checkpoint, under its own names, such as
    /// {"image_size": 64, "num_channels": 192, "learn_sigma": true}.
    #[arg(long, value_name = "FILE")]
    arch: Option<PathBuf>,
    /// What Stable Diffusion predicts, which its file does not tell: 2-base predicts epsilon, 2 predicts v_prediction
    /// [default: epsilon for 1].
    #[arg(long, conflicts_with = "arch", value_parser = super::one_of(PredictionType::ALL.iter().copied(), PredictionType::name))]
    prediction: Option<PredictionType>,
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
    match &args.arch {
        Some(arch) => adm::import(&args.from, arch, &args.out).map(drop),
        None => single_file::import(&args.from, &args.out, args.prediction).map(drop),
    }
    .map_err(|error| error.to_string())?;
    super::print(format!(
        "Model saved to {}. Serve it:\n  {}",
        args.out.display(),
        super::serve_command(&args.out, None)
    ))
}
