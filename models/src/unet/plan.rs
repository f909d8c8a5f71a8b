//! The network compiled for the CPU or a GPU: the same layers as [`super::blocks`], added to an assembly.

mod attention;
mod blocks;
#[cfg(feature = "cuda")]
mod embedding;
mod resnet;

use super::config::{Activation, TimeEmbedding};
use super::{UNet2DConfig, UNet2DModel};
use crate::assembly::{Assembly, End, FIXED, Map, Size, TOLD, X};
use crate::kernels::{Function, Isa, Numbers, Taps, padded};
use crate::plan::{self, Plan, Sizes, Training};
use crate::weights::Weights;

type Builder<'a> = plan::Builder<'a, UNet2DConfig>;

/// Takes all weights but those of the time and class embedding. Maps between layers, and with them the
/// operands of products, are of `numbers`; what comes in and goes out is f32.
///
/// It is asked for `x` `[B, C, H, W]`, the time embedding `[B, time width]`, already through the
/// activation, and sigma `[B]`, by which a network with Fourier embedding divides.
pub(super) fn compile(
    config: &UNet2DConfig,
    weights: &Weights,
    isa: Isa,
    numbers: Numbers,
) -> crate::Result<Plan> {
    let projected = UNet2DModel::weight_shapes(config)?
        .iter()
        .filter(|(name, _)| name.ends_with("time_emb_proj.bias"))
        .map(|(_, shape)| padded(shape[0]))
        .sum();
    let mut builder = Builder::new(config, isa, numbers, projected);
    let time = embedded(&mut builder);
    assemble(&mut builder, weights, time)?;
    Ok(Plan::new(builder, sizes(config)))
}

/// The same on the GPU of its weights, and with maps of their type; what comes in and goes out is of it, too. It takes
/// the weights of the time and class embedding as well, and is asked for `x`, the condition (or anything, if the network
/// has none), and the times.
#[cfg(feature = "cuda")]
pub(super) fn compile_for_gpu(
    config: &UNet2DConfig,
    weights: &Weights,
) -> crate::Result<crate::gpu::Program> {
    let mut builder = crate::gpu::Builder::new(config, weights)?;
    let time = embedding::embedding(&mut builder, weights)?;
    assemble(&mut builder, weights, time)?;
    Ok(builder.finish()?)
}

/// The same of a network whose weights are trained and f32, with the CPU's inputs: `x` is of the type of the maps, as the
/// answer is.
#[cfg(feature = "cuda")]
pub(super) fn compile_trained_for_gpu(
    config: &UNet2DConfig,
    weights: &Weights,
) -> crate::Result<crate::gpu::Training> {
    let all = weights.in_f32();
    let mut builder = crate::gpu::Builder::trained(config, &all, weights.dtype())?;
    let time = embedded(&mut builder);
    let ends = assemble(&mut builder, &all, time)?;
    let divided = config.time_embedding == TimeEmbedding::Fourier;
    Ok(crate::gpu::Training::new(builder, ends, scale(config).0, divided)?)
}

/// The same of a network whose weights are trained.
pub(super) fn compile_trained(
    config: &UNet2DConfig,
    weights: &Weights,
    isa: Isa,
) -> crate::Result<Training> {
    let mut builder = Builder::trained(config, isa);
    let time = embedded(&mut builder);
    let ends = assemble(&mut builder, weights, time)?;
    let trained = Training::new(builder, ends, sizes(config), scale(config).0);
    Ok(match config.time_embedding {
        TimeEmbedding::Fourier => trained.divided(),
        TimeEmbedding::Positional | TimeEmbedding::Learned => trained,
    })
}

fn sizes(config: &UNet2DConfig) -> Sizes {
    let pixels = config.height * config.width;
    Sizes {
        inputs: [pixels * config.in_channels, config.time_width(), 1],
        output: [config.out_channels, config.height, config.width],
    }
}

/// What the network's input is multiplied with, and what is added.
fn scale(config: &UNet2DConfig) -> (f32, f32) {
    if config.center_input_sample { (2.0, -1.0) } else { (1.0, 0.0) }
}

/// The time embedding that a network is asked for.
fn embedded<'a>(builder: &mut impl Assembly<'a, UNet2DConfig>) -> Map {
    let channels = builder.config().time_width();
    builder.import(TOLD, Size { height: 1, width: 1, channels }, 1.0, 0.0)
}

/// All but the time embedding, `time`: the input, that, and the answer.
fn assemble<'a>(
    builder: &mut impl Assembly<'a, UNet2DConfig>,
    weights: &Weights,
    time: Map,
) -> crate::Result<[Map; 3]> {
    let config = builder.config();
    let UNet2DConfig { height, width, in_channels, .. } = *config;
    builder.time(time);
    let (factor, shift) = scale(config);
    let x = builder.import(X, Size { height, width, channels: in_channels }, factor, shift);
    let first = builder.map(height, width, config.channels[0]);
    builder.convolve(&weights.at("conv_in"), x, first, Taps::SAME, End::default())?;
    builder.release(x);

    let bottom = blocks::network(builder, weights, first)?;

    let (groups, name) = (config.norm_num_groups, weights.at("conv_norm_out"));
    let normed =
        builder.normalise(&name, &[bottom], (groups, config.norm_eps), None, Function::Silu)?;
    builder.release(bottom);
    let y = builder.answer(height, width, config.out_channels);
    builder.convolve(&weights.at("conv_out"), normed, y, Taps::SAME, End::default())?;
    builder.release(normed);
    let fourier = config.time_embedding == TimeEmbedding::Fourier;
    builder.export(y, fourier.then_some(FIXED));
    Ok([x, time, y])
}

impl From<Activation> for Function {
    fn from(activation: Activation) -> Self {
        match activation {
            Activation::Silu => Self::Silu,
            Activation::Mish => Self::Mish,
            Activation::Gelu => Self::Gelu,
            Activation::Relu => Self::Relu,
        }
    }
}
