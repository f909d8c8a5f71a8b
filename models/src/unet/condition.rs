//! `unet/config.json` of a text-to-image model: the configuration of diffusers' `UNet2DConditionModel`, checked once and trusted
//! from then on.

mod check;
mod description;
mod fewer_blocks;

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::config::{TimeScaleShift, sides};
use super::plan::Resample;
use crate::activation::Activation;
use crate::each::Each;
use crate::fields::{Fields, typed, written};
use crate::graph::Graph;
use crate::initial::Distribution;
use crate::network::Architecture;
use crate::weight::Weight;
use crate::{Conditioning, Geometry, NetworkConfig, Prompt, Result};

pub use fewer_blocks::FewerBlocks;

/// Tokens of a prompt, as CLIP's text encoders have them, where nobody asks for others.
const TOKENS: usize = 77;

/// Numbers beside a pooled text (Podell et al. 2023, §2.2): the size that the image had, where it was cut, and the size it has.
const SIZES: usize = 6;

/// Width of what a guidance scale becomes: that of latent consistency models (Luo et al. 2023).
const GUIDANCE_WIDTH: usize = 256;

/// A level on the way down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Down {
    /// Residual blocks, then a convolution.
    #[serde(rename = "DownBlock2D", alias = "UNetResDownBlock2D")]
    Plain,
    /// Residual blocks each followed by a transformer that sees the prompt, then a convolution.
    #[serde(rename = "CrossAttnDownBlock2D", alias = "UNetResCrossAttnDownBlock2D")]
    CrossAttention,
    /// Residual blocks, then one that resamples.
    #[serde(rename = "ResnetDownsampleBlock2D", alias = "UNetResResnetDownsampleBlock2D")]
    Resnet,
}

/// A level on the way up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Up {
    #[serde(rename = "UpBlock2D", alias = "UNetResUpBlock2D")]
    Plain,
    #[serde(rename = "CrossAttnUpBlock2D", alias = "UNetResCrossAttnUpBlock2D")]
    CrossAttention,
    #[serde(rename = "ResnetUpsampleBlock2D", alias = "UNetResResnetUpsampleBlock2D")]
    Resnet,
}

/// Between the two ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Middle {
    /// Two residual blocks, and a transformer between them.
    #[serde(rename = "UNetMidBlock2DCrossAttn")]
    CrossAttention,
    /// One residual block.
    #[serde(rename = "UNetMidBlock2D")]
    Plain,
}

/// Blocks of the transformers of a level: as many in each, or so many in one after the other.
type Depths = Each<Each<usize>>;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum TimeEmbeddingType {
    /// Sines and cosines of fixed frequencies.
    Positional,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum ClassEmbedType {
    /// A number embedded as the timestep is.
    Timestep,
    /// A vector as wide as the time embedding.
    Identity,
    /// A vector through two layers.
    Projection,
    /// A vector through one.
    SimpleProjection,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum AdditionEmbedType {
    /// What a text encoder pools, and [`SIZES`] numbers.
    TextTime,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum AttentionType {
    /// Without boxes that objects are in.
    Default,
}

/// A checked configuration of diffusers' `UNet2DConditionModel`.
///
/// It can only be made by [`UNet2DConditionConfig::from_json`], so whoever holds one need not check it again. Fields of
/// parts that are refused are here to be refused by name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct UNet2DConditionConfig {
    sample_size: Option<Each<usize>>,
    in_channels: usize,
    out_channels: usize,
    center_input_sample: bool,
    flip_sin_to_cos: bool,
    freq_shift: f64,
    down_block_types: Vec<Down>,
    mid_block_type: Option<Middle>,
    up_block_types: Vec<Up>,
    only_cross_attention: Each<bool>,
    block_out_channels: Vec<usize>,
    layers_per_block: Each<usize>,
    downsample_padding: usize,
    mid_block_scale_factor: f64,
    dropout: f64,
    act_fn: Activation,
    norm_num_groups: usize,
    norm_eps: f64,
    cross_attention_dim: Each<usize>,
    transformer_layers_per_block: Depths,
    reverse_transformer_layers_per_block: Option<Depths>,
    encoder_hid_dim: Option<Value>,
    encoder_hid_dim_type: Option<Value>,
    /// The number of heads, whatever its name says (diffusers' issue 2011).
    attention_head_dim: Each<usize>,
    num_attention_heads: Option<Value>,
    dual_cross_attention: bool,
    use_linear_projection: bool,
    class_embed_type: Option<ClassEmbedType>,
    addition_embed_type: Option<AdditionEmbedType>,
    addition_time_embed_dim: Option<usize>,
    num_class_embeds: Option<usize>,
    /// Whether attention is worked out in f32, as it always is here.
    upcast_attention: Option<bool>,
    resnet_time_scale_shift: TimeScaleShift,
    resnet_skip_time_act: bool,
    resnet_out_scale_factor: f64,
    time_embedding_type: TimeEmbeddingType,
    time_embedding_dim: Option<usize>,
    time_embedding_act_fn: Option<Value>,
    timestep_post_act: Option<Value>,
    time_cond_proj_dim: Option<usize>,
    conv_in_kernel: usize,
    conv_out_kernel: usize,
    projection_class_embeddings_input_dim: Option<usize>,
    attention_type: AttentionType,
    class_embeddings_concat: bool,
    /// Of blocks that are refused alone.
    mid_block_only_cross_attention: Option<Value>,
    cross_attention_norm: Option<Value>,
    /// Of additions alone.
    addition_embed_type_num_heads: Option<Value>,
    /// Tokens of the prompts that the network is built for, of which `config.json` says nothing.
    #[serde(skip)]
    tokens: usize,
}

impl Default for UNet2DConditionConfig {
    fn default() -> Self {
        use {Down as D, Up as U};
        Self {
            sample_size: None,
            in_channels: 4,
            out_channels: 4,
            center_input_sample: false,
            flip_sin_to_cos: true,
            freq_shift: 0.0,
            down_block_types: vec![
                D::CrossAttention,
                D::CrossAttention,
                D::CrossAttention,
                D::Plain,
            ],
            mid_block_type: Some(Middle::CrossAttention),
            up_block_types: vec![U::Plain, U::CrossAttention, U::CrossAttention, U::CrossAttention],
            only_cross_attention: Each::All(false),
            block_out_channels: vec![320, 640, 1280, 1280],
            layers_per_block: Each::All(2),
            downsample_padding: 1,
            mid_block_scale_factor: 1.0,
            dropout: 0.0,
            act_fn: Activation::Silu,
            norm_num_groups: 32,
            norm_eps: 1e-5,
            cross_attention_dim: Each::All(1280),
            transformer_layers_per_block: Each::All(Each::All(1)),
            reverse_transformer_layers_per_block: None,
            encoder_hid_dim: None,
            encoder_hid_dim_type: None,
            attention_head_dim: Each::All(8),
            num_attention_heads: None,
            dual_cross_attention: false,
            use_linear_projection: false,
            class_embed_type: None,
            addition_embed_type: None,
            addition_time_embed_dim: None,
            num_class_embeds: None,
            upcast_attention: None,
            resnet_time_scale_shift: TimeScaleShift::Default,
            resnet_skip_time_act: false,
            resnet_out_scale_factor: 1.0,
            time_embedding_type: TimeEmbeddingType::Positional,
            time_embedding_dim: None,
            time_embedding_act_fn: None,
            timestep_post_act: None,
            time_cond_proj_dim: None,
            conv_in_kernel: 3,
            conv_out_kernel: 3,
            projection_class_embeddings_input_dim: None,
            attention_type: AttentionType::Default,
            class_embeddings_concat: false,
            mid_block_only_cross_attention: None,
            cross_attention_norm: None,
            addition_embed_type_num_heads: None,
            tokens: TOKENS,
        }
    }
}

impl UNet2DConditionConfig {
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
    /// [`crate::Error::Value`] for a size that the levels cannot halve, or that is more than memory holds.
    pub fn at(&self, [height, width]: [usize; 2], tokens: usize) -> Result<Self> {
        let sample_size = Some(Each::One(vec![height, width]));
        let mut config = Self { sample_size, tokens, ..self.clone() };
        if height == width {
            config.sample_size = Some(Each::All(height));
        }
        let json = config.to_json();
        config.check(&Fields::new(&json, "the requested size")?)?;
        Ok(config)
    }

    /// The shapes the network takes and gives.
    pub fn geometry(&self) -> Geometry {
        let [height, width] = self.sides();
        let vector = self.projection_class_embeddings_input_dim.unwrap_or(0);
        Geometry {
            in_channels: self.in_channels,
            out_channels: self.out_channels,
            height,
            width,
            conditioning: match (self.class_embed_type, self.num_class_embeds) {
                (None, None) => match self.pooled() {
                    Some(text) => Conditioning::TextTime { text, numbers: SIZES },
                    None => Conditioning::None,
                },
                (None, Some(classes)) => Conditioning::Classes(classes),
                (Some(ClassEmbedType::Timestep), _) => Conditioning::Timestep,
                (Some(ClassEmbedType::Identity), _) => Conditioning::Embedding(self.time_width()),
                (Some(ClassEmbedType::Projection | ClassEmbedType::SimpleProjection), _) => {
                    Conditioning::Embedding(vector)
                }
            },
            prompt: self.prompt(),
            guidance: self.time_cond_proj_dim.is_some(),
        }
    }

    /// Number of resolutions.
    fn levels(&self) -> usize {
        self.block_out_channels.len()
    }

    /// Height and width of a sample; 0 where none is given.
    fn sides(&self) -> [usize; 2] {
        self.sample_size.as_ref().map_or([0; 2], sides)
    }

    /// Width of the time embedding.
    fn time_width(&self) -> usize {
        self.time_embedding_dim.unwrap_or(4 * self.block_out_channels[0])
    }

    /// Numbers of the pooled text that it takes, where it takes one.
    fn pooled(&self) -> Option<usize> {
        self.addition_embed_type?;
        let (all, each) =
            (self.projection_class_embeddings_input_dim?, self.addition_time_embed_dim?);
        all.checked_sub(SIZES.checked_mul(each)?)
    }

    /// Whether transformers of a level see the prompt; `None` is the middle.
    fn sees_prompt(&self, level: Option<usize>) -> bool {
        let last = self.levels() - 1;
        match level {
            None => self.mid_block_type == Some(Middle::CrossAttention),
            Some(level) => {
                self.down_block_types[level] == Down::CrossAttention
                    || self.up_block_types[last - level] == Up::CrossAttention
                    || (level == last && self.sees_prompt(None))
            }
        }
    }

    /// The prompts it takes, where anything sees them.
    fn prompt(&self) -> Option<Prompt> {
        let level = (0..self.levels()).find(|&level| self.sees_prompt(Some(level)))?;
        let width = *self.cross_attention_dim.at(level)?;
        Some(Prompt { tokens: self.tokens, width })
    }
}

const CLASS: &str = "UNet2DConditionModel";

impl Architecture for UNet2DConditionConfig {
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

    /// Attentions keep their number of heads.
    fn scaled(&self, factor: f64) -> Option<NetworkConfig> {
        let heads = (0..self.levels()).filter_map(|level| self.attention_head_dim.at(level));
        let step = heads.fold(self.norm_num_groups, |step, &heads| least_multiple(step, heads));
        let width = |&channels: &usize| {
            ((channels as f64 * factor / step as f64).round() as usize).max(1) * step
        };
        let mut json = self.to_json();
        json["block_out_channels"] =
            json!(self.block_out_channels.iter().map(width).collect::<Vec<_>>());
        if let Some(width) = self.time_embedding_dim {
            json["time_embedding_dim"] = json!(((width as f64 * factor).round() as usize).max(1));
        }
        // Whatever is not a network after all is refused where every configuration is.
        let scaled = Self::from_json(&json, "a scaled config.json").ok()?;
        Some(Self { tokens: self.tokens, ..scaled }.into())
    }

    fn fewer_blocks(&self, how: FewerBlocks) -> Option<Result<NetworkConfig>> {
        Some(Self::fewer_blocks(self, how))
    }

    fn larger_name(&self, student: &NetworkConfig, name: &str) -> Option<String> {
        match student {
            NetworkConfig::UNetCondition(student) => Some(Self::larger_name(self, student, name)),
            _ => None,
        }
    }

    fn with_guidance(&self, takes: bool) -> Option<NetworkConfig> {
        let time_cond_proj_dim = takes.then_some(GUIDANCE_WIDTH);
        Some(Self { time_cond_proj_dim, ..self.clone() }.into())
    }

    fn unusual(&self, name: &str) -> Option<Distribution> {
        (name == "class_embedding.weight").then_some(Distribution::Normal(1.0))
    }

    fn rename(&self, weights: &mut HashMap<String, Weight>) {
        super::rename_attention(weights);
    }
}

/// The least number that both divide.
fn least_multiple(a: usize, b: usize) -> usize {
    let (mut x, mut y) = (a, b);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    a / x * b
}

impl Down {
    fn resample(self) -> Resample {
        if self == Self::Resnet { Resample::Resnet } else { Resample::Conv }
    }
}

impl Up {
    fn resample(self) -> Resample {
        if self == Self::Resnet { Resample::Resnet } else { Resample::Conv }
    }
}
