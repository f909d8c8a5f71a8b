//! The text encoder: transformers' own `CLIPTextModel` (Stable Diffusion 1), or that of OpenCLIP (2), whose queries, keys and
//! values are one matrix, and whose last layer is not used.

use std::path::Path;

use serde_json::{Value, json};

use super::{Source, length};
use crate::weights::Shapes;
use crate::{Error, Result};

/// The class in transformers.
pub(super) const CLASS: &str = "CLIPTextModel";
/// What stands before the names.
pub(super) const PREFIX: &str = "cond_stage_model.";
/// OpenCLIP's table of tokens.
pub(super) const OPEN_CLIP_FIRST: &str = "cond_stage_model.model.token_embedding.weight";
/// That of transformers.
pub(super) const OPENAI_FIRST: &str =
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight";

const OPEN_CLIP: &str = "cond_stage_model.model.";
/// Some programs leave out a part of the names.
const OPENAI: [&str; 2] =
    ["cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."];
const HEAD_CHANNELS: usize = 64;

/// What stands before the names of transformers' encoder, if the file has one.
pub(super) fn openai_prefix(shapes: &Shapes) -> Option<&'static str> {
    let first =
        |prefix: &&str| shapes.contains_key(&format!("{prefix}embeddings.token_embedding.weight"));
    OPENAI.into_iter().find(first)
}

/// Whether a tensor has no part in reading prompts: positions that are counted, CLIP's temperature, its projection into the
/// space of images, and OpenCLIP's mask.
pub(super) fn is_idle(name: &str) -> bool {
    let Some(name) = name.strip_prefix(PREFIX) else { return false };
    ["position_ids", "logit_scale", "text_projection", "attn_mask", "text_projection.weight"]
        .iter()
        .any(|last| name == *last || name.ends_with(&format!(".{last}")))
        || is_unused_layer(name)
}

/// The last of OpenCLIP's 24 layers: the network is told what the one before says.
fn is_unused_layer(name: &str) -> bool {
    name.starts_with("model.transformer.resblocks.23.")
}

/// `config.json` of the text encoder whose tensors these are.
///
/// # Errors
/// [`Error::Format`] for tensors that are no such encoder's.
pub(super) fn config(path: &Path, shapes: &Shapes) -> Result<Value> {
    let length = |name: String, at| length(path, shapes, &name, at);
    let count = |first: &dyn Fn(usize) -> String| {
        (0..).take_while(|&layer| shapes.contains_key(&first(layer))).count()
    };
    let (table, positions, hidden, layers, act) = match openai_prefix(shapes) {
        Some(prefix) => {
            let first = |layer: usize| format!("{prefix}encoder.layers.{layer}.layer_norm1.weight");
            (
                format!("{prefix}embeddings.token_embedding.weight"),
                format!("{prefix}embeddings.position_embedding.weight"),
                format!("{prefix}encoder.layers.0.mlp.fc1.weight"),
                count(&first),
                "quick_gelu",
            )
        }
        None => {
            let first =
                |layer: usize| format!("{OPEN_CLIP}transformer.resblocks.{layer}.ln_1.weight");
            let used = |layer: &usize| !is_unused_layer(&first(*layer)[PREFIX.len()..]);
            (
                OPEN_CLIP_FIRST.to_owned(),
                format!("{OPEN_CLIP}positional_embedding"),
                format!("{OPEN_CLIP}transformer.resblocks.0.mlp.c_fc.weight"),
                (0..count(&first)).filter(used).count(),
                "gelu",
            )
        }
    };
    if layers == 0 {
        let problem = format!("has no layers of a text encoder under `{PREFIX}`");
        return Err(Error::Format { path: path.to_owned(), problem });
    }
    let width = length(table.clone(), 1)?;
    Ok(json!({
        "vocab_size": length(table, 0)?,
        "hidden_size": width,
        "intermediate_size": length(hidden, 0)?,
        "num_hidden_layers": layers,
        "num_attention_heads": (width / HEAD_CHANNELS).max(1),
        "max_position_embeddings": length(positions, 0)?,
        "hidden_act": act,
    }))
}

/// The configuration with what transformers needs beside it.
pub(super) fn whole_config(config: &Value) -> Value {
    let mut config = config.clone();
    config["architectures"] = json!([CLASS]);
    config["model_type"] = json!("clip_text_model");
    config["projection_dim"] = config["hidden_size"].clone();
    config["layer_norm_eps"] = json!(1e-5);
    let end = config["vocab_size"].as_u64().unwrap_or(1) - 1;
    config["bos_token_id"] = json!(end.saturating_sub(1));
    config["eos_token_id"] = json!(end);
    config["pad_token_id"] = json!(if config["hidden_act"] == "gelu" { 0 } else { end });
    config
}

/// Where the tensors of the encoder are.
pub(super) fn sources(shapes: &Shapes) -> impl Fn(&str) -> Source + use<> {
    let prefix = openai_prefix(shapes);
    move |name| {
        let short = name.strip_prefix("text_model.").unwrap_or(name);
        match prefix {
            Some(prefix) => Source::Same(format!("{prefix}{short}")),
            None => open_clip(short).unwrap_or_else(|| Source::Same(format!("{OPEN_CLIP}{short}"))),
        }
    }
}

fn open_clip(name: &str) -> Option<Source> {
    let parts: Vec<&str> = name.split('.').collect();
    let same = |name: String| Some(Source::Same(format!("{OPEN_CLIP}{name}")));
    match parts[..] {
        ["embeddings", "token_embedding", "weight"] => same("token_embedding.weight".into()),
        ["embeddings", "position_embedding", "weight"] => same("positional_embedding".into()),
        ["final_layer_norm", last] => same(format!("ln_final.{last}")),
        ["encoder", "layers", layer, ref rest @ ..] => {
            let block = format!("transformer.resblocks.{layer}");
            match rest {
                ["layer_norm1", last] => same(format!("{block}.ln_1.{last}")),
                ["layer_norm2", last] => same(format!("{block}.ln_2.{last}")),
                ["mlp", "fc1", last] => same(format!("{block}.mlp.c_fc.{last}")),
                ["mlp", "fc2", last] => same(format!("{block}.mlp.c_proj.{last}")),
                ["self_attn", "out_proj", last] => same(format!("{block}.attn.out_proj.{last}")),
                ["self_attn", part, last] => {
                    let part = ["q_proj", "k_proj", "v_proj"].iter().position(|it| it == part)?;
                    let name = format!("{OPEN_CLIP}{block}.attn.in_proj_{last}");
                    Some(Source::Third(name, part))
                }
                _ => None,
            }
        }
        _ => None,
    }
}
