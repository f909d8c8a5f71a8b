//! What tells tokens their places.

use super::Size;

/// Sines and cosines of column and row, `[pixels, channels]`: a quarter of the channels each for `sin(x·ω)`, `cos(x·ω)`,
/// `sin(y·ω)` and `cos(y·ω)`, with `ω_i = 10000^(−4i/channels)` (Vaswani et al. 2017, §3.5, in two dimensions); in f64
/// until they are done, as diffusers has it.
pub(crate) fn positions(size: Size) -> Vec<f32> {
    let quarter = size.channels / 4;
    let frequency = |i: usize| 1.0 / libm::pow(10_000.0, i as f64 / quarter as f64);
    let mut values = Vec::with_capacity(size.height * size.width * size.channels);
    for y in 0..size.height {
        for x in 0..size.width {
            for place in [x, y] {
                let phase = |i: usize| place as f64 * frequency(i);
                values.extend((0..quarter).map(|i| libm::sin(phase(i)) as f32));
                values.extend((0..quarter).map(|i| libm::cos(phase(i)) as f32));
            }
        }
    }
    values
}
