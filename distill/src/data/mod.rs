//! Sets of images on disk, read whole into memory as bytes. Files are known by their content.
//!
//! | what | labels |
//! | --- | --- |
//! | an `idx` file (MNIST, Fashion-MNIST), gzipped or not | its sibling `…-labels-idx1-…` |
//! | a folder of PNG, JPEG or WebP files | subfolders are classes, by name: numbers in their order, else as text |
//! | the same with a `metadata.jsonl` | its `label`; its `text` is the caption |
//! | a tar archive of such files, plain, gzip or zstd | as in a folder |
//! | an `.npz` with `arr_0`, uint8 `[N, H, W, C]` | `arr_1` |
//!
//! What file managers and notebooks leave among images (`.DS_Store`, `Thumbs.db`, `.ipynb_checkpoints` and
//! whatever begins with a dot) is passed over.

mod arrays;
mod content;
mod idx;
mod metadata;
mod pictures;

use std::{ops::Range, path::Path};

use candle_core::{Device, Tensor};
use sha2::{Digest, Sha256};
use understudy_models::{Error, Image, Result};

use content::Content;

/// A set of images of one size.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Images {
    /// 1 (gray) or 3 (RGB).
    pub channels: usize,
    /// Pixels, top to bottom.
    pub height: usize,
    /// Pixels, left to right.
    pub width: usize,
    /// `[N, height, width, channels]`, 0 to 255.
    pub pixels: Vec<u8>,
    /// The class of each image, where the set tells.
    pub labels: Option<Vec<u32>>,
    /// The classes' names, in the order of their numbers, where the set tells.
    pub class_names: Vec<String>,
    /// What is to be seen in each image, where the set tells.
    pub captions: Option<Vec<String>>,
    /// Files and folders that are no images and were passed over.
    pub skipped: usize,
}

impl Images {
    /// Pictures of one size as a set.
    pub fn of_pictures(pictures: &[Image]) -> Self {
        let shape = pictures.first().map(|first| (first.channels, first.height, first.width));
        let (channels, height, width) = shape.unwrap_or_default();
        let pixels = pictures.iter().flat_map(|picture| picture.pixels.iter().copied()).collect();
        Self { channels, height, width, pixels, ..Self::default() }
    }

    /// Reads the set at `path`; the module says which kinds there are.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Format`] naming the file: unreadable, corrupt, not an image, of another
    /// size than the first, without images.
    pub fn open(path: &Path) -> Result<Self> {
        let images = if path.is_dir() {
            pictures::folder(path)
        } else {
            match content::open(path)? {
                Content::Idx(content, bytes) => idx::read(path, content, bytes),
                Content::Tar(content) => pictures::archive(path, content),
                Content::Zip => arrays::read(path),
            }
        }?;
        if images.is_empty() {
            return Err(malformed(path, "holds no images"));
        }
        Ok(images)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.pixels.len() / self.image_bytes()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.pixels.is_empty()
    }

    /// Bytes of one image.
    pub fn image_bytes(&self) -> usize {
        self.channels * self.height * self.width
    }

    /// The bytes of image `index`, `[height, width, channels]`.
    pub fn image(&self, index: usize) -> &[u8] {
        &self.pixels[index * self.image_bytes()..][..self.image_bytes()]
    }

    /// The images with the numbers in `range`, as a set.
    pub fn slice(&self, range: Range<usize>) -> Self {
        let bytes = self.image_bytes();
        Self {
            pixels: self.pixels[range.start * bytes..range.end * bytes].to_vec(),
            labels: self.labels.as_ref().map(|labels| labels[range.clone()].to_vec()),
            captions: self.captions.as_ref().map(|captions| captions[range].to_vec()),
            class_names: self.class_names.clone(),
            ..*self
        }
    }

    /// SHA-256 of the captions, in hexadecimal.
    pub fn captions_sha256(&self) -> String {
        let mut hash = Sha256::new();
        for caption in self.captions.iter().flatten() {
            hash.update((caption.len() as u64).to_le_bytes());
            hash.update(caption);
        }
        hex(&hash.finalize())
    }

    /// SHA-256 of all else that training can see of the set (sizes, pixels, labels, names), in hexadecimal.
    pub fn sha256(&self) -> String {
        let mut hash = Sha256::new();
        let Self { channels, height, width, pixels, labels, class_names, captions: _, skipped: _ } =
            self;
        for size in [*channels, *height, *width, pixels.len(), class_names.len()] {
            hash.update((size as u64).to_le_bytes());
        }
        hash.update(pixels);
        for label in labels.iter().flatten() {
            hash.update(label.to_le_bytes());
        }
        for name in class_names {
            hash.update((name.len() as u64).to_le_bytes());
            hash.update(name);
        }
        hex(&hash.finalize())
    }

    /// Number of classes: one more than the largest label; 0 without labels.
    pub fn classes(&self) -> usize {
        self.labels.iter().flatten().max().map_or(0, |&label| label as usize + 1)
    }

    /// The set at the size a network takes. Smaller images are centred on background, which is 0 (−1 to
    /// a network); an odd pixel goes to the bottom and the right. `what` names the set in errors.
    ///
    /// # Errors
    /// [`Error::Value`] where images are larger, or gray for a colour network or the other way round.
    pub fn fit(self, what: &str, channels: usize, height: usize, width: usize) -> Result<Self> {
        if self.channels != channels || self.height > height || self.width > width {
            let shape = |c: usize, h: usize, w: usize| {
                format!("{w}×{h} {}", if c == 1 { "gray".into() } else { format!("{c}-channel") })
            };
            return Err(Error::value(
                what,
                format!("a set of {} images", shape(self.channels, self.height, self.width)),
                format!(
                    "the network takes {} and images are padded, never scaled or recoloured; \
                     convert them first",
                    shape(channels, height, width)
                ),
            ));
        }
        if (self.height, self.width) == (height, width) {
            return Ok(self);
        }
        let (top, left) = ((height - self.height) / 2, (width - self.width) / 2);
        let (row, line) = (self.width * channels, width * channels);
        let mut pixels = vec![0; self.len() * height * line];
        for (padded, image) in
            pixels.chunks_exact_mut(height * line).zip(self.pixels.chunks_exact(self.image_bytes()))
        {
            for (y, bytes) in image.chunks_exact(row).enumerate() {
                padded[(top + y) * line + left * channels..][..row].copy_from_slice(bytes);
            }
        }
        Ok(Self { height, width, pixels, ..self })
    }

    /// The images with the given numbers as a network takes them: f32 `[B, C, H, W]`, `byte/127.5 − 1`.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn batch(&self, indices: &[usize], device: &Device) -> candle_core::Result<Tensor> {
        let mut values = Vec::with_capacity(indices.len() * self.image_bytes());
        for &index in indices {
            values.extend(self.image(index).iter().map(|&byte| f32::from(byte) / 127.5 - 1.0));
        }
        let shape = (indices.len(), self.height, self.width, self.channels);
        Tensor::from_vec(values, shape, device)?.permute((0, 3, 1, 2))?.contiguous()
    }
}

/// Bytes as hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A file that does not hold what it should.
fn malformed(path: &Path, problem: impl Into<String>) -> Error {
    Error::Format { path: path.to_owned(), problem: problem.into() }
}

#[cfg(test)]
mod tests;
