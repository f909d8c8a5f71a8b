//! A model folder that appears complete or not at all.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
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
    /// [`Error::Value`] when `out` exists, [`Error::Io`] when nothing can be made there.
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
        let draft = Partial::folder(out).map_err(at(out))?;
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

    fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
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

    /// Gives the folder its name.
    pub(super) fn finish(self) -> Result<()> {
        self.draft.finish(&self.out).map_err(at(&self.out))
    }
}

fn at(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_path_buf();
    |source| Error::Io { path, source }
}
