//! Weights that stay in their file until they are asked for: a network that packs its weights never holds
//! them in two forms.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Metadata, TensorInfo};

use super::{file::unreadable, read};
use crate::{Error, Result, weight::Weight};

/// The length of the header, which is where it begins, too.
const HEADER: u64 = 8;
/// Bytes of the longest header that is read: enough for hundreds of thousands of tensors.
const HEADER_LIMIT: u64 = 32 << 20;

/// All tensors of a safetensors file.
///
/// # Errors
/// [`Error::Io`], or [`Error::Format`] where the file is not a whole safetensors file. A file that changes
/// later fails when the tensor is read.
pub(super) fn open(path: &Path) -> Result<HashMap<String, Weight>> {
    let (file, header, begin) = header(path)?;
    let file = Arc::new((file, path.to_owned()));
    let weight = |(name, info): (String, &TensorInfo)| {
        let dtype = DType::try_from(info.dtype).map_err(|error| broken(path, error))?;
        let start = begin + info.data_offsets.0 as u64;
        let (file, shape, own) = (Arc::clone(&file), info.shape.clone(), name.clone());
        let bytes = info.data_offsets.1 - info.data_offsets.0;
        let read = move || tensor(&file, &own, start, bytes, dtype, &shape);
        Ok((name, Weight::Later { shape: info.shape.clone(), dtype, read: Box::new(read) }))
    };
    header.tensors().into_iter().map(weight).collect()
}

/// What a safetensors file tells beside its tensors.
///
/// # Errors
/// As [`open`].
pub(super) fn metadata(path: &Path) -> Result<HashMap<String, String>> {
    Ok(header(path)?.1.metadata().clone().unwrap_or_default())
}

/// The file, its header, and where its tensors begin.
fn header(path: &Path) -> Result<(File, Metadata, u64)> {
    let (mut file, length) = read::open(path).map_err(|error| match error {
        Error::Io { source, .. } => unreadable(path, source),
        error => error,
    })?;
    let mut size = [0; HEADER as usize];
    file.read_exact(&mut size).map_err(|error| broken(path, error))?;
    let size = u64::from_le_bytes(size);
    if size > length.saturating_sub(HEADER) {
        return Err(broken(path, "its header is longer than the file"));
    }
    if size > HEADER_LIMIT {
        return Err(broken(path, format!("its header has {size} bytes, at most {HEADER_LIMIT}")));
    }
    let mut header = vec![0; size as usize];
    file.read_exact(&mut header).map_err(|error| broken(path, error))?;
    let header: Metadata = serde_json::from_slice(&header).map_err(|error| broken(path, error))?;
    if header.data_len() as u64 != length - HEADER - size {
        return Err(broken(path, "its tensors are not as long as its header says"));
    }
    Ok((file, header, HEADER + size))
}

fn tensor(
    (file, path): &(File, PathBuf),
    name: &str,
    start: u64,
    bytes: usize,
    dtype: DType,
    shape: &[usize],
) -> Result<Tensor> {
    let mut file = file;
    let mut read = || -> io::Result<Vec<u8>> {
        let mut data = read::zeroed(bytes)?;
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(&mut data)?;
        Ok(data)
    };
    let data = read().map_err(|source| Error::Io { path: path.clone(), source })?;
    if !all_finite(&data, dtype) {
        let problem = format!("`{name}` {NOT_FINITE}");
        return Err(Error::Format { path: path.clone(), problem });
    }
    Ok(Tensor::from_raw_buffer(&data, dtype, shape, &Device::Cpu)?)
}

/// What is said of weights that are not [`all_finite`].
pub(super) const NOT_FINITE: &str = "holds NaN or infinity; fetch or convert it again";

/// Whether little-endian floats are all numbers: those that are not have every bit of the exponent set.
pub(super) fn all_finite(data: &[u8], dtype: DType) -> bool {
    let halves = |exponent: u16| {
        data.as_chunks().0.iter().all(|half| u16::from_le_bytes(*half) & exponent != exponent)
    };
    match dtype {
        DType::F16 => halves(0x7c00),
        DType::BF16 => halves(0x7f80),
        DType::F32 => {
            const EXPONENT: u32 = 0x7f80_0000;
            data.as_chunks().0.iter().all(|word| u32::from_le_bytes(*word) & EXPONENT != EXPONENT)
        }
        DType::F64 => data.as_chunks().0.iter().all(|word| f64::from_le_bytes(*word).is_finite()),
        _ => true,
    }
}

fn broken(path: &Path, problem: impl std::fmt::Display) -> Error {
    Error::Format {
        path: path.to_owned(),
        problem: format!("not a whole safetensors file ({problem}); fetch or convert it again"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_number_is_found_in_every_type() {
        for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
            for (value, finite) in
                [(f64::NAN, false), (f64::NEG_INFINITY, false), (-6e4, true), (1e-40, true)]
            {
                let values = Tensor::new(&[0.5, value, 1.0][..], &Device::Cpu).unwrap();
                let path = tempfile::tempdir().unwrap().keep().join("w.safetensors");
                candle_core::safetensors::save(
                    &HashMap::from([("w".to_owned(), values.to_dtype(dtype).unwrap())]),
                    &path,
                )
                .unwrap();
                let weight = open(&path).unwrap().remove("w").unwrap();
                match weight.take() {
                    Ok(_) => assert!(finite, "{dtype:?} {value}"),
                    Err(error) => {
                        assert!(!finite && error.to_string().contains("`w` holds NaN"), "{error}");
                    }
                }
                std::fs::remove_dir_all(path.parent().unwrap()).unwrap();
            }
        }
    }
}
