//! The way down, the bottom, and the way up: [`crate::unet::blocks`] as layers of an assembly.

use super::attention::attention;
use super::resnet::resnet;
use crate::assembly::{Assembly, End, Map};
use crate::kernels::Taps;
use crate::unet::UNet2DConfig;
use crate::unet::config::{Block, Resample};
use crate::unet::resnet::Resize;
use crate::weights::Weights;

/// All blocks; `x` is used up.
pub(super) fn network<'a>(
    builder: &mut impl Assembly<'a, UNet2DConfig>,
    weights: &Weights,
    mut x: Map,
) -> crate::Result<Map> {
    let levels = builder.config().levels();
    let mut skips = vec![builder.retain(x)];
    for level in 0..levels {
        let place = weights.at(format_args!("down_blocks.{level}"));
        x = down(builder, &place, level, x, &mut skips)?;
    }
    if builder.config().mid_block {
        x = middle(builder, &weights.at("mid_block"), x)?;
    }
    for index in 0..levels {
        let place = weights.at(format_args!("up_blocks.{index}"));
        x = up(builder, &place, index, x, &mut skips)?;
    }
    Ok(x)
}

fn down<'a>(
    builder: &mut impl Assembly<'a, UNet2DConfig>,
    weights: &Weights,
    level: usize,
    mut x: Map,
    skips: &mut Vec<Map>,
) -> crate::Result<Map> {
    let config = builder.config();
    let (block, output) = (config.down_blocks[level], config.channels[level]);
    for index in 0..config.layers_per_block {
        let next = layer(builder, weights, index, &[x], output, block)?;
        builder.release(x);
        x = next;
        skips.push(builder.retain(x));
    }
    if level + 1 < config.levels() {
        let place = weights.at("downsamplers.0");
        let next = match resample(block, config.downsample) {
            Resample::Resnet => resnet(builder, &place, &[x], output, Resize::Down, 1.0)?,
            Resample::Conv => {
                // Without padding above and left there is one row and column of zeros below and right.
                let padding = config.downsample_padding;
                let taps = Taps { side: 3, stride: 2, padding, doubled: false };
                let image = builder.size(x);
                let target = builder.map(image.height / 2, image.width / 2, output);
                builder.convolve(&place.at("conv"), x, target, taps, End::default())?;
                target
            }
        };
        builder.release(x);
        x = next;
        skips.push(builder.retain(x));
    }
    Ok(x)
}

fn middle<'a>(
    builder: &mut impl Assembly<'a, UNet2DConfig>,
    weights: &Weights,
    x: Map,
) -> crate::Result<Map> {
    let config = builder.config();
    let channels = config.channels[config.levels() - 1];
    let scale = config.mid_block_scale_factor;
    let place = weights.at("resnets.0");
    let mut y = resnet(builder, &place, &[x], channels, Resize::Keep, scale)?;
    builder.release(x);
    if config.add_attention {
        // Without a number of its own the mid block's attention is normalised as the residual blocks
        // are, except beside scale-shift norms, where it is not normalised at all.
        let groups = config
            .attn_norm_num_groups
            .or_else(|| (!config.scale_shift).then_some(config.norm_num_groups));
        let next = attention(builder, &weights.at("attentions.0"), y, groups, scale)?;
        builder.release(y);
        y = next;
    }
    let place = weights.at("resnets.1");
    let next = resnet(builder, &place, &[y], channels, Resize::Keep, scale)?;
    builder.release(y);
    Ok(next)
}

fn up<'a>(
    builder: &mut impl Assembly<'a, UNet2DConfig>,
    weights: &Weights,
    index: usize,
    mut x: Map,
    skips: &mut Vec<Map>,
) -> crate::Result<Map> {
    let config = builder.config();
    let level = config.levels() - 1 - index;
    let (block, output) = (config.up_blocks[index], config.channels[level]);
    for i in 0..=config.layers_per_block {
        let skip = skips.pop().expect("the way down pushed one map for each layer of the way up");
        let next = layer(builder, weights, i, &[x, skip], output, block)?;
        builder.release(x);
        builder.release(skip);
        x = next;
    }
    if level > 0 {
        let place = weights.at("upsamplers.0");
        let next = match resample(block, config.upsample) {
            Resample::Resnet => resnet(builder, &place, &[x], output, Resize::Up, 1.0)?,
            Resample::Conv => {
                let taps = Taps { side: 3, stride: 1, padding: 1, doubled: true };
                let image = builder.size(x);
                let target = builder.map(2 * image.height, 2 * image.width, output);
                builder.convolve(&place.at("conv"), x, target, taps, End::default())?;
                target
            }
        };
        builder.release(x);
        x = next;
    }
    Ok(x)
}

/// What resamples at the end of a block, `asked` being what blocks with attention do.
fn resample(block: Block, asked: Resample) -> Resample {
    match block {
        Block::Plain => Resample::Conv,
        Block::Resnet => Resample::Resnet,
        Block::Attention => asked,
    }
}

/// A residual block and the attention that may follow it.
fn layer<'a>(
    builder: &mut impl Assembly<'a, UNet2DConfig>,
    weights: &Weights,
    index: usize,
    sources: &[Map],
    output: usize,
    block: Block,
) -> crate::Result<Map> {
    let place = weights.at(format_args!("resnets.{index}"));
    let x = resnet(builder, &place, sources, output, Resize::Keep, 1.0)?;
    if block != Block::Attention {
        return Ok(x);
    }
    let (place, groups) =
        (weights.at(format_args!("attentions.{index}")), builder.config().norm_num_groups);
    let y = attention(builder, &place, x, Some(groups), 1.0)?;
    builder.release(x);
    Ok(y)
}
