//! Data-free distillation of diffusion models, ordinary training, and evaluation.
//!
//! The method is DKDM (Xiang et al., *Data-Free Knowledge Distillation for Diffusion Models with Any
//! Architecture*, CVPR 2025). The crate knows nothing of HTTP, of the server's engine or of the command
//! line: it stands beside the server on `understudy-models`.

pub mod blocks;
pub mod checkpoint;
pub mod data;
pub mod encoded;
pub mod estimate;
pub mod evaluate;
pub mod generate;
pub mod generated;
mod guard;
pub mod guidance;
mod identity;
pub mod importance;
pub mod matching;
pub mod noised;
mod npz;
pub mod objective;
pub mod optimizer;
pub mod parameters;
pub mod picture;
pub mod pool;
pub mod prompting;
pub mod prompts;
pub mod prune;
mod publish;
pub mod quantize;
mod random;
pub mod ranks;
pub mod reduce;
pub mod run_dir;
pub mod shrink;
mod slices;
pub mod student;
mod task;
pub mod teacher;
pub mod train;
pub mod training_batch;
pub mod walk;
pub mod watch;
