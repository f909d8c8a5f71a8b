//! The autoencoder: `AutoencoderKL` of latent diffusion as diffusers'.
//!
//! Levels on the way up are counted from the smallest map here, and from the largest there.

use std::path::Path;

use serde_json::{Value, json};

use super::{Source, length};
use crate::Result;
use crate::weights::Shapes;

/// What stands before the names.
pub(super) const PREFIX: &str = "first_stage_model.";
/// The first convolution.
pub(super) const FIRST: &str = "first_stage_model.encoder.conv_in.weight";

/// Whether a tensor has no part in encoding or decoding: what training judged images by.
pub(super) fn is_idle(name: &str) -> bool {
    ["loss.", "model_ema."]
        .iter()
        .any(|part| name.strip_prefix(PREFIX).is_some_and(|it| it.starts_with(part)))
}

/// `config.json` of the autoencoder whose tensors these are, and of whose latents this is the scale.
///
/// # Errors
/// [`crate::Error::Format`] for tensors that are no such autoencoder's.
pub(super) fn config(path: &Path, shapes: &Shapes, scale: f64) -> Result<Value> {
    let length = |name: &str, at| length(path, shapes, &format!("{PREFIX}{name}"), at);
    let block =
        |level: usize, layer: usize| format!("encoder.down.{level}.block.{layer}.conv1.weight");
    let there = |level, layer| shapes.contains_key(&format!("{PREFIX}{}", block(level, layer)));
    let levels = (0..).take_while(|&level| there(level, 0)).count().max(1);
    let layers = (0..).take_while(|&layer| there(0, layer)).count().max(1);
    let channels: Vec<usize> =
        (0..levels).map(|level| length(&block(level, 0), 0)).collect::<Result<_>>()?;
    Ok(json!({
        "_class_name": "AutoencoderKL",
        "in_channels": length("encoder.conv_in.weight", 1)?,
        "out_channels": length("decoder.conv_out.weight", 0)?,
        "down_block_types": vec!["DownEncoderBlock2D"; levels],
        "up_block_types": vec!["UpDecoderBlock2D"; levels],
        "block_out_channels": channels,
        "layers_per_block": layers,
        "latent_channels": length("post_quant_conv.weight", 0)?,
        "scaling_factor": scale,
    }))
}

/// Where the tensors of the autoencoder of this configuration are.
pub(super) fn sources(config: &Value) -> impl Fn(&str) -> Source + use<> {
    let levels = config["block_out_channels"].as_array().map_or(0, Vec::len);
    move |name| {
        let there = renamed(name, levels).unwrap_or_else(|| name.to_owned());
        let linear = there.contains(".attn_1.") && there.ends_with(".weight");
        let there = format!("{PREFIX}{there}");
        if linear && !there.ends_with(".norm.weight") {
            Source::Point(there)
        } else {
            Source::Same(there)
        }
    }
}

/// The name there of a tensor here, in an autoencoder of so many levels. Nothing where it is the same.
fn renamed(name: &str, levels: usize) -> Option<String> {
    let parts: Vec<&str> = name.split('.').collect();
    match parts[..] {
        [half, "conv_norm_out", last] => Some(format!("{half}.norm_out.{last}")),
        [half, "mid_block", "resnets", layer, ref rest @ ..] => {
            let layer: usize = layer.parse().ok()?;
            Some(format!("{half}.mid.block_{}.{}", layer + 1, residual(rest)))
        }
        [half, "mid_block", "attentions", "0", ref rest @ ..] => {
            let (part, last) = match rest {
                ["group_norm", last] => ("norm", last),
                ["to_q", last] => ("q", last),
                ["to_k", last] => ("k", last),
                ["to_v", last] => ("v", last),
                ["to_out", "0", last] => ("proj_out", last),
                _ => return None,
            };
            Some(format!("{half}.mid.attn_1.{part}.{last}"))
        }
        ["encoder", "down_blocks", level, "resnets", layer, ref rest @ ..] => {
            Some(format!("encoder.down.{level}.block.{layer}.{}", residual(rest)))
        }
        ["encoder", "down_blocks", level, "downsamplers", "0", "conv", last] => {
            Some(format!("encoder.down.{level}.downsample.conv.{last}"))
        }
        ["decoder", "up_blocks", level, "resnets", layer, ref rest @ ..] => {
            let level = levels.checked_sub(1 + level.parse::<usize>().ok()?)?;
            Some(format!("decoder.up.{level}.block.{layer}.{}", residual(rest)))
        }
        ["decoder", "up_blocks", level, "upsamplers", "0", "conv", last] => {
            let level = levels.checked_sub(1 + level.parse::<usize>().ok()?)?;
            Some(format!("decoder.up.{level}.upsample.conv.{last}"))
        }
        _ => None,
    }
}

/// A part of a residual block.
fn residual(rest: &[&str]) -> String {
    let parts: Vec<&str> = rest
        .iter()
        .map(|&part| if part == "conv_shortcut" { "nin_shortcut" } else { part })
        .collect();
    parts.join(".")
}
