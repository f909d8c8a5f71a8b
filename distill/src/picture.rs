//! Pictures on disk: finished samples, and grids of them.

use std::io::Cursor;
use std::path::{Path, PathBuf};

use image::{DynamicImage, GrayImage, ImageFormat, RgbImage};
use understudy_models::checkpoint::write_atomically;
use understudy_models::{Error, Image, Result};

/// Where the sample with that class and seed is kept: `folder/CLASS/SEED.png`, or `folder/SEED.png`.
pub(crate) fn place(folder: &Path, class: Option<u32>, seed: u64) -> PathBuf {
    let name = format!("{seed}.png");
    match class {
        // As many digits as make the names' order that of the numbers, which readers of folders go by.
        Some(class) => folder.join(format!("{class:04}")).join(name),
        None => folder.join(name),
    }
}

/// Writes a PNG, and the folder it is in where there is none yet.
///
/// # Errors
/// As [`write`].
pub(crate) fn write_new(path: &Path, image: &Image) -> Result<()> {
    if let Some(folder) = path.parent() {
        let io = |source| Error::Io { path: folder.to_owned(), source };
        std::fs::create_dir_all(folder).map_err(io)?;
    }
    write(path, image)
}

/// Writes a PNG, whole or not at all.
///
/// # Errors
/// [`Error::Io`] naming the file; [`Error::Format`] for pictures of neither 1 nor 3 channels.
pub fn write(path: &Path, image: &Image) -> Result<()> {
    let malformed = |problem: String| Error::Format { path: path.to_owned(), problem };
    let (width, height) = (image.width as u32, image.height as u32);
    let pixels = image.pixels.clone();
    let picture = match image.channels {
        1 => GrayImage::from_raw(width, height, pixels).map(DynamicImage::ImageLuma8),
        3 => RgbImage::from_raw(width, height, pixels).map(DynamicImage::ImageRgb8),
        _ => None,
    };
    let picture = picture
        .ok_or_else(|| malformed(format!("{} channels: a picture has 1 or 3", image.channels)))?;
    let mut bytes = Cursor::new(Vec::new());
    picture.write_to(&mut bytes, ImageFormat::Png).map_err(|error| malformed(error.to_string()))?;
    write_atomically(path, bytes.get_ref())
}

/// Pictures of one size side by side, row by row, `columns` in a row.
pub fn grid(images: &[Image], columns: usize) -> Option<Image> {
    let Image { width, height, channels, .. } = *images.first()?;
    let rows = images.len().div_ceil(columns);
    let line = columns * width * channels;
    let mut pixels = vec![0; rows * height * line];
    for (i, image) in images.iter().enumerate() {
        let (top, left) = (i / columns * height, i % columns * width * channels);
        for (y, row) in image.pixels.chunks_exact(width * channels).enumerate() {
            pixels[(top + y) * line + left..][..row.len()].copy_from_slice(row);
        }
    }
    Some(Image { width: columns * width, height: rows * height, channels, pixels })
}
