//! `unet/config.json`: the configuration of diffusers' `UNet2DModel`, checked once and trusted from then on.

mod check;
mod description;
mod smaller;

use std::collections::HashMap;

use serde::{Deserialize, Deserializer, Serialize, de::IntoDeserializer};
use serde_json::Value;

use super::plan::Resample;
use crate::activation::Activation;
use crate::each::Each;
use crate::fields::{Fields, typed, whole_if_exact, written};
use crate::graph::Graph;
use crate::initial::Distribution;
use crate::network::Architecture;
use crate::weight::Weight;
use crate::{Conditioning, Geometry, NetworkConfig, Result};

/// How the timestep becomes a vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum TimeEmbedding {
    /// Sines and cosines of fixed frequencies (Ho et al. 2020, after Vaswani et al. 2017).
    Positional,
    /// Sines and cosines of the logarithm at random frequencies (Song et al. 2021).
    Fourier,
    /// A table with one row per training timestep.
    Learned,
}

/// What a level on the way down is made of. Folders written before 2023 put `UNetRes` before the names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Down {
    /// Residual blocks, then a resampling convolution.
    #[serde(rename = "DownBlock2D", alias = "UNetResDownBlock2D")]
    Plain,
    /// Residual blocks each followed by self-attention; resamples as `downsample_type` says.
    #[serde(rename = "AttnDownBlock2D", alias = "UNetResAttnDownBlock2D")]
    Attention,
    /// Residual blocks, then a residual block that resamples.
    #[serde(rename = "ResnetDownsampleBlock2D", alias = "UNetResResnetDownsampleBlock2D")]
    Resnet,
}

/// What a level on the way up is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Up {
    #[serde(rename = "UpBlock2D", alias = "UNetResUpBlock2D")]
    Plain,
    #[serde(rename = "AttnUpBlock2D", alias = "UNetResAttnUpBlock2D")]
    Attention,
    #[serde(rename = "ResnetUpsampleBlock2D", alias = "UNetResResnetUpsampleBlock2D")]
    Resnet,
}

/// Between the two ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Middle {
    /// Two residual blocks, with self-attention between them where `add_attention` says so.
    #[serde(rename = "UNetMidBlock2D")]
    Plain,
}

/// How the time acts on residual blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum TimeScaleShift {
    /// It is added.
    Default,
    /// It scales and shifts.
    ScaleShift,
}

/// What the network is conditioned on beside time, where it is not a table of classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum ClassEmbedType {
    /// A number embedded as the timestep is.
    Timestep,
    /// A vector as wide as the time embedding.
    Identity,
}

/// A checked configuration of diffusers' `UNet2DModel`.
///
/// It can only be made by [`UNet2DConfig::from_json`], so whoever holds one need not check it again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct UNet2DConfig {
    sample_size: Option<Each<usize>>,
    in_channels: usize,
    out_channels: usize,
    center_input_sample: bool,
    time_embedding_type: TimeEmbedding,
    time_embedding_dim: Option<usize>,
    #[serde(serialize_with = "whole_if_exact")]
    freq_shift: f64,
    flip_sin_to_cos: bool,
    down_block_types: Vec<Down>,
    mid_block_type: Option<Middle>,
    up_block_types: Vec<Up>,
    block_out_channels: Vec<usize>,
    layers_per_block: usize,
    #[serde(serialize_with = "whole_if_exact")]
    mid_block_scale_factor: f64,
    downsample_padding: usize,
    #[serde(deserialize_with = "convolution_for_null")]
    downsample_type: Resample,
    #[serde(deserialize_with = "convolution_for_null")]
    upsample_type: Resample,
    dropout: f64,
    #[serde(deserialize_with = "in_any_case")]
    act_fn: Activation,
    attention_head_dim: Option<usize>,
    norm_num_groups: usize,
    attn_norm_num_groups: Option<usize>,
    norm_eps: f64,
    resnet_time_scale_shift: TimeScaleShift,
    add_attention: bool,
    class_embed_type: Option<ClassEmbedType>,
    num_class_embeds: Option<usize>,
    num_train_timesteps: Option<usize>,
}

impl Default for UNet2DConfig {
    fn default() -> Self {
        Self {
            sample_size: None,
            in_channels: 3,
            out_channels: 3,
            center_input_sample: false,
            time_embedding_type: TimeEmbedding::Positional,
            time_embedding_dim: None,
            freq_shift: 0.0,
            flip_sin_to_cos: true,
            down_block_types: vec![Down::Plain, Down::Attention, Down::Attention, Down::Attention],
            mid_block_type: Some(Middle::Plain),
            up_block_types: vec![Up::Attention, Up::Attention, Up::Attention, Up::Plain],
            block_out_channels: vec![224, 448, 672, 896],
            layers_per_block: 2,
            mid_block_scale_factor: 1.0,
            downsample_padding: 1,
            downsample_type: Resample::Conv,
            upsample_type: Resample::Conv,
            dropout: 0.0,
            act_fn: Activation::Silu,
            attention_head_dim: Some(8),
            norm_num_groups: 32,
            attn_norm_num_groups: None,
            norm_eps: 1e-5,
            resnet_time_scale_shift: TimeScaleShift::Default,
            add_attention: true,
            class_embed_type: None,
            num_class_embeds: None,
            num_train_timesteps: None,
        }
    }
}

/// diffusers takes anything but `resnet` for a convolution; of that, `null` is what files have.
fn convolution_for_null<'de, D: Deserializer<'de>>(from: D) -> Result<Resample, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(Resample::Conv))
}

/// diffusers looks functions up by their names in lower case.
fn in_any_case<'de, D: Deserializer<'de>>(from: D) -> Result<Activation, D::Error> {
    Activation::deserialize(String::deserialize(from)?.to_lowercase().into_deserializer())
}

const CLASS: &str = "UNet2DModel";

impl UNet2DConfig {
    /// Reads and checks a `config.json`; `file` is what error messages call it.
    ///
    /// Absent fields take diffusers' defaults. Fields that diffusers does not know are ignored, as
    /// diffusers does, with a warning.
    ///
    /// # Errors
    /// [`crate::Error::Value`] naming file, field, value and remedy for anything that cannot be honoured.
    pub fn from_json(value: &Value, file: &str) -> Result<Self> {
        let fields = Fields::of_class(value, file, CLASS)?;
        let mut config: Self = typed(value, file)?;
        // diffusers takes 0 for "not given".
        config.time_embedding_dim = config.time_embedding_dim.filter(|&width| width > 0);
        config.check(&fields)?;
        let known = config.to_json();
        for name in fields.names().filter(|name| !name.starts_with('_')) {
            if known.get(name).is_none() {
                tracing::warn!("{file}: `{name}` is not a field of {CLASS} and is ignored");
            }
        }
        Ok(config)
    }

    /// The same configuration as diffusers writes it, every field present.
    pub fn to_json(&self) -> Value {
        written(self, CLASS)
    }

    /// The shapes the network takes and gives.
    pub fn geometry(&self) -> Geometry {
        let [height, width] = self.sides();
        Geometry {
            in_channels: self.in_channels,
            out_channels: self.out_channels,
            height,
            width,
            conditioning: match (self.class_embed_type, self.num_class_embeds) {
                (None, None) => Conditioning::None,
                (None, Some(classes)) => Conditioning::Classes(classes),
                (Some(ClassEmbedType::Timestep), _) => Conditioning::Timestep,
                (Some(ClassEmbedType::Identity), _) => Conditioning::Embedding(self.time_width()),
            },
            prompt: None,
            guidance: false,
        }
    }

    /// Height and width of a sample; 0 where none is given.
    fn sides(&self) -> [usize; 2] {
        self.sample_size.as_ref().map_or([0; 2], sides)
    }

    /// Width of the time embedding that the residual blocks see.
    fn time_width(&self) -> usize {
        self.time_embedding_dim.unwrap_or(4 * self.block_out_channels[0])
    }

    /// Width of the projected timestep before its two layers.
    fn projected_width(&self) -> usize {
        match self.time_embedding_type {
            TimeEmbedding::Fourier => 2 * self.block_out_channels[0],
            TimeEmbedding::Positional | TimeEmbedding::Learned => self.block_out_channels[0],
        }
    }

    /// Number of resolutions.
    fn levels(&self) -> usize {
        self.block_out_channels.len()
    }

    /// Attention heads at a level, or nothing where there is no attention.
    fn heads(&self, level: usize) -> Option<usize> {
        let last = self.levels() - 1;
        let attends = self.down_block_types[level] == Down::Attention
            || self.up_block_types[last - level] == Up::Attention
            || (level == last && self.mid_block_type.is_some() && self.add_attention);
        attends.then(|| {
            self.block_out_channels[level]
                / self.attention_head_dim.unwrap_or(self.block_out_channels[level])
        })
    }

    /// How wide the heads of a network with other widths are. Attentions keep their number of heads where all have the same
    /// width; elsewhere heads keep theirs, or become as wide as divides all.
    fn heads_as_in(&self, other: &Self) -> Option<usize> {
        let head = self.attention_head_dim?;
        let widths: Vec<usize> = other.attention_widths().collect();
        let heads = self.attention_widths().next().map_or(1, |width| width / head);
        let same = |all: &[usize]| all.windows(2).all(|pair| pair[0] == pair[1]);
        let wanted = match widths.first() {
            Some(width) if same(&widths) && width.is_multiple_of(heads) => width / heads,
            _ => head,
        };
        let fits = |head: &usize| widths.iter().all(|width| width.is_multiple_of(*head));
        (1..=wanted).rev().find(fits)
    }

    fn attention_widths(&self) -> impl Iterator<Item = usize> {
        (0..self.levels())
            .filter(|&level| self.heads(level).is_some())
            .map(|level| self.block_out_channels[level])
    }
}

/// Height and width, of a square's side or of both; 0 where it is neither.
pub(super) fn sides(size: &Each<usize>) -> [usize; 2] {
    match size {
        Each::All(side) => [*side; 2],
        Each::One(sides) => match sides[..] {
            [side] => [side; 2],
            [height, width] => [height, width],
            _ => [0; 2],
        },
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

    fn scaled(&self, factor: f64) -> Option<NetworkConfig> {
        let groups = self.norm_num_groups.max(self.attn_norm_num_groups.unwrap_or(1));
        let width = |&channels: &usize| {
            ((channels as f64 * factor / groups as f64).round() as usize).max(1) * groups
        };
        let mut scaled = Self {
            block_out_channels: self.block_out_channels.iter().map(width).collect(),
            ..self.clone()
        };
        scaled.time_embedding_dim =
            self.time_embedding_dim.map(|width| ((width as f64 * factor).round() as usize).max(1));
        scaled.attention_head_dim = self.heads_as_in(&scaled);
        // Whatever is not a network after all is refused where every configuration is.
        Self::from_json(&scaled.to_json(), "a scaled config.json").ok().map(Into::into)
    }

    fn smaller(&self) -> Vec<Vec<NetworkConfig>> {
        let named = |direction: Vec<Self>| direction.into_iter().map(Into::into).collect();
        self.all_smaller().into_iter().map(named).collect()
    }

    /// How diffusers draws the weight `name` where its shape does not tell: tables of embeddings, and
    /// the random frequencies of Song et al. 2021, which have a scale of 16.
    fn unusual(&self, name: &str) -> Option<Distribution> {
        match (name, self.time_embedding_type) {
            ("time_proj.weight", TimeEmbedding::Fourier) => Some(Distribution::Normal(16.0)),
            ("time_proj.weight" | "class_embedding.weight", _) => Some(Distribution::Normal(1.0)),
            _ => None,
        }
    }

    fn rename(&self, weights: &mut HashMap<String, Weight>) {
        super::rename_attention(weights);
    }
}
