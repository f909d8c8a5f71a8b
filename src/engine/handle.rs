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
    job::Request,
    load::{Load, Work},
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
        let [submission] = self.admit([Request::Generate(request)])?;
        Ok(submission)
    }

    /// Admits two requests for images together: both or neither. Where the planner has no reason to
    /// prefer one of them, the first goes first.
    ///
    /// # Errors
    /// As [`Engine::generate`].
    pub fn generate_both(&self, requests: [GenerateRequest; 2]) -> Result<[Submission; 2], Rejected> {
        self.admit(requests.map(Request::Generate))
    }

    /// Admits one raw evaluation, one permit per row.
    ///
    /// # Errors
    /// As [`Engine::generate`].
    pub fn infer(&self, request: InferRequest) -> Result<Submission, Rejected> {
        let [submission] = self.admit([Request::Infer(request)])?;
        Ok(submission)
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

    /// Admits all of them or none.
    fn admit<const N: usize>(&self, requests: [Request; N]) -> Result<[Submission; N], Rejected> {
        let models = requests.each_ref().map(|request| Arc::clone(request.model()));
        let works = requests.each_ref().map(Request::work);
        let counts = requests.each_ref().map(Request::samples);
        let admitted = self.permits(counts.iter().sum()).and_then(|mut permits| {
            for (request, (model, work)) in requests.iter().zip(models.iter().zip(works)) {
                self.meets_deadline(model, work, request.deadline())?;
            }
            let mut all = Vec::with_capacity(permits.len());
            let submissions = requests.map(|request| {
                let (reply, events) = mpsc::unbounded_channel();
                let own = permits.drain(..request.samples()).collect();
                all.extend(request.into_samples(reply, own));
                Submission { events }
            });
            for ((model, work), count) in models.iter().zip(works).zip(counts) {
                self.load.admit(model, work);
                self.metrics.samples_waiting.with_label_values(&[&model.id]).add(count as i64);
            }
            self.send(Command::Run(all)).inspect_err(|_| {
                for ((model, work), count) in models.iter().zip(works).zip(counts) {
                    self.load.left(model.key, work);
                    self.metrics.samples_waiting.with_label_values(&[&model.id]).sub(count as i64);
                }
            })?;
            Ok(submissions)
        });
        admitted.inspect_err(|rejected| {
            for (model, count) in models.iter().zip(counts) {
                let rejections = &self.metrics.rejected;
                rejections.with_label_values(&[&model.id, rejected.reason()]).inc_by(count as u64);
            }
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
