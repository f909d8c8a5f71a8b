//! Pixels become PNG, JPEG or WebP; but for the smallest, away from the threads that serve requests.

use image::{
    ExtendedColorType, ImageEncoder,
    codecs::{jpeg::JpegEncoder, webp::WebPEncoder},
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

/// The name of a PNG's text that says what it was made with.
const PARAMETERS: &str = "parameters";

/// Bytes of pixels of which a PNG is made at once: it takes some 15 µs, as handing it over would.
const SMALL: usize = 1024;

/// Encodes on the blocking pool what is not small; a PNG holds `parameters` as well.
pub(super) async fn encode(
    image: Image,
    encoding: Encoding,
    parameters: Option<String>,
) -> Result<Vec<u8>, Problem> {
    let encoded = if encoding.format == OutputFormat::Png && image.pixels.len() <= SMALL {
        // So that a request for many lets others have their turn.
        tokio::task::coop::consume_budget().await;
        encode_now(&image, encoding, parameters)
    } else {
        tokio::task::spawn_blocking(move || encode_now(&image, encoding, parameters))
            .await
            .map_err(Problem::internal)?
    };
    encoded.map_err(|error| Problem::internal(format!("encoding: {error}")))
}

fn encode_now(
    image: &Image,
    encoding: Encoding,
    parameters: Option<String>,
) -> Result<Vec<u8>, String> {
    let (width, height) = (image.width as u32, image.height as u32);
    let color = if image.channels == 1 { ExtendedColorType::L8 } else { ExtendedColorType::Rgb8 };
    let mut bytes = Vec::new();
    let written = match (encoding.format, encoding.quality) {
        (OutputFormat::Png, _) => return png(image, parameters).map_err(|error| error.to_string()),
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

fn png(image: &Image, parameters: Option<String>) -> Result<Vec<u8>, png::EncodingError> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, image.width as u32, image.height as u32);
    encoder.set_color(match image.channels {
        1 => png::ColorType::Grayscale,
        _ => png::ColorType::Rgb,
    });
    encoder.set_compression(png::Compression::Fast);
    encoder.set_filter(png::Filter::Adaptive);
    if let Some(text) = parameters {
        // As Pillow does: simple readers know Latin-1 alone.
        match text.chars().all(|letter| letter <= '\u{ff}') {
            true => encoder.add_text_chunk(PARAMETERS.into(), text)?,
            false => encoder.add_itxt_chunk(PARAMETERS.into(), text)?,
        }
    }
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&image.pixels)?;
    writer.finish()?;
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
                let bytes = encode_now(&image, Encoding { format, quality }, None).unwrap();
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

    #[test]
    fn a_png_says_what_it_was_made_with() {
        let image = gradient(3);
        let encoding = Encoding { format: OutputFormat::Png, quality: None };
        let plain = encode_now(&image, encoding, None).unwrap();
        for text in ["Apfel, grün\nSteps: 4, Seed: 7", "りんご 🍎\nSteps: 4"] {
            let bytes = encode_now(&image, encoding, Some(text.to_owned())).unwrap();
            let decoder = png::Decoder::new(std::io::Cursor::new(&bytes));
            let mut reader = decoder.read_info().unwrap();
            let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
            reader.next_frame(&mut pixels).unwrap();
            assert_eq!(pixels, image.pixels);
            let info = reader.info();
            let latin =
                info.uncompressed_latin1_text.iter().map(|it| (&it.keyword, it.text.clone()));
            let utf8 = info.utf8_text.iter().map(|it| (&it.keyword, it.get_text().unwrap()));
            let found: Vec<_> = latin.chain(utf8).collect();
            assert_eq!(found, [(&PARAMETERS.to_owned(), text.to_owned())]);
            // Nothing but the text has come in.
            assert!(bytes.ends_with(&plain[33..]));
        }
    }
}
