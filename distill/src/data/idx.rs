//! The `idx` format of MNIST and its successors: a magic number, big-endian dimensions, bytes.

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
};

use flate2::read::MultiGzDecoder;
use understudy_models::{Error, Result};

use super::{Images, malformed};

/// Unsigned bytes, three dimensions and one.
const IMAGES: [u8; 4] = [0, 0, 8, 3];
const LABELS: [u8; 4] = [0, 0, 8, 1];
const GZIP: [u8; 2] = [0x1f, 0x8b];

/// Reads images, and the labels beside them where there are any.
pub(super) fn read(path: &Path) -> Result<Images> {
    let remedy =
        "is no set of images; use an idx file, a folder of images, a .tar of one, or an .npz";
    let ([n, height, width], pixels) = parse(path, IMAGES, remedy)?;
    let labels = match labels_beside(path) {
        Some(beside) => {
            let ([count], labels) = parse(&beside, LABELS, "is no idx file of labels")?;
            if count != n {
                let problem = format!("has {count} labels, {} has {n} images", path.display());
                return Err(malformed(&beside, problem));
            }
            Some(labels.into_iter().map(u32::from).collect())
        }
        None => None,
    };
    Ok(Images { channels: 1, height, width, pixels, labels, class_names: Vec::new() })
}

fn parse<const D: usize>(
    path: &Path,
    magic: [u8; 4],
    otherwise: &str,
) -> Result<([usize; D], Vec<u8>)> {
    let mut bytes = unpacked(path)?;
    if !bytes.starts_with(&magic) || bytes.len() < 4 + 4 * D {
        return Err(malformed(path, otherwise));
    }
    let body = bytes.split_off(4 + 4 * D);
    let mut dimensions = [0; D];
    for (dimension, word) in dimensions.iter_mut().zip(bytes[4..].chunks_exact(4)) {
        *dimension = u32::from_be_bytes([word[0], word[1], word[2], word[3]]) as usize;
    }
    let expected = dimensions.iter().map(|&size| size as u128).product::<u128>();
    if expected != body.len() as u128 {
        let problem =
            format!("announces {expected} bytes and holds {}; fetch it again", body.len());
        return Err(malformed(path, problem));
    }
    Ok((dimensions, body))
}

fn unpacked(path: &Path) -> Result<Vec<u8>> {
    let bytes = fs::read(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
    if !bytes.starts_with(&GZIP) {
        return Ok(bytes);
    }
    let mut unpacked = Vec::new();
    MultiGzDecoder::new(&bytes[..])
        .read_to_end(&mut unpacked)
        .map_err(|error| malformed(path, format!("not a whole gzip file ({error})")))?;
    Ok(unpacked)
}

/// `train-images-idx3-ubyte.gz` → `train-labels-idx1-ubyte.gz`, or its unpacked twin.
fn labels_beside(path: &Path) -> Option<PathBuf> {
    let name = path.file_name()?.to_str()?;
    let labels = name.replace("images", "labels").replace("idx3", "idx1");
    let stem = labels.strip_suffix(".gz").unwrap_or(&labels);
    let candidates = [labels.clone(), format!("{stem}.gz"), stem.to_owned()];
    let beside = candidates.into_iter().map(|candidate| path.with_file_name(candidate));
    beside.filter(|beside| beside != path).find(|beside| beside.is_file())
}
