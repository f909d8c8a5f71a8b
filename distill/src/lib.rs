//! Data-free distillation of diffusion models, ordinary training, and evaluation.
//!
//! The method is DKDM (Xiang et al., *Data-Free Knowledge Distillation for Diffusion Models with Any
//! Architecture*, CVPR 2025). The crate knows nothing of HTTP, of the server's engine or of the command
//! line: it stands beside the server on `understudy-models`.

pub mod data;
pub mod evaluate;
pub mod generate;
mod npz;
