//! A model folder that appears complete or not at all.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use serde_json::Value;

use crate::{Error, Result};

/// A folder in the making, beside the one it will be; removed again unless it is finished.
#[derive(Debug)]
pub struct Draft {
    draft: PathBuf,
    out: PathBuf,
}

impl Draft {
    /// Begins a folder that will be `out`, which must not exist, or be empty.
    ///
    /// # Errors
    /// [`Error::Value`] when `out` exists, [`Error::Io`] when nothing can be made there.
    pub fn new(out: &Path) -> Result<Self> {
        let Some(name) = out.file_name() else {
            return Err(Error::value("out", out.display(), "must be the path of a new folder"));
        };
        let empty = fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_none());
        if !empty && fs::symlink_metadata(out).is_ok() {
            return Err(Error::value("out", out.display(), "exists; choose another or remove it"));
        }
        let mut draft = OsString::from(".");
        draft.push(name);
        draft.push(format!(".{}.partial", std::process::id()));
        let draft = out.with_file_name(draft);
        if let Some(parent) = draft.parent() {
            fs::create_dir_all(parent).map_err(at(parent))?;
        }
        fs::create_dir(&draft).map_err(at(&draft))?;
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
        let path = self.draft.join(name);
        let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
        let bytes = safetensors::serialize(tensors, Some(metadata))
            .map_err(|error| Error::Format { path, problem: error.to_string() })?;
        self.write(name, &bytes)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.draft.join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(at(parent))?;
        }
        let write = || -> std::io::Result<()> {
            let mut file = File::create(&path)?;
            file.write_all(bytes)?;
            file.sync_all()
        };
        write().map_err(at(&path))?;
        sync(path.parent())
    }

    /// Gives the folder its name.
    pub(super) fn finish(self) -> Result<()> {
        sync(Some(&self.draft))?;
        fs::rename(&self.draft, &self.out).map_err(at(&self.out))?;
        sync(self.out.parent())
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // After `finish` nothing is there any more, and of a failure to clean up there is nobody to tell.
        let _ = fs::remove_dir_all(&self.draft);
    }
}

/// Makes names of files durable, where the system can.
fn sync(folder: Option<&Path>) -> Result<()> {
    let folder = match folder {
        Some(folder) if folder.as_os_str().is_empty() => Path::new("."),
        Some(folder) => folder,
        None => return Ok(()),
    };
    if cfg!(unix) {
        File::open(folder).and_then(|file| file.sync_all()).map_err(at(folder))
    } else {
        Ok(())
    }
}

fn at(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_path_buf();
    |source| Error::Io { path, source }
}
