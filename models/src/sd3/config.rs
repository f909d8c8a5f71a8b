//! `transformer/config.json`: the configuration of diffusers' `SD3Transformer2DModel`, checked once and trusted from then
//! on.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::graph::PLACES;
use crate::fields::{Fields, typed, written};
use crate::graph::{Graph, Grid, Size};
use crate::initial::Distribution;
use crate::network::Architecture;
use crate::{Conditioning, Geometry, NetworkConfig, Prompt, Result};

const CLASS: &str = "SD3Transformer2DModel";
/// Tokens of a prompt, where nobody asks for others: CLIP's 77 and T5's 256, as diffusers' pipeline has them.
const TOKENS: usize = 333;

/// What queries and keys are divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Norm {
    /// Each head's root mean square.
    RmsNorm,
}

/// A checked configuration of diffusers' `SD3Transformer2DModel`.
///
/// It can only be made by [`SD3Config::from_json`], so whoever holds one need not check it again. Fields that diffusers does
/// not know are ignored, as diffusers does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SD3Config {
    pub(super) sample_size: usize,
    pub(super) patch_size: usize,
    pub(super) in_channels: usize,
    pub(super) num_layers: usize,
    pub(super) attention_head_dim: usize,
    pub(super) num_attention_heads: usize,
    pub(super) joint_attention_dim: usize,
    pub(super) caption_projection_dim: usize,
    pub(super) pooled_projection_dim: usize,
    pub(super) out_channels: Option<usize>,
    pub(super) pos_embed_max_size: usize,
    /// Blocks with a second attention among the patches; numbers of none are of no effect.
    pub(super) dual_attention_layers: Vec<usize>,
    pub(super) qk_norm: Option<Norm>,
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
}

impl Default for Asked {
    fn default() -> Self {
        Self { size: None, tokens: TOKENS }
    }
}

impl Default for SD3Config {
    fn default() -> Self {
        Self {
            sample_size: 128,
            patch_size: 2,
            in_channels: 16,
            num_layers: 18,
            attention_head_dim: 64,
            num_attention_heads: 18,
            joint_attention_dim: 4096,
            caption_projection_dim: 1152,
            pooled_projection_dim: 2048,
            out_channels: Some(16),
            pos_embed_max_size: 96,
            dual_attention_layers: Vec::new(),
            qk_norm: None,
            asked: Asked::default(),
        }
    }
}

impl SD3Config {
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

    /// The same network over samples of another height and width, for prompts of so many tokens.
    ///
    /// # Errors
    /// [`crate::Error::Value`] for a size that patches do not fill, that has more places than there are, or is more than
    /// memory holds.
    pub fn at(&self, size: [usize; 2], tokens: usize) -> Result<Self> {
        let size = (size != [self.sample_size; 2]).then_some(size);
        let config = Self { asked: Asked { size, tokens }, ..self.clone() };
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
            conditioning: Conditioning::TextTime { text: self.pooled_projection_dim, numbers: 0 },
            prompt: Some(Prompt { tokens: self.asked.tokens, width: self.joint_attention_dim }),
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
}

impl Architecture for SD3Config {
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
            None => format!("_class_name to {CLASS}, which knows no classes"),
            Some(_) => {
                "_class_name to DiTTransformer2DModel, since this one knows no classes".into()
            }
        }
    }

    fn dropout(&self) -> f64 {
        0.0
    }

    /// As many heads, each narrower.
    fn scaled(&self, factor: f64) -> Option<NetworkConfig> {
        // Rows and columns take sines and cosines each.
        let steps = (self.attention_head_dim as f64 * factor / 4.0).round() as usize;
        let mut scaled = Self { attention_head_dim: 4 * steps.max(1), ..self.clone() };
        scaled.caption_projection_dim = scaled.width();
        // Whatever is not a network after all is refused where every configuration is.
        let checked = Self::from_json(&scaled.to_json(), "a scaled config.json").ok()?;
        Some(Self { asked: self.asked.clone(), ..checked }.into())
    }

    fn unusual(&self, name: &str) -> Option<Distribution> {
        let side = self.pos_embed_max_size;
        let size = Size { height: side, width: side, channels: self.width() };
        let grid = Grid { side: self.sample_size / self.patch_size, scale: 1.0 };
        (name == PLACES).then_some(Distribution::Places(size, grid))
    }
}
