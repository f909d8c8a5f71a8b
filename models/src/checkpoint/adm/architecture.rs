//! guided-diffusion's flags, and what they mean in diffusers' terms.

use std::path::Path;

use candle_core::Tensor;
use serde_json::{Value, json};

use super::flags::{GROUPS, LIMIT, attends, channels, head_dim, refuse_other_models};
use super::schedule::Schedule;
use crate::checkpoint::read;
use crate::fields::Fields;
use crate::unet::UNet2DConfig;
use crate::{Error, Result};

/// A checked set of flags that a `UNet2DModel` can express.
pub(super) struct Architecture {
    /// What messages call the file.
    file: String,
    image_size: usize,
    in_channels: usize,
    /// Channels per level.
    pub(super) channels: Vec<usize>,
    pub(super) num_res_blocks: usize,
    /// Levels with attention.
    pub(super) attends: Vec<bool>,
    head_dim: usize,
    new_attention_order: bool,
    scale_shift: bool,
    pub(super) resblock_updown: bool,
    learn_sigma: bool,
    classes: Option<usize>,
    dropout: f64,
    schedule: Schedule,
}

impl Architecture {
    /// Reads and checks a file of flags.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let text = read::text(path, read::DESCRIPTION_LIMIT)?;
        let value: Value = serde_json::from_str(&text).map_err(|error| Error::Format {
            path: path.to_path_buf(),
            problem: format!("not JSON: {error}"),
        })?;
        Self::from_json(&value, &path.display().to_string())
    }

    pub(super) fn from_json(value: &Value, file: &str) -> Result<Self> {
        let flags = Fields::new(value, file)?;
        refuse_other_models(&flags)?;
        let image_size = flags.count("image_size", 64, LIMIT)?;
        let channels = channels(&flags, image_size)?;
        let resblock_updown = flags.flag("resblock_updown", false)?;
        if !flags.flag("conv_resample", true)? && !resblock_updown && channels.len() > 1 {
            return Err(flags.refuse(
                "conv_resample",
                "resampling without weights cannot be expressed as a UNet2DModel; only checkpoints \
                 with conv_resample or resblock_updown can be imported",
            ));
        }
        let attends = attends(&flags, image_size, channels.len())?;
        let classes = flags.count("num_classes", 1000, 1 << 24)?;
        Ok(Self {
            file: file.to_string(),
            image_size,
            in_channels: flags.count("in_channels", 3, LIMIT)?,
            num_res_blocks: flags.count("num_res_blocks", 2, 64)?,
            head_dim: head_dim(&flags, &channels, &attends)?,
            channels,
            attends,
            new_attention_order: flags.flag("use_new_attention_order", false)?,
            scale_shift: flags.flag("use_scale_shift_norm", true)?,
            resblock_updown,
            learn_sigma: flags.flag("learn_sigma", false)?,
            classes: flags.flag("class_cond", false)?.then_some(classes),
            dropout: flags.number("dropout", 0.0)?,
            schedule: Schedule::new(&flags)?,
        })
    }

    /// The network as `UNet2DModel` describes it.
    pub(super) fn config(&self) -> Result<UNet2DConfig> {
        let levels = self.channels.len();
        let types = |plain: &'static str, attention: &'static str, resnet: &'static str| {
            let name = move |&attends: &bool| match (attends, self.resblock_updown) {
                (true, _) => attention,
                (false, true) => resnet,
                (false, false) => plain,
            };
            self.attends.iter().map(name).collect::<Vec<_>>()
        };
        let down = types("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D");
        let mut up = types("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D");
        up.reverse();
        debug_assert_eq!(down.len(), levels);
        let resample = if self.resblock_updown { "resnet" } else { "conv" };
        let out_channels = if self.learn_sigma { 2 * self.in_channels } else { self.in_channels };
        let config = json!({
            "sample_size": self.image_size,
            "in_channels": self.in_channels,
            "out_channels": out_channels,
            // timestep_embedding: cosines first, exponents over half the width.
            "time_embedding_type": "positional",
            "flip_sin_to_cos": true,
            "freq_shift": 0,
            "down_block_types": down,
            "up_block_types": up,
            "block_out_channels": self.channels,
            "layers_per_block": self.num_res_blocks,
            "downsample_padding": 1,
            "downsample_type": resample,
            "upsample_type": resample,
            "dropout": self.dropout,
            "act_fn": "silu",
            "attention_head_dim": self.head_dim,
            "norm_num_groups": GROUPS,
            // Said, because UNet2DModel has no norm there beside scale-shift norms otherwise.
            "attn_norm_num_groups": GROUPS,
            "norm_eps": 1e-5,
            "resnet_time_scale_shift": if self.scale_shift { "scale_shift" } else { "default" },
            "num_class_embeds": self.classes,
        });
        UNet2DConfig::from_json(&config, &format!("{}, as unet/config.json", self.file))
    }

    /// The noise schedule as diffusers' `DDPMScheduler` describes it.
    pub(super) fn scheduler(&self) -> Value {
        self.schedule.to_json(self.learn_sigma)
    }

    /// Number of attention heads over `channels` channels.
    pub(super) fn heads(&self, channels: usize) -> usize {
        channels / self.head_dim
    }

    /// Divides the attention's one product, `[3C]` or `[3C, C, 1]`, into those of query, key and
    /// value, each `[C]` or `[C, C]` with the heads one after the other.
    pub(super) fn split(&self, qkv: &Tensor, heads: usize) -> Result<[Tensor; 3]> {
        let channels = qkv.dim(0)? / 3;
        let width = qkv.elem_count() / (3 * channels);
        let (order, axis) = if self.new_attention_order {
            ((3, heads, channels / heads, width), 0)
        } else {
            ((heads, 3, channels / heads, width), 1)
        };
        let qkv = qkv.reshape(order)?;
        let part = |i| -> Result<Tensor> {
            let part = qkv.narrow(axis, i, 1)?.contiguous()?;
            Ok(if width == 1 { part.reshape(channels)? } else { part.reshape((channels, width))? })
        };
        Ok([part(0)?, part(1)?, part(2)?])
    }
}
