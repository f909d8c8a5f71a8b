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
mod layers;
mod lists;
mod machine;
mod parameters;
mod product;
mod program;
mod tape;
mod training;

pub(crate) use builder::Builder;
pub(crate) use kernels::Waves;
pub(crate) use launch::{Kernels, knows, numbers, over, view};
pub(crate) use lists::{join, part};
pub(crate) use program::Program;
pub(crate) use training::Training;

use crate::weights::Weights;

/// Whether a network of these weights may be compiled for a GPU: one there, of a type there are kernels for.
pub(crate) fn compiles(weights: &Weights) -> bool {
    weights.device().is_cuda() && knows(weights.dtype())
}
