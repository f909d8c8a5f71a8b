//! A run's state in one file: what makes a resumed run the same as one that was never stopped.
//!
//! A checkpoint is a safetensors file; numbers that are not tensors are JSON in its metadata. It appears
//! whole under its name or not at all, and replaces the one before only then.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde_json::Value;
use understudy_models::checkpoint::write_with;
use understudy_models::{Error, Result};

/// Tensors and a JSON object, written to and read from a file.
#[derive(Debug, Default)]
pub struct Snapshot {
    tensors: BTreeMap<String, Held>,
    /// All that is not a tensor.
    pub state: Value,
    path: PathBuf,
}

/// A tensor: its type, its shape, its bytes.
type Held = (Dtype, Vec<usize>, Vec<u8>);

/// The key of [`Snapshot::state`] in the file's metadata.
const STATE: &str = "state";

impl Snapshot {
    /// A snapshot that holds `state` and no tensors yet.
    pub fn new(state: Value) -> Self {
        Self { state, ..Self::default() }
    }

    /// Puts in f32 values.
    pub fn f32(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        let bytes = bytemuck::cast_slice(values).to_vec();
        self.tensors.insert(name.into(), (Dtype::F32, shape.to_vec(), bytes));
    }

    /// Puts in whole numbers.
    pub fn u64(&mut self, name: &str, values: &[u64]) {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.tensors.insert(name.into(), (Dtype::U64, vec![values.len()], bytes));
    }

    /// Puts in bytes.
    pub fn u8(&mut self, name: &str, values: &[u8]) {
        self.tensors.insert(name.into(), (Dtype::U8, vec![values.len()], values.to_vec()));
    }

    /// f32 values.
    ///
    /// # Errors
    /// [`Error::Format`] naming what is missing.
    pub fn get_f32(&self, name: &str) -> Result<Vec<f32>> {
        let bytes = self.get(name, Dtype::F32)?;
        Ok(bytes
            .chunks_exact(4)
            .map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]]))
            .collect())
    }

    /// f32 values as a tensor of their shape.
    ///
    /// # Errors
    /// [`Error::Format`] naming what is missing.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let values = self.get_f32(name)?;
        let shape = self.tensors.get(name).map(|(_, shape, _)| shape.clone());
        Ok(Tensor::from_vec(values, shape.unwrap_or_default(), &Device::Cpu)?)
    }

    /// Whole numbers.
    ///
    /// # Errors
    /// [`Error::Format`] naming what is missing.
    pub fn get_u64(&self, name: &str) -> Result<Vec<u64>> {
        let bytes = self.get(name, Dtype::U64)?;
        let number =
            |eight: &[u8]| eight.iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte));
        Ok(bytes.chunks_exact(8).map(number).collect())
    }

    /// Bytes.
    ///
    /// # Errors
    /// [`Error::Format`] naming what is missing.
    pub fn get_u8(&self, name: &str) -> Result<Vec<u8>> {
        Ok(self.get(name, Dtype::U8)?.to_vec())
    }

    /// Puts in all tensors of another, whose names begin with `part.` here.
    pub fn put_part(&mut self, part: &str, other: Self) {
        let named = other.tensors.into_iter().map(|(name, it)| (format!("{part}.{name}"), it));
        self.tensors.extend(named);
    }

    /// What [`Snapshot::put_part`] put in.
    pub fn part(&self, part: &str) -> Self {
        let own = |(name, it): (&String, &Held)| {
            let name = name.strip_prefix(part)?.strip_prefix('.')?;
            Some((name.to_owned(), it.clone()))
        };
        let tensors = self.tensors.iter().filter_map(own).collect();
        Self { tensors, path: self.path.clone(), ..Self::default() }
    }

    /// Puts in all tensors of another, under their own names.
    pub(crate) fn put_all(&mut self, other: Self) {
        self.tensors.extend(other.tensors);
    }

    fn get(&self, name: &str, dtype: Dtype) -> Result<&[u8]> {
        match self.tensors.get(name) {
            Some((found, _, bytes)) if *found == dtype => Ok(bytes),
            _ => Err(self.malformed(&format!("`{name}` is not in it"))),
        }
    }

    /// A complaint about this checkpoint.
    pub fn malformed(&self, problem: &str) -> Error {
        Error::Format {
            path: self.path.clone(),
            problem: format!(
                "not a checkpoint of this run: {problem}; name another --out, or remove the file to begin \
                 again"
            ),
        }
    }

    /// Writes the file: under a temporary name, synced, renamed.
    ///
    /// # Errors
    /// [`Error::Io`] naming the file (disk full); the one that was there is left as it is.
    pub fn write(&self, path: &Path) -> Result<()> {
        let (header, tensors) = self.laid_out(path)?;
        write_with(path, |file| {
            file.write_all(&header)?;
            tensors.iter().try_for_each(|bytes| file.write_all(bytes))
        })
    }

    /// What [`Snapshot::write`] would write.
    ///
    /// # Errors
    /// [`Error::Format`] for what the format does not hold.
    pub(crate) fn to_bytes(&self) -> Result<Vec<u8>> {
        let (header, tensors) = self.laid_out(&self.path)?;
        let parts: Vec<&[u8]> = std::iter::once(&header[..]).chain(tensors).collect();
        Ok(parts.concat())
    }

    /// The file's header, and what follows it.
    fn laid_out(&self, path: &Path) -> Result<(Vec<u8>, Vec<&[u8]>)> {
        let malformed = |error: String| Error::Format { path: path.into(), problem: error };
        // The widest types first, as every writer of the format has them, so that all are aligned.
        let mut tensors: Vec<_> = self.tensors.iter().collect();
        tensors.sort_by_key(|(name, (dtype, ..))| (Reverse(dtype.bitsize()), *name));
        let mut offset = 0;
        let mut infos = Vec::with_capacity(tensors.len());
        for (name, (dtype, shape, bytes)) in &tensors {
            let data_offsets = (offset, offset + bytes.len());
            offset = data_offsets.1;
            let (dtype, shape) = (*dtype, shape.clone());
            infos.push(((*name).clone(), TensorInfo { dtype, shape, data_offsets }));
        }
        let metadata = HashMap::from([(STATE.to_string(), self.state.to_string())]);
        let header = Metadata::new(Some(metadata), infos);
        let header = header.map_err(|error| malformed(error.to_string()))?;
        let mut header =
            serde_json::to_vec(&header).map_err(|error| malformed(error.to_string()))?;
        header.resize(header.len().next_multiple_of(8), b' ');
        let header = [&(header.len() as u64).to_le_bytes()[..], &header].concat();
        Ok((header, tensors.into_iter().map(|(_, (.., bytes))| &bytes[..]).collect()))
    }

    /// Reads a file; nothing where there is none.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Format`] for a file that is no checkpoint.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        match fs::read(path) {
            Ok(bytes) => Self::parse(&bytes, path).map(Some),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(Error::Io { path: path.into(), source }),
        }
    }

    /// Reads what [`Snapshot::to_bytes`] gave.
    ///
    /// # Errors
    /// [`Error::Format`] for anything else.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self> {
        Self::parse(bytes, Path::new("the checkpoint of another rank"))
    }

    /// What a file holds.
    fn parse(bytes: &[u8], path: &Path) -> Result<Self> {
        let mut snapshot = Self { path: path.into(), ..Self::default() };
        let refuse = |error: String| snapshot.malformed(&error);
        let parsed = safetensors::SafeTensors::deserialize(bytes)
            .map_err(|error| refuse(error.to_string()))?;
        let (_, metadata) = safetensors::SafeTensors::read_metadata(bytes)
            .map_err(|error| refuse(error.to_string()))?;
        let state = metadata.metadata().as_ref().and_then(|metadata| metadata.get(STATE));
        let state = state.and_then(|state| serde_json::from_str(state).ok());
        let state = state.ok_or_else(|| refuse("its state is not in it".into()))?;
        let tensors = parsed.iter().map(|(name, view)| {
            (name.to_string(), (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
        });
        snapshot.tensors = tensors.collect();
        snapshot.state = state;
        Ok(snapshot)
    }
}

/// Writes tensors in f32 under `prefix.NAME`.
///
/// # Errors
/// Whatever the device says.
pub(crate) fn put_tensors<'a>(
    snapshot: &mut Snapshot,
    prefix: &str,
    tensors: impl Iterator<Item = (&'a String, &'a Tensor)>,
) -> Result<()> {
    for (name, tensor) in tensors {
        let values: Vec<f32> = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        snapshot.f32(&format!("{prefix}.{name}"), tensor.dims(), &values);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("checkpoint.safetensors");
        assert!(Snapshot::read(&path).unwrap().is_none());
        let mut snapshot = Snapshot { state: json!({"step": 7}), ..Snapshot::default() };
        snapshot.f32("w", &[2, 1], &[1.5, -0.0]);
        snapshot.u64("seeds", &[u64::MAX, 3]);
        snapshot.u8("copies", &[0, 1, 1]);
        let mut part = Snapshot::default();
        part.f32("w", &[1], &[2.5]);
        snapshot.put_part("critic", part);
        snapshot.write(&path).unwrap();
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            fs::write(home.path().join("neighbour"), "").unwrap();
            let mode = |name: &str| home.path().join(name).metadata().unwrap().permissions().mode();
            assert_eq!(mode("checkpoint.safetensors"), mode("neighbour"));
            fs::remove_file(home.path().join("neighbour")).unwrap();
        }
        let read = Snapshot::read(&path).unwrap().unwrap();
        assert_eq!(read.state["step"], 7);
        assert_eq!(read.tensor("w").unwrap().dims(), [2, 1]);
        assert_eq!(read.get_f32("w").unwrap()[1].to_bits(), (-0f32).to_bits());
        assert_eq!(read.get_u64("seeds").unwrap(), [u64::MAX, 3]);
        assert_eq!(read.get_u8("copies").unwrap(), [0, 1, 1]);
        assert_eq!(read.part("critic").get_f32("w").unwrap(), [2.5]);
        assert!(read.part("crit").get_f32("w").is_err());
        assert!(read.get_u64("w").unwrap_err().to_string().contains("`w`"));
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_write_that_fails_leaves_the_last_one() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("checkpoint.safetensors");
        let mut snapshot = Snapshot { state: json!({"step": 1}), ..Snapshot::default() };
        snapshot.write(&path).unwrap();
        // A folder that is gone is what no write gets past.
        let gone = home.path().join("gone/checkpoint.safetensors");
        snapshot.state = json!({"step": 2});
        assert!(snapshot.write(&gone).is_err());
        assert_eq!(Snapshot::read(&path).unwrap().unwrap().state["step"], 1);
    }

    #[test]
    fn what_is_no_checkpoint_is_refused() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("checkpoint.safetensors");
        fs::write(&path, b"half a fi").unwrap();
        let problem = Snapshot::read(&path).unwrap_err().to_string();
        assert!(problem.contains("checkpoint.safetensors") && problem.contains("remove"));
    }
}
