//! The engine: admission, batching of single denoising steps, and the thread that owns the device.
//!
//! [`Engine`] is the handle everyone holds; a [`GenerateRequest`] goes in, [`Event`]s come out. The
//! unit of scheduling is one network evaluation: samples that stand at different timesteps, of
//! different classes, step counts and samplers, share it.
//!
//! ```text
//! handle  admission: permits, deadlines        → worker  the loop that owns the device
//! load    predicts when the queue is done         batcher  decides who shares the next evaluation
//! cost    seconds of an evaluation, by rows       step     does it
//! ```

pub mod batcher;
mod cost;
mod handle;
mod job;
mod load;
mod sample;
mod step;
#[cfg(test)]
mod tests;
mod warmup;
mod worker;

pub use cost::CostModel;
pub use handle::Engine;
pub use job::{
    Event, Failure, GenerateRequest, Image, InferRequest, Rejected, SampleSpec, SampleTimings,
    Submission,
};
pub use warmup::probe;
pub(crate) use warmup::probe_inputs;
