//! guided-diffusion's flags, and what they mean in diffusers' terms.

use std::collections::BTreeSet;
use std::path::Path;

use candle_core::Tensor;
use serde_json::{Value, json};

use crate::unet::UNet2DConfig;
use crate::unet::fields::Fields;
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

struct Schedule {
    steps: usize,
    cosine: bool,
    /// How many steps of the schedule make one of the time that the network is told.
    stride: usize,
    predict_xstart: bool,
    sigma_small: bool,
}

const USED: [&str; 21] = [
    "image_size",
    "num_channels",
    "channel_mult",
    "num_res_blocks",
    "attention_resolutions",
    "num_head_channels",
    "num_heads",
    "num_heads_upsample",
    "use_new_attention_order",
    "use_scale_shift_norm",
    "resblock_updown",
    "learn_sigma",
    "class_cond",
    "num_classes",
    "in_channels",
    "diffusion_steps",
    "noise_schedule",
    "predict_xstart",
    "sigma_small",
    "rescale_timesteps",
    "conv_resample",
];
const WITHOUT_CONSEQUENCE: [&str; 8] = [
    "dims",
    "dropout",
    "use_fp16",
    "use_checkpoint",
    "use_kl",
    "rescale_learned_sigmas",
    "timestep_respacing",
    "model_path",
];
const LIMIT: usize = 1 << 14;
/// GroupNorm32 always has this many groups.
const GROUPS: usize = 32;

impl Architecture {
    /// Reads and checks a file of flags.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let io = |source| Error::Io {
            path: path.to_path_buf(),
            source,
        };
        let text = std::fs::read_to_string(path).map_err(io)?;
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
        let resample = if self.resblock_updown {
            "resnet"
        } else {
            "conv"
        };
        let out_channels = if self.learn_sigma {
            2 * self.in_channels
        } else {
            self.in_channels
        };
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
    pub(super) fn scheduler(&self) -> Result<Value> {
        let Schedule {
            cosine,
            stride,
            predict_xstart,
            sigma_small,
            ..
        } = self.schedule;
        let mut scheduler = json!({
            "_class_name": "DDPMScheduler",
            "num_train_timesteps": self.schedule.steps / stride,
            "beta_schedule": if cosine { "squaredcos_cap_v2" } else { "linear" },
            "beta_start": self.schedule.scale() * 1e-4,
            "beta_end": self.schedule.scale() * 0.02,
            "prediction_type": if predict_xstart { "sample" } else { "epsilon" },
            "variance_type": match (self.learn_sigma, sigma_small) {
                (true, _) => "learned_range",
                (false, true) => "fixed_small",
                (false, false) => "fixed_large",
            },
            "clip_sample": true,
            "clip_sample_range": 1.0,
            "timestep_spacing": "leading",
            "steps_offset": 0,
        });
        if stride > 1 {
            scheduler["trained_betas"] = json!(self.schedule.strided_betas());
        }
        Ok(scheduler)
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
            Ok(if width == 1 {
                part.reshape(channels)?
            } else {
                part.reshape((channels, width))?
            })
        };
        Ok([part(0)?, part(1)?, part(2)?])
    }
}

impl Schedule {
    fn new(flags: &Fields) -> Result<Self> {
        let steps = flags.count("diffusion_steps", 1000, 1 << 20)?;
        let cosine = match flags.text("noise_schedule", Some("linear"))? {
            Some("linear") => false,
            Some("cosine") => true,
            _ => return Err(flags.refuse("noise_schedule", "must be linear or cosine")),
        };
        if steps != 1000 && flags.get("rescale_timesteps").is_none() {
            let remedy = "must be given where diffusion_steps is not 1000: true is the default of \
                          improved-diffusion, false that of guided-diffusion";
            return Err(flags.refuse("rescale_timesteps", remedy));
        }
        // A network that was told the time in thousandths is imported with the schedule's every
        // stride-th step: there its time is a whole number, and the schedule exact.
        let stride = if flags.flag("rescale_timesteps", false)? {
            if !steps.is_multiple_of(1000) {
                let remedy = "with rescale_timesteps it must be a multiple of 1000";
                return Err(flags.refuse("diffusion_steps", remedy));
            }
            steps / 1000
        } else {
            1
        };
        let schedule = Self {
            steps,
            cosine,
            stride,
            predict_xstart: flags.flag("predict_xstart", false)?,
            sigma_small: flags.flag("sigma_small", false)?,
        };
        if !cosine && schedule.scale() * 0.02 >= 1.0 {
            let remedy = "a linear schedule needs at least 21 steps to keep beta below 1";
            return Err(flags.refuse("diffusion_steps", remedy));
        }
        Ok(schedule)
    }

    /// A linear schedule of fewer steps takes larger ones.
    fn scale(&self) -> f64 {
        1000.0 / self.steps as f64
    }

    /// The betas of every `stride`-th step of the schedule (Nichol & Dhariwal 2021, §4).
    fn strided_betas(&self) -> Vec<f64> {
        let mut betas = Vec::with_capacity(self.steps / self.stride);
        let (mut alpha_bar, mut last) = (1.0, 1.0);
        for step in 0..self.steps {
            alpha_bar *= 1.0 - self.beta(step);
            if step.is_multiple_of(self.stride) {
                betas.push(1.0 - alpha_bar / last);
                last = alpha_bar;
            }
        }
        betas
    }

    fn beta(&self, step: usize) -> f64 {
        let steps = self.steps as f64;
        if self.cosine {
            let alpha_bar = |t: f64| {
                libm::pow(
                    libm::cos((t / steps + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2),
                    2.0,
                )
            };
            (1.0 - alpha_bar(step as f64 + 1.0) / alpha_bar(step as f64)).min(0.999)
        } else {
            self.scale() * (1e-4 + (0.02 - 1e-4) * step as f64 / (steps - 1.0))
        }
    }
}

fn refuse_other_models(flags: &Fields) -> Result<()> {
    for name in flags.names() {
        if ["large_size", "small_size"].contains(&name) {
            let remedy = "super-resolution models see a second image, which UNet2DModel does not";
            return Err(flags.refuse(name, remedy));
        }
        if name.starts_with("classifier_") {
            return Err(flags.refuse(
                name,
                "classifiers are not imported; give the diffusion model's flags",
            ));
        }
        if !USED.contains(&name) && !WITHOUT_CONSEQUENCE.contains(&name) {
            return Err(flags.refuse(name, "is not one of guided-diffusion's flags; remove it"));
        }
    }
    if flags.count("dims", 2, 3)? != 2 {
        return Err(flags.refuse("dims", "must be 2"));
    }
    Ok(())
}

/// A list of numbers: `"1,2,3"`, `[1, 2, 3]` or `1`.
fn list(flags: &Fields, name: &str, default: &str) -> Result<Vec<f64>> {
    let refuse = || {
        flags.refuse(
            name,
            "must be positive numbers, as \"32,16,8\" or [32, 16, 8]",
        )
    };
    let numbers: Option<Vec<f64>> = match flags.get(name) {
        Some(Value::Array(list)) => list.iter().map(Value::as_f64).collect(),
        Some(Value::Number(number)) => number.as_f64().map(|number| vec![number]),
        Some(Value::String(text)) => parse(text),
        None => parse(default),
        Some(_) => None,
    };
    let numbers = numbers.ok_or_else(refuse)?;
    let usable = |number: &f64| *number > 0.0 && *number <= LIMIT as f64;
    if numbers.iter().all(usable) {
        Ok(numbers)
    } else {
        Err(refuse())
    }
}

fn parse(text: &str) -> Option<Vec<f64>> {
    let parts = text
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty());
    parts.map(|part| part.parse().ok()).collect()
}

/// Channels per level.
fn channels(flags: &Fields, image_size: usize) -> Result<Vec<usize>> {
    let first = flags.count("num_channels", 128, LIMIT)?;
    if !first.is_multiple_of(GROUPS) {
        return Err(flags.refuse(
            "num_channels",
            "must be a multiple of 32, the number of groups of every norm",
        ));
    }
    let mut multipliers = list(flags, "channel_mult", "")?;
    if multipliers.is_empty() {
        multipliers = match image_size {
            512 => vec![0.5, 1., 1., 2., 2., 4., 4.],
            256 => vec![1., 1., 2., 2., 4., 4.],
            128 => vec![1., 1., 2., 3., 4.],
            64 => vec![1., 2., 3., 4.],
            // Only improved-diffusion has models of this size.
            32 => vec![1., 2., 2., 2.],
            _ => {
                return Err(flags.refuse(
                    "channel_mult",
                    format!("must be given for image_size {image_size}"),
                ));
            }
        };
    }
    if multipliers[0] != 1.0 {
        let found = multipliers[0];
        let remedy = format!(
            "begins with {found}, but UNet2DModel's time embedding is as wide as its first level, so \
             it must begin with 1"
        );
        return Err(flags.refuse("channel_mult", remedy));
    }
    Ok(multipliers
        .into_iter()
        .map(|multiplier| (multiplier * first as f64) as usize)
        .collect())
}

/// Which levels have attention. Sides that no level has are without effect, as in guided-diffusion.
fn attends(flags: &Fields, image_size: usize, levels: usize) -> Result<Vec<bool>> {
    let mut rates = BTreeSet::new();
    for side in list(flags, "attention_resolutions", "16,8")? {
        if side.fract() != 0.0 {
            return Err(flags.refuse("attention_resolutions", "must be whole numbers"));
        }
        rates.insert(image_size / side as usize);
    }
    Ok((0..levels)
        .map(|level| level < 63 && rates.contains(&(1 << level)))
        .collect())
}

/// The one width that all attention heads of a `UNet2DModel` have.
fn head_dim(flags: &Fields, channels: &[usize], attends: &[bool]) -> Result<usize> {
    let number = |name, default: f64| -> Result<Option<usize>> {
        match flags.number(name, default)? {
            -1.0 => Ok(None),
            count if count >= 1.0 && count.fract() == 0.0 && count <= LIMIT as f64 => {
                Ok(Some(count as usize))
            }
            _ => Err(flags.refuse(name, "must be a whole number from 1, or -1 for none")),
        }
    };
    let last = channels.len() - 1;
    // The middle block always attends, with the last level's channels.
    let levels: Vec<usize> = (0..=last)
        .filter(|&level| attends[level])
        .map(|level| channels[level])
        .collect();
    let widths = || levels.iter().chain([&channels[last]]);
    if let Some(head) = number("num_head_channels", -1.0)? {
        return match widths().find(|width| !width.is_multiple_of(head)) {
            None => Ok(head),
            Some(width) => {
                let remedy =
                    format!("must divide the {width} channels of every level with attention");
                Err(flags.refuse("num_head_channels", remedy))
            }
        };
    }
    let heads = number("num_heads", 4.0)?
        .ok_or_else(|| flags.refuse("num_heads", "must be given where num_head_channels is not"))?;
    let up = number("num_heads_upsample", -1.0)?.unwrap_or(heads);
    let pairs = widths().map(|&width| (width, heads, "num_heads"));
    let pairs = pairs.chain(
        levels
            .iter()
            .map(|&width| (width, up, "num_heads_upsample")),
    );
    let mut head_dims = BTreeSet::new();
    for (width, heads, flag) in pairs {
        if !width.is_multiple_of(heads) {
            let remedy = format!("must divide the {width} channels of every level with attention");
            return Err(flags.refuse(flag, remedy));
        }
        head_dims.insert(width / heads);
    }
    match head_dims.iter().collect::<Vec<_>>()[..] {
        [&head_dim] => Ok(head_dim),
        _ => {
            let flag = if up == heads {
                "num_heads"
            } else {
                "num_heads_upsample"
            };
            let remedy = format!(
                "makes attention heads of {head_dims:?} channels, but those of a UNet2DModel all have \
                 one width; only checkpoints trained with num_head_channels, or whose widths coincide, \
                 can be imported"
            );
            Err(flags.refuse(flag, remedy))
        }
    }
}
