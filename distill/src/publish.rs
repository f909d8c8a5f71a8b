//! A finished network becomes a model folder.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use candle_core::Tensor;
use understudy_models::checkpoint::card::Card;
use understudy_models::checkpoint::{Draft, ModelFolder};
use understudy_models::{Error, Result};

use crate::guard::WORKSHOP;
use crate::student::Student;

/// Puts a model folder's files into `out`, which already holds the run's own folder.
/// `model_index.json`, by which a model folder is known, goes first and comes last, so that whoever
/// looks sees a whole model or none.
///
/// # Errors
/// [`Error::Io`] naming the file.
pub(crate) fn publish(
    out: &Path,
    student: &Student,
    weights: &HashMap<String, Tensor>,
    card: &Card,
) -> Result<()> {
    const INDEX: &str = "model_index.json";
    let draft = out.join(WORKSHOP).join("model");
    remove(&draft)?;
    ModelFolder::write(Draft::new(&draft)?, &student.config, weights, &student.schedule, card)?;
    remove(&out.join(INDEX))?;
    for name in [student.config.component(), "scheduler", "understudy.json", INDEX] {
        let (from, to) = (draft.join(name), out.join(name));
        remove(&to)?;
        fs::rename(&from, &to).map_err(|source| Error::Io { path: to, source })?;
    }
    remove(&draft)
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
