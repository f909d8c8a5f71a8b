//! Pixels become PNG, JPEG or WebP, away from the threads that serve requests.

use image::{
    ExtendedColorType, ImageEncoder,
    codecs::{jpeg::JpegEncoder, png::PngEncoder, webp::WebPEncoder},
};

use super::{error::Problem, wire::OutputFormat};
use crate::engine::Image;

/// How images leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Encoding {
    pub(super) format: OutputFormat,
    /// Quality, 0 to 100; `None` is the best there is: lossless for WebP.
    pub(super) quality: Option<u8>,
}

/// Encodes on the blocking pool.
pub(super) async fn encode(image: Image, encoding: Encoding) -> Result<Vec<u8>, Problem> {
    tokio::task::spawn_blocking(move || encode_now(&image, encoding))
        .await
        .map_err(Problem::internal)?
        .map_err(|error| Problem::internal(format!("encoding: {error}")))
}

fn encode_now(image: &Image, encoding: Encoding) -> Result<Vec<u8>, String> {
    let (width, height) = (image.width as u32, image.height as u32);
    let color = if image.channels == 1 { ExtendedColorType::L8 } else { ExtendedColorType::Rgb8 };
    let mut bytes = Vec::new();
    let written = match (encoding.format, encoding.quality) {
        (OutputFormat::Png, _) => {
            PngEncoder::new(&mut bytes).write_image(&image.pixels, width, height, color)
        }
        (OutputFormat::Jpeg, quality) => {
            // The encoder's lowest quality is 1.
            JpegEncoder::new_with_quality(&mut bytes, quality.unwrap_or(100).max(1)).write_image(
                &image.pixels,
                width,
                height,
                color,
            )
        }
        (OutputFormat::Webp, None) => {
            WebPEncoder::new_lossless(&mut bytes).write_image(&image.pixels, width, height, color)
        }
        (OutputFormat::Webp, Some(quality)) => return lossy_webp(image, quality),
    };
    written.map_err(|error| error.to_string())?;
    Ok(bytes)
}

fn lossy_webp(image: &Image, quality: u8) -> Result<Vec<u8>, String> {
    let rgb: Vec<u8> = match image.channels {
        1 => image.pixels.iter().flat_map(|gray| [*gray; 3]).collect(),
        _ => image.pixels.clone(),
    };
    webp::Encoder::from_rgb(&rgb, image.width as u32, image.height as u32)
        .encode_simple(false, f32::from(quality))
        .map(|memory| memory.to_vec())
        .map_err(|error| format!("{error:?}"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn gradient(channels: usize) -> Image {
        let pixels =
            (0..16 * 8 * channels).map(|i| (i * 255 / (16 * 8 * channels)) as u8).collect();
        Image { width: 16, height: 8, channels, pixels }
    }

    #[test]
    fn every_format_gives_back_the_picture() {
        for channels in [1, 3] {
            for (format, quality, tolerance) in [
                (OutputFormat::Png, None, 0),
                (OutputFormat::Webp, None, 0),
                (OutputFormat::Jpeg, None, 4),
                (OutputFormat::Jpeg, Some(0), 255),
                (OutputFormat::Webp, Some(100), 24),
                (OutputFormat::Webp, Some(0), 255),
            ] {
                let image = gradient(channels);
                let bytes = encode_now(&image, Encoding { format, quality }).unwrap();
                let decoded = image::load_from_memory(&bytes).unwrap();
                assert_eq!((decoded.width(), decoded.height()), (16, 8));
                let decoded = if channels == 1 {
                    decoded.to_luma8().into_raw()
                } else {
                    decoded.to_rgb8().into_raw()
                };
                let worst = decoded.iter().zip(&image.pixels).map(|(a, b)| a.abs_diff(*b)).max();
                assert!(
                    worst.unwrap() <= tolerance,
                    "{format:?} {quality:?} {channels}: {worst:?}"
                );
            }
        }
    }
}
