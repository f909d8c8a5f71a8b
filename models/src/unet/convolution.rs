//! A convolution: candle's, and on a GPU cuDNN's, asked for by ourselves (`crate::gpu` says why).

use candle_core::{Result, Tensor};

/// `x` `[B, C, H, W]` convolved with `weight` `[O, C, K, K]`, with zeros around, as [`Tensor::conv2d`].
///
/// # Errors
/// Shapes that do not fit, and whatever the device says.
pub(super) fn convolve(
    x: &Tensor,
    weight: &Tensor,
    padding: usize,
    stride: usize,
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() && crate::gpu::knows(x.dtype()) {
        return crate::gpu::convolve(x, weight, padding, stride, crate::gpu::Lie::Rows);
    }
    x.conv2d(weight, padding, stride, 1, 1)
}
