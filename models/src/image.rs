//! Pictures of 8 bits, as latents become them at the end of a trajectory.

use candle_core::{Device, Result, Tensor};

/// An 8-bit picture, rows top to bottom, channels interleaved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Pixels, left to right.
    pub width: usize,
    /// Pixels, top to bottom.
    pub height: usize,
    /// 1 (gray) or 3 (RGB).
    pub channels: usize,
    /// `height × width × channels` bytes.
    pub pixels: Vec<u8>,
}

impl Image {
    /// The pictures of a batch of clean samples, f32 `[B, C, H, W]` in [−1, 1]:
    /// `round(255·clamp(x/2 + 1/2, 0, 1))`.
    ///
    /// # Errors
    /// Another shape or element type, and whatever the device says.
    pub fn from_batch(x: &Tensor) -> Result<Vec<Self>> {
        let (_, channels, height, width) = x.dims4()?;
        let values: Vec<f32> =
            x.to_device(&Device::Cpu)?.permute((0, 2, 3, 1))?.flatten_all()?.to_vec1()?;
        let byte = |x: &f32| ((x / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round() as u8;
        let picture = |values: &[f32]| Self {
            width,
            height,
            channels,
            pixels: values.iter().map(byte).collect(),
        };
        Ok(values.chunks_exact(channels * height * width).map(picture).collect())
    }
}
