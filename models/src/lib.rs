//! Diffusion networks, noise schedules, samplers and checkpoints.
//!
//! The crate knows nothing of HTTP, async runtimes, command lines or metrics. Data flows one way:
//! a [`checkpoint`] becomes a network (a [`Denoiser`]) and a noise schedule; the schedule and a
//! request's settings become a [`sampler::Trajectory`]; whoever owns the device alternates network
//! evaluations with [`sampler::advance`].

mod activation;
pub mod autoencoder;
mod autoguided;
mod blocks;
pub mod channels;
pub mod checkpoint;
mod compiled;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda_graphs;
mod demand;
mod denoiser;
mod device_fault;
pub mod dit;
mod each;
mod eager;
mod error;
mod features;
mod fields;
mod fixed_batch;
#[cfg(feature = "cuda")]
mod gpu;
mod graph;
mod image;
mod initial;
pub mod kernels;
mod least_squares;
pub mod lists;
pub mod memory;
pub mod misspelt;
mod network;
pub mod noise;
mod patches;
pub mod pixart;
pub mod quantization;
pub mod repair;
pub mod rollout;
pub mod sampler;
pub mod schedule;
pub mod sd3;
pub mod text;
pub mod unet;
mod weight;
mod weights;
mod wrappers;

pub use autoguided::Autoguided;
pub use denoiser::{Conditioning, Conditions, Denoiser, Geometry, Prompt};
pub use device_fault::DeviceFault;
pub use error::{Error, Result};
pub use fixed_batch::FixedBatch;
pub use image::Image;
pub use network::NetworkConfig;
pub use unet::FewerBlocks;
