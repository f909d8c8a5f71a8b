//! Admission: what gets in, and what is told to wait.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use super::{
    GenerateRequest, InferRequest, Rejected, Submission,
    job::Request,
    load::{Load, Outlook, alone_seconds, seconds},
    worker::{Command, Worker},
};
use crate::{metrics::Metrics, registry::Model};

/// The handle on the engine; cheap to clone. The worker thread ends when the last one is dropped and
/// what was admitted is done.
#[derive(Debug, Clone)]
pub struct Engine {
    /// One request is judged at a time. `None` once the server drains.
    admission: Arc<Mutex<Option<Sender<Command>>>>,
    permits: Arc<Semaphore>,
    load: Arc<Load>,
    metrics: Arc<Metrics>,
    max_queue: usize,
}

/// Which of several candidates was admitted.
#[derive(Debug)]
pub struct Routed {
    /// Its number among the candidates.
    pub served: usize,
    /// What it sends.
    pub submission: Submission,
    /// Of each candidate up to it, the predicted time to its last image; `None` without a deadline.
    pub predicted: Vec<Option<Duration>>,
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
            admission: Arc::new(Mutex::new(Some(commands))),
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
    pub fn generate_both(
        &self,
        requests: [GenerateRequest; 2],
    ) -> Result<[Submission; 2], Rejected> {
        self.admit(requests.map(Request::Generate))
    }

    /// Admits the first of the candidates, which ask for the same images of different models, that is
    /// predicted to meet its deadline; without a deadline that is the first.
    ///
    /// # Errors
    /// As [`Engine::generate`], when none can be admitted: what the last candidate was told, or an earlier
    /// one that only the queue keeps from meeting its deadline.
    pub fn generate_first(&self, candidates: &[GenerateRequest]) -> Result<Routed, Rejected> {
        let asked = candidates.last().map(|request| (&request.model, request.samples.len()));
        let gate = self.admission.lock().unwrap_or_else(PoisonError::into_inner);
        let routed = gate.as_ref().ok_or(Rejected::Draining).and_then(|sender| {
            let permits = self.permits(asked.map_or(0, |(_, samples)| samples))?;
            self.enter_first(sender, candidates, permits)
        });
        routed.map_err(|rejected| self.count_rejected(rejected, asked))
    }

    fn enter_first(
        &self,
        sender: &Sender<Command>,
        candidates: &[GenerateRequest],
        permits: Vec<OwnedSemaphorePermit>,
    ) -> Result<Routed, Rejected> {
        let mut predicted = Vec::new();
        let mut refusal = Rejected::Draining;
        for (served, request) in candidates.iter().enumerate() {
            let request = Request::Generate(request.clone());
            match self.judge(std::slice::from_ref(&request)) {
                Ok(outlook) => {
                    let with_deadline = outlook.as_ref().filter(|_| request.deadline().is_some());
                    predicted.push(with_deadline.map(Outlook::predicted));
                    let [submission] = self.enter(sender, [request], permits, outlook.as_ref())?;
                    return Ok(Routed { served, submission, predicted });
                }
                Err(refused) => {
                    predicted.push(refused.predicted());
                    // That a later candidate could never make it does not make waiting useless.
                    if refused.passes() || !refusal.passes() {
                        refusal = refused;
                    }
                }
            }
        }
        Err(refusal)
    }

    /// Admits one raw evaluation, one permit per row.
    ///
    /// # Errors
    /// As [`Engine::generate`].
    pub fn infer(&self, request: InferRequest) -> Result<Submission, Rejected> {
        let [submission] = self.admit([Request::Infer(request)])?;
        Ok(submission)
    }

    /// Runs a request whenever nothing else is to do. It takes no permit, so no client is refused for its
    /// sake, and delays a client by at most one evaluation; no metric but those of evaluations counts it.
    ///
    /// # Errors
    /// [`Rejected::Draining`].
    pub fn generate_in_background(&self, request: GenerateRequest) -> Result<Submission, Rejected> {
        let gate = self.admission.lock().unwrap_or_else(PoisonError::into_inner);
        let sender = gate.as_ref().ok_or(Rejected::Draining)?;
        let [submission] = self.enter(sender, [Request::Background(request)], Vec::new(), None)?;
        Ok(submission)
    }

    /// Whether no client waits for anything.
    pub fn is_idle(&self) -> bool {
        self.load.is_idle()
    }

    /// Evaluates a model that nobody uses yet until its costs by batch size are known, between the
    /// evaluations of those that are in use. `max_rows` overrides the largest useful batch.
    ///
    /// # Errors
    /// A sentence when the network cannot be evaluated, or the server drains.
    pub async fn warm_up(&self, model: Arc<Model>, max_rows: Option<usize>) -> Result<(), String> {
        let (reply, done) = oneshot::channel();
        self.tell(Command::WarmUp { model, max_rows, reply })
            .map_err(|rejected| rejected.to_string())?;
        done.await.unwrap_or_else(|_| Err("the device thread ended".into()))
    }

    /// A reply with a deadline was ready so long after its last image was made, and in time or not.
    pub fn delivered(&self, after: Duration, in_time: bool) {
        self.load.promised(in_time, Some(after));
        self.metrics.prediction_margin.set(self.load.margins().0);
    }

    /// Refuses everything from now on; what is in flight goes on.
    pub fn drain(&self) {
        *self.admission.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// How long what is admitted is predicted to take.
    pub fn predicted_drain(&self) -> Duration {
        self.load.predicted_drain()
    }

    /// Admits all of them or none.
    fn admit<const N: usize>(&self, requests: [Request; N]) -> Result<[Submission; N], Rejected> {
        let asked = requests.each_ref().map(|r| (Arc::clone(r.model()), r.samples()));
        let gate = self.admission.lock().unwrap_or_else(PoisonError::into_inner);
        let admitted = gate.as_ref().ok_or(Rejected::Draining).and_then(|sender| {
            let permits = self.permits(asked.iter().map(|(_, samples)| samples).sum())?;
            let outlook = self.judge(&requests)?;
            self.enter(sender, requests, permits, outlook.as_ref())
        });
        admitted.map_err(|rejected| {
            let asked = asked.iter().map(|(model, samples)| (model, *samples));
            self.count_rejected(rejected, asked)
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

    /// Whether all deadlines are predicted to be met, and what else is predicted.
    fn judge(&self, requests: &[Request]) -> Result<Option<Outlook>, Rejected> {
        let newcomers: Vec<_> = requests.iter().flat_map(Request::newcomers).collect();
        if !self.load.needs_outlook(&newcomers) {
            return Ok(None);
        }
        let Some(deadline) = requests.iter().filter_map(Request::deadline).min() else {
            return Ok(Some(self.load.outlook(&newcomers)));
        };
        let deadline = deadline.saturating_duration_since(Instant::now());
        let (margin, delivery) = self.load.margins();
        let alone = seconds(alone_seconds(&newcomers) * margin + delivery);
        if alone > deadline {
            return Err(Rejected::DeadlineImpossible { predicted: alone, deadline });
        }
        let outlook = self.load.outlook(&newcomers);
        let predicted = outlook.late_finish.saturating_add(seconds(delivery));
        if predicted > deadline {
            let retry_after = predicted - deadline;
            return Err(Rejected::DeadlineQueue { predicted, deadline, retry_after });
        }
        if outlook.breaks_promises {
            return Err(Rejected::DeadlineOthers { retry_after: alone });
        }
        Ok(Some(outlook))
    }

    /// Hands requests to the device thread, the first one's samples first.
    fn enter<const N: usize>(
        &self,
        sender: &Sender<Command>,
        requests: [Request; N],
        mut permits: Vec<OwnedSemaphorePermit>,
        outlook: Option<&Outlook>,
    ) -> Result<[Submission; N], Rejected> {
        let newcomers: Vec<_> = requests.iter().flat_map(Request::newcomers).collect();
        let mut samples = Vec::with_capacity(newcomers.len());
        let submissions = requests.map(|request| {
            let (reply, events) = mpsc::unbounded_channel();
            let own = permits.drain(..request.samples().min(permits.len())).collect();
            samples.extend(request.into_samples(reply, own));
            Submission { events }
        });
        let waiting = || {
            let clients = newcomers.iter().filter(|newcomer| !newcomer.background);
            clients.map(|newcomer| {
                self.metrics.samples_waiting.with_label_values(&[&newcomer.model.id])
            })
        };
        waiting().for_each(|gauge| gauge.inc());
        let sent = self.load.admit(&newcomers, outlook, |keys| {
            let samples = keys.iter().copied().zip(samples).collect();
            sender.send(Command::Run(samples)).map_err(|_| Rejected::Draining)
        });
        sent.inspect_err(|_| waiting().for_each(|gauge| gauge.dec()))?;
        Ok(submissions)
    }

    fn tell(&self, command: Command) -> Result<(), Rejected> {
        let gate = self.admission.lock().unwrap_or_else(PoisonError::into_inner);
        let sender = gate.as_ref().ok_or(Rejected::Draining)?;
        sender.send(command).map_err(|_| Rejected::Draining)
    }

    fn count_rejected<'a>(
        &self,
        rejected: Rejected,
        asked: impl IntoIterator<Item = (&'a Arc<Model>, usize)>,
    ) -> Rejected {
        for (model, samples) in asked {
            let counter = &self.metrics.rejected;
            counter.with_label_values(&[&model.id, rejected.reason()]).inc_by(samples as u64);
        }
        rejected
    }
}
