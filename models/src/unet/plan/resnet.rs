//! The residual block: [`crate::unet::resnet`] as kernels.

use super::builder::{Builder, Map, values};
use crate::kernels::{Downsample, Taps, Upsample};
use crate::unet::resnet::Resize;
use crate::unet::weights::Weights;

/// The block over the channels of all `sources`, to `output` channels; the sum is divided by `scale`.
pub(super) fn resnet(
    builder: &mut Builder,
    weights: &Weights,
    sources: &[Map],
    output: usize,
    resize: Resize,
    scale: f64,
) -> crate::Result<Map> {
    let config = builder.config;
    let (groups, activation) = (config.norm_num_groups, config.activation.into());
    let input: usize = sources.iter().map(|&source| builder.image(source).channels()).sum();

    let normed = builder.normalise(&weights.at("norm1"), sources, groups, None, activation)?;
    let h = match resize {
        Resize::Keep | Resize::Up => normed,
        Resize::Down => halve(builder, normed),
    };
    let doubled = resize == Resize::Up;
    let taps = Taps { side: 3, stride: 1, padding: 1, doubled };
    let size = builder.image(h);
    let (height, width) = (size.height << usize::from(doubled), size.width << usize::from(doubled));
    let first = builder.map(height, width, output);
    let (offset, modulation) = if config.scale_shift {
        (None, Some(builder.project(&weights.at("time_emb_proj"), 2 * output)?))
    } else {
        let start = builder.project(&weights.at("time_emb_proj"), output)?;
        (Some((builder.projected(), start)), None)
    };
    builder.convolve(&weights.at("conv1"), h, first, taps, |finish| finish.offset = offset)?;
    builder.release(h);

    let name = weights.at("norm2");
    let normed = builder.normalise(&name, &[first], groups, modulation, activation)?;
    builder.release(first);

    let around: Vec<Map> = match resize {
        Resize::Keep => sources.iter().map(|&source| builder.retain(source)).collect(),
        Resize::Up => vec![double(builder, sources[0])],
        Resize::Down => {
            let source = builder.retain(sources[0]);
            vec![halve(builder, source)]
        }
    };
    let sum = builder.map(height, width, output);
    let residual = if input == output && around.len() == 1 {
        around[0]
    } else {
        shortcut(builder, weights, &around, sum, (input, output))?;
        sum
    };
    let residual = builder.image(residual);
    let taps = Taps { doubled: false, ..taps };
    builder.convolve(&weights.at("conv2"), normed, sum, taps, |finish| {
        finish.residual = Some(residual);
        finish.factor = (1.0 / scale) as f32;
    })?;
    builder.release(normed);
    for map in around {
        builder.release(map);
    }
    Ok(sum)
}

/// The way around where the number of channels changes; where two maps join to as many channels as
/// there are afterwards, diffusers has no weights, and they are only joined.
fn shortcut(
    builder: &mut Builder,
    weights: &Weights,
    around: &[Map],
    target: Map,
    (input, output): (usize, usize),
) -> crate::Result<()> {
    let (weight, bias) = if input == output {
        let identity = (0..input * input).map(|i| f32::from(u8::from(i / input == i % input)));
        (identity.collect(), vec![0.0; input])
    } else {
        let place = weights.at("conv_shortcut");
        let weight = values(&place.get("weight", &[output, input, 1, 1])?)?;
        (weight, values(&place.get("bias", &[output])?)?)
    };
    builder.pointwise(around, target, &weight, &bias, |_| {});
    Ok(())
}

/// The map at half the size; the map itself is released.
fn halve(builder: &mut Builder, map: Map) -> Map {
    let input = builder.image(map);
    let half = builder.map(input.height / 2, input.width / 2, input.channels());
    let output = builder.image(half);
    builder.push(Downsample { input, output });
    builder.release(map);
    half
}

/// The map at twice the size.
fn double(builder: &mut Builder, map: Map) -> Map {
    let input = builder.image(map);
    let double = builder.map(2 * input.height, 2 * input.width, input.channels());
    let output = builder.image(double);
    builder.push(Upsample { input, output });
    double
}
