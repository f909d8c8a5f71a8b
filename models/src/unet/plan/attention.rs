//! Norm, self-attention and the way around: [`crate::unet::attention`] as layers of an assembly.

use crate::assembly::{Affine, Assembly, End, Map, Size};
use crate::kernels::Function;
use crate::unet::UNet2DConfig;
use crate::weights::Weights;

/// Attention over `x`, normalised in `groups` groups or not at all; the sum is divided by
/// `scale_down`.
pub(super) fn attention<'a>(
    builder: &mut impl Assembly<'a, UNet2DConfig>,
    weights: &Weights,
    x: Map,
    groups: Option<usize>,
    scale_down: f64,
) -> crate::Result<Map> {
    let config = builder.config();
    let Size { height, width, channels } = builder.size(x);
    let head_dim = config.attention_head_dim.unwrap_or(channels);
    let heads = channels / head_dim;

    let normed = match groups {
        None => builder.retain(x),
        Some(groups) => {
            let name = weights.at("group_norm");
            builder.normalise(&name, &[x], (groups, config.norm_eps), None, Function::Identity)?
        }
    };
    let scale = 1.0 / (head_dim as f64).sqrt();
    let part = |name, factor| -> crate::Result<Affine> {
        let place = weights.at(name);
        let weight = place.get("weight", &[channels, channels])?;
        Ok((weight, place.get("bias", &[channels])?, factor))
    };
    // The scale of the scores goes into the queries.
    let parts = [part("to_q", scale)?, part("to_k", 1.0)?, part("to_v", 1.0)?];
    let gathered = builder.attend(normed, &parts, heads)?;
    builder.release(normed);

    let sum = builder.map(height, width, channels);
    let end = End { residual: Some(x), factor: (1.0 / scale_down) as f32, ..End::default() };
    builder.pointwise(&[gathered], sum, &[part("to_out.0", 1.0)?], end)?;
    builder.release(gathered);
    Ok(sum)
}
