//! `transformer/config.json`: the configuration of diffusers' `DiTTransformer2DModel`, checked once and trusted
//! from then on.

mod json;

use serde_json::Value;

use crate::graph::Graph;
use crate::initial::Distribution;
use crate::network::Architecture;
use crate::{Conditioning, Geometry, NetworkConfig};

/// The element-wise function between the two linear layers of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Activation {
    /// `x·Φ(x)`, exact.
    Gelu,
    /// `½·x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))`.
    GeluTanh,
}

/// A checked configuration of diffusers' `DiTTransformer2DModel`.
///
/// It can only be made by [`DiTConfig::from_json`], so whoever holds one need not check it again.
#[derive(Debug, Clone, PartialEq)]
pub struct DiTConfig {
    pub(super) heads: usize,
    pub(super) head_dim: usize,
    pub(super) in_channels: usize,
    pub(super) out_channels: Option<usize>,
    pub(super) layers: usize,
    pub(super) dropout: f64,
    pub(super) attention_bias: bool,
    pub(super) sample_size: usize,
    pub(super) patch_size: usize,
    pub(super) activation: Activation,
    /// Classes but for the one that means "none".
    pub(super) classes: usize,
    pub(super) upcast_attention: bool,
    pub(super) norm_eps: f64,
}

impl DiTConfig {
    /// The shapes the network takes and gives.
    ///
    /// diffusers gives every table of classes one row more than `num_embeds_ada_norm` says, for the class
    /// that means "none": a network with `num_embeds_ada_norm` 0 knows no other, and is unconditional; any
    /// other has `num_embeds_ada_norm + 1` classes, of which the last means "none".
    pub fn geometry(&self) -> Geometry {
        Geometry {
            in_channels: self.in_channels,
            out_channels: self.out_channels.unwrap_or(self.in_channels),
            height: self.sample_size,
            width: self.sample_size,
            conditioning: match self.rows() {
                1 => Conditioning::None,
                rows => Conditioning::Classes(rows),
            },
            prompt: None,
            guidance: false,
        }
    }

    /// Channels of a token.
    pub(super) fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Patches of an image's side.
    pub(super) fn patches(&self) -> usize {
        self.sample_size / self.patch_size
    }

    /// Rows of a table of classes.
    pub(super) fn rows(&self) -> usize {
        self.classes + 1
    }
}

impl Architecture for DiTConfig {
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
        ["num_layers", "sample_size"]
    }

    fn null_class(&self) -> Option<u32> {
        (self.classes > 0).then_some(self.classes as u32)
    }

    fn setting_for_classes(&self, classes: Option<usize>) -> String {
        // Its tables have a row more than that.
        let other_rows = classes.map_or(0, |classes| classes.saturating_sub(1));
        format!("num_embeds_ada_norm to {other_rows}")
    }

    fn dropout(&self) -> f64 {
        self.dropout
    }

    /// As many heads, each narrower.
    fn scaled(&self, factor: f64) -> Option<NetworkConfig> {
        // Rows and columns take sines and cosines each: four channels at a time.
        let quarter = (self.head_dim as f64 * factor / 4.0).round() as usize;
        let scaled = Self { head_dim: 4 * quarter.max(1), ..self.clone() };
        // Whatever is not a network after all is refused where every configuration is.
        Self::from_json(&scaled.to_json(), "a scaled config.json").ok().map(Into::into)
    }

    fn unusual(&self, name: &str) -> Option<Distribution> {
        self.initial(name)
    }
}
