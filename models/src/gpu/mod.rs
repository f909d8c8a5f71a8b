//! Networks compiled for a GPU, and what else runs there: kernels of our own, convolutions by cuDNN, products by cuBLAS.
//!
//! A map is a tensor `[B, height, width, channels]`: the channels of a pixel lie side by side, as tensor cores take
//! them, and a linear map of every pixel is one product.

mod attention;
mod builder;
mod context;
mod convolution;
mod cudnn;
mod kernels;
mod launch;
mod lists;
mod ops;
mod parameters;
mod product;
mod program;
mod tape;
mod training;

pub(crate) use launch::{Kernels, knows, numbers, over, view};
pub(crate) use lists::{join, part};
pub(crate) use program::Program;
pub(crate) use training::Training;

use crate::graph::{Graph, Op, Scalar, Sees};
use crate::kernels::Function;
use crate::weights::Weights;

/// Numbers of a program's inputs: the noisy samples; the condition, or, where the network is trained, the vectors that
/// time and condition become ([`crate::features`]); and the times.
const SAMPLE: usize = 0;
const CONDITION: usize = 1;
const FEATURES: usize = 1;
const TIME: usize = 2;

/// Whether a network may be compiled for a GPU: one that has its weights, of a type and operations there are kernels for.
pub(crate) fn compiles(graph: &Graph, weights: &Weights) -> bool {
    let known = weights.device().is_cuda() && knows(weights.dtype());
    known && graph.answers().len() == 1 && graph.ops.iter().all(has_kernels)
}

fn has_kernels(op: &Op) -> bool {
    match op {
        Op::Learned { .. }
        | Op::Geglu { .. }
        | Op::Prompt { .. }
        | Op::Embed { .. }
        | Op::TextTime { .. }
        | Op::Nearest { .. }
        | Op::Crop { .. }
        | Op::Join { .. }
        | Op::Take { .. }
        | Op::RmsNorm { .. }
        | Op::Sum { .. }
        | Op::Sinusoid { of: Scalar::Guidance | Scalar::Number(_), .. }
        | Op::Modulate { plus_one: false, .. } => false,
        Op::Activate { function, .. } => {
            !matches!(function, Function::QuickGelu | Function::SoftClamp)
        }
        Op::Answer { factor, shift, .. } => (*factor, *shift) == (1.0, 0.0),
        Op::Convolve { taps, .. } => taps.side == 3,
        Op::Attend { queries, keys, values, sees, .. } => {
            *sees == Sees::All && queries.map == keys.map && queries.map == values.map
        }
        _ => true,
    }
}

/// Whether such a network is trained by steps of its own: every operation has its gradient here.
pub(crate) fn trains(graph: &Graph) -> bool {
    !graph.ops.iter().any(|op| {
        let of_tokens = matches!(op, Op::Modulate { .. } | Op::Gate { .. });
        of_tokens || matches!(op, Op::Activate { function: Function::GeluTanh, .. })
    })
}
