//! Networks compiled for a GPU, and what else runs there: kernels of our own, convolutions by cuDNN, products by cuBLAS.
//!
//! A map is a tensor `[B, height, width, channels]`: the channels of a pixel lie side by side, as tensor cores take
//! them, and a linear map of every pixel is one product.

mod attention;
mod builder;
mod convolution;
mod cudnn;
mod kernels;
mod launch;
mod lists;
mod machine;
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

use crate::graph::{Graph, Op};
use crate::weights::Weights;

/// Numbers of a program's inputs: the noisy samples; the condition, or, where the network is trained, the vectors that
/// time and condition become ([`crate::features`]); and the times.
const SAMPLE: usize = 0;
const CONDITION: usize = 1;
const FEATURES: usize = 1;
const TIME: usize = 2;

/// Whether a network of these weights may be compiled for a GPU: one there, of a type there are kernels for.
pub(crate) fn compiles(weights: &Weights) -> bool {
    weights.device().is_cuda() && knows(weights.dtype())
}

/// Whether such a network is trained by steps of its own: every operation has its gradient here.
pub(crate) fn trains(graph: &Graph) -> bool {
    !graph.ops.iter().any(|op| matches!(op, Op::Modulate { .. } | Op::Gate { .. }))
}
