//! A sample: one image on its way, or one row of a raw evaluation.

use std::{sync::Arc, time::Instant};

use candle_core::Tensor;
use understudy_models::{
    autoencoder::Decoding,
    sampler::{Evaluation, Trajectory},
};

use super::{
    Beginning, Event, GenerateRequest, InferRequest, Mask, SampleSpec, SampleTimings, StageTime,
    Start,
    admission::Admission,
    batcher::{Part, SampleKey, ScheduledWork, Urgency},
    embeddings::{States, Tokens},
    job::{Failure, Reply},
    queue::Place,
    stage::{PerStage, Stage},
};

/// One image on its way, or one row of a raw evaluation. It holds everything it needs, its place in
/// the queue included.
#[derive(Debug)]
pub(super) struct Sample {
    pub(super) admission: Arc<Admission>,
    pub(super) task: Task,
    /// The network's conditioning, as its `Conditioning` says; empty for none.
    pub(super) condition: Vec<f32>,
    /// The prompts of its rows; none of a model without text.
    pub(super) prompts: Vec<Prompt>,
    pub(super) clock: Clock,
    index: usize,
    reply: Reply,
    /// Its place in the queue; background work has none.
    place: Option<Place>,
}

/// A prompt on its way to a network.
#[derive(Debug, Clone)]
pub(super) struct Prompt {
    pub(super) tokens: Tokens,
    /// What it comes to, once that is known.
    pub(super) states: Option<States>,
}

#[derive(Debug)]
pub(super) enum Task {
    /// Walk a trajectory from noise to an image.
    Generate(Walk),
    /// Answer one raw evaluation.
    Infer {
        /// `[in_channels, height, width]`, flat.
        x: Vec<f32>,
        timestep: f32,
        /// `[tokens, width]`, flat; empty for a network that is told no prompt.
        states: Vec<f32>,
        /// For a network that is told it.
        guidance_scale: f32,
    },
}

/// Where an image stands.
#[derive(Debug)]
pub(super) struct Walk {
    pub(super) seed: u64,
    pub(super) trajectory: Trajectory,
    /// Evaluations done.
    pub(super) position: usize,
    pub(super) guidance_scale: f64,
    partial_images: usize,
    pub(super) start: Origin,
    pub(super) kept: Option<Kept>,
    /// Made when the first evaluation begins.
    pub(super) latent: Option<Latent>,
    /// What its latent becomes, where that is done in parts.
    pub(super) decoding: Option<Box<Decoding>>,
}

/// Where a walk begins.
#[derive(Debug, Clone)]
pub(super) enum Origin {
    /// At its seed's noise.
    Noise,
    /// There, f32 `[1, C, H, W]`.
    Latent(Tensor),
    /// At an image with its seed's noise in it.
    Image(Beginning),
}

/// What stays of the image that a walk begins with.
#[derive(Debug, Clone)]
pub(super) struct Kept {
    pub(super) mask: Arc<Mask>,
    /// The image, clean, as the network works on it, and the noise that was added to it: f32 `[1, C, H, W]`.
    pub(super) clean: Tensor,
    pub(super) noise: Tensor,
}

/// The state a sampler carries: a row of the batch in which it took its last step.
#[derive(Debug, Clone)]
pub(super) struct Latent {
    /// f32 `[B, C, H, W]`.
    pub(super) x: Tensor,
    /// As `x`.
    pub(super) memory: Tensor,
    pub(super) row: usize,
}

/// Where the time goes.
#[derive(Debug)]
pub(super) struct Clock {
    admitted: Instant,
    started: Option<Instant>,
    device_seconds: f64,
    evaluations: usize,
    row_evaluations: usize,
    /// Σ over evaluations of the rows that shared it.
    batch_rows: usize,
    stages: PerStage<Option<StageTime>>,
}

impl Clock {
    fn start() -> Self {
        Self {
            admitted: Instant::now(),
            started: None,
            device_seconds: 0.0,
            evaluations: 0,
            row_evaluations: 0,
            batch_rows: 0,
            stages: PerStage::default(),
        }
    }

    pub(super) fn started(&self) -> bool {
        self.started.is_some()
    }

    /// Its first evaluation began then, if none did before.
    pub(super) fn starts(&mut self, began: Instant) {
        self.started.get_or_insert(began);
    }

    /// An evaluation in which the sample had `rows` of `batch_rows` rows.
    pub(super) fn evaluated(&mut self, seconds: f64, rows: usize, batch_rows: usize) {
        self.device_seconds += seconds * rows as f64 / batch_rows as f64;
        self.evaluations += 1;
        self.row_evaluations += rows;
        self.batch_rows += batch_rows;
    }

    /// An evaluation of that stage lasted from one moment to the other.
    pub(super) fn passed(&mut self, stage: Stage, began: Instant, ended: Instant) {
        let first = StageTime { began, ended, evaluations: 0 };
        let time = self.stages[stage].get_or_insert(first);
        time.ended = ended;
        time.evaluations += 1;
    }

    /// Its share of an evaluation that is not the network's.
    pub(super) fn shared(&mut self, seconds: f64, rows: usize, batch_rows: usize) {
        self.device_seconds += seconds * rows as f64 / batch_rows.max(1) as f64;
    }

    pub(super) fn read(&self, now: Instant) -> SampleTimings {
        let started = self.started.unwrap_or(now);
        SampleTimings {
            queue: started.duration_since(self.admitted),
            device: std::time::Duration::from_secs_f64(self.device_seconds),
            total: now.duration_since(self.admitted),
            network_evaluations: self.row_evaluations,
            mean_batch: self.batch_rows as f64 / self.evaluations.max(1) as f64,
            finished: now,
            stages: self.stages,
        }
    }
}

impl Sample {
    /// The images of a request, whose `prompts` are known or not; `background` is whether no client waits
    /// for them.
    pub(super) fn images(
        request: GenerateRequest,
        prompts: &[Prompt],
        background: bool,
        reply: &Reply,
        mut key: impl FnMut() -> SampleKey,
    ) -> Vec<Self> {
        let once = |rows: usize| Part { rows, evaluations: usize::from(rows > 0) };
        let unknown = prompts.iter().filter(|prompt| prompt.states.is_none());
        let parts_of = |prompt: &Prompt| {
            request.model.text().map_or(0, |text| text.parts(prompt.tokens.ids().len()))
        };
        let unknown = unknown.map(parts_of).sum();
        let parts = PerStage::new(|stage| match stage {
            Stage::Encode => once(unknown),
            Stage::Embed => {
                let begins = matches!(request.start, Start::Image(_));
                once(usize::from(begins && request.model.decodes()))
            }
            Stage::Denoise => Part { rows: request.rows(), evaluations: request.trajectory.len() },
            Stage::Decode if request.model.decodes() => {
                Part { rows: 1, evaluations: request.model.decode_parts() }
            }
            Stage::Decode => Part::default(),
        });
        let sample = |(index, spec): (usize, &SampleSpec)| {
            let admission = Admission {
                key: key(),
                model: Arc::clone(&request.model),
                parts,
                deadline: request.deadline,
                background,
            };
            let walk = Walk {
                seed: spec.seed,
                trajectory: Arc::clone(&request.trajectory),
                position: 0,
                guidance_scale: request.guidance_scale,
                partial_images: request.partial_images,
                start: match &request.start {
                    Start::Noise => Origin::Noise,
                    Start::Latents(latents) => {
                        latents.get(index).cloned().map_or(Origin::Noise, Origin::Latent)
                    }
                    Start::Image(beginning) => Origin::Image(beginning.clone()),
                },
                kept: None,
                latent: None,
                decoding: None,
            };
            let class = spec.class_label.map(|label| label as f32);
            let condition = class.into_iter().collect();
            let prompts = prompts.to_vec();
            Self { prompts, ..Self::new(admission, Task::Generate(walk), condition, index, reply) }
        };
        request.samples.iter().enumerate().map(sample).collect()
    }

    /// The rows of a raw evaluation.
    pub(super) fn rows(
        request: InferRequest,
        reply: &Reply,
        mut key: impl FnMut() -> SampleKey,
    ) -> Vec<Self> {
        let rows = request.timesteps.len();
        let elements = request.sample.len() / rows.max(1);
        let condition = request.condition.unwrap_or_default();
        let width = condition.len() / rows.max(1);
        let told = request.prompts.len() / rows.max(1);
        let row = |index: usize| {
            let admission = Admission {
                key: key(),
                model: Arc::clone(&request.model),
                parts: ScheduledWork::denoising(1, 1, Urgency::Background).parts,
                deadline: request.deadline,
                background: false,
            };
            let task = Task::Infer {
                x: request.sample[index * elements..(index + 1) * elements].to_vec(),
                timestep: request.timesteps[index],
                states: request.prompts[index * told..(index + 1) * told].to_vec(),
                guidance_scale: request.guidance_scales.get(index).copied().unwrap_or(1.0),
            };
            let condition = condition[index * width..(index + 1) * width].to_vec();
            Self::new(admission, task, condition, index, reply)
        };
        (0..rows).map(row).collect()
    }

    fn new(
        admission: Admission,
        task: Task,
        condition: Vec<f32>,
        index: usize,
        reply: &Reply,
    ) -> Self {
        let (admission, reply) = (Arc::new(admission), reply.clone());
        let (prompts, clock) = (Vec::new(), Clock::start());
        Self { admission, task, condition, prompts, clock, index, reply, place: None }
    }

    /// It is let in: its time runs from now on, and a client's holds a place.
    pub(super) fn enter(&mut self, place: Option<Place>) {
        self.clock = Clock::start();
        self.place = place;
    }

    /// Evaluations done and needed.
    pub(super) fn progress(&self) -> (usize, usize) {
        match &self.task {
            Task::Generate(walk) => (walk.position, self.admission.evaluations()),
            Task::Infer { .. } => (0, self.admission.evaluations()),
        }
    }

    /// Whether nobody waits for it any more.
    pub(super) fn abandoned(&self) -> bool {
        self.reply.is_closed()
    }

    pub(super) fn expired(&self, now: Instant) -> Option<Failure> {
        let (done, total) = self.progress();
        self.admission.deadline.filter(|&at| at <= now).map(|_| Failure::Deadline { done, total })
    }

    /// Tells whoever waits; a receiver that is gone is no error.
    pub(super) fn send(&self, event: impl FnOnce(usize) -> Event) {
        let _ = self.reply.send(event(self.index));
    }

    /// Tells the last of it and gives its place in the queue back.
    pub(super) fn finish(self, event: impl FnOnce(usize) -> Event) {
        self.send(event);
        drop(self.place);
    }
}

impl Walk {
    /// The evaluation it stands at.
    pub(super) fn current(&self) -> &Evaluation {
        &self.trajectory[self.position]
    }

    /// Whether its last evaluation has been asked for.
    pub(super) fn is_done(&self) -> bool {
        self.position == self.trajectory.len()
    }

    /// The number of the preview due now, if one is. `k` previews split the trajectory evenly: number
    /// `i` comes after `(i + 1)·N / (k + 1)` of its `N` evaluations, none before the first or after
    /// the last.
    pub(super) fn preview_due(&self) -> Option<usize> {
        let (total, parts) = (self.trajectory.len(), self.partial_images + 1);
        let inside = (1..total).contains(&self.position);
        (1..parts).find(|part| inside && self.position == part * total / parts).map(|part| part - 1)
    }
}
