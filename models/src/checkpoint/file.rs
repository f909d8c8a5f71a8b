//! Files that are there whole or not at all.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::{
    partial::{self, Partial},
    read,
};
use crate::{Error, Result};

/// Writes `bytes` to `path`: [`write_with`], for what is in memory as a whole.
///
/// # Errors
/// As [`write_with`].
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    write_with(path, |file| file.write_all(bytes))
}

/// Has `write` write a file under a temporary name beside `path`, syncs, and renames: whoever looks sees the
/// old file or the new one. A symbolic link stays one; the file that it names is replaced.
///
/// # Errors
/// [`Error::Value`] where something else than a file is at `path`; [`Error::Io`] naming the file (disk full,
/// no permission). Nothing is left behind then.
pub fn write_with(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<&mut File>) -> io::Result<()>,
) -> Result<()> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let target = check_target(path)?;
    let mut partial = Partial::file(&target).map_err(io)?;
    let mut file = BufWriter::new(partial.as_file());
    write(&mut file).and_then(|()| file.flush()).map_err(io)?;
    drop(file);
    partial.finish(&target).map_err(io)
}

/// Refuses a place that no file can be written to, and gives the one that a symbolic link there names.
///
/// # Errors
/// [`Error::Value`] for a folder, a device, a pipe or a socket; [`Error::Io`] for a link that leads nowhere.
pub fn check_target(path: &Path) -> Result<PathBuf> {
    let Ok(there) = fs::symlink_metadata(path) else { return Ok(path.to_owned()) };
    let target = match there.is_symlink() {
        true => {
            fs::canonicalize(path).map_err(|source| Error::Io { path: path.to_owned(), source })?
        }
        false => path.to_owned(),
    };
    if fs::metadata(&target).is_ok_and(|there| !there.is_file()) {
        let remedy = "only a regular file can be written; name another path";
        return Err(Error::value(path.display().to_string(), "not a regular file", remedy));
    }
    Ok(target)
}

/// Removes what processes that were killed while they wrote left in `folder`; others are left alone.
///
/// # Errors
/// [`Error::Io`] naming the folder, where it cannot be read.
pub fn reclaim(folder: &Path) -> Result<()> {
    partial::reclaim(folder).map_err(|source| Error::Io { path: folder.to_owned(), source })
}

/// Makes the names in `folder` durable, where the system can.
///
/// # Errors
/// [`Error::Io`] naming the folder.
pub fn sync_folder(folder: &Path) -> Result<()> {
    partial::sync(folder).map_err(|source| Error::Io { path: folder.to_owned(), source })
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
