//! The server: diffusion models over HTTP, batched by single denoising steps.
//!
//! [`cli`] parses, [`config`] validates once, [`registry`] loads models, [`engine`] runs them,
//! [`http`] speaks to clients, [`experiments`] keeps splits and votes, [`metrics`] counts, [`percentiles`] sums up and
//! [`similarity`] compares images; [`load`] is a client that asks for as much as it is told to. The binary is a few lines
//! around this library, so that the tests can start a server of their own.

pub mod cli;
pub mod config;
pub mod engine;
pub mod experiments;
#[cfg(feature = "cuda")]
mod gpu;
pub mod http;
pub mod load;
pub mod metrics;
mod mlflow;
pub mod model_folders;
mod names;
pub mod percentiles;
pub mod registry;
mod report;
pub mod similarity;
pub mod traces;
