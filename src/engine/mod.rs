//! The engine: admission, batching of single denoising steps, and the threads that each own a device.
//!
//! [`Engine`] is the handle everyone holds; a [`GenerateRequest`] goes in, [`Event`]s come out. The
//! unit of scheduling is one network evaluation: samples that stand at different timesteps, of
//! different classes, step counts and samplers, share it.
//!
//! ```text
//! handle        places, deadlines, device       → worker    the loop that owns a device
//! admission     a sample's record                  batcher   decides who shares the next evaluation
//! device_queue  a device's plan, shared by both    step      does it
//! queue         the places, and whose they are     observer  counts what becomes of samples
//! forecast      the plan played forward
//! stage         what an evaluation is of: encode, denoise, decode
//! embeddings    what prompts came to
//! cost          seconds of an evaluation, by rows
//! batch_calibration  measures them at warm-up
//! cost_check         or sees whether those of an earlier run still hold
//! calibration   how far predictions are off
//! ```

mod admission;
mod batch_calibration;
pub mod batcher;
mod calibration;
mod cost;
mod cost_check;
mod device_queue;
mod embeddings;
pub mod forecast;
mod handle;
mod job;
mod observer;
mod queue;
mod sample;
pub mod stage;
mod step;
#[cfg(test)]
mod tests;
mod warmup;
mod worker;

pub use batch_calibration::BUDGET_SECONDS as WARM_UP_SECONDS;
pub use cost::{CostModel, StageCosts};
pub(crate) use embeddings::Embeddings;
pub use embeddings::{Tokens, Words};
pub use handle::{Engine, Routed};
pub use job::{
    Beginning, Event, Failure, GenerateRequest, Image, InferRequest, Mask, Rejected, SampleSpec,
    SampleTimings, StageTime, Start, Submission,
};
pub use queue::Client;
pub use stage::{PerStage, Stage};
pub use warmup::probe;
pub(crate) use warmup::probe_inputs;
