//! A folder that appears complete or not at all.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use serde_json::Value;

use super::partial::{self, Partial};
use crate::{Error, Result};

/// A folder in the making, beside the one it will be; removed again unless it is finished.
#[derive(Debug)]
pub struct Draft {
    draft: Partial,
    out: PathBuf,
}

impl Draft {
    /// Begins a folder that will be `out`, which must not exist, or be empty.
    ///
    /// # Errors
    /// [`Error::Value`] when `out` exists, or is being made by another process; [`Error::Io`] when nothing can be
    /// made there.
    pub fn new(out: &Path) -> Result<Self> {
        if out.file_name().is_none() {
            return Err(Error::value("out", out.display(), "must be the path of a new folder"));
        }
        let empty = fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_none());
        if !empty && fs::symlink_metadata(out).is_ok() {
            return Err(Error::value("out", out.display(), "exists; choose another or remove it"));
        }
        let parent = partial::folder_of(out);
        fs::create_dir_all(parent).map_err(at(parent))?;
        let draft = Partial::folder(out).map_err(|source| match source.kind() {
            ErrorKind::ResourceBusy => Error::value(
                "out",
                out.display(),
                format!("{source}; wait until it ends, or name another folder"),
            ),
            _ => at(out)(source),
        })?;
        Ok(Self { draft, out: out.to_path_buf() })
    }

    /// Writes `value` to `name` inside the folder.
    pub(super) fn write_json(&self, name: &str, value: &Value) -> Result<()> {
        self.write(name, format!("{value:#}\n").as_bytes())
    }

    /// Writes `tensors` to `name` inside the folder, marked as PyTorch's, as diffusers expects.
    pub(super) fn write_tensors(
        &self,
        name: &str,
        tensors: &HashMap<String, Tensor>,
    ) -> Result<()> {
        let path = self.draft.path.join(name);
        let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
        let bytes = safetensors::serialize(tensors, Some(metadata))
            .map_err(|error| Error::Format { path, problem: error.to_string() })?;
        self.write(name, &bytes)
    }

    /// Writes a file inside the folder.
    ///
    /// # Errors
    /// [`Error::Io`] naming the file.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.draft.path.join(name);
        let folder = partial::folder_of(&path);
        fs::create_dir_all(folder).map_err(at(folder))?;
        let write = || -> std::io::Result<()> {
            let mut file = File::create(&path)?;
            file.write_all(bytes)?;
            file.sync_all()
        };
        write().map_err(at(&path))?;
        partial::sync(folder).map_err(at(folder))
    }

    /// Puts a file that is there already at `name` inside the folder: as a link to the same bytes where the file system
    /// can, else as a copy.
    ///
    /// # Errors
    /// [`Error::Io`] naming the file.
    pub(super) fn link(&self, name: &str, file: &Path) -> Result<()> {
        // Of a symbolic link the file that it names: the link itself may lead nowhere from elsewhere.
        let file = fs::canonicalize(file).map_err(at(file))?;
        let path = self.draft.path.join(name);
        let folder = partial::folder_of(&path);
        fs::create_dir_all(folder).map_err(at(folder))?;
        if fs::hard_link(&file, &path).is_err() {
            fs::copy(&file, &path)
                .and_then(|_| File::open(&path)?.sync_all())
                .map_err(at(&path))?;
        }
        partial::sync(folder).map_err(at(folder))
    }

    /// Gives the folder its name.
    ///
    /// # Errors
    /// [`Error::Io`] naming it, when something has taken the name meanwhile.
    pub fn finish(self) -> Result<()> {
        self.draft.finish(&self.out).map_err(at(&self.out))
    }
}

fn at(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_path_buf();
    |source| Error::Io { path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_made_by_one_at_a_time() {
        let home = tempfile::tempdir().unwrap();
        let out = home.path().join("model");
        // What a process that was killed left; another's own files are none of it.
        let orphan = home.path().join(".model.0123456789abcdef.partial");
        fs::create_dir(&orphan).unwrap();
        fs::write(home.path().join("model.partial"), "mine").unwrap();
        let first = Draft::new(&out).unwrap();
        assert!(!orphan.exists());
        let problem = Draft::new(&out).unwrap_err().to_string();
        let process = format!("being made by process {}", std::process::id());
        assert!(problem.contains(&process), "{problem}");
        Draft::new(&home.path().join("other")).unwrap();
        first.write("a/b", b"c").unwrap();
        first.finish().unwrap();
        assert_eq!(fs::read(out.join("a/b")).unwrap(), b"c");
        assert!(Draft::new(&out).unwrap_err().to_string().contains("exists"));
        let mut left: Vec<_> =
            fs::read_dir(home.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["model", "model.partial"]);
    }
}
