//! Images as patches, and back.

use candle_core::{Result, Tensor};

/// Squares of `side` pixels: `[B, C, H, W]` → `[B, C·side·side, H/side, W/side]`.
pub(crate) fn cut(x: &Tensor, side: usize) -> Result<Tensor> {
    if side == 1 {
        return Ok(x.clone());
    }
    let (batch, channels, height, width) = x.dims4()?;
    let (rows, columns) = (height / side, width / side);
    x.reshape(&[batch, channels, rows, side, columns, side][..])?
        .permute([0, 1, 3, 5, 2, 4])?
        .reshape((batch, channels * side * side, rows, columns))
}

/// `[B, side·side·C, H/side, W/side]` → `[B, C, H, W]`.
pub(crate) fn join(y: &Tensor, side: usize) -> Result<Tensor> {
    if side == 1 {
        return Ok(y.clone());
    }
    let (batch, all, rows, columns) = y.dims4()?;
    let channels = all / (side * side);
    y.reshape(&[batch, side, side, channels, rows, columns][..])?
        .permute([0, 3, 4, 1, 5, 2])?
        .reshape((batch, channels, rows * side, columns * side))
}
