//! The server: diffusion models over HTTP, batched by single denoising steps.
//!
//! [`cli`] parses, [`config`] validates once, [`registry`] loads models, [`engine`] runs them,
//! [`http`] speaks to clients, [`metrics`] counts and [`similarity`] compares images. The binary is a few lines around this library,
//! so that the tests can start a server of their own.

pub mod cli;
pub mod config;
pub mod engine;
#[cfg(feature = "cuda")]
mod gpu;
pub mod http;
pub mod metrics;
pub mod registry;
pub mod similarity;
