//! Pictures that requests bring: read within limits, and counted among what there is for bodies.

use std::{io::Cursor, sync::Arc};

use axum::http::StatusCode;
use image::{DynamicImage, GrayImage, ImageDecoder, ImageFormat, ImageReader, Limits, RgbImage};

use super::{
    body::{Budget, Taken},
    error::Problem,
};

/// Longest side of a picture that is read, in pixels.
const LONGEST_SIDE: u32 = 16_384;
/// Most pixels of a picture that is read: a square of 4096.
const MOST_PIXELS: u64 = 1 << 24;
/// Most bytes that a decoder may take: 16 bits of four channels.
const DECODER_BYTES: u64 = 8 * MOST_PIXELS;

/// What images begin with, beside the request for them.
#[derive(Debug, Clone)]
pub(super) struct Edit {
    /// The image, upright.
    pub(super) picture: Arc<Picture>,
    /// Of its size: 255 where it is drawn anew. All of it is where there is none.
    pub(super) mask: Option<Arc<GrayImage>>,
    /// Of the steps the last part that is taken, above 0 to 1.
    pub(super) strength: f64,
}

/// A picture and the memory that it takes of what there is for bodies.
#[derive(Debug)]
pub(super) struct Picture {
    pub(super) pixels: RgbImage,
    _memory: Taken,
}

/// The picture in a field, turned as its EXIF data says, without transparency, as Pillow's `convert("RGB")` has it.
pub(super) fn decoded(field: &str, bytes: &[u8], budget: &Arc<Budget>) -> Result<Picture, Problem> {
    let (picture, mut memory) = read(field, bytes, budget)?;
    let pixels = picture.into_rgb8();
    memory.keep(pixels.as_raw().len());
    Ok(Picture { pixels, _memory: memory })
}

/// Where a picture of this size is drawn anew: 255 where a mask is transparent, as OpenAI has it.
pub(super) fn drawn(
    bytes: &[u8],
    (width, height): (u32, u32),
    budget: &Arc<Budget>,
) -> Result<GrayImage, Problem> {
    let (mask, _memory) = read("mask", bytes, budget)?;
    if !mask.color().has_alpha() {
        let message = "`mask` has no transparency: send a PNG with an alpha channel that is 0 where the image is drawn anew";
        return Err(Problem::new(StatusCode::BAD_REQUEST, "invalid_value", message).at("mask"));
    }
    if (mask.width(), mask.height()) != (width, height) {
        let remedy = format!("it must be as large as the image, {width}x{height}");
        let size = format!("{}x{}", mask.width(), mask.height());
        return Err(Problem::value("mask", size, remedy));
    }
    let alpha = mask.into_rgba8().into_raw().into_iter().skip(3).step_by(4);
    let drawn = alpha.map(|alpha| if alpha == 0 { 255 } else { 0 }).collect();
    GrayImage::from_raw(width, height, drawn).ok_or_else(|| Problem::internal("a mask's size"))
}

/// A picture in a field, upright, and the memory that it takes while it is turned into another kind.
fn read(field: &str, bytes: &[u8], budget: &Arc<Budget>) -> Result<(DynamicImage, Taken), Problem> {
    let refuse = |problem: &dyn std::fmt::Display| {
        let message =
            format!("`{field}` cannot be read ({problem}): send a PNG, JPEG or WebP file");
        Problem::new(StatusCode::BAD_REQUEST, "invalid_value", message).at(field)
    };
    let reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format();
    let mut reader = reader.map_err(|error| refuse(&error))?;
    let known = [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP];
    if !reader.format().is_some_and(|format| known.contains(&format)) {
        return Err(refuse(&"it begins like none of these"));
    }
    let mut limits = Limits::default();
    limits.max_image_width = Some(LONGEST_SIDE);
    limits.max_image_height = Some(LONGEST_SIDE);
    limits.max_alloc = Some(DECODER_BYTES);
    reader.limits(limits);
    let mut decoder = reader.into_decoder().map_err(|error| refuse(&error))?;
    let (width, height) = decoder.dimensions();
    if u64::from(width) * u64::from(height) > MOST_PIXELS {
        let remedy = format!("at most {MOST_PIXELS} pixels are read; send a smaller one");
        return Err(Problem::value(field, format!("{width}x{height}"), remedy));
    }
    // What it is decoded to, and what is made of that: four bytes a pixel at most.
    let bytes = decoder.total_bytes() + 4 * u64::from(width) * u64::from(height);
    let memory = budget.take(bytes as usize)?;
    let orientation = decoder.orientation().map_err(|error| refuse(&error))?;
    let mut picture = DynamicImage::from_decoder(decoder).map_err(|error| refuse(&error))?;
    picture.apply_orientation(orientation);
    Ok((picture, memory))
}

#[cfg(test)]
mod tests;
