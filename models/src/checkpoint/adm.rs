//! OpenAI's guided-diffusion and improved-diffusion checkpoints, as diffusers folders.
//!
//! Such a checkpoint is a PyTorch state dict; its architecture is known only to the command
//! line that trained it. [`import`] therefore reads that command line from a JSON file with
//! guided-diffusion's own flag names, for example, for `64x64_diffusion.pt`:
//!
//! ```json
//! {
//!   "image_size": 64,
//!   "num_channels": 192,
//!   "num_res_blocks": 3,
//!   "num_head_channels": 64,
//!   "attention_resolutions": "32,16,8",
//!   "resblock_updown": true,
//!   "use_new_attention_order": true,
//!   "use_scale_shift_norm": true,
//!   "learn_sigma": true,
//!   "class_cond": true,
//!   "dropout": 0.1,
//!   "diffusion_steps": 1000,
//!   "noise_schedule": "cosine"
//! }
//! ```
//!
//! | flag | meaning | absent |
//! | --- | --- | --- |
//! | `image_size` | side of the image | 64 |
//! | `num_channels` | channels of the first level; must be a multiple of 32 | 128 |
//! | `channel_mult` | `"1,2,3"` or `[1, 2, 3]`: channels per level, in units of `num_channels` | by `image_size` |
//! | `num_res_blocks` | residual blocks per level | 2 |
//! | `attention_resolutions` | `"16,8"`, `[16, 8]` or `16`: image sides at which there is attention | `"16,8"` |
//! | `num_head_channels`, `num_heads`, `num_heads_upsample` | width, or else number, of attention heads | −1, 4, −1 |
//! | `use_new_attention_order` | how the attention's one product is divided into query, key and value | false |
//! | `use_scale_shift_norm` | the time embedding scales and shifts a norm instead of being added | true |
//! | `resblock_updown` | residual blocks change the image's size, not convolutions | false |
//! | `learn_sigma` | twice the output channels: mean and variance | false |
//! | `class_cond`, `num_classes` | class labels, and how many | false, 1000 |
//! | `in_channels` | channels of the image | 3 |
//! | `diffusion_steps`, `noise_schedule` | `linear` or `cosine` | 1000, `linear` |
//! | `predict_xstart` | the network tells the clean image, not the noise | false |
//! | `sigma_small` | the smaller of the two fixed variances (improved-diffusion) | false |
//! | `rescale_timesteps` | the network sees times from 0 to 1000 whatever `diffusion_steps` is; improved-diffusion's default is true, so it must be given unless `diffusion_steps` is 1000 | false |
//! | `conv_resample`, `dims` | true, 2; nothing else can be imported | true, 2 |
//! | `dropout`, `use_fp16`, `use_checkpoint`, `use_kl`, `rescale_learned_sigmas`, `timestep_respacing` | of no consequence for the network's answers | |
//!
//! There is no second network: the checkpoint becomes a `UNet2DModel`,
//! which can express most of these architectures. What it cannot express is refused by name:
//! attention heads whose width differs between levels, a first level of another width than
//! `num_channels` (its time embedding has that width), resampling without weights, super-resolution
//! models and classifiers.

mod architecture;
mod flags;
mod names;
mod schedule;

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Tensor};

use super::card::Card;
use super::{Draft, ModelFolder, StateDict};
use crate::schedule::ScheduleConfig;
use crate::unet::UNet2DConfig;
use crate::weights::{Shapes, mismatch};
use crate::{Error, Result};
use architecture::Architecture;
use names::Target;

/// Converts the state dict in `weights` (see [`StateDict`]), whose training flags are in
/// `arch` (JSON, see the [module](self)), to a diffusers folder at `out`, and returns the network's
/// configuration.
///
/// The folder appears complete or not at all. Weights keep their element type, except that f64
/// becomes f32.
///
/// # Errors
/// [`Error::Value`] for a flag that cannot be honoured, and where `out` exists;
/// [`Error::Weights`] naming tensors that are missing, do not belong, or have another shape;
/// [`Error::Format`] and [`Error::Io`] for files that cannot be read or written.
pub fn import(weights: &Path, arch: &Path, out: &Path) -> Result<UNet2DConfig> {
    let architecture = Architecture::read(arch)?;
    let config = architecture.config()?;
    let draft = Draft::new(out)?;
    let tensors = convert(weights, &architecture, &config)?;
    let schedule = ScheduleConfig::from_json(&architecture.scheduler(), "the flags' scheduler")?;
    ModelFolder::write(draft, &config.clone().into(), &tensors, &schedule, &Card::default())?;
    Ok(config)
}

/// Reads the checkpoint's tensors under the names that diffusers gives them.
fn convert(
    path: &Path,
    architecture: &Architecture,
    config: &UNet2DConfig,
) -> Result<HashMap<String, Tensor>> {
    let entries = names::entries(architecture, config)?;
    let expected: Shapes =
        entries.iter().map(|entry| (entry.source.clone(), entry.shape.clone())).collect();
    let mut file = StateDict::open(path, &expected.keys().cloned().collect())?;
    // Compared before anything is read, so that no size in the file is believed.
    if let Some(difference) = mismatch(&expected, &file.shapes()) {
        return Err(Error::Weights(format!(
            "{}: {difference}. Check the flags in the architecture file against the command line \
             that trained the checkpoint",
            path.display()
        )));
    }
    let mut tensors = HashMap::new();
    for entry in entries {
        let tensor = file.take(&entry.source)?;
        let tensor = match tensor.dtype() {
            DType::F64 => tensor.to_dtype(DType::F32)?,
            DType::F32 | DType::F16 | DType::BF16 => tensor,
            other => {
                let problem = format!("`{}` is {other:?}", entry.source);
                return Err(Error::Format { path: path.to_owned(), problem });
            }
        };
        match entry.target {
            Target::Same(name) => drop(tensors.insert(name, tensor.reshape(entry.reshaped)?)),
            Target::QueryKeyValue { names, heads } => {
                let parts = architecture.split(&tensor, heads)?;
                tensors.extend(names.into_iter().zip(parts));
            }
        }
    }
    Ok(tensors)
}
