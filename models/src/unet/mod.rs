//! The U-Net of denoising diffusion models: diffusers' `UNet2DModel`, and `UNet2DConditionModel`, which draws after text.
//!
//! Ho et al., *Denoising Diffusion Probabilistic Models* (2020), after Ronneberger et al. (2015);
//! the scale-shift norms and resampling residual blocks are those of Dhariwal & Nichol, *Diffusion
//! Models Beat GANs on Image Synthesis* (2021). Weight names and configuration are diffusers'.

mod condition;
mod config;
mod graph;
mod legacy;
mod plan;

pub use condition::{FewerBlocks, UNet2DConditionConfig};
pub use config::UNet2DConfig;
pub(crate) use legacy::rename_attention;
