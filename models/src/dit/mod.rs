//! The diffusion transformer: diffusers' `DiTTransformer2DModel`.
//!
//! Peebles & Xie, *Scalable Diffusion Models with Transformers* (2023): a vision transformer over
//! patches of the image, conditioned on time and class by the scales, shifts and gates of its norms
//! (adaLN-Zero). Weight names and configuration are diffusers'.

mod config;
mod graph;
mod initial;

pub use config::DiTConfig;
