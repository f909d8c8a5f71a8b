//! `unet/config.json`: what diffusers' `UNet2DModel` is told, checked once and trusted from then on.

use serde_json::{Value, json};

use super::fields::Fields;
use super::weights;
use crate::{Conditioning, Error, Geometry, Result};

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

/// What resamples at the end of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Resample {
    /// A convolution.
    Conv,
    /// A residual block.
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

/// The element-wise function between norm and convolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Activation {
    /// `x·σ(x)`, also called swish.
    Silu,
    /// `x·tanh(ln(1 + eˣ))`.
    Mish,
    /// `x·Φ(x)`, exact.
    Gelu,
    /// `max(x, 0)`.
    Relu,
}

const CHANNEL_LIMIT: usize = 1 << 16;
const SIDE_LIMIT: usize = 1 << 14;
const LEVEL_LIMIT: usize = 12;
const LAYER_LIMIT: usize = 64;
const TABLE_LIMIT: usize = 1 << 24;
/// The most elements one sample's largest activation, and the most weights the network, may have:
/// 16 GiB in f32, beyond which a mistyped number is likelier than a network.
const ELEMENT_LIMIT: u64 = 1 << 32;

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

/// Every field that diffusers' constructor takes.
const KNOWN: [&str; 30] = [
    "sample_size",
    "in_channels",
    "out_channels",
    "center_input_sample",
    "time_embedding_type",
    "time_embedding_dim",
    "freq_shift",
    "flip_sin_to_cos",
    "down_block_types",
    "mid_block_type",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "mid_block_scale_factor",
    "downsample_padding",
    "downsample_type",
    "upsample_type",
    "dropout",
    "act_fn",
    "attention_head_dim",
    "norm_num_groups",
    "attn_norm_num_groups",
    "norm_eps",
    "resnet_time_scale_shift",
    "add_attention",
    "class_embed_type",
    "num_class_embeds",
    "num_train_timesteps",
    "_class_name",
    "_diffusers_version",
];

impl UNet2DConfig {
    /// Reads and checks a `config.json`; `file` is what error messages call it.
    ///
    /// Absent fields take diffusers' defaults. Fields that diffusers does not know are ignored, as
    /// diffusers does, with a warning.
    ///
    /// # Errors
    /// [`Error::Value`] naming file, field, value and remedy for anything that cannot be honoured.
    pub fn from_json(value: &Value, file: &str) -> Result<Self> {
        let fields = Fields::new(value, file)?;
        match fields.text("_class_name", Some("UNet2DModel"))? {
            Some("UNet2DModel") => {}
            _ => return Err(fields.refuse("_class_name", "must be UNet2DModel")),
        }
        for name in fields.names() {
            if !KNOWN.contains(&name) && !name.starts_with('_') {
                tracing::warn!("{file}: `{name}` is not a field of UNet2DModel and is ignored");
            }
        }
        let (height, width) = sample_size(&fields)?;
        let class_embedding = class_embedding(&fields)?;
        let config = Self {
            height,
            width,
            in_channels: fields.count("in_channels", 3, CHANNEL_LIMIT)?,
            out_channels: fields.count("out_channels", 3, CHANNEL_LIMIT)?,
            center_input_sample: fields.flag("center_input_sample", false)?,
            time_embedding: time_embedding(&fields)?,
            time_embedding_dim: time_embedding_dim(&fields)?,
            freq_shift: fields.number("freq_shift", 0.0)?,
            flip_sin_to_cos: fields.flag("flip_sin_to_cos", true)?,
            down_blocks: blocks(&fields, "down_block_types", &DOWN_DEFAULT, &DOWN_NAMES)?,
            mid_block: mid_block(&fields)?,
            up_blocks: blocks(&fields, "up_block_types", &UP_DEFAULT, &UP_NAMES)?,
            channels: fields.counts("block_out_channels", &[224, 448, 672, 896], CHANNEL_LIMIT)?,
            layers_per_block: fields.count("layers_per_block", 2, LAYER_LIMIT)?,
            mid_block_scale_factor: fields.number("mid_block_scale_factor", 1.0)?,
            downsample_padding: downsample_padding(&fields)?,
            downsample: resample(&fields, "downsample_type")?,
            upsample: resample(&fields, "upsample_type")?,
            dropout: fields.number("dropout", 0.0)?,
            activation: activation(&fields)?,
            attention_head_dim: head_dim(&fields)?,
            norm_num_groups: fields.count("norm_num_groups", 32, CHANNEL_LIMIT)?,
            attn_norm_num_groups: fields.optional_count("attn_norm_num_groups", CHANNEL_LIMIT)?,
            norm_eps: fields.number("norm_eps", 1e-5)?,
            scale_shift: scale_shift(&fields)?,
            add_attention: fields.flag("add_attention", true)?,
            class_embedding,
            num_class_embeds: fields.optional_count("num_class_embeds", TABLE_LIMIT)?,
            num_train_timesteps: fields.optional_count("num_train_timesteps", TABLE_LIMIT)?,
        };
        config.check_levels(&fields)?;
        config.check_numbers(&fields)?;
        config.check_size(&fields)?;
        Ok(config)
    }

    /// The same configuration as diffusers writes it, every field present.
    pub fn to_json(&self) -> Value {
        let sample_size = if self.height == self.width {
            json!(self.height)
        } else {
            json!([self.height, self.width])
        };
        json!({
            "_class_name": "UNet2DModel",
            "sample_size": sample_size,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "center_input_sample": self.center_input_sample,
            "time_embedding_type": match self.time_embedding {
                TimeEmbedding::Positional => "positional",
                TimeEmbedding::Fourier => "fourier",
                TimeEmbedding::Learned => "learned",
            },
            "time_embedding_dim": self.time_embedding_dim,
            "freq_shift": whole_if_exact(self.freq_shift),
            "flip_sin_to_cos": self.flip_sin_to_cos,
            "down_block_types": names(&self.down_blocks, &DOWN_NAMES),
            "mid_block_type": self.mid_block.then_some("UNetMidBlock2D"),
            "up_block_types": names(&self.up_blocks, &UP_NAMES),
            "block_out_channels": self.channels,
            "layers_per_block": self.layers_per_block,
            "mid_block_scale_factor": whole_if_exact(self.mid_block_scale_factor),
            "downsample_padding": self.downsample_padding,
            "downsample_type": resample_name(self.downsample),
            "upsample_type": resample_name(self.upsample),
            "dropout": self.dropout,
            "act_fn": match self.activation {
                Activation::Silu => "silu",
                Activation::Mish => "mish",
                Activation::Gelu => "gelu",
                Activation::Relu => "relu",
            },
            "attention_head_dim": self.attention_head_dim,
            "norm_num_groups": self.norm_num_groups,
            "attn_norm_num_groups": self.attn_norm_num_groups,
            "norm_eps": self.norm_eps,
            "resnet_time_scale_shift": if self.scale_shift { "scale_shift" } else { "default" },
            "add_attention": self.add_attention,
            "class_embed_type": match self.class_embedding {
                ClassEmbedding::None | ClassEmbedding::Table(_) => None,
                ClassEmbedding::Timestep => Some("timestep"),
                ClassEmbedding::Identity => Some("identity"),
            },
            "num_class_embeds": self.num_class_embeds,
            "num_train_timesteps": self.num_train_timesteps,
        })
    }

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

    fn check_levels(&self, fields: &Fields) -> Result<()> {
        let levels = self.levels();
        if levels == 0 || levels > LEVEL_LIMIT {
            return Err(fields.refuse(
                "block_out_channels",
                format!("must have 1 to {LEVEL_LIMIT} entries"),
            ));
        }
        let remedy = format!("must have as many entries as block_out_channels, {levels}");
        if self.down_blocks.len() != levels {
            return Err(fields.refuse("down_block_types", remedy));
        }
        if self.up_blocks.len() != levels {
            return Err(fields.refuse("up_block_types", remedy));
        }
        let step = 1 << (levels - 1);
        if !self.height.is_multiple_of(step) || !self.width.is_multiple_of(step) {
            return Err(fields.refuse(
                "sample_size",
                format!(
                    "must be a multiple of {step}, since {levels} levels halve it {} times",
                    levels - 1
                ),
            ));
        }
        Ok(())
    }

    fn check_numbers(&self, fields: &Fields) -> Result<()> {
        let groups = self.norm_num_groups;
        for (i, channels) in self.channels.iter().enumerate() {
            if !channels.is_multiple_of(groups) {
                let remedy = format!("must be a multiple of norm_num_groups, {groups}");
                return Err(fields.refuse_entry("block_out_channels", i, remedy));
            }
        }
        if let Some(head) = self.attention_head_dim
            && let Some(channels) = self
                .attention_widths()
                .find(|width| !width.is_multiple_of(head))
        {
            let remedy =
                format!("must divide the {channels} channels of every block with attention");
            return Err(fields.refuse("attention_head_dim", remedy));
        }
        let last = self.channels[self.levels() - 1];
        if self
            .attn_norm_num_groups
            .is_some_and(|groups| !last.is_multiple_of(groups))
        {
            let remedy = format!("must divide the {last} channels of the mid block");
            return Err(fields.refuse("attn_norm_num_groups", remedy));
        }
        if self.norm_eps < 0.0 {
            return Err(fields.refuse("norm_eps", "must not be negative"));
        }
        if !(0.0..=1.0).contains(&self.dropout) {
            return Err(fields.refuse("dropout", "must be from 0 to 1"));
        }
        if self.mid_block_scale_factor == 0.0 {
            return Err(fields.refuse(
                "mid_block_scale_factor",
                "must not be 0, since activations are divided by it",
            ));
        }
        if self.time_embedding == TimeEmbedding::Learned && self.num_train_timesteps.is_none() {
            let remedy = "must be set, since time_embedding_type is learned: it is the number of rows of the table";
            return Err(fields.refuse("num_train_timesteps", remedy));
        }
        if self.time_embedding == TimeEmbedding::Positional {
            let half = self.channels[0] / 2;
            if half == 0 {
                let remedy = "must be at least 2: half of it is the number of frequencies of the time embedding";
                return Err(fields.refuse_entry("block_out_channels", 0, remedy));
            }
            if self.freq_shift >= half as f64 {
                return Err(fields.refuse(
                    "freq_shift",
                    format!("must be below block_out_channels[0] / 2, {half}"),
                ));
            }
        }
        Ok(())
    }

    /// Refuses what could not be held in memory, before anything is allocated for it.
    fn check_size(&self, fields: &Fields) -> Result<()> {
        let weights: u64 = weights::shapes(self)?
            .values()
            .map(|shape| shape.iter().map(|&side| side as u64).product::<u64>())
            .sum();
        if weights > ELEMENT_LIMIT {
            let remedy = format!(
                "the network would have {weights} weights; at most {ELEMENT_LIMIT} are supported"
            );
            return Err(fields.refuse("block_out_channels", remedy));
        }
        for level in 0..self.levels() {
            let pixels = ((self.height >> level) * (self.width >> level)) as u64;
            // The widest tensor of a level is what enters its up blocks: what comes from below and the skip.
            let below = self.channels[(level + 1).min(self.levels() - 1)];
            let activation =
                pixels * (self.channels[level] + below.max(self.channels[level])) as u64;
            // A 3×3 convolution gathers nine values for each of at most 512 pixels at a time: small beside these.
            let heads = self.heads(level).unwrap_or(0) as u64;
            let scores = pixels.saturating_mul(pixels).saturating_mul(heads);
            if activation.max(scores) > ELEMENT_LIMIT {
                let what = if scores > activation {
                    "attention scores"
                } else {
                    "activations"
                };
                let remedy = format!(
                    "level {level} would have {} {what} per sample; at most {ELEMENT_LIMIT} are supported",
                    activation.max(scores)
                );
                return Err(fields.refuse("sample_size", remedy));
            }
        }
        Ok(())
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

const DOWN_NAMES: [&str; 3] = ["DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"];
const UP_NAMES: [&str; 3] = ["UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"];
const DOWN_DEFAULT: [&str; 4] = [
    "DownBlock2D",
    "AttnDownBlock2D",
    "AttnDownBlock2D",
    "AttnDownBlock2D",
];
const UP_DEFAULT: [&str; 4] = [
    "AttnUpBlock2D",
    "AttnUpBlock2D",
    "AttnUpBlock2D",
    "UpBlock2D",
];

fn blocks(
    fields: &Fields,
    field: &str,
    default: &[&'static str],
    known: &[&str; 3],
) -> Result<Vec<Block>> {
    let mut blocks = Vec::new();
    for (i, name) in fields.texts(field, default)?.into_iter().enumerate() {
        // Folders written before 2023 carry this prefix, which diffusers strips too.
        let name = name.strip_prefix("UNetRes").unwrap_or(name);
        blocks.push(match known.iter().position(|known| *known == name) {
            Some(0) => Block::Plain,
            Some(1) => Block::Attention,
            Some(_) => Block::Resnet,
            None => {
                return Err(fields.refuse_entry(
                    field,
                    i,
                    format!("must be one of {}", known.join(", ")),
                ));
            }
        });
    }
    Ok(blocks)
}

fn names(blocks: &[Block], known: &[&'static str; 3]) -> Vec<&'static str> {
    let name = |block: &Block| match block {
        Block::Plain => known[0],
        Block::Attention => known[1],
        Block::Resnet => known[2],
    };
    blocks.iter().map(name).collect()
}

fn sample_size(fields: &Fields) -> Result<(usize, usize)> {
    let remedy =
        format!("must be the side of the image or [height, width], each from 1 to {SIDE_LIMIT}");
    let sides = match fields.get("sample_size") {
        Some(Value::Array(_)) => fields.counts("sample_size", &[], SIDE_LIMIT)?,
        Some(Value::Number(_)) => vec![fields.count("sample_size", 0, SIDE_LIMIT)?],
        _ => vec![],
    };
    match sides[..] {
        [side] => Ok((side, side)),
        [height, width] => Ok((height, width)),
        _ => Err(fields.refuse("sample_size", remedy)),
    }
}

fn time_embedding(fields: &Fields) -> Result<TimeEmbedding> {
    match fields.text("time_embedding_type", Some("positional"))? {
        Some("positional") => Ok(TimeEmbedding::Positional),
        Some("fourier") => Ok(TimeEmbedding::Fourier),
        Some("learned") => Ok(TimeEmbedding::Learned),
        _ => Err(fields.refuse(
            "time_embedding_type",
            "must be positional, fourier or learned",
        )),
    }
}

fn time_embedding_dim(fields: &Fields) -> Result<Option<usize>> {
    // diffusers takes 0 for "not given".
    if fields.get("time_embedding_dim").and_then(Value::as_u64) == Some(0) {
        return Ok(None);
    }
    fields.optional_count("time_embedding_dim", 4 * CHANNEL_LIMIT)
}

fn mid_block(fields: &Fields) -> Result<bool> {
    match fields.text("mid_block_type", Some("UNetMidBlock2D"))? {
        None => Ok(false),
        Some("UNetMidBlock2D") => Ok(true),
        Some(_) => Err(fields.refuse("mid_block_type", "must be UNetMidBlock2D or null")),
    }
}

fn downsample_padding(fields: &Fields) -> Result<usize> {
    match fields.get("downsample_padding").map(Value::as_u64) {
        None | Some(Some(1)) => Ok(1),
        Some(Some(0)) => Ok(0),
        Some(_) => Err(fields.refuse(
            "downsample_padding",
            "must be 0 or 1; others do not halve the image",
        )),
    }
}

fn resample(fields: &Fields, field: &str) -> Result<Resample> {
    match fields.text(field, Some("conv"))? {
        None | Some("conv") => Ok(Resample::Conv),
        Some("resnet") => Ok(Resample::Resnet),
        Some(_) => Err(fields.refuse(field, "must be conv or resnet")),
    }
}

fn resample_name(resample: Resample) -> &'static str {
    match resample {
        Resample::Conv => "conv",
        Resample::Resnet => "resnet",
    }
}

fn activation(fields: &Fields) -> Result<Activation> {
    let name = fields.text("act_fn", Some("silu"))?.map(str::to_lowercase);
    match name.as_deref() {
        Some("silu" | "swish") => Ok(Activation::Silu),
        Some("mish") => Ok(Activation::Mish),
        Some("gelu") => Ok(Activation::Gelu),
        Some("relu") => Ok(Activation::Relu),
        _ => Err(fields.refuse("act_fn", "must be silu, swish, mish, gelu or relu")),
    }
}

fn head_dim(fields: &Fields) -> Result<Option<usize>> {
    match fields.get("attention_head_dim") {
        None => Ok(Some(8)),
        Some(_) => fields.optional_count("attention_head_dim", CHANNEL_LIMIT),
    }
}

fn scale_shift(fields: &Fields) -> Result<bool> {
    match fields.text("resnet_time_scale_shift", Some("default"))? {
        Some("default") => Ok(false),
        Some("scale_shift") => Ok(true),
        _ => Err(fields.refuse("resnet_time_scale_shift", "must be default or scale_shift")),
    }
}

fn class_embedding(fields: &Fields) -> Result<ClassEmbedding> {
    let classes = fields.optional_count("num_class_embeds", TABLE_LIMIT)?;
    match fields.text("class_embed_type", None)? {
        None => Ok(classes.map_or(ClassEmbedding::None, ClassEmbedding::Table)),
        Some("timestep") => Ok(ClassEmbedding::Timestep),
        Some("identity") => Ok(ClassEmbedding::Identity),
        Some(_) => Err(fields.refuse("class_embed_type", "must be null, timestep or identity")),
    }
}

/// diffusers' files say `1`, not `1.0`, where the constructor's annotation is a whole number.
fn whole_if_exact(number: f64) -> Value {
    if number.fract() == 0.0 && number.abs() < 1e9 {
        json!(number as i64)
    } else {
        json!(number)
    }
}

impl TryFrom<&Value> for UNet2DConfig {
    type Error = Error;

    /// As [`UNet2DConfig::from_json`], for a value that comes from no file.
    fn try_from(value: &Value) -> Result<Self> {
        Self::from_json(value, "config.json")
    }
}
