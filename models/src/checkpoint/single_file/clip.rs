//! Text encoders: transformers' own CLIP (Stable Diffusion 1), that of OpenCLIP (2), whose queries, keys and values are one
//! matrix, and whose last layer is not used there, or both (XL).

use std::path::Path;

use serde_json::{Value, json};

use super::{Source, length};
use crate::weights::Shapes;
use crate::{Error, Result};

const PLAIN: &str = "CLIPTextModel";
const PROJECTED: &str = "CLIPTextModelWithProjection";
/// OpenAI's tokens fill a prompt with the one that ends it.
const END: &str = "<|endoftext|>";
const HEAD_CHANNELS: usize = 64;
/// Some programs leave out a part of the names.
const TRANSFORMERS: [&str; 2] = ["transformer.text_model.", "transformer."];
const OPEN_CLIP: &str = "model.";
/// The last of OpenCLIP's 24 layers, which Stable Diffusion 2 does not use: the network is told what the one before says.
const UNUSED: &str = "model.transformer.resblocks.23.";

/// Who trained an encoder, and so how its tensors are called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// OpenAI's, under transformers' names, with what stands before them.
    OpenAi(&'static str),
    OpenClip,
}

/// An encoder in a file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Encoder {
    /// What stands before all its names.
    pub(super) root: &'static str,
    /// Its folder, and its tokenizer's.
    pub(super) folders: [&'static str; 2],
    kind: Kind,
    /// Whether what it pools is projected, and its last layer used.
    whole: bool,
}

/// What stands before the names of encoders.
pub(super) const ALONE: &str = "cond_stage_model.";
pub(super) const BOTH: [&str; 2] = ["conditioner.embedders.0.", "conditioner.embedders.1."];

/// The first tensor of every encoder that there may be, without what stands before it.
pub(super) fn firsts() -> [String; 4] {
    let open_clip = |root: &str| format!("{root}{OPEN_CLIP}token_embedding.weight");
    let openai = |root: &str| format!("{root}{}embeddings.token_embedding.weight", TRANSFORMERS[0]);
    [openai(ALONE), open_clip(ALONE), openai(BOTH[0]), open_clip(BOTH[1])]
}

impl Encoder {
    /// The only encoder of a file, if it has one.
    pub(super) fn alone(shapes: &Shapes) -> Option<Self> {
        Self::find(shapes, ALONE, false)
    }

    /// Both encoders of a file, if it has them.
    pub(super) fn both(shapes: &Shapes) -> Option<[Self; 2]> {
        let [first, second] = BOTH.map(|root| Self::find(shapes, root, true));
        let first = first.filter(Self::is_openai).map(|it| Self { whole: false, ..it })?;
        let second = second.filter(|it| !it.is_openai())?;
        Some([first, Self { folders: ["text_encoder_2", "tokenizer_2"], ..second }])
    }

    fn find(shapes: &Shapes, root: &'static str, whole: bool) -> Option<Self> {
        let there = |name: String| shapes.contains_key(&name);
        let openai = TRANSFORMERS
            .into_iter()
            .find(|part| there(format!("{root}{part}embeddings.token_embedding.weight")));
        let open_clip = || there(format!("{root}{OPEN_CLIP}token_embedding.weight"));
        let kind = openai.map(Kind::OpenAi).or_else(|| open_clip().then_some(Kind::OpenClip))?;
        Some(Self { root, folders: ["text_encoder", "tokenizer"], kind, whole })
    }

    /// Whether OpenAI trained it.
    pub(super) fn is_openai(&self) -> bool {
        self.kind != Kind::OpenClip
    }

    /// The class in transformers.
    pub(super) fn class(&self) -> &'static str {
        if self.projects() { PROJECTED } else { PLAIN }
    }

    fn projects(&self) -> bool {
        self.whole && !self.is_openai()
    }

    /// The token that fills a prompt.
    pub(super) fn padding(&self) -> &'static str {
        if self.is_openai() { END } else { "!" }
    }

    /// Whether a tensor has no part in reading prompts: positions that are counted, CLIP's temperature, its projection into the
    /// space of images where nobody asks for it, and OpenCLIP's mask.
    pub(super) fn is_idle(&self, name: &str) -> bool {
        let Some(name) = name.strip_prefix(self.root) else { return false };
        let projection = ["text_projection", "text_projection.weight"];
        ["position_ids", "logit_scale", "attn_mask"]
            .iter()
            .chain(projection.iter().filter(|_| !self.projects()))
            .any(|last| name == *last || name.ends_with(&format!(".{last}")))
            || self.is_unused(name)
    }

    /// Of a name without what stands before it.
    fn is_unused(&self, name: &str) -> bool {
        !self.whole && name.starts_with(UNUSED)
    }

    /// `config.json` of the encoder.
    ///
    /// # Errors
    /// [`Error::Format`] for tensors that are no such encoder's.
    pub(super) fn config(&self, path: &Path, shapes: &Shapes) -> Result<Value> {
        let root = self.root;
        let length = |name: String, at| length(path, shapes, &format!("{root}{name}"), at);
        let count = |first: &dyn Fn(usize) -> String| {
            (0..)
                .take_while(|&layer| shapes.contains_key(&format!("{root}{}", first(layer))))
                .count()
        };
        let (table, positions, hidden, layers, act) = match self.kind {
            Kind::OpenAi(part) => {
                let first =
                    |layer: usize| format!("{part}encoder.layers.{layer}.layer_norm1.weight");
                (
                    format!("{part}embeddings.token_embedding.weight"),
                    format!("{part}embeddings.position_embedding.weight"),
                    format!("{part}encoder.layers.0.mlp.fc1.weight"),
                    count(&first),
                    "quick_gelu",
                )
            }
            Kind::OpenClip => {
                let first =
                    |layer: usize| format!("{OPEN_CLIP}transformer.resblocks.{layer}.ln_1.weight");
                let used = |layer: &usize| !self.is_unused(&first(*layer));
                (
                    format!("{OPEN_CLIP}token_embedding.weight"),
                    format!("{OPEN_CLIP}positional_embedding"),
                    format!("{OPEN_CLIP}transformer.resblocks.0.mlp.c_fc.weight"),
                    (0..count(&first)).filter(used).count(),
                    "gelu",
                )
            }
        };
        if layers == 0 {
            let problem = format!("has no layers of a text encoder under `{root}`");
            return Err(Error::Format { path: path.to_owned(), problem });
        }
        let width = length(table.clone(), 1)?;
        let mut config = json!({
            "vocab_size": length(table, 0)?,
            "hidden_size": width,
            "intermediate_size": length(hidden, 0)?,
            "num_hidden_layers": layers,
            "num_attention_heads": (width / HEAD_CHANNELS).max(1),
            "max_position_embeddings": length(positions, 0)?,
            "hidden_act": act,
        });
        if self.projects() {
            config["projection_dim"] = json!(length(format!("{OPEN_CLIP}text_projection"), 1)?);
        }
        Ok(config)
    }

    /// A configuration with what transformers needs beside it.
    pub(super) fn whole_config(&self, config: &Value) -> Value {
        let mut config = config.clone();
        config["architectures"] = json!([self.class()]);
        config["model_type"] = json!("clip_text_model");
        if config["projection_dim"].is_null() {
            config["projection_dim"] = config["hidden_size"].clone();
        }
        config["layer_norm_eps"] = json!(1e-5);
        let end = config["vocab_size"].as_u64().unwrap_or(1) - 1;
        config["bos_token_id"] = json!(end.saturating_sub(1));
        config["eos_token_id"] = json!(end);
        config["pad_token_id"] = json!(if self.is_openai() { end } else { 0 });
        config
    }

    /// Where its tensors are.
    pub(super) fn sources(self) -> impl Fn(&str) -> Source {
        let root = self.root;
        move |name| {
            let short = name.strip_prefix("text_model.").unwrap_or(name);
            match self.kind {
                Kind::OpenAi(part) => Source::Same(format!("{root}{part}{short}")),
                Kind::OpenClip => open_clip(root, short)
                    .unwrap_or_else(|| Source::Same(format!("{root}{OPEN_CLIP}{short}"))),
            }
        }
    }
}

fn open_clip(root: &str, name: &str) -> Option<Source> {
    let parts: Vec<&str> = name.split('.').collect();
    let there = |name: String| format!("{root}{OPEN_CLIP}{name}");
    let same = |name: String| Some(Source::Same(there(name)));
    match parts[..] {
        ["embeddings", "token_embedding", "weight"] => same("token_embedding.weight".into()),
        ["embeddings", "position_embedding", "weight"] => same("positional_embedding".into()),
        ["final_layer_norm", last] => same(format!("ln_final.{last}")),
        ["text_projection", "weight"] => Some(Source::Transposed(there("text_projection".into()))),
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
                    Some(Source::Third(there(format!("{block}.attn.in_proj_{last}")), part))
                }
                _ => None,
            }
        }
        _ => None,
    }
}
