//! The network: `UNetModel` of latent diffusion as diffusers' `UNet2DConditionModel`.
//!
//! Blocks are counted through there, `input_blocks.N` on the way down and `output_blocks.N` on the way up; what resamples
//! is a block of its own on the way down, and the last part of one on the way up.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use super::{Source, length};
use crate::weights::Shapes;
use crate::{Error, Result};

/// What stands before the names.
pub(super) const PREFIX: &str = "model.diffusion_model.";
/// The first convolution.
pub(super) const FIRST: &str = "model.diffusion_model.input_blocks.0.0.weight";
/// What embeds more than time and prompt.
pub(super) const LABELS: &str = "model.diffusion_model.label_emb.";

/// Heads of an attention between convolutions (Stable Diffusion 1).
const HEADS: usize = 8;
/// Channels of a head of an attention between linear maps (Stable Diffusion 2 and later).
const HEAD_CHANNELS: usize = 64;

/// Sines and cosines of a size (Stable Diffusion XL).
const SIZE_WIDTH: usize = 256;

/// A level of the network, as its blocks tell.
#[derive(Debug, Default)]
struct Level {
    channels: usize,
    layers: usize,
    /// Transformer blocks behind each residual block; nothing without attention.
    depth: usize,
}

/// `config.json` of the network whose tensors these are; `sample_size` is the side of a latent.
///
/// # Errors
/// [`Error::Format`] for tensors that are no such network's.
pub(super) fn config(path: &Path, shapes: &Shapes, sample_size: usize) -> Result<Value> {
    let refuse = |problem: String| Error::Format { path: path.to_owned(), problem };
    let there = |name: &str| shapes.contains_key(&format!("{PREFIX}{name}"));
    let length = |name: &str, at| length(path, shapes, &format!("{PREFIX}{name}"), at);
    let depth = |block: &str| {
        let block = |i: usize| format!("{block}.transformer_blocks.{i}.norm1.weight");
        (0..).take_while(|&i| there(&block(i))).count()
    };
    let mut levels = vec![Level::default()];
    for block in (1..).map(|block| format!("input_blocks.{block}")) {
        if there(&format!("{block}.0.op.weight")) {
            levels.push(Level::default());
        } else if there(&format!("{block}.0.in_layers.2.weight")) {
            let level = levels.last_mut().ok_or_else(|| refuse("has no blocks".into()))?;
            level.channels = length(&format!("{block}.0.in_layers.2.weight"), 0)?;
            level.layers += 1;
            level.depth = depth(&format!("{block}.1"));
        } else {
            break;
        }
    }
    let layers = levels[0].layers;
    if layers == 0 || levels.iter().any(|level| level.layers != layers) {
        return Err(refuse(format!(
            "has {} residual blocks in its levels (`{PREFIX}input_blocks`); all must have as many, and at least one",
            levels.iter().map(|level| level.layers.to_string()).collect::<Vec<_>>().join(", ")
        )));
    }
    let attends: Vec<usize> = (0..levels.len()).filter(|&level| levels[level].depth > 0).collect();
    let Some(&seeing) = attends.first() else {
        return Err(refuse(format!("has no attention to a prompt in `{PREFIX}input_blocks`")));
    };
    let seeing = format!("input_blocks.{}.1", seeing * (layers + 1) + 1);
    let context = length(&format!("{seeing}.transformer_blocks.0.attn2.to_k.weight"), 1)?;
    let projection = format!("{PREFIX}{seeing}.proj_in.weight");
    let linear = shapes.get(&projection).is_some_and(|shape| shape.len() == 2);
    let heads =
        |level: &Level| if linear { (level.channels / HEAD_CHANNELS).max(1) } else { HEADS };
    let types = |kind: &str| -> Vec<String> {
        let of = |level: &Level| {
            let cross = if level.depth > 0 { "CrossAttn" } else { "" };
            format!("{cross}{kind}Block2D")
        };
        levels.iter().map(of).collect()
    };
    let mut up_types = types("Up");
    up_types.reverse();
    // The transformer in the middle is as deep as the deepest level's, also where that has none of its own.
    let middle = depth("middle_block.1");
    let last = levels.len() - 1;
    let depths: Vec<usize> = levels
        .iter()
        .enumerate()
        .map(|(i, level)| if i == last && level.depth == 0 { middle } else { level.depth.max(1) })
        .collect();
    let mut config = json!({
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "in_channels": length("input_blocks.0.0.weight", 1)?,
        "out_channels": length("out.2.weight", 0)?,
        "down_block_types": types("Down"),
        "up_block_types": up_types,
        "block_out_channels": levels.iter().map(|level| level.channels).collect::<Vec<_>>(),
        "layers_per_block": layers,
        "transformer_layers_per_block": depths,
        "cross_attention_dim": context,
        "attention_head_dim": levels.iter().map(heads).collect::<Vec<_>>(),
        "use_linear_projection": linear,
    });
    // A pooled text, and sizes as sines and cosines (Podell et al. 2023, §2.2).
    if there("label_emb.0.0.weight") {
        config["addition_embed_type"] = json!("text_time");
        config["addition_time_embed_dim"] = json!(SIZE_WIDTH);
        config["projection_class_embeddings_input_dim"] = json!(length("label_emb.0.0.weight", 1)?);
    }
    Ok(config)
}

/// Where the tensors of the network with these weights are.
pub(super) fn sources(shapes: &Shapes) -> impl Fn(&str) -> Source + use<> {
    let names = names(shapes);
    move |name| {
        let there = names.get(name).map_or(name, String::as_str);
        Source::Same(format!("{PREFIX}{there}"))
    }
}

/// The names there, by the names of the weights here, of a network that could be there: all its levels have as many residual
/// blocks.
pub(super) fn names(shapes: &Shapes) -> BTreeMap<String, String> {
    let there = |name: &str| shapes.contains_key(name);
    let layers = |way: &str, level: usize| {
        let block = |layer: usize| format!("{way}_blocks.{level}.resnets.{layer}.norm1.weight");
        (0..).take_while(|&layer| there(&block(layer))).count()
    };
    let blocks = layers("down", 0) + 1;
    let levels = (0..).take_while(|&level| layers("down", level) > 0).count();
    if (0..levels).any(|level| layers("down", level) + 1 != blocks || layers("up", level) != blocks)
    {
        return BTreeMap::new();
    }
    let attends = |level: usize| there(&format!("up_blocks.{level}.attentions.0.norm.weight"));
    let named = |name: &String| Some((name.clone(), renamed(name, blocks, attends)?));
    shapes.keys().filter_map(named).collect()
}

/// The name there of a tensor here, in a network of so many blocks a level on the way down; `attends` tells of blocks on the
/// way up. Nothing for one that no such network has.
fn renamed(name: &str, blocks: usize, attends: impl Fn(usize) -> bool) -> Option<String> {
    let whole = [
        ("time_embedding.linear_1.", "time_embed.0."),
        ("time_embedding.linear_2.", "time_embed.2."),
        ("add_embedding.linear_1.", "label_emb.0.0."),
        ("add_embedding.linear_2.", "label_emb.0.2."),
        ("conv_in.", "input_blocks.0.0."),
        ("conv_norm_out.", "out.0."),
        ("conv_out.", "out.2."),
    ];
    if let Some((here, there)) = whole.iter().find(|(here, _)| name.starts_with(here)) {
        return Some(format!("{there}{}", &name[here.len()..]));
    }
    let parts: Vec<&str> = name.split('.').collect();
    match parts[..] {
        ["mid_block", "resnets", layer, ref rest @ ..] => {
            Some(format!("middle_block.{}.{}", 2 * number(layer)?, residual(rest)?))
        }
        ["mid_block", "attentions", "0", ref rest @ ..] => {
            Some(format!("middle_block.1.{}", rest.join(".")))
        }
        ["down_blocks", level, "resnets", layer, ref rest @ ..] => {
            let block = number(level)? * blocks + number(layer)? + 1;
            Some(format!("input_blocks.{block}.0.{}", residual(rest)?))
        }
        ["down_blocks", level, "attentions", layer, ref rest @ ..] => {
            let block = number(level)? * blocks + number(layer)? + 1;
            Some(format!("input_blocks.{block}.1.{}", rest.join(".")))
        }
        ["down_blocks", level, "downsamplers", "0", "conv", last] => {
            Some(format!("input_blocks.{}.0.op.{last}", (number(level)? + 1) * blocks))
        }
        ["up_blocks", level, "resnets", layer, ref rest @ ..] => {
            let block = number(level)? * blocks + number(layer)?;
            Some(format!("output_blocks.{block}.0.{}", residual(rest)?))
        }
        ["up_blocks", level, "attentions", layer, ref rest @ ..] => {
            let block = number(level)? * blocks + number(layer)?;
            Some(format!("output_blocks.{block}.1.{}", rest.join(".")))
        }
        ["up_blocks", level, "upsamplers", "0", "conv", last] => {
            let level = number(level)?;
            // Behind a transformer, where there is one.
            let place = if attends(level) { 2 } else { 1 };
            Some(format!("output_blocks.{}.{place}.conv.{last}", level * blocks + blocks - 1))
        }
        _ => None,
    }
}

/// A part of a residual block.
fn residual(rest: &[&str]) -> Option<String> {
    let [part, last] = rest[..] else { return None };
    let there = match part {
        "norm1" => "in_layers.0",
        "conv1" => "in_layers.2",
        "time_emb_proj" => "emb_layers.1",
        "norm2" => "out_layers.0",
        "conv2" => "out_layers.3",
        "conv_shortcut" => "skip_connection",
        _ => return None,
    };
    Some(format!("{there}.{last}"))
}

fn number(text: &str) -> Option<usize> {
    text.parse().ok()
}
