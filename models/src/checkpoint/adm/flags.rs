//! The flags that need more than reading.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::Result;
use crate::fields::Fields;

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
/// GroupNorm32 always has this many groups.
pub(super) const GROUPS: usize = 32;
/// No count in an architecture comes near this.
pub(super) const LIMIT: usize = 1 << 14;

/// Refuses flags of other models, and names that are no flags at all.
pub(super) fn refuse_other_models(flags: &Fields) -> Result<()> {
    for name in flags.names() {
        if ["large_size", "small_size"].contains(&name) {
            let remedy = "super-resolution models see a second image, which UNet2DModel does not";
            return Err(flags.refuse(name, remedy));
        }
        if name.starts_with("classifier_") {
            return Err(flags
                .refuse(name, "classifiers are not imported; give the diffusion model's flags"));
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
    let refuse = || flags.refuse(name, "must be positive numbers, as \"32,16,8\" or [32, 16, 8]");
    let numbers: Option<Vec<f64>> = match flags.get(name) {
        Some(Value::Array(list)) => list.iter().map(Value::as_f64).collect(),
        Some(Value::Number(number)) => number.as_f64().map(|number| vec![number]),
        Some(Value::String(text)) => parse(text),
        None => parse(default),
        Some(_) => None,
    };
    let numbers = numbers.ok_or_else(refuse)?;
    let usable = |number: &f64| *number > 0.0 && *number <= LIMIT as f64;
    if numbers.iter().all(usable) { Ok(numbers) } else { Err(refuse()) }
}

fn parse(text: &str) -> Option<Vec<f64>> {
    let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
    parts.map(|part| part.parse().ok()).collect()
}

/// Channels per level.
pub(super) fn channels(flags: &Fields, image_size: usize) -> Result<Vec<usize>> {
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
                return Err(flags
                    .refuse("channel_mult", format!("must be given for image_size {image_size}")));
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
    Ok(multipliers.into_iter().map(|multiplier| (multiplier * first as f64) as usize).collect())
}

/// Which levels have attention. Sides that no level has are without effect, as in guided-diffusion.
pub(super) fn attends(flags: &Fields, image_size: usize, levels: usize) -> Result<Vec<bool>> {
    let mut rates = BTreeSet::new();
    for side in list(flags, "attention_resolutions", "16,8")? {
        if side.fract() != 0.0 {
            return Err(flags.refuse("attention_resolutions", "must be whole numbers"));
        }
        rates.insert(image_size / side as usize);
    }
    Ok((0..levels).map(|level| level < 63 && rates.contains(&(1 << level))).collect())
}

/// The one width that all attention heads of a `UNet2DModel` have.
pub(super) fn head_dim(flags: &Fields, channels: &[usize], attends: &[bool]) -> Result<usize> {
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
    let levels: Vec<usize> =
        (0..=last).filter(|&level| attends[level]).map(|level| channels[level]).collect();
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
    let pairs = pairs.chain(levels.iter().map(|&width| (width, up, "num_heads_upsample")));
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
            let flag = if up == heads { "num_heads" } else { "num_heads_upsample" };
            let remedy = format!(
                "makes attention heads of {head_dims:?} channels, but those of a UNet2DModel all have \
                 one width; only checkpoints trained with num_head_channels, or whose widths coincide, \
                 can be imported"
            );
            Err(flags.refuse(flag, remedy))
        }
    }
}
