//! NumPy's `.npz` archives, read and written: a ZIP of `.npy` files.
//!
//! Format: <https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>. Read are
//! little-endian arrays in C order of the types in [`Values`]; an array is never believed to be larger
//! than the bytes that are there.

use std::{
    fs::File,
    io::{BufReader, Cursor, Write},
    path::{Path, PathBuf},
};

use understudy_models::{
    Error, Result,
    checkpoint::{read, write_atomically},
    memory,
};
use zip::{CompressionMethod, ZipArchive, ZipWriter, write::SimpleFileOptions};

const MAGIC: &[u8] = b"\x93NUMPY";

/// An array's elements.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Values {
    /// `|u1`
    U8(Vec<u8>),
    /// `<i4` and `<i8`
    I64(Vec<i64>),
    /// `<f4`
    F32(Vec<f32>),
    /// `<f8`
    F64(Vec<f64>),
    /// `<U…`: one string, a scalar array.
    Text(String),
}

impl Values {
    /// The numbers as f64; none for a string.
    pub(crate) fn to_f64(&self) -> Vec<f64> {
        match self {
            Self::U8(values) => values.iter().map(|&value| value.into()).collect(),
            Self::I64(values) => values.iter().map(|&value| value as f64).collect(),
            Self::F32(values) => values.iter().map(|&value| value.into()).collect(),
            Self::F64(values) => values.clone(),
            Self::Text(_) => Vec::new(),
        }
    }
}

/// An array.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Array {
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Values,
}

/// An archive whose directory has been read.
pub(crate) struct Npz {
    path: PathBuf,
    archive: ZipArchive<BufReader<File>>,
}

impl Npz {
    /// Reads the directory.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Format`] naming the file.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let (file, _) = read::open(path)?;
        let archive = ZipArchive::new(BufReader::new(file)).map_err(|error| Error::Format {
            path: path.to_owned(),
            problem: format!("not a whole .npz archive ({error})"),
        })?;
        Ok(Self { path: path.to_owned(), archive })
    }

    /// The arrays' names.
    pub(crate) fn names(&self) -> Vec<String> {
        let names = self.archive.file_names().filter_map(|name| name.ok());
        names.filter_map(|name| Some(name.strip_suffix(".npy")?.to_owned())).collect()
    }

    /// Reads one array.
    ///
    /// # Errors
    /// [`Error::Format`] naming file and array: not there, corrupt, or of a type that is not read.
    pub(crate) fn array(&mut self, name: &str) -> Result<Array> {
        let path = self.path.clone();
        let refuse = |problem: String| Error::Format { path, problem };
        let names = self.names();
        if !names.iter().any(|there| there == name) {
            let names = names.join(", ");
            return Err(refuse(format!("has no array `{name}`, only: {names}")));
        }
        let member = self.archive.by_name(&format!("{name}.npy"));
        let read = member.map_err(|error| error.to_string()).and_then(|mut member| {
            // The archive's own word for it, which the header inside is held against; a bomb says what it is.
            let announced = member.size();
            memory::admit(announced.saturating_mul(2)).map_err(|error| error.to_string())?;
            read::to_end(&mut member, announced).map_err(|error| error.to_string())
        });
        let parsed = read.and_then(|bytes| parse(&bytes));
        parsed.map_err(|problem| refuse(format!("array `{name}`: {problem}")))
    }
}

/// Writes arrays, not compressed, under a temporary name that is then renamed.
///
/// # Errors
/// [`Error::Io`] naming the file.
pub(crate) fn write(path: &Path, arrays: &[(&str, Array)]) -> Result<()> {
    let mut archive = ZipWriter::new(Cursor::new(Vec::new()));
    let options =
        SimpleFileOptions::default().compression_method(CompressionMethod::Stored).large_file(true);
    let mut fill = || -> std::io::Result<()> {
        for (name, array) in arrays {
            archive.start_file(format!("{name}.npy"), options)?;
            archive.write_all(&to_npy(array))?;
        }
        Ok(())
    };
    let io = |source| Error::Io { path: path.to_owned(), source };
    fill().map_err(io)?;
    let bytes = archive.finish().map_err(|error| io(error.into()))?;
    write_atomically(path, bytes.get_ref())
}

fn to_npy(array: &Array) -> Vec<u8> {
    let (descr, body): (String, Vec<u8>) = match &array.values {
        Values::U8(values) => ("|u1".into(), values.clone()),
        Values::I64(values) => {
            ("<i8".into(), values.iter().flat_map(|value| value.to_le_bytes()).collect())
        }
        Values::F32(values) => {
            ("<f4".into(), values.iter().flat_map(|value| value.to_le_bytes()).collect())
        }
        Values::F64(values) => {
            ("<f8".into(), values.iter().flat_map(|value| value.to_le_bytes()).collect())
        }
        Values::Text(text) => {
            let body = text.chars().flat_map(|c| u32::from(c).to_le_bytes()).collect();
            (format!("<U{}", text.chars().count()), body)
        }
    };
    let sizes: String = array.shape.iter().map(|size| format!("{size}, ")).collect();
    let mut header = format!(
        "{{'descr': '{descr}', 'fortran_order': False, 'shape': ({}), }}",
        sizes.trim_end()
    );
    // The body begins at a multiple of 64.
    let unpadded = MAGIC.len() + 4 + header.len() + 1;
    header.push_str(&" ".repeat(unpadded.next_multiple_of(64) - unpadded));
    header.push('\n');
    let mut bytes = MAGIC.to_vec();
    bytes.extend([1, 0]);
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(body);
    bytes
}

fn parse(bytes: &[u8]) -> Result<Array, String> {
    let broken = || "not a whole .npy file".to_string();
    let rest = bytes.strip_prefix(MAGIC).ok_or_else(broken)?;
    let (version, rest) = rest.split_first_chunk::<2>().ok_or_else(broken)?;
    let (length, rest) = match version[0] {
        1 => rest
            .split_first_chunk()
            .map(|(length, rest)| (usize::from(u16::from_le_bytes(*length)), rest)),
        _ => rest
            .split_first_chunk()
            .map(|(length, rest)| (u32::from_le_bytes(*length) as usize, rest)),
    }
    .ok_or_else(broken)?;
    let (header, body) = rest.split_at_checked(length).ok_or_else(broken)?;
    let header = str::from_utf8(header).map_err(|_| broken())?;
    let field = |name: &str| header.split_once(&format!("'{name}':")).map(|(_, rest)| rest.trim());
    if !field("fortran_order").is_some_and(|order| order.starts_with("False")) {
        return Err("is in Fortran order; save numpy.ascontiguousarray of it".into());
    }
    let descr = field("descr").and_then(|rest| rest.split('\'').nth(1)).ok_or_else(broken)?;
    let sizes = field("shape")
        .and_then(|rest| rest.strip_prefix('('))
        .and_then(|rest| rest.split_once(')'))
        .ok_or_else(broken)?
        .0;
    let sizes = sizes.split(',').map(str::trim).filter(|size| !size.is_empty());
    let shape: Vec<usize> =
        sizes.map(|size| size.parse().map_err(|_| broken())).collect::<Result<_, _>>()?;
    let count = shape.iter().try_fold(1, |count: usize, &size| count.checked_mul(size));
    let count = count.ok_or_else(broken)?;

    let width = match descr {
        "|u1" => 1,
        "<i4" | "<f4" => 4,
        "<i8" | "<f8" => 8,
        _ => match descr.strip_prefix("<U").map(str::parse::<usize>) {
            Some(Ok(length)) if count == 1 && length > 0 => {
                length.checked_mul(4).ok_or_else(broken)?
            }
            _ => return Err(format!("is of type {descr}; use u1, i4, i8, f4 or f8")),
        },
    };
    if count.checked_mul(width) != Some(body.len()) {
        return Err(format!("{shape:?} of {descr} does not take {} bytes", body.len()));
    }
    let values = match descr {
        "|u1" => Values::U8(body.to_vec()),
        "<i4" => Values::I64(words(body).map(|word| i32::from_le_bytes(word).into()).collect()),
        "<i8" => Values::I64(words(body).map(i64::from_le_bytes).collect()),
        "<f4" => Values::F32(words(body).map(f32::from_le_bytes).collect()),
        "<f8" => Values::F64(words(body).map(f64::from_le_bytes).collect()),
        _ => {
            let letters = words(body).map(u32::from_le_bytes).take_while(|&letter| letter != 0);
            let text: Option<String> = letters.map(char::from_u32).collect();
            Values::Text(text.ok_or_else(broken)?)
        }
    };
    Ok(Array { shape, values })
}

fn words<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> {
    bytes.as_chunks::<N>().0.iter().copied()
}
