//! The U-Net of denoising diffusion models: diffusers' `UNet2DModel`.
//!
//! Ho et al., *Denoising Diffusion Probabilistic Models* (2020), after Ronneberger et al. (2015);
//! the scale-shift norms and resampling residual blocks are those of Dhariwal & Nichol, *Diffusion
//! Models Beat GANs on Image Synthesis* (2021). Weight names and configuration are diffusers'.

mod config;
mod graph;
mod legacy;

pub use config::UNet2DConfig;
pub(crate) use legacy::rename_attention;
