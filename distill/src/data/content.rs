//! What a file of images is, by its content: names say nothing, so none is believed.

use std::{
    io::{BufReader, Chain, Cursor, Read},
    path::Path,
};

use flate2::read::MultiGzDecoder;
use ruzstd::decoding::StreamingDecoder;
use understudy_models::{Result, checkpoint::read};

use super::{idx, malformed};

/// A kind of file, and its content without compression.
pub(super) enum Content {
    /// Images or labels as MNIST has them, and how many bytes there are, where they are not compressed.
    Idx(Box<dyn Read>, Option<u64>),
    /// A tar archive.
    Tar(Box<dyn Read>),
    /// A ZIP archive, which is read from its end.
    Zip,
}

/// The size of a tar header, which is all that has to be seen of any kind.
const BLOCK: usize = 512;

/// Kinds that are not read: how they begin, what they are, the remedy.
const OTHERS: &[(&[u8], &str)] = &[
    (b"BZh", "is compressed with bzip2; unpack it, or compress it with gzip or zstd"),
    (b"\xfd7zXZ\0", "is compressed with xz; unpack it, or compress it with gzip or zstd"),
    (b"\x04\x22\x4d\x18", "is compressed with lz4; unpack it, or compress it with gzip or zstd"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7-Zip archive; unpack it, and name the folder"),
    (b"Rar!", "is a RAR archive; unpack it, and name the folder"),
    (b"\x93NUMPY", "is a single NumPy array; write it as `arr_0` of an .npz with numpy.savez"),
    (b"\x89HDF\r\n", "is an HDF5 file; write its images as a folder, or as `arr_0` of an .npz"),
    (b"PAR1", "is a Parquet file; write its images as a folder, or as `arr_0` of an .npz"),
];

const NONE: &str =
    "is no set of images; use an idx file, a folder of images, a .tar of one, or an .npz";

/// Opens a file and looks what it is.
///
/// # Errors
/// As [`read::open`]; a file of a kind that is not read, saying what it is.
pub(super) fn open(path: &Path) -> Result<Content> {
    let (file, bytes) = read::open(path)?;
    let (start, rest) = peek(path, BufReader::new(file))?;
    let content: Box<dyn Read> = if start.starts_with(&[0x1f, 0x8b]) {
        Box::new(MultiGzDecoder::new(rest))
    } else if start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        let decoder = StreamingDecoder::new(rest);
        Box::new(decoder.map_err(|error| malformed(path, format!("not whole zstd ({error})")))?)
    } else if start.starts_with(b"PK") {
        return Ok(Content::Zip);
    } else {
        return of(path, &start, Box::new(rest), Some(bytes));
    };
    let (start, content) = peek(path, content)?;
    of(path, &start, Box::new(content), None)
}

/// The kind of what is not compressed, or not any more.
fn of(path: &Path, start: &[u8], content: Box<dyn Read>, bytes: Option<u64>) -> Result<Content> {
    if idx::begins(start) {
        return Ok(Content::Idx(content, bytes));
    }
    if is_tar_header(start) {
        return Ok(Content::Tar(content));
    }
    let other = OTHERS.iter().find(|(magic, _)| start.starts_with(magic));
    let picture = image::guess_format(start).is_ok();
    Err(malformed(
        path,
        match other {
            Some((_, problem)) => *problem,
            None if picture => "is a single picture; name the folder that it is in",
            None => NONE,
        },
    ))
}

/// A content whose first bytes have been seen.
type Peeked<R> = Chain<Cursor<Vec<u8>>, R>;

/// The first bytes, and all of them again.
fn peek<R: Read>(path: &Path, mut content: R) -> Result<(Vec<u8>, Peeked<R>)> {
    let mut start = Vec::new();
    let read = content.by_ref().take(BLOCK as u64).read_to_end(&mut start);
    read.map_err(|error| malformed(path, format!("cannot be unpacked ({error}); fetch it again")))?;
    Ok((start.clone(), Cursor::new(start).chain(content)))
}

/// Whether a header's checksum is right (POSIX ustar; older formats have it in the same place), or the
/// archive is empty.
fn is_tar_header(block: &[u8]) -> bool {
    const CHECKSUM: std::ops::Range<usize> = 148..156;
    if block.len() < BLOCK {
        return false;
    }
    if block.iter().all(|&byte| byte == 0) {
        return true;
    }
    let written = String::from_utf8_lossy(&block[CHECKSUM]);
    let written = written.trim_matches([' ', '\0']);
    // The field itself counts as spaces.
    let sum = |bytes: &[u8]| bytes.iter().map(|&byte| u32::from(byte)).sum::<u32>();
    let sum = sum(block) - sum(&block[CHECKSUM]) + 8 * u32::from(b' ');
    u32::from_str_radix(written, 8) == Ok(sum)
}
