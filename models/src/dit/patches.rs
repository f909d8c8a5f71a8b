//! Images as patches, and back.

use candle_core::{Result, Tensor};

use super::DiTConfig;

/// How an image is cut.
pub(super) struct Patches {
    /// Pixels of a patch's side.
    side: usize,
    /// Patches of an image's side.
    count: usize,
    /// Channels of the answer.
    output: usize,
}

impl Patches {
    pub(super) fn new(config: &DiTConfig) -> Self {
        let output = config.geometry().out_channels;
        Self { side: config.patch_size, count: config.patches(), output }
    }

    /// `[B, C, H, W]` → `[B, C·side·side, count, count]`.
    pub(super) fn cut(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, channels, ..) = x.dims4()?;
        let (side, count) = (self.side, self.count);
        x.reshape(&[batch, channels, count, side, count, side][..])?
            .permute([0, 1, 3, 5, 2, 4])?
            .reshape((batch, channels * side * side, count, count))
    }

    /// `[B, side·side·C', count, count]` → `[B, C', H, W]`.
    pub(super) fn join(&self, y: &Tensor) -> Result<Tensor> {
        let (batch, side, count) = (y.dim(0)?, self.side, self.count);
        y.reshape(&[batch, side, side, self.output, count, count][..])?
            .permute([0, 3, 4, 1, 5, 2])?
            .reshape((batch, self.output, count * side, count * side))
    }
}

/// Sines and cosines of column and row, `[count·count, width]`: a quarter of the channels each for
/// `sin(x·ω)`, `cos(x·ω)`, `sin(y·ω)` and `cos(y·ω)`, with `ω_i = 10000^(−4i/width)`; in f64 until they
/// are done, as diffusers has it.
pub(super) fn positions(count: usize, width: usize) -> Vec<f32> {
    let quarter = width / 4;
    let frequency = |i: usize| 1.0 / libm::pow(10_000.0, i as f64 / quarter as f64);
    let mut values = Vec::with_capacity(count * count * width);
    for y in 0..count {
        for x in 0..count {
            for place in [x, y] {
                let phase = |i: usize| place as f64 * frequency(i);
                values.extend((0..quarter).map(|i| libm::sin(phase(i)) as f32));
                values.extend((0..quarter).map(|i| libm::cos(phase(i)) as f32));
            }
        }
    }
    values
}
