//! The folder of a run, `OUT/training`: one process at a time, and nothing left of those that were killed.

use std::collections::hash_map::RandomState;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::hash::{BuildHasher, Hasher};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

use understudy_models::checkpoint::{reclaim, write_atomically};
use understudy_models::{Error, Result};

/// The folder inside the model folder that belongs to the run.
pub const RUN_DIR: &str = "training";

/// The file in it that holds the run's state.
pub const CHECKPOINT: &str = "checkpoint.safetensors";

/// Holds the process's number, and is locked as long as that lives.
const LOCK: &str = "lock";

/// Holds the run's number.
const ID: &str = "id";

/// A run's folder, which no other process uses meanwhile.
#[derive(Debug)]
pub struct RunDir {
    out: PathBuf,
    path: PathBuf,
    id: String,
    /// Folders that were made for this run, innermost first.
    made: Vec<PathBuf>,
    /// Kept for its lock.
    _lock: File,
}

impl RunDir {
    /// Makes the folder where there is none, locks it, and removes unfinished files of processes that were
    /// killed in it. A folder without a checkpoint disappears again when it is dropped.
    ///
    /// # Errors
    /// [`Error::Value`] when `out` holds something else than a run, and when another process has the run's
    /// lock, with its number; [`Error::Io`] naming the file.
    pub fn open(out: &Path) -> Result<Self> {
        check_out(out)?;
        let path = out.join(RUN_DIR);
        let made = make(&path)?;
        let lock = lock(&path.join(LOCK), out)?;
        clean(&path)?;
        let id = match fs::read_to_string(path.join(ID)) {
            Ok(id) => id.trim().to_owned(),
            Err(_) => {
                let id = format!("{:016x}", RandomState::new().build_hasher().finish());
                write_atomically(&path.join(ID), format!("{id}\n").as_bytes())?;
                id
            }
        };
        Ok(Self { out: out.to_owned(), path, id, made, _lock: lock })
    }

    /// The model folder that the run makes.
    pub fn out(&self) -> &Path {
        &self.out
    }

    /// Where the run keeps its files.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file of its state.
    pub fn checkpoint(&self) -> PathBuf {
        self.path.join(CHECKPOINT)
    }

    /// A random number, the same for all sessions of the run: text without line breaks.
    pub fn id(&self) -> &str {
        &self.id
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        if self.made.is_empty() || self.checkpoint().exists() {
            return;
        }
        let others = fs::read_dir(&self.path).is_ok_and(|entries| {
            entries.flatten().any(|entry| entry.file_name() != LOCK && entry.file_name() != ID)
        });
        if others {
            return;
        }
        let _ = fs::remove_file(self.path.join(ID));
        let _ = fs::remove_file(self.path.join(LOCK));
        for folder in &self.made {
            // Only of an empty one.
            let _ = fs::remove_dir(folder);
        }
    }
}

/// Refuses a folder that holds something else than a run.
///
/// # Errors
/// [`Error::Value`] naming it.
pub fn check_out(out: &Path) -> Result<()> {
    if out.join(RUN_DIR).join(CHECKPOINT).exists() {
        return Ok(());
    }
    let foreign = match fs::read_dir(out) {
        Ok(entries) => {
            let mut names = entries.flatten().map(|entry| entry.file_name());
            names.find(|name| name != RUN_DIR)
        }
        // A file, or nothing yet.
        Err(_) => out.exists().then(|| out.as_os_str().to_owned()),
    };
    match foreign {
        None => Ok(()),
        Some(name) => Err(Error::value(
            "out",
            out.display(),
            format!(
                "holds {}, which is not of an unfinished run; name a new folder",
                name.to_string_lossy()
            ),
        )),
    }
}

/// Makes a folder and those above it; gives those that were not there, innermost first.
fn make(path: &Path) -> Result<Vec<PathBuf>> {
    let missing = |folder: &&Path| !folder.as_os_str().is_empty() && !folder.exists();
    let made = path.ancestors().take_while(missing).map(Path::to_owned).collect();
    fs::create_dir_all(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
    Ok(made)
}

fn lock(path: &Path, out: &Path) -> Result<File> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    loop {
        let mut open = OpenOptions::new();
        let mut file =
            open.read(true).write(true).create(true).truncate(false).open(path).map_err(io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut process = String::new();
                let _ = file.read_to_string(&mut process);
                return Err(Error::value(
                    "out",
                    out.display(),
                    format!(
                        "in use by process {}; wait until it ends, or name another folder",
                        process.trim()
                    ),
                ));
            }
            Err(TryLockError::Error(source)) => return Err(io(source)),
        }
        // A run that ended without a checkpoint took its lock with it.
        if !is_at(&file, path) {
            continue;
        }
        let number = format!("{}\n", std::process::id());
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| file.write_all(number.as_bytes()))
            .map_err(io)?;
        return Ok(file);
    }
}

/// Whether an open file is the one that has this name now.
#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let (Ok(open), Ok(there)) = (file.metadata(), fs::metadata(path)) else { return false };
    (open.dev(), open.ino()) == (there.dev(), there.ino())
}

#[cfg(not(unix))]
fn is_at(_: &File, path: &Path) -> bool {
    path.exists()
}

/// Removes what is unfinished. The lock is held, so that nobody is still writing it.
fn clean(path: &Path) -> Result<()> {
    reclaim(path)?;
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        // What earlier versions called their unfinished files and folders, and a model on its way out.
        if name.ends_with(".partial") || name.starts_with(".tmp") || name == "model" {
            let path = entry.path();
            let _ = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_run_has_one_process_and_a_number_that_stays() {
        let home = tempfile::tempdir().unwrap();
        let out = home.path().join("models/out");
        let run = RunDir::open(&out).unwrap();
        let problem = RunDir::open(&out).unwrap_err().to_string();
        assert!(
            problem.contains(&format!("in use by process {}", std::process::id())),
            "{problem}"
        );
        let id = run.id().to_owned();
        fs::write(run.checkpoint(), "").unwrap();
        drop(run);
        assert_eq!(RunDir::open(&out).unwrap().id(), id);
    }

    #[test]
    fn a_run_without_a_checkpoint_leaves_nothing() {
        let home = tempfile::tempdir().unwrap();
        drop(RunDir::open(&home.path().join("models/out")).unwrap());
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
        // What was there before stays.
        let out = home.path().join("out");
        fs::create_dir(&out).unwrap();
        drop(RunDir::open(&out).unwrap());
        assert_eq!(fs::read_dir(&out).unwrap().count(), 0);
    }

    #[test]
    fn unfinished_files_of_the_killed_are_removed() {
        let home = tempfile::tempdir().unwrap();
        let run = home.path().join(RUN_DIR);
        fs::create_dir_all(run.join(".model.0123456789abcdef.partial/weights")).unwrap();
        fs::create_dir_all(run.join(".model.1.partial")).unwrap();
        for name in ["checkpoint.partial", ".tmpAbCdEf", "log.jsonl", CHECKPOINT] {
            fs::write(run.join(name), "").unwrap();
        }
        drop(RunDir::open(home.path()).unwrap());
        let mut left: Vec<_> = fs::read_dir(&run)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(left, [CHECKPOINT, ID, LOCK, "log.jsonl"]);
    }
}
