//! Norm, self-attention and the way around: [`crate::unet::attention`] as kernels.

use super::builder::{Builder, Map, values};
use crate::kernels::{Attend, Function, Numbers, PackKeys, PackValues};
use crate::unet::weights::Weights;

/// Attention over `x`, normalised in `groups` groups or not at all; the sum is divided by `scale`.
pub(super) fn attention(
    builder: &mut Builder,
    weights: &Weights,
    x: Map,
    groups: Option<usize>,
    scale: f64,
) -> crate::Result<Map> {
    let image = builder.image(x);
    let (height, width, channels) = (image.height, image.width, image.channels());
    let head_dim = builder.config.attention_head_dim.unwrap_or(channels);
    let heads = channels / head_dim;

    let normed = match groups {
        None => builder.retain(x),
        Some(groups) => {
            let name = weights.at("group_norm");
            builder.normalise(&name, &[x], groups, None, Function::Identity)?
        }
    };
    let (weight, bias) = merged(weights, channels, head_dim)?;
    // Two channels in a word must be of one head.
    let qkv = match head_dim % 2 {
        0 => builder.map(height, width, 3 * channels),
        _ => builder.map_of_f32(height, width, 3 * channels),
    };
    builder.pointwise(&[normed], qkv, &weight, &bias, |_| {});
    builder.release(normed);

    let (input, panel, rows) = (builder.image(qkv), builder.isa.panel(), builder.isa.rows());
    let keys = builder.take(PackKeys::len(&input, panel));
    builder.push(PackKeys { input, heads, panel, output: keys });
    let pairs = (input.numbers == Numbers::Bf16).then(|| {
        let output = builder.take(PackValues::len(&input));
        builder.push(PackValues { input, output });
        output
    });
    let gathered = builder.map(height, width, channels);
    let output = builder.image(gathered);
    builder.push(Attend { input, keys, values: pairs, heads, panel, rows, output });
    builder.give(keys);
    if let Some(pairs) = pairs {
        builder.give(pairs);
    }
    builder.release(qkv);

    let place = weights.at("to_out.0");
    let weight = values(&place.get("weight", &[channels, channels])?)?;
    let bias = values(&place.get("bias", &[channels])?)?;
    let sum = builder.map(height, width, channels);
    builder.pointwise(&[gathered], sum, &weight, &bias, |finish| {
        finish.residual = Some(image);
        finish.factor = (1.0 / scale) as f32;
    });
    builder.release(gathered);
    Ok(sum)
}

/// Weights and biases of query, key and value one below the other, the scale of the scores already in
/// the query's.
fn merged(
    weights: &Weights,
    channels: usize,
    head_dim: usize,
) -> crate::Result<(Vec<f32>, Vec<f32>)> {
    let scale = 1.0 / (head_dim as f64).sqrt();
    let (mut weight, mut bias) = (Vec::new(), Vec::new());
    for (name, factor) in [("to_q", scale), ("to_k", 1.0), ("to_v", 1.0)] {
        let place = weights.at(name);
        let scaled = |x: f32| (f64::from(x) * factor) as f32;
        let part = values(&place.get("weight", &[channels, channels])?)?;
        weight.extend(part.into_iter().map(scaled));
        bias.extend(values(&place.get("bias", &[channels])?)?.into_iter().map(scaled));
    }
    Ok((weight, bias))
}
