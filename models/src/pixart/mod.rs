//! PixArt's transformer: diffusers' `PixArtTransformer2DModel`.
//!
//! Chen et al., *PixArt-α* (2023) and *PixArt-Σ* (2024): a diffusion transformer that sees a prompt by cross-attention in
//! every block, and whose blocks share one product of the time, each adding a table of its own (adaLN-single). Weight names
//! and configuration are diffusers'.

mod check;
mod config;
mod graph;

pub use config::PixArtConfig;
