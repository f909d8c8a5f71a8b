//! What makes the networks fast on a CPU.
//!
//! A network is compiled into a `program::Program`: a list of operations over one arena, whose
//! buffers the planner has assigned. The program checks once that no operation can leave the arena or
//! overwrite its own input, and is safe to run from then on; `unsafe` stays in here. Each operation is
//! cut into items that a `team` of threads works on; what vectors compute is written once, for any
//! instruction set (`simd`), and the set is chosen in one place (`isa`).
//!
//! Maps are channels last, with channels padded by zeros to whole cache lines. A sample's result does
//! not depend on its neighbours or on the number of threads: items never share a sum, and every sum
//! has an order that only the layer's shape decides. Maps hold f32 or, where the processor multiplies
//! it, bf16 (`numbers`); sums, norms and softmax are of f32 either way.

// Loops over lanes and tiles index several arrays at once, and must leave nothing that is not inlined.
#![allow(clippy::needless_range_loop)]

mod activation;
mod arena;
mod attention;
mod bf16;
mod constants;
mod direct;
mod element;
mod finish;
mod gemm;
mod gradient;
mod image;
mod int8;
mod isa;
mod kernel_bench;
mod moves;
mod norm;
mod observe;
mod peak;
mod pixels;
mod program;
mod quantized;
#[cfg(test)]
mod reference;
mod rms_norm;
mod scheme;
mod simd;
mod team;
#[cfg(test)]
mod tests;
mod tokens;
mod winograd;

pub(crate) use activation::Function;
pub(crate) use arena::{Aligned, Buffer, Layout, NoMemory, padded};
pub(crate) use attention::{Attend, PackKeys, PackValues};
pub(crate) use constants::{Constants, Values};
pub(crate) use direct::{Direct, Taps};
pub(crate) use element::ElementType;
pub(crate) use finish::Finish;
pub(crate) use gradient::{
    ActivateGradient, AttendGradient, Combine, DirectGradient, Filter, Form, GateGradient,
    GegluGradient, ModulateGradient, NormGradient, NormSource, Pack, PackBias, Row, Scale, Sums,
    Way, WinogradGradient, places,
};
pub(crate) use image::{Channels, Downsample, Export, Image, Import, Upsample};
pub use isa::Isa;
pub use kernel_bench::{KernelBench, Layer};
pub(crate) use moves::{Activate, Embed, Fill, Learned, LearnedGradient, Nearest};
pub(crate) use norm::{GroupNormAffine, GroupNormApply, GroupNormStatistics};
pub(crate) use observe::{Observe, Watch};
pub use peak::Peak;
pub(crate) use pixels::{CopyPixels, Crop};
pub(crate) use program::{Call, Operation, Part, Program, Workspace};
pub use program::{Footprint, Timing};
pub(crate) use quantized::{Grid, MOST_PRODUCTS, Quantize, Quantized, Weights as QuantizedWeights};
pub(crate) use rms_norm::RmsNorm;
pub(crate) use tokens::{CountTokens, Gate, Geglu, Modulate, Sum, SumGradient, Vector};
pub(crate) use winograd::{Variant, Winograd};
