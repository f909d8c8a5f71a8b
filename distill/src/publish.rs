//! A finished network becomes a model folder.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use candle_core::Tensor;
use understudy_models::checkpoint::card::Card;
use understudy_models::checkpoint::{Draft, ModelFolder, sync_folder};
use understudy_models::{Error, Result};

use crate::run_dir::RunDir;
use crate::student::Student;

/// By which a model folder is known.
const INDEX: &str = "model_index.json";

/// What there may be around a network.
const AROUND: [&str; 6] =
    ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae", "vqvae"];

/// Whether `out` holds the model of that many steps.
pub(crate) fn is_published(out: &Path, steps: u64) -> bool {
    let model = ModelFolder::open(out);
    model.is_ok_and(|model| model.card.recipe.get("student_steps") == Some(&steps.into()))
}

/// Puts a model folder's files beside the run's own folder. [`INDEX`] goes first and comes last, so that
/// whoever looks sees a whole model or none.
///
/// # Errors
/// [`Error::Io`] naming the file.
pub(crate) fn publish(
    run: &RunDir,
    student: &Student,
    weights: &HashMap<String, Tensor>,
    card: &Card,
) -> Result<()> {
    let (out, draft) = (run.out(), run.path().join("model"));
    remove(&draft)?;
    let around = student.around.as_deref().map(ModelFolder::open).transpose()?;
    let (config, schedule) = (&student.config, &student.schedule);
    let new = Draft::new(&draft)?;
    ModelFolder::write_around(new, config, weights, schedule, card, around.as_ref())?;
    remove(&out.join(INDEX))?;
    sync_folder(out)?;
    let own = [student.config.component(), "scheduler", "understudy.json", "README.md"];
    let around = AROUND.into_iter().filter(|name| draft.join(name).exists());
    for name in own.into_iter().chain(around) {
        replace(&draft.join(name), &out.join(name))?;
    }
    sync_folder(out)?;
    replace(&draft.join(INDEX), &out.join(INDEX))?;
    sync_folder(out)?;
    remove(&draft)
}

fn replace(from: &Path, to: &Path) -> Result<()> {
    remove(to)?;
    fs::rename(from, to).map_err(|source| Error::Io { path: to.to_owned(), source })
}

fn remove(path: &Path) -> Result<()> {
    let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::Io { path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}
