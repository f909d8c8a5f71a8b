//! The `idx` format of MNIST and its successors: a magic number, big-endian dimensions, bytes.

use std::{
    io::Read,
    path::{Path, PathBuf},
};

use understudy_models::{Result, checkpoint::read};

use super::{
    Images,
    content::{self, Content},
    malformed,
};

/// Unsigned bytes, three dimensions and one.
const IMAGES: [u8; 4] = [0, 0, 8, 3];
const LABELS: [u8; 4] = [0, 0, 8, 1];

/// Whether a file that starts so is an idx file of bytes.
pub(super) fn begins(start: &[u8]) -> bool {
    start.starts_with(&IMAGES) || start.starts_with(&LABELS)
}

/// Reads images, and the labels beside them where there are any.
pub(super) fn read(path: &Path, content: Box<dyn Read>, bytes: Option<u64>) -> Result<Images> {
    let otherwise = "is an idx file of labels; name the file of images beside it";
    let ([n, height, width], pixels) = parse(path, (content, bytes), IMAGES, otherwise)?;
    let labels = match labels_beside(path) {
        Some(beside) => {
            let otherwise = "is no idx file of labels";
            let Content::Idx(content, bytes) = content::open(&beside)? else {
                return Err(malformed(&beside, otherwise));
            };
            let ([count], labels) = parse(&beside, (content, bytes), LABELS, otherwise)?;
            if count != n {
                let problem = format!("has {count} labels, {} has {n} images", path.display());
                return Err(malformed(&beside, problem));
            }
            Some(labels.into_iter().map(u32::from).collect())
        }
        None => None,
    };
    Ok(Images { channels: 1, height, width, pixels, labels, ..Images::default() })
}

fn parse<const D: usize>(
    path: &Path,
    (mut content, bytes): (Box<dyn Read>, Option<u64>),
    magic: [u8; 4],
    otherwise: &str,
) -> Result<([usize; D], Vec<u8>)> {
    let broken =
        |error| malformed(path, format!("cannot be read to its end ({error}); fetch it again"));
    let mut header = vec![0; 4 + 4 * D];
    content.read_exact(&mut header).map_err(broken)?;
    if !header.starts_with(&magic) {
        return Err(malformed(path, otherwise));
    }
    let mut dimensions = [0; D];
    for (dimension, word) in dimensions.iter_mut().zip(header[4..].chunks_exact(4)) {
        *dimension = u32::from_be_bytes([word[0], word[1], word[2], word[3]]) as usize;
    }
    let expected = dimensions.iter().map(|&size| size as u128).product::<u128>();
    let refuse = |found: String| {
        malformed(path, format!("announces {expected} bytes and holds {found}; fetch it again"))
    };
    let there = bytes.map(|bytes| u128::from(bytes).saturating_sub(header.len() as u128));
    if let Some(there) = there.filter(|there| *there != expected) {
        return Err(refuse(there.to_string()));
    }
    read::admit(usize::try_from(expected).unwrap_or(usize::MAX)).map_err(broken)?;
    // One byte more than there should be tells of all that follow.
    let most = u64::try_from(expected).unwrap_or(u64::MAX).saturating_add(1);
    let body = read::to_end(content.take(most), most).map_err(broken)?;
    if expected != body.len() as u128 {
        return Err(refuse(match body.len() as u128 > expected {
            true => "more".to_owned(),
            false => body.len().to_string(),
        }));
    }
    Ok((dimensions, body))
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
