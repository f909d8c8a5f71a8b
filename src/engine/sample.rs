//! A sample: one image on its way, or one row of a raw evaluation.

use std::{sync::Arc, time::Instant};

use candle_core::Tensor;
use understudy_models::sampler::{Evaluation, Trajectory};

use super::{
    Event, GenerateRequest, InferRequest, SampleTimings,
    job::{Failure, Reply, Request},
    queue::Place,
};
use crate::registry::Model;

/// One image on its way, or one row of a raw evaluation. It holds everything it needs, its place in
/// the queue included.
#[derive(Debug)]
pub(super) struct Sample {
    pub(super) model: Arc<Model>,
    pub(super) task: Task,
    /// What the network is told beside the latent, as its `Conditioning` says; empty for nothing.
    pub(super) condition: Vec<f32>,
    pub(super) deadline: Option<Instant>,
    pub(super) clock: Clock,
    index: usize,
    reply: Reply,
    /// Its place in the queue; background work has none.
    place: Option<Place>,
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
    /// Made when the first evaluation begins.
    pub(super) latent: Option<Latent>,
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

    pub(super) fn read(&self, now: Instant) -> SampleTimings {
        let started = self.started.unwrap_or(now);
        SampleTimings {
            queue: started.duration_since(self.admitted),
            device: std::time::Duration::from_secs_f64(self.device_seconds),
            total: now.duration_since(self.admitted),
            network_evaluations: self.row_evaluations,
            mean_batch: self.batch_rows as f64 / self.evaluations.max(1) as f64,
            finished: now,
        }
    }
}

impl Request {
    /// Its samples, each with a place in the queue unless it is background work.
    pub(super) fn into_samples(self, reply: Reply, places: Vec<Place>) -> Vec<Sample> {
        match self {
            Self::Generate(request) => {
                Sample::generate(request, reply, places.into_iter().map(Some).collect())
            }
            Self::Background(request) => {
                let none = request.samples.iter().map(|_| None).collect();
                Sample::generate(request, reply, none)
            }
            Self::Infer(request) => Sample::infer(request, reply, places),
        }
    }
}

impl Sample {
    pub(super) fn generate(
        request: GenerateRequest,
        reply: Reply,
        places: Vec<Option<Place>>,
    ) -> Vec<Self> {
        let specs = request.samples.iter().zip(places).enumerate();
        let sample = |(index, (spec, place)): (usize, (&super::SampleSpec, _))| Self {
            model: Arc::clone(&request.model),
            task: Task::Generate(Walk {
                seed: spec.seed,
                trajectory: Arc::clone(&request.trajectory),
                position: 0,
                guidance_scale: request.guidance_scale,
                partial_images: request.partial_images,
                latent: None,
            }),
            condition: spec.class_label.map(|label| label as f32).into_iter().collect(),
            deadline: request.deadline,
            clock: Clock::start(),
            index,
            reply: reply.clone(),
            place,
        };
        specs.map(sample).collect()
    }

    pub(super) fn infer(request: InferRequest, reply: Reply, places: Vec<Place>) -> Vec<Self> {
        let rows = request.timesteps.len();
        let elements = request.sample.len() / rows.max(1);
        let condition = request.condition.unwrap_or_default();
        let width = condition.len() / rows.max(1);
        let row = |(index, place)| Self {
            model: Arc::clone(&request.model),
            task: Task::Infer {
                x: request.sample[index * elements..(index + 1) * elements].to_vec(),
                timestep: request.timesteps[index],
            },
            condition: condition[index * width..(index + 1) * width].to_vec(),
            deadline: request.deadline,
            clock: Clock::start(),
            index,
            reply: reply.clone(),
            place: Some(place),
        };
        places.into_iter().enumerate().map(row).collect()
    }

    /// Rows it takes in an evaluation.
    pub(super) fn rows(&self) -> usize {
        match &self.task {
            Task::Generate(walk) if walk.guided() => 2,
            Task::Generate(_) | Task::Infer { .. } => 1,
        }
    }

    /// Evaluations done and needed.
    pub(super) fn progress(&self) -> (usize, usize) {
        match &self.task {
            Task::Generate(walk) => (walk.position, walk.trajectory.len()),
            Task::Infer { .. } => (0, 1),
        }
    }

    /// Whether no client waits for it.
    pub(super) fn background(&self) -> bool {
        self.place.is_none()
    }

    /// Whether nobody waits for it any more.
    pub(super) fn abandoned(&self) -> bool {
        self.reply.is_closed()
    }

    pub(super) fn expired(&self, now: Instant) -> Option<Failure> {
        let (done, total) = self.progress();
        self.deadline.filter(|&at| at <= now).map(|_| Failure::Deadline { done, total })
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
    pub(super) fn guided(&self) -> bool {
        self.guidance_scale != 1.0
    }

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
