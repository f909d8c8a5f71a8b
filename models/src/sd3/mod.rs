//! Stable Diffusion 3's transformer: diffusers' `SD3Transformer2DModel`.
//!
//! Esser et al., *Scaling Rectified Flow Transformers for High-Resolution Image Synthesis* (2024): patches of an image and
//! tokens of a prompt attend to each other as one row, with weights of their own for either (MM-DiT, §4). Stable Diffusion 3.5
//! has queries and keys by their root mean square, and a second attention among the patches in some blocks (MMDiT-X). Weight
//! names and configuration are diffusers'.

mod check;
mod config;
mod graph;

pub use config::SD3Config;
