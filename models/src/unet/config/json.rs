//! Reading and writing the fields.

use serde_json::{Value, json};

use super::check::{CHANNEL_LIMIT, LAYER_LIMIT, SIDE_LIMIT, TABLE_LIMIT};
use super::{Block, ClassEmbedding, TimeEmbedding, UNet2DConfig};
use crate::Result;
use crate::activation::Activation;
use crate::fields::Fields;
use crate::unet::plan::Resample;

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
    /// [`crate::Error::Value`] naming file, field, value and remedy for anything that cannot be honoured.
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
        config.check(&fields)?;
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
}

const DOWN_NAMES: [&str; 3] = ["DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"];
const UP_NAMES: [&str; 3] = ["UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"];
const DOWN_DEFAULT: [&str; 4] =
    ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"];
const UP_DEFAULT: [&str; 4] = ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"];

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
        _ => Err(fields.refuse("time_embedding_type", "must be positional, fourier or learned")),
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
        Some(_) => {
            Err(fields
                .refuse("downsample_padding", "must be 0 or 1; others do not halve the image"))
        }
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
    if number.fract() == 0.0 && number.abs() < 1e9 { json!(number as i64) } else { json!(number) }
}
