//! Images in NumPy's `.npz`: `arr_0` uint8 `[N, H, W, C]` or `[N, H, W]`, labels in `arr_1`, as
//! guided-diffusion's samplers write them.

use std::path::Path;

use understudy_models::Result;

use super::{Images, malformed};
use crate::npz::{Npz, Values};

pub(super) fn read(path: &Path) -> Result<Images> {
    let mut npz = Npz::open(path)?;
    if npz.names().is_empty() {
        let problem = "is a ZIP archive without NumPy arrays; unpack it, and name the folder";
        return Err(malformed(path, problem));
    }
    let array = npz.array("arr_0")?;
    let (n, height, width, channels) = match array.shape[..] {
        [n, height, width] => (n, height, width, 1),
        [n, height, width, channels @ (1 | 3)] => (n, height, width, channels),
        _ => {
            let problem = format!("`arr_0` is {:?}; use uint8 [N, H, W, 1 or 3]", array.shape);
            return Err(malformed(path, problem));
        }
    };
    let Values::U8(pixels) = array.values else {
        return Err(malformed(path, "`arr_0` is not uint8; images are bytes from 0 to 255"));
    };
    let labels = match npz.names().contains(&"arr_1".to_owned()) {
        true => Some(labels(path, &mut npz, n)?),
        false => None,
    };
    Ok(Images { channels, height, width, pixels, labels, ..Images::default() })
}

fn labels(path: &Path, npz: &mut Npz, n: usize) -> Result<Vec<u32>> {
    let array = npz.array("arr_1")?;
    let refuse = |problem: String| malformed(path, problem);
    if array.shape != [n] {
        return Err(refuse(format!("`arr_1` is {:?}, there are {n} images", array.shape)));
    }
    let whole = |value: f64| {
        let label = value as u32;
        (f64::from(label) == value).then_some(label)
    };
    let labels: Option<Vec<u32>> = array.values.to_f64().into_iter().map(whole).collect();
    labels.ok_or_else(|| refuse("`arr_1` holds something else than class numbers".into()))
}
