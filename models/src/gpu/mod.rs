//! Networks compiled for a GPU, and what else runs there: kernels of our own, convolutions by cuDNN, products by cuBLAS.
//!
//! A map is a tensor `[B, height, width, channels]`: the channels of a pixel lie side by side, as tensor cores take
//! them, and a linear map of every pixel is one product.

mod builder;
mod convolution;
mod kernels;
mod launch;
mod layers;
mod machine;
mod norm;
mod product;
mod program;

pub(crate) use builder::Builder;
pub(crate) use convolution::{Lie, convolve};
pub(crate) use kernels::Waves;
pub(crate) use launch::{Kernels, knows, numbers, over, view};
pub(crate) use norm::group_norm;
pub(crate) use program::Program;

use crate::weights::Weights;

/// Whether a network of these weights is compiled for a GPU: one there, which stays as it is, of a type there are kernels
/// for.
pub(crate) fn compiles(weights: &Weights) -> bool {
    weights.device().is_cuda() && knows(weights.dtype()) && weights.may_merge()
}
