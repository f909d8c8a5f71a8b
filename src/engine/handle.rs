//! Admission: what gets in, and what is told to wait.

use std::{
    num::NonZeroUsize,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

use tokio::sync::{mpsc, oneshot};

use super::{
    GenerateRequest, InferRequest, Rejected, Submission, Tokens,
    admission::Admission,
    batcher::SampleKey,
    calibration::Calibrator,
    cost::StageCosts,
    device_queue::{DeviceQueue, Forecast, alone_seconds, seconds},
    observer::Observer,
    queue::{Client, Place, Queue},
    sample::{Prompt, Sample},
    worker::{Command, Worker},
};
use crate::{metrics::Metrics, registry::Model};

/// The handle on the engine; cheap to clone. The worker threads, one per device, end when the last one is
/// dropped and what was admitted is done.
#[derive(Debug, Clone)]
pub struct Engine {
    /// One request is judged at a time. `None` once the server drains.
    gate: Arc<Mutex<Option<Gate>>>,
    queue: Arc<Queue>,
    /// On whose behalf it asks.
    client: Client,
    /// What each device has to do.
    pub(super) devices: Arc<[Arc<DeviceQueue>]>,
    calibrator: Calibrator,
    observer: Observer,
}

/// What whoever is admitted passes.
#[derive(Debug)]
struct Gate {
    /// The way to each device.
    senders: Vec<Sender<Command>>,
    next_key: u64,
    observer: Observer,
}

/// The samples of a request, and what its client waits for.
type Arrived = (Vec<Sample>, Submission);

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

/// Where requests go, and what is predicted to come of it.
struct Destination {
    device: usize,
    forecast: Option<Forecast>,
}

impl Gate {
    fn images(&mut self, request: GenerateRequest, background: bool) -> Arrived {
        let (reply, events) = mpsc::unbounded_channel();
        let known = request.model.embeddings();
        let prompt = |tokens: &Tokens| {
            let (tokens, states) = (Arc::clone(tokens), known.get(tokens));
            Prompt { tokens, states }
        };
        let prompts: Vec<Prompt> = request.prompts.iter().map(prompt).collect();
        self.observer.prompted(&request.model, &prompts);
        let samples = Sample::images(request, &prompts, background, &reply, || self.key());
        (samples, Submission { events })
    }

    fn rows(&mut self, request: InferRequest) -> Arrived {
        let (reply, events) = mpsc::unbounded_channel();
        (Sample::rows(request, &reply, || self.key()), Submission { events })
    }

    fn key(&mut self) -> SampleKey {
        self.next_key += 1;
        SampleKey(self.next_key)
    }
}

impl Engine {
    /// Starts a worker thread for each of `devices` devices, which are alike. At most `max_queue` images
    /// are admitted at a time.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start(
        devices: NonZeroUsize,
        max_queue: usize,
        metrics: Arc<Metrics>,
    ) -> std::io::Result<Self> {
        let (calibrator, observer) = (Calibrator::default(), Observer::new(metrics));
        let (mut senders, mut queues) = (Vec::new(), Vec::new());
        for device in 0..devices.get() {
            let (sender, receiver) = channel();
            let queue = Arc::new(DeviceQueue::new(device, calibrator.clone()));
            let (shared, own) = (Arc::clone(&queue), calibrator.clone());
            let worker = Worker::new(device, receiver, shared, own, observer.clone());
            let name = format!("device {device}");
            let (shared, observer) = (Arc::clone(&queue), observer.clone());
            thread::Builder::new().name(name).spawn(move || {
                // What is caught nowhere else ends the thread, and with it what the device was to do.
                if catch_unwind(AssertUnwindSafe(|| worker.run())).is_err() {
                    tracing::error!(device, "the device's thread panicked; start the server anew");
                    observer.panicked("device");
                    shared.end();
                }
            })?;
            senders.push(sender);
            queues.push(queue);
        }
        Ok(Self {
            gate: Arc::new(Mutex::new(Some(Gate {
                senders,
                next_key: 0,
                observer: observer.clone(),
            }))),
            queue: Queue::new(max_queue),
            client: Client::default(),
            devices: queues.into(),
            calibrator,
            observer,
        })
    }

    /// Whether there is a place for one more image or row, before more is done for it than asking.
    ///
    /// # Errors
    /// [`Rejected::QueueFull`] and [`Rejected::QueueShare`].
    pub fn check_room(&self, model: &Arc<Model>) -> Result<(), Rejected> {
        let now = Instant::now();
        let room = self.queue.check(&self.client, 1, now, || self.predicted_drain());
        room.inspect_err(|rejected| self.observer.rejected(rejected, [(model, 1)]))
    }

    /// The same engine, asked on behalf of a client: who has its share of the queue makes room for those who wait.
    pub fn on_behalf_of(&self, client: Client) -> Self {
        Self { client, ..self.clone() }
    }

    /// Admits a request for images, one place per image, without waiting.
    ///
    /// # Errors
    /// [`Rejected`] when the queue is full, the deadline cannot be met, or the server drains.
    pub fn generate(&self, request: GenerateRequest) -> Result<Submission, Rejected> {
        let asked = [(Arc::clone(&request.model), request.samples.len())];
        let [submission] = self.admit(&asked, |gate| [gate.images(request, false)])?;
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
        let asked = requests.each_ref().map(|r| (Arc::clone(&r.model), r.samples.len()));
        self.admit(&asked, |gate| requests.map(|request| gate.images(request, false)))
    }

    /// Admits the first of the candidates, which ask for the same images of different models, that is
    /// predicted to meet its deadline; without a deadline that is the first.
    ///
    /// # Errors
    /// As [`Engine::generate`], when none can be admitted: what the last candidate was told, or an earlier
    /// one that only the queue keeps from meeting its deadline.
    pub fn generate_first(&self, candidates: &[GenerateRequest]) -> Result<Routed, Rejected> {
        let asked = candidates.last().map(|request| (&request.model, request.samples.len()));
        let mut gate = self.lock();
        let routed = gate.as_mut().ok_or(Rejected::Draining).and_then(|gate| {
            let places = self.places(asked.map_or(0, |(_, samples)| samples))?;
            self.enter_first(gate, candidates, places)
        });
        routed.inspect_err(|rejected| self.observer.rejected(rejected, asked))
    }

    fn enter_first(
        &self,
        gate: &mut Gate,
        candidates: &[GenerateRequest],
        places: Vec<Place>,
    ) -> Result<Routed, Rejected> {
        let mut predicted = Vec::new();
        let mut refusal = Rejected::Draining;
        for (served, request) in candidates.iter().enumerate() {
            let (samples, submission) = gate.images(request.clone(), false);
            match self.destination(&admissions(&samples)) {
                Ok(destination) => {
                    let forecast = destination.forecast.as_ref();
                    let with_deadline = forecast.filter(|_| request.deadline.is_some());
                    predicted.push(with_deadline.map(Forecast::predicted));
                    self.enter(gate, samples, places, &destination)?;
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

    /// Admits one raw evaluation, one place per row.
    ///
    /// # Errors
    /// As [`Engine::generate`].
    pub fn infer(&self, request: InferRequest) -> Result<Submission, Rejected> {
        let asked = [(Arc::clone(&request.model), request.timesteps.len())];
        let [submission] = self.admit(&asked, |gate| [gate.rows(request)])?;
        Ok(submission)
    }

    /// Runs a request whenever nothing else is to do. It takes no place in the queue, so no client is refused for its
    /// sake, and delays a client by at most one evaluation; no metric but those of evaluations counts it.
    ///
    /// # Errors
    /// [`Rejected::Draining`].
    pub fn generate_in_background(&self, request: GenerateRequest) -> Result<Submission, Rejected> {
        let mut gate = self.lock();
        let gate = gate.as_mut().ok_or(Rejected::Draining)?;
        let (samples, submission) = gate.images(request, true);
        let destination = Destination { device: self.soonest()[0], forecast: None };
        self.enter(gate, samples, Vec::new(), &destination)?;
        Ok(submission)
    }

    /// Whether no client waits for anything.
    pub fn is_idle(&self) -> bool {
        self.devices.iter().all(|device| device.is_idle())
    }

    /// Whether a device answers nothing any more, until the process is started anew. Requests go to the others,
    /// if there are any.
    pub fn has_lost_a_device(&self) -> bool {
        self.devices.iter().any(|device| device.is_lost())
    }

    /// Evaluates a model that nobody uses yet, on every device, until its costs by batch size are known
    /// there, between the evaluations of those that are in use. `max_rows` overrides the largest useful
    /// batch; `known` costs are taken where a few evaluations show that they still hold. Gives what was measured on the
    /// first device, if that is worth keeping.
    ///
    /// # Errors
    /// A sentence when the network cannot be evaluated, or the server drains.
    pub async fn warm_up(
        &self,
        model: Arc<Model>,
        max_rows: Option<usize>,
        known: StageCosts,
    ) -> Result<Option<StageCosts>, String> {
        let warming = self.tell_all(|reply| {
            let (model, known) = (Arc::clone(&model), known.clone());
            Command::WarmUp { model, max_rows, known, reply }
        });
        let mut measured = Vec::new();
        for done in warming.map_err(|rejected| rejected.to_string())? {
            measured.push(done.await.unwrap_or_else(|_| Err("the device thread ended".into()))?);
        }
        Ok(measured.into_iter().next().flatten())
    }

    /// A reply with a deadline was in time or not; it was ready so long after its last image was made, where that says how long
    /// replies take.
    pub fn delivered(&self, in_time: bool, after: Option<Duration>) {
        self.observer.margin(self.calibrator.deadline_ended(in_time, after).margin());
    }

    /// Refuses everything from now on; what is in flight goes on.
    pub fn drain(&self) {
        *self.lock() = None;
    }

    /// How long what is admitted is predicted to take.
    pub fn predicted_drain(&self) -> Duration {
        self.devices.iter().map(|device| device.predicted_drain()).max().unwrap_or_default()
    }

    /// Admits all requests that arrive or none; `asked` is how many samples of which models they are for.
    fn admit<const N: usize>(
        &self,
        asked: &[(Arc<Model>, usize); N],
        arrive: impl FnOnce(&mut Gate) -> [Arrived; N],
    ) -> Result<[Submission; N], Rejected> {
        let mut gate = self.lock();
        let admitted = gate.as_mut().ok_or(Rejected::Draining).and_then(|gate| {
            let places = self.places(asked.iter().map(|(_, samples)| samples).sum())?;
            let mut all = Vec::with_capacity(places.len());
            let submissions = arrive(gate).map(|(samples, submission)| {
                all.extend(samples);
                submission
            });
            let destination = self.destination(&admissions(&all))?;
            self.enter(gate, all, places, &destination)?;
            Ok(submissions)
        });
        admitted.inspect_err(|rejected| {
            let asked = asked.iter().map(|(model, samples)| (model, *samples));
            self.observer.rejected(rejected, asked);
        })
    }

    fn lock(&self) -> MutexGuard<'_, Option<Gate>> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One place per image, all or none, without waiting.
    fn places(&self, asked: usize) -> Result<Vec<Place>, Rejected> {
        self.queue.enter(&self.client, asked, Instant::now(), || self.predicted_drain())
    }

    /// The devices, the one that is done soonest first; those that are lost behind all others.
    fn soonest(&self) -> Vec<usize> {
        let mut devices: Vec<usize> = (0..self.devices.len()).collect();
        if devices.len() > 1 {
            devices.sort_by_cached_key(|&device| {
                let queue = &self.devices[device];
                (queue.is_lost(), queue.predicted_drain())
            });
        }
        devices
    }

    /// Where requests go that are admitted together: to one device, so that they share evaluations; to the
    /// one that is done soonest, or the next on which all deadlines are predicted to be met.
    fn destination(&self, arrivals: &[Arc<Admission>]) -> Result<Destination, Rejected> {
        let deadline = arrivals.iter().filter_map(|arrival| arrival.deadline).min();
        let mut refusal = Rejected::Draining;
        for (turn, device) in self.soonest().into_iter().enumerate() {
            match self.judge(device, arrivals, deadline) {
                Ok(forecast) => return Ok(Destination { device, forecast }),
                Err(refused) if turn == 0 => refusal = refused,
                Err(_) => {}
            }
        }
        Err(refusal)
    }

    /// Whether a deadline, and those promised before, are predicted to be met on a device, and what else
    /// is predicted.
    fn judge(
        &self,
        device: usize,
        arrivals: &[Arc<Admission>],
        deadline: Option<Instant>,
    ) -> Result<Option<Forecast>, Rejected> {
        let queue = &self.devices[device];
        if !queue.needs_forecast(arrivals) {
            return Ok(None);
        }
        let Some(deadline) = deadline else { return Ok(Some(queue.forecast(arrivals))) };
        let deadline = deadline.saturating_duration_since(Instant::now());
        let calibration = self.calibrator.now();
        let (margin, delivery) = (calibration.margin(), calibration.delivery_seconds());
        self.observer.margin(margin);
        let alone = seconds(alone_seconds(device, arrivals) * margin + delivery);
        if alone > deadline {
            return Err(Rejected::DeadlineImpossible { predicted: alone, deadline });
        }
        let forecast = queue.forecast(arrivals);
        let predicted = forecast.late_finish.saturating_add(seconds(delivery));
        if predicted > deadline {
            let retry_after = predicted - deadline;
            return Err(Rejected::DeadlineQueue { predicted, deadline, retry_after });
        }
        if forecast.misses_others {
            return Err(Rejected::DeadlineOthers { retry_after: alone });
        }
        Ok(Some(forecast))
    }

    /// Hands samples to the thread of their device, the first one first.
    fn enter(
        &self,
        gate: &Gate,
        mut samples: Vec<Sample>,
        places: Vec<Place>,
        Destination { device, forecast }: &Destination,
    ) -> Result<(), Rejected> {
        let mut places = places.into_iter();
        samples.iter_mut().for_each(|sample| sample.enter(places.next()));
        let arrivals = admissions(&samples);
        arrivals.iter().for_each(|arrival| self.observer.entered(arrival));
        let sent = self.devices[*device].admit(&arrivals, forecast.as_ref(), || {
            gate.senders[*device].send(Command::Run(samples)).map_err(|_| Rejected::DeviceLost)
        });
        sent.inspect_err(|_| {
            arrivals.iter().for_each(|arrival| self.observer.gone(arrival, false));
        })
    }

    /// Tells every device, and gives what each will answer.
    fn tell_all<T>(
        &self,
        command: impl Fn(oneshot::Sender<T>) -> Command,
    ) -> Result<Vec<oneshot::Receiver<T>>, Rejected> {
        let gate = self.lock();
        let senders = &gate.as_ref().ok_or(Rejected::Draining)?.senders;
        let tell = |sender: &Sender<Command>| {
            let (reply, answer) = oneshot::channel();
            sender.send(command(reply)).map(|()| answer).map_err(|_| Rejected::DeviceLost)
        };
        senders.iter().map(tell).collect()
    }
}

fn admissions(samples: &[Sample]) -> Vec<Arc<Admission>> {
    samples.iter().map(|sample| Arc::clone(&sample.admission)).collect()
}
