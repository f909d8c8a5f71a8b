//! What tells tokens their places.

use super::Size;

/// What a token's place is in, of a network that was made for one size.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Grid {
    /// Tokens of a side at that size, over which those of any other size are spread.
    pub(crate) side: usize,
    /// What places are divided by after that.
    pub(crate) scale: f32,
}

/// Sines and cosines of column and row, `[pixels, channels]`: a quarter of the channels each for `sin(x·ω)`, `cos(x·ω)`,
/// `sin(y·ω)` and `cos(y·ω)`, with `ω_i = 10000^(−4i/channels)` (Vaswani et al. 2017, §3.5, in two dimensions); places in f32
/// and all else in f64 until it is done, as diffusers has it.
pub(crate) fn positions(size: Size, grid: Grid) -> Vec<f32> {
    let quarter = size.channels / 4;
    let frequency = |i: usize| 1.0 / libm::pow(10_000.0, i as f64 / quarter as f64);
    let place = |index: usize, count: usize| {
        let spread = (count as f64 / grid.side as f64) as f32;
        f64::from(index as f32 / spread / grid.scale)
    };
    let mut values = Vec::with_capacity(size.height * size.width * size.channels);
    for y in 0..size.height {
        for x in 0..size.width {
            for place in [place(x, size.width), place(y, size.height)] {
                let phase = |i: usize| place * frequency(i);
                values.extend((0..quarter).map(|i| libm::sin(phase(i)) as f32));
                values.extend((0..quarter).map(|i| libm::cos(phase(i)) as f32));
            }
        }
    }
    values
}
