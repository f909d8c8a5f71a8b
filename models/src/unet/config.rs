//! `unet/config.json`: what diffusers' `UNet2DModel` is told, checked once and trusted from then on.

mod check;
mod description;
mod json;

use std::collections::HashMap;

use serde_json::Value;

use super::plan::Resample;
use crate::activation::Activation;
use crate::graph::Graph;
use crate::initial::Distribution;
use crate::network::Architecture;
use crate::weight::Weight;
use crate::{Conditioning, Geometry, NetworkConfig};

/// How the timestep becomes a vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TimeEmbedding {
    /// Sines and cosines of fixed frequencies (Ho et al. 2020, after Vaswani et al. 2017).
    Positional,
    /// Sines and cosines of the logarithm at random frequencies (Song et al. 2021).
    Fourier,
    /// A table with one row per training timestep.
    Learned,
}

/// What a block is made of; its name also says which way it resamples.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Block {
    /// Residual blocks, then a resampling convolution.
    Plain,
    /// Residual blocks each followed by self-attention; resamples as `downsample_type` or `upsample_type` says.
    Attention,
    /// Residual blocks, then a residual block that resamples.
    Resnet,
}

/// What the network is conditioned on beside time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ClassEmbedding {
    /// Nothing.
    None,
    /// A table of this many rows.
    Table(usize),
    /// A number embedded as the timestep is.
    Timestep,
    /// A vector as wide as the time embedding.
    Identity,
}

/// A checked configuration of diffusers' `UNet2DModel`.
///
/// It can only be made by [`UNet2DConfig::from_json`], so whoever holds one need not check it again.
#[derive(Debug, Clone, PartialEq)]
pub struct UNet2DConfig {
    pub(super) height: usize,
    pub(super) width: usize,
    pub(super) in_channels: usize,
    pub(super) out_channels: usize,
    pub(super) center_input_sample: bool,
    pub(super) time_embedding: TimeEmbedding,
    pub(super) time_embedding_dim: Option<usize>,
    pub(super) freq_shift: f64,
    pub(super) flip_sin_to_cos: bool,
    pub(super) down_blocks: Vec<Block>,
    pub(super) mid_block: bool,
    pub(super) up_blocks: Vec<Block>,
    pub(super) channels: Vec<usize>,
    pub(super) layers_per_block: usize,
    pub(super) mid_block_scale_factor: f64,
    pub(super) downsample_padding: usize,
    pub(super) downsample: Resample,
    pub(super) upsample: Resample,
    pub(super) dropout: f64,
    pub(super) activation: Activation,
    pub(super) attention_head_dim: Option<usize>,
    pub(super) norm_num_groups: usize,
    pub(super) attn_norm_num_groups: Option<usize>,
    pub(super) norm_eps: f64,
    pub(super) scale_shift: bool,
    pub(super) add_attention: bool,
    pub(super) class_embedding: ClassEmbedding,
    pub(super) num_class_embeds: Option<usize>,
    pub(super) num_train_timesteps: Option<usize>,
}

impl UNet2DConfig {
    /// The shapes the network takes and gives.
    pub fn geometry(&self) -> Geometry {
        Geometry {
            in_channels: self.in_channels,
            out_channels: self.out_channels,
            height: self.height,
            width: self.width,
            conditioning: match self.class_embedding {
                ClassEmbedding::None => Conditioning::None,
                ClassEmbedding::Table(classes) => Conditioning::Classes(classes),
                ClassEmbedding::Timestep => Conditioning::Timestep,
                ClassEmbedding::Identity => Conditioning::Embedding(self.time_width()),
            },
            prompt: None,
            guidance: false,
        }
    }

    /// Width of the time embedding that the residual blocks see.
    pub(super) fn time_width(&self) -> usize {
        self.time_embedding_dim.unwrap_or(4 * self.channels[0])
    }

    /// Width of the projected timestep before its two layers.
    pub(super) fn projected_width(&self) -> usize {
        match self.time_embedding {
            TimeEmbedding::Fourier => 2 * self.channels[0],
            TimeEmbedding::Positional | TimeEmbedding::Learned => self.channels[0],
        }
    }

    /// Number of resolutions.
    pub(super) fn levels(&self) -> usize {
        self.channels.len()
    }

    /// Attention heads at a level, or nothing where there is no attention.
    fn heads(&self, level: usize) -> Option<usize> {
        let last = self.levels() - 1;
        let attends = self.down_blocks[level] == Block::Attention
            || self.up_blocks[last - level] == Block::Attention
            || (level == last && self.mid_block && self.add_attention);
        attends
            .then(|| self.channels[level] / self.attention_head_dim.unwrap_or(self.channels[level]))
    }

    fn attention_widths(&self) -> impl Iterator<Item = usize> {
        (0..self.levels())
            .filter(|&level| self.heads(level).is_some())
            .map(|level| self.channels[level])
    }
}

impl Architecture for UNet2DConfig {
    fn to_json(&self) -> Value {
        Self::to_json(self)
    }

    fn geometry(&self) -> Geometry {
        Self::geometry(self)
    }

    fn graph(&self) -> Graph {
        Self::graph(self)
    }

    fn size_fields(&self) -> [&'static str; 2] {
        ["block_out_channels", "sample_size"]
    }

    fn setting_for_classes(&self, classes: Option<usize>) -> String {
        match classes {
            Some(classes) => format!("num_class_embeds to {classes}"),
            None => "num_class_embeds to null".into(),
        }
    }

    fn dropout(&self) -> f64 {
        self.dropout
    }

    /// Attentions keep their number of heads where all have the
    /// same width; elsewhere heads keep theirs, or become as wide as divides all.
    fn scaled(&self, factor: f64) -> Option<NetworkConfig> {
        let groups = self.norm_num_groups.max(self.attn_norm_num_groups.unwrap_or(1));
        let width = |&channels: &usize| {
            ((channels as f64 * factor / groups as f64).round() as usize).max(1) * groups
        };
        let mut scaled =
            Self { channels: self.channels.iter().map(width).collect(), ..self.clone() };
        scaled.time_embedding_dim =
            self.time_embedding_dim.map(|width| ((width as f64 * factor).round() as usize).max(1));
        if let Some(head) = self.attention_head_dim {
            let widths: Vec<usize> = scaled.attention_widths().collect();
            let theirs = self.attention_widths().next();
            let same = |all: &[usize]| all.windows(2).all(|pair| pair[0] == pair[1]);
            let heads = theirs.map_or(1, |width| width / head);
            let wanted = match widths.first() {
                Some(width) if same(&widths) && width.is_multiple_of(heads) => width / heads,
                _ => head,
            };
            let fits = |head: &usize| widths.iter().all(|width| width.is_multiple_of(*head));
            scaled.attention_head_dim = (1..=wanted).rev().find(fits);
        }
        // Whatever is not a network after all is refused where every configuration is.
        Self::from_json(&scaled.to_json(), "a scaled config.json").ok().map(Into::into)
    }

    /// How diffusers draws the weight `name` where its shape does not tell: tables of embeddings, and
    /// the random frequencies of Song et al. 2021, which have a scale of 16.
    fn unusual(&self, name: &str) -> Option<Distribution> {
        match (name, self.time_embedding) {
            ("time_proj.weight", TimeEmbedding::Fourier) => Some(Distribution::Normal(16.0)),
            ("time_proj.weight" | "class_embedding.weight", _) => Some(Distribution::Normal(1.0)),
            _ => None,
        }
    }

    fn rename(&self, weights: &mut HashMap<String, Weight>) {
        super::rename_attention(weights);
    }
}
