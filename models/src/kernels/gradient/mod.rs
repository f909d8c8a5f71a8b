//! What training needs beside the kernels of an evaluation: weights packed anew for each run, and the
//! gradients of every layer.
//!
//! The gradient of a map lies in the arena as the map does, its padding zero. The gradient of a
//! convolution's input is itself a convolution, by the same kernels over weights packed the other way
//! round; that of its weights is a sum over the pixels of the whole batch, cut into a number of parts
//! that the shape and the batch decide, never the threads, and added in their order. So a step's bits
//! do not depend on the number of threads.

mod attention;
mod direct;
mod filter;
mod norm;
mod outer;
mod pack;
mod resize;
mod scheme;
mod sums;
#[cfg(test)]
mod tests;
mod tokens;
mod winograd;

pub(crate) use attention::AttendGradient;
pub(crate) use direct::DirectGradient;
pub(crate) use filter::{Filter, Row, places};
pub(crate) use norm::{NormGradient, NormSource};
pub(crate) use pack::{Form, Pack, PackBias};
pub(crate) use resize::{Combine, Scale, Way};
pub(crate) use sums::Sums;
pub(crate) use tokens::{ActivateGradient, GateGradient, GegluGradient, ModulateGradient};
pub(crate) use winograd::WinogradGradient;
