//! The network compiled for the CPU or a GPU: the same layers as [`super::blocks`], added to an assembly. What a sample
//! is told lies in maps of one pixel, so products with it run over the whole batch.

use candle_core::{DType, Device, Result, Tensor};

use super::DiTConfig;
use super::blocks::{EXPANSION, NORM_EPS};
use super::condition::{Condition, TIME_CHANNELS, table};
use super::patches::positions;
use crate::assembly::{Affine, Assembly, End, FIXED, Map, Size, TOLD, X};
use crate::kernels::{Function, Isa, Numbers};
use crate::plan::{self, Plan, Sizes, Training};
use crate::weights::Weights;

type Builder<'a> = plan::Builder<'a, DiTConfig>;

/// The tables of classes, one for each block: what is taken from them has a gradient of candle's own.
pub(super) struct Tables(Vec<Tensor>);

impl Tables {
    pub(super) fn new(config: &DiTConfig, weights: &Weights) -> crate::Result<Self> {
        let place = |i| weights.at(format_args!("transformer_blocks.{i}.norm1.emb"));
        let tables = (0..config.layers).map(|i| table(config, &place(i)));
        Ok(Self(tables.collect::<crate::Result<_>>()?))
    }

    /// Each sample's rows, `[B, width, layers]`.
    pub(super) fn rows(&self, condition: &Condition) -> Result<Tensor> {
        let rows: Vec<Tensor> =
            self.0.iter().map(|table| condition.row_of(table)).collect::<Result<_>>()?;
        Tensor::stack(&rows, 2)
    }

    /// Bytes of all tables.
    pub(super) fn weight_bytes(&self) -> usize {
        self.0.iter().map(|table| table.elem_count() * table.dtype().size_in_bytes()).sum()
    }
}

/// Takes all weights but the tables of classes.
///
/// It is asked for the patches `[B, C·side·side, patches, patches]`, every block's row of its table
/// `[B, width, layers]`, and the sines and cosines of the time `[B, 256]`, and answers with patches
/// `[B, side·side·C', patches, patches]`.
pub(super) fn compile(config: &DiTConfig, weights: &Weights, isa: Isa) -> crate::Result<Plan> {
    let mut builder = Builder::new(config, isa, Numbers::F32, 0);
    assemble(&mut builder, weights)?;
    Ok(Plan::new(builder, sizes(config)))
}

/// The same on the GPU of its weights, with maps, inputs and answer of their type.
#[cfg(feature = "cuda")]
pub(super) fn compile_for_gpu(
    config: &DiTConfig,
    weights: &Weights,
) -> crate::Result<crate::gpu::Program> {
    let mut builder = crate::gpu::Builder::new(config, weights)?;
    assemble(&mut builder, weights)?;
    Ok(builder.finish()?)
}

/// The same of a network whose weights are trained.
pub(super) fn compile_trained(
    config: &DiTConfig,
    weights: &Weights,
    isa: Isa,
) -> crate::Result<Training> {
    let mut builder = Builder::trained(config, isa);
    let ends = assemble(&mut builder, weights)?;
    Ok(Training::new(builder, ends, sizes(config), 1.0))
}

fn sizes(config: &DiTConfig) -> Sizes {
    let (count, pixels) = (config.patches(), config.patch_size * config.patch_size);
    let patch = config.in_channels * pixels;
    Sizes {
        inputs: [count * count * patch, config.width() * config.layers, TIME_CHANNELS],
        output: [config.geometry().out_channels * pixels, count, count],
    }
}

/// The whole network: its input, what it is told, and its answer.
fn assemble<'a>(
    builder: &mut impl Assembly<'a, DiTConfig>,
    weights: &Weights,
) -> crate::Result<[Map; 3]> {
    let config = builder.config();
    let (width, count) = (config.width(), config.patches());
    let Sizes { inputs, output: [answer, ..] } = sizes(config);
    let mut import = |input, height, width, channels| {
        builder.import(input, Size { height, width, channels }, 1.0, 0.0)
    };
    let classes = import(TOLD, config.layers, 1, width);
    let phases = import(FIXED, 1, 1, TIME_CHANNELS);
    let patches = import(X, count, count, inputs[X] / (count * count));

    let mut x = builder.map(count, count, width);
    let positions = builder.constant(&positions(count, width), x)?;
    let place = weights.at("pos_embed.proj");
    let side = config.patch_size;
    let kernel = place.get("weight", &[width, config.in_channels, side, side])?;
    let end = End { residual: Some(positions), ..End::default() };
    builder.pointwise(&[patches], x, &[(kernel, place.get("bias", &[width])?, 1.0)], end)?;
    builder.release(patches);
    builder.release(positions);

    let mut first = None;
    for index in 0..config.layers {
        let place = weights.at(format_args!("transformer_blocks.{index}"));
        let told = embed(builder, &place.at("norm1.emb"), [classes, phases], index)?;
        x = block(builder, &place, x, told)?;
        // The first block's embedding of time and class is the output's, too.
        match first {
            None => first = Some(told),
            Some(_) => builder.release(told),
        }
    }
    builder.release(classes);
    builder.release(phases);
    let told = first.expect("a configuration has at least one layer");
    let parts = builder.told(2 * width);
    linear(builder, &weights.at("proj_out_1"), told, parts)?;
    builder.release(told);
    let normed = builder.modulate(x, NORM_EPS, parts, [1, 0]);
    builder.release(x);
    builder.release(parts);
    let y = builder.answer(count, count, answer);
    linear(builder, &weights.at("proj_out_2"), normed, y)?;
    builder.release(normed);
    builder.export(y, None);
    Ok([patches, classes, y])
}

/// Time and class as block `index` sees them, through SiLU.
fn embed<'a>(
    builder: &mut impl Assembly<'a, DiTConfig>,
    weights: &Weights,
    [classes, phases]: [Map; 2],
    index: usize,
) -> crate::Result<Map> {
    let width = builder.config().width();
    let time = weights.at("timestep_embedder");
    let hidden = builder.map(1, 1, width);
    linear(builder, &time.at("linear_1"), phases, hidden)?;
    let active = builder.activate(hidden, Function::Silu);
    builder.release(hidden);
    let class = builder.pixel(classes, index);
    let sum = builder.map(1, 1, width);
    let end = End { residual: Some(class), ..End::default() };
    let part = weight(&time.at("linear_2"), width, width)?;
    builder.pointwise(&[active], sum, &[part], end)?;
    builder.release(active);
    builder.release(class);
    let told = builder.activate(sum, Function::Silu);
    builder.release(sum);
    Ok(told)
}

/// A block, with `told` what time and class tell it; `x` is used up.
fn block<'a>(
    builder: &mut impl Assembly<'a, DiTConfig>,
    weights: &Weights,
    x: Map,
    told: Map,
) -> crate::Result<Map> {
    let config = builder.config();
    let (count, width) = (config.patches(), config.width());
    let parts = builder.told(6 * width);
    linear(builder, &weights.at("norm1.linear"), told, parts)?;

    let normed = builder.modulate(x, NORM_EPS, parts, [1, 0]);
    let gathered = attention(builder, &weights.at("attn1"), normed)?;
    let y = builder.map(count, count, width);
    linear(builder, &weights.at("attn1.to_out.0"), gathered, y)?;
    builder.release(gathered);
    let sum = builder.gate(y, x, parts, 2);
    builder.release(y);
    builder.release(x);

    let normed = builder.modulate(sum, config.norm_eps, parts, [4, 3]);
    let wide = builder.map(count, count, EXPANSION * width);
    linear(builder, &weights.at("ff.net.0.proj"), normed, wide)?;
    builder.release(normed);
    let hidden = builder.activate(wide, config.activation.into());
    builder.release(wide);
    let y = builder.map(count, count, width);
    linear(builder, &weights.at("ff.net.2"), hidden, y)?;
    builder.release(hidden);
    let x = builder.gate(y, sum, parts, 5);
    for map in [y, sum, parts] {
        builder.release(map);
    }
    Ok(x)
}

/// What attention gathers; `x` is used up.
fn attention<'a>(
    builder: &mut impl Assembly<'a, DiTConfig>,
    weights: &Weights,
    x: Map,
) -> crate::Result<Map> {
    let config = builder.config();
    let width = config.width();
    let part = |name, factor| -> crate::Result<Affine> {
        let place = weights.at(name);
        let weight = place.get("weight", &[width, width])?;
        let bias = match config.attention_bias {
            true => place.get("bias", &[width])?,
            false => Tensor::zeros(width, DType::F32, &Device::Cpu)?,
        };
        Ok((weight, bias, factor))
    };
    // The scale of the scores goes into the queries.
    let scale = 1.0 / (config.head_dim as f64).sqrt();
    let parts = [part("to_q", scale)?, part("to_k", 1.0)?, part("to_v", 1.0)?];
    let gathered = builder.attend(x, &parts, config.heads)?;
    builder.release(x);
    Ok(gathered)
}

/// A linear map of every pixel of `source` to `target`.
fn linear<'a>(
    builder: &mut impl Assembly<'a, DiTConfig>,
    weights: &Weights,
    source: Map,
    target: Map,
) -> crate::Result<()> {
    let (input, output) = (builder.size(source).channels, builder.size(target).channels);
    builder.pointwise(&[source], target, &[weight(weights, input, output)?], End::default())
}

fn weight(weights: &Weights, input: usize, output: usize) -> crate::Result<Affine> {
    Ok((weights.get("weight", &[output, input])?, weights.get("bias", &[output])?, 1.0))
}
