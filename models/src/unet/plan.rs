//! The network compiled for the CPU: the same layers as [`super::blocks`], as a list of kernels over
//! one arena.

mod attention;
mod blocks;
mod resnet;

use super::config::{Activation, TimeEmbedding};
use super::{UNet2DConfig, UNet2DModel};
use crate::kernels::{Export, Function, Import, Isa, Numbers, padded};
use crate::plan::{self, FIXED, Map, Plan, Sizes, TOLD, Training, X};
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
    let Ends { time, projections, .. } = assemble(&mut builder, weights)?;
    let time = builder.image(time);
    builder.insert_projections(projections, time);
    Ok(Plan::new(builder, sizes(config)))
}

/// The same of a network whose weights are trained.
pub(super) fn compile_trained(
    config: &UNet2DConfig,
    weights: &Weights,
    isa: Isa,
) -> crate::Result<Training> {
    let mut builder = Builder::trained(config, isa);
    let Ends { x, time, y, .. } = assemble(&mut builder, weights)?;
    let trained = Training::new(builder, [x, time, y], sizes(config), scale(config).0);
    Ok(match config.time_embedding {
        TimeEmbedding::Fourier => trained.divided(),
        TimeEmbedding::Positional | TimeEmbedding::Learned => trained,
    })
}

/// Where a network begins and ends.
struct Ends {
    x: Map,
    time: Map,
    y: Map,
    /// Where in the list the projections of the time embedding belong: their weights are gathered while
    /// the blocks are built.
    projections: usize,
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

/// The whole network, from its inputs to its output.
fn assemble(builder: &mut Builder, weights: &Weights) -> crate::Result<Ends> {
    let config = builder.config;
    let time = builder.map_of_f32(1, 1, config.time_width());
    let output = builder.image(time);
    builder.push(Import { input: TOLD, output, factor: 1.0, shift: 0.0 });
    if let Some(tape) = &mut builder.tape {
        tape.time = Some(time);
    }
    let projections = builder.len();

    let x = builder.map_of_f32(config.height, config.width, config.in_channels);
    let (factor, shift) = scale(config);
    let output = builder.image(x);
    builder.push(Import { input: X, output, factor, shift });
    let first = builder.map(config.height, config.width, config.channels[0]);
    builder.same(&weights.at("conv_in"), x, first)?;
    builder.release(x);

    let bottom = blocks::network(builder, weights, first)?;

    let (groups, name) = (config.norm_num_groups, weights.at("conv_norm_out"));
    let normed =
        builder.normalise(&name, &[bottom], (groups, config.norm_eps), None, Function::Silu)?;
    builder.release(bottom);
    let y = builder.map_of_f32(config.height, config.width, config.out_channels);
    builder.same(&weights.at("conv_out"), normed, y)?;
    builder.release(normed);
    let fourier = config.time_embedding == TimeEmbedding::Fourier;
    let input = builder.image(y);
    builder.push(Export { input, divisor: fourier.then_some(FIXED) });
    Ok(Ends { x, time, y, projections })
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
