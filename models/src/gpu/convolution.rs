//! Convolutions of maps and their gradients by cuDNN.
//!
//! candle describes each anew, has an algorithm chosen and zeroes memory for it whenever it is asked; sums f16 in
//! f16, and lets f32 be rounded to TF32; and has gradients made by kernels that it has for every shape. Here what a
//! convolution is and how it is done is worked out once for each shape and thread; sums are taken in f32 of what
//! their operands are; and no algorithm adds in an order that differs from one time to the next.

mod graph;
mod plan;

use std::sync::Once;

use candle_core::{CudaDevice, DType, Device, Result, Tensor, bail};

use super::launch::pointer;
use crate::DeviceFault;
pub(super) use plan::Scratch;
use plan::planned;

/// Which of the tensors of a convolution is made of the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Part {
    /// y, of x and the weights.
    Answer,
    /// x's gradient, of the weights and y's.
    OfInput,
    /// The weights' gradient, of x and y's.
    OfWeight,
}

/// A part of a convolution, with zeros around, of contiguous tensors of one type: x `[B, H, W, C]`, weights `[O, K, K, C]`
/// and y `[B, H', W', O]`. What cuDNN does not do in that order is turned into rows and back, of which the log tells the
/// first.
///
/// # Errors
/// Shapes that do not fit, types other than f32, bf16 and f16, and whatever cuDNN says.
pub(super) fn convolve(
    part: Part,
    tensors: [&Tensor; 3],
    [padding, stride]: [usize; 2],
    scratch: &mut Scratch,
) -> Result<()> {
    let problem = Problem::new(tensors, padding, stride)?;
    let Err(reason) = run(part, problem, tensors, scratch)? else { return Ok(()) };
    // Which orders of which types and sizes it has no plan for is not written down anywhere.
    static TOLD: Once = Once::new();
    TOLD.call_once(|| tracing::warn!(?problem, %reason, "convolved in rows, which is slower"));
    let [x, weight, y] = tensors.map(|tensor| tensor.permute((0, 3, 1, 2))?.contiguous());
    let turned = [&x?, &weight?, &y?];
    if let Err(reason) = run(part, Problem { lie: Lie::Rows, ..problem }, turned, scratch)? {
        let said = format!("cuDNN does not do {part:?} of {problem:?}: {reason}");
        return Err(reason.saying(said).into());
    }
    let given = match part {
        Part::Answer => 2,
        Part::OfInput => 0,
        Part::OfWeight => 1,
    };
    tensors[given].slice_set(&turned[given].permute((0, 2, 3, 1))?.contiguous()?, 0, 0)
}

/// Does it, or says why cuDNN has no plan for it.
fn run(
    part: Part,
    problem: Problem,
    [x, weight, y]: [&Tensor; 3],
    scratch: &mut Scratch,
) -> Result<std::result::Result<(), DeviceFault>> {
    let device = cuda(x)?;
    let operands = [pointer(x, 0)?, pointer(weight, 0)?, pointer(y, 0)?];
    // SAFETY: the operands are contiguous, and of the shapes and the type that the problem has.
    match unsafe { planned(device, problem, part, operands, scratch)? } {
        // SAFETY: the same.
        Ok(plan) => unsafe { plan.run(device, operands, scratch) }.map(Ok),
        Err(reason) => Ok(Err(reason)),
    }
}

fn cuda(tensor: &Tensor) -> Result<&CudaDevice> {
    match tensor.device() {
        Device::Cuda(device) => Ok(device),
        _ => bail!("cuDNN convolves on GPUs"),
    }
}

/// How images and weights lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Lie {
    /// `[B, C, H, W]` and `[O, C, K, K]`.
    Rows,
    /// `[B, H, W, C]` and `[O, K, K, C]`.
    Pixels,
}

impl Lie {
    /// Numbers from one to the next in each of the dimensions of [`Lie::Rows`].
    fn strides(self, [_, b, c, d]: [usize; 4]) -> [usize; 4] {
        match self {
            Self::Rows => [b * c * d, c * d, d, 1],
            Self::Pixels => [c * d * b, 1, d * b, b],
        }
    }
}

/// What is convolved with what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Problem {
    dtype: DType,
    lie: Lie,
    /// Of x, the weights and y, as of [`Lie::Rows`].
    shapes: [[usize; 4]; 3],
    padding: usize,
    stride: usize,
}

impl Problem {
    /// Of tensors as [`convolve`] takes them.
    fn new(tensors: [&Tensor; 3], padding: usize, stride: usize) -> Result<Self> {
        let dtype = tensors[0].dtype();
        let like = |tensor: &&Tensor| {
            tensor.dtype() == dtype && tensor.device().same_device(tensors[0].device())
        };
        if !tensors.iter().all(like) || !super::knows(dtype) {
            bail!("a convolution's operands are on one GPU and of one type: f32, bf16 or f16")
        }
        let rows = |tensor: &Tensor| {
            let (a, b, c, d) = tensor.dims4()?;
            Ok::<_, candle_core::Error>([a, d, b, c])
        };
        let [x, weight, y] = tensors.map(rows);
        let shapes = [x?, weight?, y?];
        let [[batch, channels, height, width], [outputs, inputs, tall, wide], y] = shapes;
        let (seen_height, seen_width) = (height + 2 * padding, width + 2 * padding);
        let fits = batch > 0
            && inputs == channels
            && seen_height >= tall
            && seen_width >= wide
            && stride > 0;
        let windows = |seen: usize, size: usize| (seen - size) / stride + 1;
        if !fits || y != [batch, outputs, windows(seen_height, tall), windows(seen_width, wide)] {
            bail!("a convolution of {shapes:?}, padding {padding}, stride {stride}")
        }
        Ok(Self { dtype, lie: Lie::Pixels, shapes, padding, stride })
    }
}
