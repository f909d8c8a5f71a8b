//! `transformer/config.json`: the configuration of diffusers' `PixArtTransformer2DModel`, checked once and trusted from
//! then on.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::fields::{Fields, typed, whole_if_exact, written};
use crate::graph::{Graph, Grid};
use crate::initial::Distribution;
use crate::kernels::Function;
use crate::network::Architecture;
use crate::{Conditioning, Geometry, NetworkConfig, Prompt, Result};

const CLASS: &str = "PixArtTransformer2DModel";
/// Tokens of a prompt, where nobody asks for others: those of PixArt-Σ, and more than PixArt-α's 120.
const TOKENS: usize = 300;
/// Pixels of an image for one of a latent's: those of Stable Diffusion's autoencoders, which PixArt has.
const FACTOR: usize = 8;
/// The `sample_size` of which a network is told the size of images, where `use_additional_conditions` says nothing.
const TOLD_SIZE: usize = 128;

/// The function between the two linear layers of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Activation {
    /// `x·Φ(x)`, exact.
    #[serde(rename = "gelu")]
    Gelu,
    /// `½·x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))`.
    #[serde(rename = "gelu-approximate")]
    GeluTanh,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum NormType {
    /// One product of the time for all blocks.
    AdaNormSingle,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum AttentionType {
    /// Without boxes that objects are in.
    Default,
}

/// A checked configuration of diffusers' `PixArtTransformer2DModel`.
///
/// It can only be made by [`PixArtConfig::from_json`], so whoever holds one need not check it again. Fields that diffusers
/// does not know are ignored, as diffusers does: earlier folders have some of a `Transformer2DModel`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PixArtConfig {
    pub(super) num_attention_heads: usize,
    pub(super) attention_head_dim: usize,
    pub(super) in_channels: usize,
    pub(super) out_channels: Option<usize>,
    pub(super) num_layers: usize,
    pub(super) dropout: f64,
    /// Of no effect.
    pub(super) norm_num_groups: usize,
    pub(super) cross_attention_dim: Option<usize>,
    pub(super) attention_bias: bool,
    pub(super) sample_size: usize,
    pub(super) patch_size: usize,
    pub(super) activation_fn: Activation,
    /// Of no effect, but must be there.
    pub(super) num_embeds_ada_norm: Option<usize>,
    /// Whether attention is worked out in f32, as it always is here.
    pub(super) upcast_attention: bool,
    pub(super) norm_type: NormType,
    pub(super) norm_elementwise_affine: bool,
    pub(super) norm_eps: f64,
    #[serde(serialize_with = "whole_number")]
    pub(super) interpolation_scale: Option<f64>,
    pub(super) use_additional_conditions: Option<bool>,
    pub(super) caption_channels: Option<usize>,
    pub(super) attention_type: AttentionType,
    /// What `config.json` says nothing of.
    #[serde(skip)]
    pub(super) asked: Asked,
}

/// What a network is built for.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Asked {
    /// Height and width of samples, where they are not `sample_size`.
    pub(super) size: Option<[usize; 2]>,
    /// Tokens of a prompt.
    pub(super) tokens: usize,
    /// Pixels of an image for one of a sample's.
    pub(super) factor: usize,
}

impl Default for PixArtConfig {
    fn default() -> Self {
        Self {
            num_attention_heads: 16,
            attention_head_dim: 72,
            in_channels: 4,
            out_channels: Some(8),
            num_layers: 28,
            dropout: 0.0,
            norm_num_groups: 32,
            cross_attention_dim: Some(1152),
            attention_bias: true,
            sample_size: 128,
            patch_size: 2,
            activation_fn: Activation::GeluTanh,
            num_embeds_ada_norm: Some(1000),
            upcast_attention: false,
            norm_type: NormType::AdaNormSingle,
            norm_elementwise_affine: false,
            norm_eps: 1e-6,
            interpolation_scale: None,
            use_additional_conditions: None,
            caption_channels: None,
            attention_type: AttentionType::Default,
            asked: Asked { size: None, tokens: TOKENS, factor: FACTOR },
        }
    }
}

impl PixArtConfig {
    /// Reads and checks a `config.json`; `file` is what error messages call it. Absent fields take diffusers' defaults.
    ///
    /// # Errors
    /// [`crate::Error::Value`] naming file, field, value and remedy for anything that cannot be honoured.
    pub fn from_json(value: &Value, file: &str) -> Result<Self> {
        let fields = Fields::of_class(value, file, CLASS)?;
        let config: Self = typed(value, file)?;
        config.check(&fields)?;
        Ok(config)
    }

    /// The same configuration as diffusers writes it, every field present.
    pub fn to_json(&self) -> Value {
        written(self, CLASS)
    }

    /// The same network over samples of another height and width, for prompts of at most so many tokens.
    ///
    /// # Errors
    /// [`crate::Error::Value`] for a size that patches do not fill, or that is more than memory holds.
    pub fn at(&self, size: [usize; 2], tokens: usize) -> Result<Self> {
        let own = [self.sample_size; 2];
        let size = (size != own).then_some(size);
        self.asking(Asked { size, tokens, ..self.asked.clone() })
    }

    /// The same network for an autoencoder that makes so many pixels of one of a latent's, a side.
    ///
    /// # Errors
    /// [`crate::Error::Value`] for none.
    pub fn with_factor(&self, factor: usize) -> Result<Self> {
        self.asking(Asked { factor, ..self.asked.clone() })
    }

    fn asking(&self, asked: Asked) -> Result<Self> {
        let config = Self { asked, ..self.clone() };
        config.check(&Fields::new(&config.to_json(), "the requested size")?)?;
        Ok(config)
    }

    /// The shapes the network takes and gives.
    pub fn geometry(&self) -> Geometry {
        let [height, width] = self.size();
        Geometry {
            in_channels: self.in_channels,
            out_channels: self.out_channels.unwrap_or(self.in_channels),
            height,
            width,
            conditioning: Conditioning::None,
            prompt: Some(Prompt { tokens: self.asked.tokens, width: self.prompt_width() }),
            guidance: false,
        }
    }

    /// Height and width of a sample.
    pub(super) fn size(&self) -> [usize; 2] {
        self.asked.size.unwrap_or([self.sample_size; 2])
    }

    /// Channels of a token.
    pub(super) fn width(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    /// Numbers of a prompt's token.
    pub(super) fn prompt_width(&self) -> usize {
        self.caption_channels.or(self.cross_attention_dim).unwrap_or(0)
    }

    /// Whether it is told the size and shape of images.
    pub(super) fn is_told_size(&self) -> bool {
        self.use_additional_conditions.unwrap_or(self.sample_size == TOLD_SIZE)
    }

    /// What a token's place is in.
    pub(super) fn grid(&self) -> Grid {
        let usual = (self.sample_size / 64).max(1) as f64;
        let scale = self.interpolation_scale.unwrap_or(usual) as f32;
        Grid { side: self.sample_size / self.patch_size, scale }
    }
}

impl Architecture for PixArtConfig {
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

    fn setting_for_classes(&self, classes: Option<usize>) -> String {
        match classes {
            None => "_class_name to PixArtTransformer2DModel, which knows no classes".into(),
            Some(_) => {
                "_class_name to DiTTransformer2DModel, since this one knows no classes".into()
            }
        }
    }

    fn dropout(&self) -> f64 {
        self.dropout
    }

    /// As many heads, each narrower.
    fn scaled(&self, factor: f64) -> Option<NetworkConfig> {
        // Rows and columns take sines and cosines each, and what is told of sizes a third: twelve channels at a time.
        let step = if self.is_told_size() { 12 } else { 4 };
        let steps = (self.attention_head_dim as f64 * factor / step as f64).round() as usize;
        let attention_head_dim = step * steps.max(1);
        let mut scaled = Self { attention_head_dim, ..self.clone() };
        if self.caption_channels.is_some() {
            scaled.cross_attention_dim = Some(scaled.width());
        }
        // Whatever is not a network after all is refused where every configuration is.
        let checked = Self::from_json(&scaled.to_json(), "a scaled config.json").ok()?;
        Some(Self { asked: self.asked.clone(), ..checked }.into())
    }

    fn unusual(&self, name: &str) -> Option<Distribution> {
        let scale = 1.0 / (self.width() as f64).sqrt();
        name.ends_with("scale_shift_table").then_some(Distribution::Normal(scale))
    }
}

impl From<Activation> for Function {
    fn from(activation: Activation) -> Self {
        match activation {
            Activation::Gelu => Self::Gelu,
            Activation::GeluTanh => Self::GeluTanh,
        }
    }
}

fn whole_number<S: serde::Serializer>(
    number: &Option<f64>,
    to: S,
) -> std::result::Result<S::Ok, S::Error> {
    match number {
        Some(number) => whole_if_exact(number, to),
        None => to.serialize_none(),
    }
}
