//! What goes into the engine and what comes out. Everything here is already valid.

use std::{
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use candle_core::{Device, Result, Tensor};
use tokio::sync::mpsc;
pub use understudy_models::Image;
use understudy_models::sampler::{Mixture, Trajectory};

use super::{embeddings::Tokens, stage::PerStage};
use crate::registry::Model;

/// A request for images, valid from here on.
#[derive(Debug, Clone)]
pub struct GenerateRequest {
    /// The model, ready; the request finishes on these weights whatever is loaded meanwhile.
    pub model: Arc<Model>,
    /// One entry per image.
    pub samples: Vec<SampleSpec>,
    /// The steps all of them take.
    pub trajectory: Trajectory,
    /// What a text-to-image model is to draw, and after it, where a guided evaluation has two rows, what it is guided
    /// away from; empty for other models.
    pub prompts: Vec<Tokens>,
    /// Classifier-free guidance; 1 is none, anything else doubles the rows of an evaluation, unless the network is told
    /// the scale.
    pub guidance_scale: f64,
    /// Where the images begin.
    pub start: Start,
    /// How many previews of x0 each image sends on its way, 0 to 3.
    pub partial_images: usize,
    /// When the answer is worthless.
    pub deadline: Option<Instant>,
}

/// Where the images of a request begin.
#[derive(Debug, Clone)]
pub enum Start {
    /// At the noise of their seeds.
    Noise,
    /// At latents, one for each: f32 `[1, C, H, W]` on the model's device.
    Latents(Vec<Tensor>),
    /// At one image with the noise of their seeds in it.
    Image(Beginning),
}

/// An image that others begin with.
#[derive(Debug, Clone)]
pub struct Beginning {
    /// f32 `[1, channels, height, width]` in [−1, 1] on the CPU, as the model makes them.
    pub image: Tensor,
    /// How much of it there is, and how much noise.
    pub begin: Mixture,
    /// Which of it stays.
    pub mask: Option<Arc<Mask>>,
}

impl Beginning {
    /// Of an image as the model makes them.
    ///
    /// # Errors
    /// Pixels that are not as many as it says.
    pub fn new(image: &Image, begin: Mixture, mask: Option<Mask>) -> Result<Self> {
        let Image { width, height, channels, ref pixels } = *image;
        let values = pixels.iter().map(|&byte| f32::from(byte) / 127.5 - 1.0);
        let image =
            Tensor::from_iter(values, &Device::Cpu)?.reshape((1, height, width, channels))?;
        let image = image.permute((0, 3, 1, 2))?.contiguous()?;
        Ok(Self { image, begin, mask: mask.map(Arc::new) })
    }
}

impl Mask {
    /// Of a latent of so many rows and columns: whether each of its places is drawn, row by row.
    ///
    /// # Errors
    /// Other than as many places.
    pub fn new(drawn: &[bool], [rows, columns]: [usize; 2], after: Arc<[Mixture]>) -> Result<Self> {
        let drawn = drawn.iter().map(|&drawn| f32::from(u8::from(drawn)));
        let drawn = Tensor::from_iter(drawn, &Device::Cpu)?.reshape((1, 1, rows, columns))?;
        Ok(Self { drawn, after })
    }
}

/// Where a sample is drawn; elsewhere its image stays.
#[derive(Debug, Clone)]
pub struct Mask {
    /// 1 where it is drawn, 0 where it stays: f32 `[1, 1, H, W]` of a latent's size on the CPU.
    pub drawn: Tensor,
    /// How much image and noise there is after each evaluation.
    pub after: Arc<[Mixture]>,
}

impl GenerateRequest {
    /// Rows of each of its evaluations.
    pub(super) fn rows(&self) -> usize {
        let twice = self.guidance_scale != 1.0 && !self.model.geometry.guidance;
        if twice { 2 } else { 1 }
    }

    /// Whether both requests start from the same N(0, I) tensors, which takes latents of one shape and
    /// the same seeds.
    pub fn shares_noise_with(&self, other: &Self) -> bool {
        let shape = |request: &Self| {
            let geometry = &request.model.geometry;
            (geometry.in_channels, geometry.height, geometry.width)
        };
        let seeds = |request: &Self| request.samples.iter().map(|s| s.seed).collect::<Vec<_>>();
        shape(self) == shape(other) && seeds(self) == seeds(other)
    }
}

/// What distinguishes one image of a request from the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SampleSpec {
    /// Seeds the noise.
    pub seed: u64,
    /// Class, for a class-conditional model.
    pub class_label: Option<u32>,
}

/// One raw network evaluation.
#[derive(Debug, Clone)]
pub struct InferRequest {
    /// The model, ready.
    pub model: Arc<Model>,
    /// `[rows, in_channels, height, width]`, flat.
    pub sample: Vec<f32>,
    /// `[rows]`.
    pub timesteps: Vec<f32>,
    /// Of a network that is told a prompt: `[rows, tokens, width]`, flat; empty for others.
    pub prompts: Vec<f32>,
    /// `[rows]`, for a network that is told its guidance scale: 1 is none.
    pub guidance_scales: Vec<f32>,
    /// As the model's `Conditioning` says, flat, `rows` entries (or `rows × width`); class numbers as floats.
    pub condition: Option<Vec<f32>>,
    /// When the answer is worthless.
    pub deadline: Option<Instant>,
}

/// Where an image's time went.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SampleTimings {
    /// From admission to the start of its first evaluation.
    pub queue: Duration,
    /// Its share of the device: Σ over its evaluations of time ÷ rows.
    pub device: Duration,
    /// From admission to the finished image.
    pub total: Duration,
    /// Evaluations it took (two rows of one evaluation count as two).
    pub network_evaluations: usize,
    /// Mean rows of the evaluations it took part in.
    pub mean_batch: f64,
    /// When the image was finished.
    pub finished: Instant,
    /// When it was in each of the stages that it went through.
    pub stages: PerStage<Option<StageTime>>,
}

/// When an image was in a stage, waits between evaluations included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StageTime {
    /// When its first evaluation began.
    pub began: Instant,
    /// When its last evaluation ended.
    pub ended: Instant,
    /// How many evaluations that took.
    pub evaluations: usize,
}

/// What a submission sends while it runs.
#[derive(Debug)]
pub enum Event {
    /// The current estimate of the clean image.
    Partial {
        /// Which image of the request.
        index: usize,
        /// Which preview of that image, from 0.
        partial_index: usize,
        /// The estimate.
        image: Image,
    },
    /// An image is finished.
    Completed {
        /// Which image of the request.
        index: usize,
        /// The image.
        image: Image,
        /// Where its time went.
        timings: SampleTimings,
    },
    /// A raw evaluation's row is finished.
    Inferred {
        /// Which row.
        index: usize,
        /// The network's own output, `[out_channels, height, width]`, flat.
        output: Vec<f32>,
        /// Where its time went.
        timings: SampleTimings,
    },
    /// An image failed; the others of the request go on.
    Failed {
        /// Which image of the request.
        index: usize,
        /// Why.
        failure: Failure,
    },
}

/// Why a sample that was admitted did not finish.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Failure {
    /// Its deadline passed.
    #[error("the deadline passed after {done} of {total} network evaluations")]
    Deadline {
        /// Evaluations done.
        done: usize,
        /// Evaluations needed.
        total: usize,
    },
    /// The network answered NaN or infinity.
    #[error("the network's answer at timestep {timestep} is not finite")]
    NonFinite {
        /// The training timestep.
        timestep: f64,
    },
    /// The device had no memory for the evaluation.
    #[error(
        "the device has no memory for a batch of {rows}; from now on at most {limit} share one"
    )]
    OutOfMemory {
        /// Rows of the batch.
        rows: usize,
        /// Rows of the model's evaluations from now on.
        limit: usize,
    },
    /// The evaluation failed or panicked; the text is for the log, not for the client.
    #[error("the evaluation failed: {0}")]
    Evaluation(String),
}

/// Why a request was not admitted.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Rejected {
    /// No room for this many images.
    #[error("the queue has room for {free} of its {limit} images, {asked} were asked for")]
    QueueFull {
        /// Images asked for.
        asked: usize,
        /// Room left.
        free: usize,
        /// `--max-queue`.
        limit: usize,
        /// When what is queued is predicted to be done.
        retry_after: Duration,
    },
    /// Others wait, and the client has its share of the queue.
    #[error(
        "{held} images of this client are in the queue, {asked} more were asked for, and while others wait its share is {share}"
    )]
    QueueShare {
        /// Images asked for.
        asked: usize,
        /// Images of the client that wait or run.
        held: usize,
        /// Images that it may have while others wait.
        share: usize,
        /// When what is queued is predicted to be done.
        retry_after: Duration,
    },
    /// The deadline would be met if it were not for the queue.
    #[error(
        "the predicted finish in {predicted:?} misses the deadline of {deadline:?} because of the queue"
    )]
    DeadlineQueue {
        /// Predicted time to the last image.
        predicted: Duration,
        /// Time to the deadline.
        deadline: Duration,
        /// When the queue is predicted to be short enough.
        retry_after: Duration,
    },
    /// The deadline could be met only by missing others that were accepted.
    #[error("the time that this deadline leaves has been promised to other requests")]
    DeadlineOthers {
        /// How long the request takes alone, after which there may be room.
        retry_after: Duration,
    },
    /// Not even an idle server could meet the deadline.
    #[error("even an idle server needs {predicted:?}, more than the deadline of {deadline:?}")]
    DeadlineImpossible {
        /// Predicted time on an idle server.
        predicted: Duration,
        /// Time to the deadline.
        deadline: Duration,
    },
    /// The server is shutting down.
    #[error("the server is shutting down")]
    Draining,
    /// The thread of the device has ended.
    #[error("the device answers nothing any more")]
    DeviceLost,
}

impl Rejected {
    /// Whether the same request can be admitted once the queue is shorter.
    pub fn passes(&self) -> bool {
        matches!(
            self,
            Self::QueueFull { .. }
                | Self::QueueShare { .. }
                | Self::DeadlineQueue { .. }
                | Self::DeadlineOthers { .. }
        )
    }

    /// The predicted time that missed the deadline.
    pub fn predicted(&self) -> Option<Duration> {
        match self {
            Self::DeadlineQueue { predicted, .. } | Self::DeadlineImpossible { predicted, .. } => {
                Some(*predicted)
            }
            Self::QueueFull { .. }
            | Self::QueueShare { .. }
            | Self::DeadlineOthers { .. }
            | Self::Draining
            | Self::DeviceLost => None,
        }
    }

    /// All reasons.
    pub const REASONS: [&str; 7] = [
        "queue_full",
        "queue_share",
        "deadline_queue",
        "deadline_others",
        "deadline_impossible",
        "draining",
        "device_lost",
    ];

    /// The `reason` label of `understudy_rejected_total`.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::QueueFull { .. } => "queue_full",
            Self::QueueShare { .. } => "queue_share",
            Self::DeadlineQueue { .. } => "deadline_queue",
            Self::DeadlineOthers { .. } => "deadline_others",
            Self::DeadlineImpossible { .. } => "deadline_impossible",
            Self::Draining => "draining",
            Self::DeviceLost => "device_lost",
        }
    }
}

impl Failure {
    /// Those that are a fault of the model or of the device.
    pub const FAULTS: [&str; 3] = ["non_finite", "out_of_memory", "evaluation"];

    /// The `reason` label of `understudy_cancelled_total`.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Deadline { .. } => "deadline",
            Self::NonFinite { .. } => "non_finite",
            Self::OutOfMemory { .. } => "out_of_memory",
            Self::Evaluation(_) => "evaluation",
        }
    }
}

/// Where a request's events go. The channel is unbounded so that the device thread never waits for a
/// client; what it holds is bounded by the request (its images and their previews).
pub(super) type Reply = mpsc::UnboundedSender<Event>;

/// An admitted request. Dropping it cancels what has not finished, at the next evaluation.
#[derive(Debug)]
pub struct Submission {
    pub(super) events: mpsc::UnboundedReceiver<Event>,
}

impl Submission {
    /// The next event; `None` once every image is completed or failed.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// [`Submission::next`] for who waits for several.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Event>> {
        self.events.poll_recv(context)
    }

    /// [`Submission::next`] for callers outside an async runtime.
    pub fn blocking_next(&mut self) -> Option<Event> {
        self.events.blocking_recv()
    }
}
