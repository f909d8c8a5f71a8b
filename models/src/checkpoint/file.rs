//! Files that are there whole or not at all.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::Path,
};

use serde_json::Value;

use super::read;
use crate::{Error, Result};

/// Writes `bytes` under a temporary name beside `path`, syncs, and renames: whoever looks sees the old
/// file or the new one.
///
/// # Errors
/// [`Error::Io`] naming the file (disk full, no permission); nothing is left behind then.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.partial", std::process::id()));
    let temporary = Path::new(&temporary);
    let written = File::create(temporary)
        .and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()
        })
        .and_then(|()| fs::rename(temporary, path));
    if written.is_err() {
        let _ = fs::remove_file(temporary);
    }
    written.map_err(io)
}

/// Reads a text file of a model folder.
///
/// # Errors
/// As [`unreadable`].
pub(super) fn read_text(path: &Path) -> Result<String> {
    read::text(path, read::DESCRIPTION_LIMIT).map_err(|error| match error {
        Error::Io { source, .. } => unreadable(path, source),
        error => error,
    })
}

/// Why a file of a model folder could not be read: [`Error::Io`], or [`Error::Format`] with the remedy
/// where it is not there.
pub(super) fn unreadable(path: &Path, source: io::Error) -> Error {
    let path = path.to_owned();
    if source.kind() != io::ErrorKind::NotFound {
        return Error::Io { path, source };
    }
    let problem = "not there; every model folder has one, and diffusers' save_pretrained(…, \
                   safe_serialization=True) writes it";
    Error::Format { path, problem: problem.into() }
}

/// Reads a JSON file of a model folder.
///
/// # Errors
/// As [`unreadable`]; [`Error::Format`] for what is not JSON.
pub(super) fn read_json(path: &Path) -> Result<Value> {
    serde_json::from_str(&read_text(path)?)
        .map_err(|error| Error::Format { path: path.to_owned(), problem: error.to_string() })
}
