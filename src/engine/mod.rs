//! The engine: admission, batching of single denoising steps, and the thread that owns the device.
//!
//! [`Engine`] is the handle everyone holds; a [`GenerateRequest`] goes in, [`Event`]s come out. The
//! unit of scheduling is one network evaluation: samples that stand at different timesteps, of
//! different classes, step counts and samplers, share it.

mod handle;
mod job;

pub use handle::Engine;
pub use job::{
    Event, Failure, GenerateRequest, Image, InferRequest, Rejected, SampleSpec, SampleTimings,
    Submission,
};
