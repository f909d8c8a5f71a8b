//! Norm, self-attention and the way around: [`crate::unet::attention`] as kernels.

use candle_core::Tensor;

use super::Builder;
use crate::kernels::Function;
use crate::plan::{End, Map};
use crate::weights::Weights;

/// Attention over `x`, normalised in `groups` groups or not at all; the sum is divided by
/// `scale_down`.
pub(super) fn attention(
    builder: &mut Builder,
    weights: &Weights,
    x: Map,
    groups: Option<usize>,
    scale_down: f64,
) -> crate::Result<Map> {
    let image = builder.image(x);
    let (height, width, channels) = (image.height, image.width, image.channels());
    let head_dim = builder.config.attention_head_dim.unwrap_or(channels);
    let heads = channels / head_dim;

    let normed = match groups {
        None => builder.retain(x),
        Some(groups) => {
            let name = weights.at("group_norm");
            builder.normalise(
                &name,
                &[x],
                (groups, builder.config.norm_eps),
                None,
                Function::Identity,
            )?
        }
    };
    // Two channels in a word must be of one head.
    let qkv = match head_dim % 2 {
        0 => builder.map(height, width, 3 * channels),
        _ => builder.map_of_f32(height, width, 3 * channels),
    };
    let scale = 1.0 / (head_dim as f64).sqrt();
    let part = |name, factor| -> crate::Result<(Tensor, Tensor, f64)> {
        let place = weights.at(name);
        let weight = place.get("weight", &[channels, channels])?;
        Ok((weight, place.get("bias", &[channels])?, factor))
    };
    // The scale of the scores goes into the queries.
    let parts = [part("to_q", scale)?, part("to_k", 1.0)?, part("to_v", 1.0)?];
    builder.pointwise(&[normed], qkv, &parts, End::default())?;
    builder.release(normed);

    let gathered = builder.attend(qkv, heads);

    let sum = builder.map(height, width, channels);
    let end = End { residual: Some(x), factor: (1.0 / scale_down) as f32, ..End::default() };
    builder.pointwise(&[gathered], sum, &[part("to_out.0", 1.0)?], end)?;
    builder.release(gathered);
    Ok(sum)
}
