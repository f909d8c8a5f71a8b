//! Admission: what gets in, and what is told to wait.

use std::{
    sync::{
        Arc, PoisonError, RwLock,
        mpsc::{Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use super::{
    GenerateRequest, InferRequest, Rejected, Submission,
    job::Reply,
    load::{Load, Work},
    sample::Sample,
    worker::{Command, Worker},
};
use crate::{metrics::Metrics, registry::Model};

/// The handle on the engine; cheap to clone. The worker thread ends when the last one is dropped and
/// what was admitted is done.
#[derive(Debug, Clone)]
pub struct Engine {
    /// `None` once the server drains.
    admission: Arc<RwLock<Option<Sender<Command>>>>,
    permits: Arc<Semaphore>,
    load: Arc<Load>,
    metrics: Arc<Metrics>,
    max_queue: usize,
}

impl Engine {
    /// Starts the worker thread. At most `max_queue` images are admitted at a time.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start(max_queue: usize, metrics: Arc<Metrics>) -> std::io::Result<Self> {
        let (commands, receiver) = channel();
        let load = Arc::new(Load::default());
        let worker = Worker::new(receiver, Arc::clone(&load), Arc::clone(&metrics));
        thread::Builder::new().name("device".into()).spawn(move || worker.run())?;
        Ok(Self {
            admission: Arc::new(RwLock::new(Some(commands))),
            permits: Arc::new(Semaphore::new(max_queue)),
            load,
            metrics,
            max_queue,
        })
    }

    /// Admits a request for images, one permit per image, without waiting.
    ///
    /// # Errors
    /// [`Rejected`] when the queue is full, the deadline cannot be met, or the server drains.
    pub fn generate(&self, request: GenerateRequest) -> Result<Submission, Rejected> {
        let guided = request.guidance_scale != 1.0;
        let work = Work {
            rows: request.samples.len() * if guided { 2 } else { 1 },
            evaluations: request.trajectory.len(),
        };
        let model = Arc::clone(&request.model);
        self.admit(&model, work, request.samples.len(), request.deadline, |reply, permits| {
            Sample::generate(request, reply, permits)
        })
    }

    /// Admits one raw evaluation, one permit per row.
    ///
    /// # Errors
    /// As [`Engine::generate`].
    pub fn infer(&self, request: InferRequest) -> Result<Submission, Rejected> {
        let rows = request.timesteps.len();
        let work = Work { rows, evaluations: 1 };
        let model = Arc::clone(&request.model);
        self.admit(&model, work, rows, request.deadline, |reply, permits| {
            Sample::infer(request, reply, permits)
        })
    }

    /// Evaluates a model that nobody uses yet until its costs by batch size are known, between the
    /// evaluations of those that are in use. `max_rows` overrides the largest useful batch.
    ///
    /// # Errors
    /// A sentence when the network cannot be evaluated, or the server drains.
    pub async fn warm_up(&self, model: Arc<Model>, max_rows: Option<usize>) -> Result<(), String> {
        let (reply, done) = oneshot::channel();
        self.send(Command::WarmUp { model, max_rows, reply })
            .map_err(|rejected| rejected.to_string())?;
        done.await.unwrap_or_else(|_| Err("the device thread ended".into()))
    }

    /// Refuses everything from now on; what is in flight goes on.
    pub fn drain(&self) {
        *self.admission.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// How long what is admitted is predicted to take.
    pub fn predicted_drain(&self) -> Duration {
        self.load.predicted_drain()
    }

    fn admit(
        &self,
        model: &Arc<Model>,
        work: Work,
        permits: usize,
        deadline: Option<Instant>,
        samples: impl FnOnce(Reply, Vec<OwnedSemaphorePermit>) -> Vec<Sample>,
    ) -> Result<Submission, Rejected> {
        let admitted = self.permits(permits).and_then(|permits| {
            self.meets_deadline(model, work, deadline)?;
            let (reply, events) = mpsc::unbounded_channel();
            self.load.admit(model, work);
            let count = permits.len() as i64;
            self.metrics.samples_waiting.with_label_values(&[&model.id]).add(count);
            if let Err(rejected) = self.send(Command::Run(samples(reply, permits))) {
                self.load.left(model.key, work);
                self.metrics.samples_waiting.with_label_values(&[&model.id]).sub(count);
                return Err(rejected);
            }
            Ok(Submission { events })
        });
        admitted.inspect_err(|rejected| {
            self.metrics
                .rejected
                .with_label_values(&[&model.id, rejected.reason()])
                .inc_by(permits as u64);
        })
    }

    /// One permit per image, all or none, without waiting.
    fn permits(&self, asked: usize) -> Result<Vec<OwnedSemaphorePermit>, Rejected> {
        let all = u32::try_from(asked)
            .ok()
            .and_then(|n| Arc::clone(&self.permits).try_acquire_many_owned(n).ok());
        let Some(mut all) = all else {
            return Err(Rejected::QueueFull {
                asked,
                free: self.permits.available_permits(),
                limit: self.max_queue,
                retry_after: self.load.predicted_drain(),
            });
        };
        let mut permits: Vec<_> = (1..asked).filter_map(|_| all.split(1)).collect();
        permits.push(all);
        Ok(permits)
    }

    fn meets_deadline(
        &self,
        model: &Model,
        work: Work,
        deadline: Option<Instant>,
    ) -> Result<(), Rejected> {
        let Some(deadline) = deadline.map(|at| at.saturating_duration_since(Instant::now())) else {
            return Ok(());
        };
        let alone = Load::predicted_alone(model, work);
        if alone > deadline {
            return Err(Rejected::DeadlineImpossible { predicted: alone, deadline });
        }
        let predicted = self.load.predicted_finish(model, work);
        if predicted > deadline {
            let retry_after = predicted - deadline;
            return Err(Rejected::DeadlineQueue { predicted, deadline, retry_after });
        }
        Ok(())
    }

    fn send(&self, command: Command) -> Result<(), Rejected> {
        let admission = self.admission.read().unwrap_or_else(PoisonError::into_inner);
        let sender = admission.as_ref().ok_or(Rejected::Draining)?;
        sender.send(command).map_err(|_| Rejected::Draining)
    }
}
