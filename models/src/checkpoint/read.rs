//! Reading what others wrote: regular files alone, and no more of them than was agreed.
//!
//! A FIFO would wait for ever, a device never ends, and a file may say that it holds more than any memory
//! does. So a source is opened with [`open`], read with [`whole`] or [`to_end`], and memory whose size a file
//! decides is taken with [`zeroed`], which fails where the allocator would end the process.

use std::{
    fs::{self, File, Metadata},
    io::{self, Read},
    path::Path,
};

use serde::de::DeserializeOwned;

use crate::{Error, Result, memory};

/// Bytes of the largest description (JSON) that is read: 100,000 betas take half of it.
pub const DESCRIPTION_LIMIT: u64 = 4 << 20;

/// Bytes for which nobody looks at what is free.
const ADMITTED: usize = 16 << 20;

/// Opens a regular file that holds something, and tells its length in bytes.
///
/// # Errors
/// [`Error::Io`] where it is not there or may not be read; [`Error::Format`] naming what it is instead of a
/// regular file: a directory, a FIFO, a socket, a device, or a file without bytes (those of `/proc` say that
/// they have none).
pub fn open(path: &Path) -> Result<(File, u64)> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    // Before it is opened, since opening a FIFO waits for its writer; and after, since it may be another by then.
    check(path, &fs::metadata(path).map_err(io)?)?;
    let file = File::open(path).map_err(io)?;
    let metadata = file.metadata().map_err(io)?;
    check(path, &metadata)?;
    Ok((file, metadata.len()))
}

/// All bytes of a regular file, which may be at most `limit`.
///
/// # Errors
/// As [`open`]; [`Error::Format`] where it is longer.
pub fn whole(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let (file, length) = open(path)?;
    if length > limit {
        let problem = format!("has {length} bytes, of which at most {limit} are read");
        return Err(Error::Format { path: path.to_owned(), problem });
    }
    // It may have grown since.
    to_end(file, limit).map_err(|source| Error::Io { path: path.to_owned(), source })
}

/// The text of a regular file, which may have at most `limit` bytes.
///
/// # Errors
/// As [`whole`]; [`Error::Format`] for bytes that are no UTF-8.
pub fn text(path: &Path, limit: u64) -> Result<String> {
    String::from_utf8(whole(path, limit)?).map_err(|error| Error::Format {
        path: path.to_owned(),
        problem: format!("is no text ({})", error.utf8_error()),
    })
}

/// The JSON of a regular file as a `T`.
///
/// # Errors
/// As [`text`]; [`Error::Format`] naming file and field for what is not JSON, or not a `T`.
pub fn json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let refuse = |problem: String| Error::Format { path: path.to_owned(), problem };
    let text = text(path, DESCRIPTION_LIMIT)?;
    let mut reader = serde_json::Deserializer::from_str(&text);
    let value = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
        let field = error.path().to_string();
        match field.as_str() {
            "." => refuse(error.inner().to_string()),
            field => refuse(format!("`{field}`: {}", error.inner())),
        }
    })?;
    reader.end().map_err(|error| refuse(error.to_string()))?;
    Ok(value)
}

/// All that `reader` gives, which may be at most `limit` bytes: for what is unpacked on the way.
///
/// # Errors
/// [`io::ErrorKind::InvalidData`] where there is more, [`io::ErrorKind::OutOfMemory`] where memory ends, and
/// what the reader says.
pub fn to_end(mut reader: impl Read, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut part = vec![0; 64 << 10];
    loop {
        let count = match reader.read(&mut part) {
            Ok(0) => return Ok(bytes),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        if (bytes.len() + count) as u64 > limit {
            let problem = format!("more than {limit} bytes, which is the limit");
            return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
        }
        if bytes.len() + count > bytes.capacity() {
            // It will be twice as long.
            admit(2 * bytes.capacity())?;
            bytes.try_reserve(count).map_err(|_| no_memory(bytes.len() + count))?;
        }
        bytes.extend_from_slice(&part[..count]);
    }
}

/// So many bytes of zeros.
///
/// # Errors
/// [`io::ErrorKind::OutOfMemory`], where `vec![0; bytes]` would end the process.
pub fn zeroed(bytes: usize) -> io::Result<Vec<u8>> {
    admit(bytes)?;
    let mut zeros = Vec::new();
    zeros.try_reserve_exact(bytes).map_err(|_| no_memory(bytes))?;
    zeros.resize(bytes, 0);
    Ok(zeros)
}

/// Refuses more than there is: where the system promises memory that it does not have, it ends the process when that
/// is used.
///
/// # Errors
/// [`io::ErrorKind::OutOfMemory`].
pub fn admit(bytes: usize) -> io::Result<()> {
    match memory::available().filter(|_| bytes >= ADMITTED) {
        Some(there) if bytes as u64 > there => Err(no_memory(bytes)),
        _ => Ok(()),
    }
}

fn no_memory(bytes: usize) -> io::Error {
    io::Error::new(io::ErrorKind::OutOfMemory, format!("no memory for {bytes} bytes"))
}

fn check(path: &Path, metadata: &Metadata) -> Result<()> {
    let problem = match kind(metadata) {
        None if metadata.len() > 0 => return Ok(()),
        None => "is empty, or no file of a disk".into(),
        Some(kind) => format!("is {kind}; name a regular file"),
    };
    Err(Error::Format { path: path.to_owned(), problem })
}

/// What it is other than a regular file.
fn kind(metadata: &Metadata) -> Option<&'static str> {
    let kind = metadata.file_type();
    if kind.is_file() {
        return None;
    }
    if kind.is_dir() {
        return Some("a directory");
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        if kind.is_fifo() {
            return Some("a FIFO");
        }
        if kind.is_socket() {
            return Some("a socket");
        }
        if kind.is_char_device() || kind.is_block_device() {
            return Some("a device");
        }
    }
    Some("no file")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_up_to_its_limit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        fs::write(&path, "{}").unwrap();
        assert_eq!(text(&path, 2).unwrap(), "{}");
        let problem = whole(&path, 1).unwrap_err().to_string();
        assert!(problem.contains("a.json") && problem.contains("2 bytes"), "{problem}");
        fs::write(&path, [0xff]).unwrap();
        assert!(text(&path, 2).unwrap_err().to_string().contains("no text"));
        fs::write(&path, "").unwrap();
        assert!(open(&path).unwrap_err().to_string().contains("empty"));
        let missing = open(&folder.path().join("b")).unwrap_err();
        assert!(
            matches!(missing, Error::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
        );
    }

    #[test]
    fn json_is_refused_by_field() {
        #[derive(serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Inner {
            #[allow(dead_code)]
            count: u8,
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        for (text, parts) in [
            (r#"{"a": {"count": "x"}}"#, ["`a.count`", "string \"x\""]),
            (r#"{"a": {"count": 256}}"#, ["`a.count`", "256"]),
            (r#"{"a": {"cuont": 1}}"#, ["`a.cuont`", "unknown field"]),
            (r#"{"a": {"count": 1}} {}"#, ["a.json", "trailing"]),
            ("{", ["a.json", "EOF"]),
        ] {
            fs::write(&path, text).unwrap();
            let read = json::<std::collections::BTreeMap<String, Inner>>(&path);
            let problem = read.map(|_| ()).unwrap_err().to_string();
            assert!(parts.iter().all(|part| problem.contains(part)), "{problem}");
        }
    }

    #[test]
    fn what_never_ends_is_cut_off() {
        let error = to_end(io::repeat(7), 100_000).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert_eq!(to_end(io::repeat(7).take(100_000), 100_000).unwrap().len(), 100_000);
        assert_eq!(zeroed(isize::MAX as usize).unwrap_err().kind(), io::ErrorKind::OutOfMemory);
    }

    #[cfg(unix)]
    #[test]
    fn other_than_regular_files_are_refused_by_what_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let fifo = folder.path().join("fifo");
        let made = std::process::Command::new("mkfifo").arg(&fifo).status().unwrap();
        assert!(made.success());
        let cases = [
            (folder.path(), "a directory"),
            (&socket, "a socket"),
            (&fifo, "a FIFO"),
            (Path::new("/dev/zero"), "a device"),
        ];
        for (path, kind) in cases {
            let problem = whole(path, 10).unwrap_err().to_string();
            assert!(problem.contains(kind) && problem.contains("regular file"), "{problem}");
        }
        if cfg!(target_os = "linux") {
            let problem = open(Path::new("/proc/self/maps")).unwrap_err().to_string();
            assert!(problem.contains("no file of a disk"), "{problem}");
        }
    }
}
