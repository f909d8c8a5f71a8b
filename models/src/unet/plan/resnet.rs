//! The residual block: [`crate::unet::resnet`] as layers of an assembly.

use crate::assembly::{Assembly, End, Map};
use crate::kernels::Taps;
use crate::unet::UNet2DConfig;
use crate::unet::resnet::Resize;
use crate::weights::Weights;

/// The block over the channels of all `sources`, to `output` channels; the sum is divided by `scale`.
pub(super) fn resnet<'a>(
    builder: &mut impl Assembly<'a, UNet2DConfig>,
    weights: &Weights,
    sources: &[Map],
    output: usize,
    resize: Resize,
    scale: f64,
) -> crate::Result<Map> {
    let config = builder.config();
    let activation = config.activation.into();
    let groups = (config.norm_num_groups, config.norm_eps);
    let input: usize = sources.iter().map(|&source| builder.size(source).channels).sum();

    let normed = builder.normalise(&weights.at("norm1"), sources, groups, None, activation)?;
    let h = match resize {
        Resize::Keep | Resize::Up => normed,
        Resize::Down => builder.halve(normed),
    };
    let doubled = resize == Resize::Up;
    let taps = Taps { side: 3, stride: 1, padding: 1, doubled };
    let size = builder.size(h);
    let (height, width) = (size.height << usize::from(doubled), size.width << usize::from(doubled));
    let first = builder.map(height, width, output);
    let (place, time) = (weights.at("time_emb_proj"), config.time_width());
    let (offset, modulation) = if config.scale_shift {
        (None, Some(builder.project(&place, time, 2 * output)?))
    } else {
        (Some(builder.project(&place, time, output)?), None)
    };
    let end = End { offset, ..End::default() };
    builder.convolve(&weights.at("conv1"), h, first, taps, end)?;
    builder.release(h);

    let name = weights.at("norm2");
    let normed = builder.normalise(&name, &[first], groups, modulation, activation)?;
    builder.release(first);

    let around: Vec<Map> = match resize {
        Resize::Keep => sources.iter().map(|&source| builder.retain(source)).collect(),
        Resize::Up => vec![builder.double(sources[0])],
        Resize::Down => {
            let source = builder.retain(sources[0]);
            vec![builder.halve(source)]
        }
    };
    let sum = builder.map(height, width, output);
    // Two maps always join to more channels than there are afterwards.
    let residual = if input == output {
        around[0]
    } else {
        let place = weights.at("conv_shortcut");
        let weight = place.get("weight", &[output, input, 1, 1])?;
        let part = (weight, place.get("bias", &[output])?, 1.0);
        builder.pointwise(&around, sum, &[part], End::default())?;
        sum
    };
    let taps = Taps { doubled: false, ..taps };
    let end = End { residual: Some(residual), factor: (1.0 / scale) as f32, ..End::default() };
    builder.convolve(&weights.at("conv2"), normed, sum, taps, end)?;
    builder.release(normed);
    for map in around {
        builder.release(map);
    }
    Ok(sum)
}
