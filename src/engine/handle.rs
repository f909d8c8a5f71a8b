//! Admission: what gets in, and what is told to wait.

use std::{
    num::NonZeroUsize,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

use tokio::sync::{mpsc, oneshot};

use super::{
    GenerateRequest, InferRequest, Rejected, Submission,
    calibration::Calibrator,
    device_queue::{Admission, DeviceQueue, Forecast, alone_seconds, seconds},
    job::Request,
    queue::{Client, Place, Queue},
    worker::{Command, Worker},
};
use crate::{metrics::Metrics, registry::Model};

/// The handle on the engine; cheap to clone. The worker threads, one per device, end when the last one is
/// dropped and what was admitted is done.
#[derive(Debug, Clone)]
pub struct Engine {
    /// The way to each device. One request is judged at a time. `None` once the server drains.
    admission: Arc<Mutex<Option<Vec<Sender<Command>>>>>,
    queue: Arc<Queue>,
    /// On whose behalf it asks.
    client: Client,
    /// What each device has to do.
    loads: Arc<[Arc<DeviceQueue>]>,
    learned: Calibrator,
    metrics: Arc<Metrics>,
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

/// Where requests go, and what is predicted to come of it.
struct Destination {
    device: usize,
    outlook: Option<Forecast>,
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
        let learned = Calibrator::default();
        let (mut commands, mut loads) = (Vec::new(), Vec::new());
        for device in 0..devices.get() {
            let (sender, receiver) = channel();
            let load = Arc::new(DeviceQueue::new(device, learned.clone()));
            let (shared, told) = (Arc::clone(&load), learned.clone());
            let worker = Worker::new(device, receiver, shared, told, Arc::clone(&metrics));
            let name = format!("device {device}");
            let (owned, counted) = (Arc::clone(&load), Arc::clone(&metrics));
            thread::Builder::new().name(name).spawn(move || {
                // What is caught nowhere else ends the thread, and with it what the device was to do.
                if catch_unwind(AssertUnwindSafe(|| worker.run())).is_err() {
                    tracing::error!(device, "the device's thread panicked; start the server anew");
                    counted.panics.with_label_values(&["device"]).inc();
                    owned.end();
                }
            })?;
            commands.push(sender);
            loads.push(load);
        }
        Ok(Self {
            admission: Arc::new(Mutex::new(Some(commands))),
            queue: Queue::new(max_queue),
            client: Client::default(),
            loads: loads.into(),
            learned,
            metrics,
        })
    }

    /// Whether there is a place for one more image or row, before more is done for it than asking.
    ///
    /// # Errors
    /// [`Rejected::QueueFull`] and [`Rejected::QueueShare`].
    pub fn check_room(&self, model: &Arc<Model>) -> Result<(), Rejected> {
        let place = self.places(1).map(drop);
        place.map_err(|rejected| self.count_rejected(rejected, [(model, 1)]))
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
        let routed = gate.as_ref().ok_or(Rejected::Draining).and_then(|senders| {
            let places = self.places(asked.map_or(0, |(_, samples)| samples))?;
            self.enter_first(senders, candidates, places)
        });
        routed.map_err(|rejected| self.count_rejected(rejected, asked))
    }

    fn enter_first(
        &self,
        senders: &[Sender<Command>],
        candidates: &[GenerateRequest],
        places: Vec<Place>,
    ) -> Result<Routed, Rejected> {
        let mut predicted = Vec::new();
        let mut refusal = Rejected::Draining;
        for (served, request) in candidates.iter().enumerate() {
            let request = Request::Generate(request.clone());
            match self.place(std::slice::from_ref(&request)) {
                Ok(place) => {
                    let outlook = place.outlook.as_ref();
                    let with_deadline = outlook.filter(|_| request.deadline().is_some());
                    predicted.push(with_deadline.map(Forecast::predicted));
                    let [submission] = self.enter(senders, [request], places, &place)?;
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
        let [submission] = self.admit([Request::Infer(request)])?;
        Ok(submission)
    }

    /// Runs a request whenever nothing else is to do. It takes no place in the queue, so no client is refused for its
    /// sake, and delays a client by at most one evaluation; no metric but those of evaluations counts it.
    ///
    /// # Errors
    /// [`Rejected::Draining`].
    pub fn generate_in_background(&self, request: GenerateRequest) -> Result<Submission, Rejected> {
        let gate = self.admission.lock().unwrap_or_else(PoisonError::into_inner);
        let senders = gate.as_ref().ok_or(Rejected::Draining)?;
        let place = Destination { device: self.soonest()[0], outlook: None };
        let [submission] =
            self.enter(senders, [Request::Background(request)], Vec::new(), &place)?;
        Ok(submission)
    }

    /// Whether no client waits for anything.
    pub fn is_idle(&self) -> bool {
        self.loads.iter().all(|load| load.is_idle())
    }

    /// Whether a device answers nothing any more, until the process is started anew. Requests go to the others,
    /// if there are any.
    pub fn has_lost_a_device(&self) -> bool {
        self.loads.iter().any(|load| load.is_lost())
    }

    /// Evaluates a model that nobody uses yet, on every device, until its costs by batch size are known
    /// there, between the evaluations of those that are in use. `max_rows` overrides the largest useful
    /// batch.
    ///
    /// # Errors
    /// A sentence when the network cannot be evaluated, or the server drains.
    pub async fn warm_up(&self, model: Arc<Model>, max_rows: Option<usize>) -> Result<(), String> {
        let warming = self.tell_all(|reply| {
            let model = Arc::clone(&model);
            Command::WarmUp { model, max_rows, reply }
        });
        for done in warming.map_err(|rejected| rejected.to_string())? {
            done.await.unwrap_or_else(|_| Err("the device thread ended".into()))?;
        }
        Ok(())
    }

    /// A reply with a deadline was ready so long after its last image was made, and in time or not.
    pub fn delivered(&self, after: Duration, in_time: bool) {
        self.learned.promised(in_time, Some(after));
        self.metrics.prediction_margin.set(self.learned.now().margin());
    }

    /// Refuses everything from now on; what is in flight goes on.
    pub fn drain(&self) {
        *self.admission.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// How long what is admitted is predicted to take.
    pub fn predicted_drain(&self) -> Duration {
        self.loads.iter().map(|load| load.predicted_drain()).max().unwrap_or_default()
    }

    /// Admits all of them or none.
    fn admit<const N: usize>(&self, requests: [Request; N]) -> Result<[Submission; N], Rejected> {
        let asked = requests.each_ref().map(|r| (Arc::clone(r.model()), r.samples()));
        let gate = self.admission.lock().unwrap_or_else(PoisonError::into_inner);
        let admitted = gate.as_ref().ok_or(Rejected::Draining).and_then(|senders| {
            let places = self.places(asked.iter().map(|(_, samples)| samples).sum())?;
            let place = self.place(&requests)?;
            self.enter(senders, requests, places, &place)
        });
        admitted.map_err(|rejected| {
            let asked = asked.iter().map(|(model, samples)| (model, *samples));
            self.count_rejected(rejected, asked)
        })
    }

    /// One place per image, all or none, without waiting.
    fn places(&self, asked: usize) -> Result<Vec<Place>, Rejected> {
        self.queue.enter(&self.client, asked, Instant::now(), || self.predicted_drain())
    }

    /// The devices, the one that is done soonest first; those that are lost behind all others.
    fn soonest(&self) -> Vec<usize> {
        let mut devices: Vec<usize> = (0..self.loads.len()).collect();
        if devices.len() > 1 {
            devices.sort_by_cached_key(|&device| {
                let load = &self.loads[device];
                (load.is_lost(), load.predicted_drain())
            });
        }
        devices
    }

    /// Where requests go that are admitted together: to one device, so that they share evaluations; to the
    /// one that is done soonest, or the next on which all deadlines are predicted to be met.
    fn place(&self, requests: &[Request]) -> Result<Destination, Rejected> {
        let newcomers: Vec<_> = requests.iter().flat_map(Request::newcomers).collect();
        let deadline = requests.iter().filter_map(Request::deadline).min();
        let mut refusal = Rejected::Draining;
        for (turn, device) in self.soonest().into_iter().enumerate() {
            match self.judge(device, &newcomers, deadline) {
                Ok(outlook) => return Ok(Destination { device, outlook }),
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
        newcomers: &[Admission],
        deadline: Option<Instant>,
    ) -> Result<Option<Forecast>, Rejected> {
        let load = &self.loads[device];
        if !load.needs_outlook(newcomers) {
            return Ok(None);
        }
        let Some(deadline) = deadline else { return Ok(Some(load.outlook(newcomers))) };
        let deadline = deadline.saturating_duration_since(Instant::now());
        let calibration = self.learned.now();
        let (margin, delivery) = (calibration.margin(), calibration.delivery_seconds());
        let alone = seconds(alone_seconds(device, newcomers) * margin + delivery);
        if alone > deadline {
            return Err(Rejected::DeadlineImpossible { predicted: alone, deadline });
        }
        let outlook = load.outlook(newcomers);
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

    /// Hands requests to the thread of their device, the first one's samples first.
    fn enter<const N: usize>(
        &self,
        senders: &[Sender<Command>],
        requests: [Request; N],
        mut places: Vec<Place>,
        place: &Destination,
    ) -> Result<[Submission; N], Rejected> {
        let newcomers: Vec<_> = requests.iter().flat_map(Request::newcomers).collect();
        let mut samples = Vec::with_capacity(newcomers.len());
        let submissions = requests.map(|request| {
            let (reply, events) = mpsc::unbounded_channel();
            let own = places.drain(..request.samples().min(places.len())).collect();
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
        let Destination { device, outlook } = place;
        let sent = self.loads[*device].admit(&newcomers, outlook.as_ref(), |keys| {
            let samples = keys.iter().copied().zip(samples).collect();
            senders[*device].send(Command::Run(samples)).map_err(|_| Rejected::DeviceLost)
        });
        sent.inspect_err(|_| waiting().for_each(|gauge| gauge.dec()))?;
        Ok(submissions)
    }

    /// Tells every device, and gives what each will answer.
    fn tell_all<T>(
        &self,
        command: impl Fn(oneshot::Sender<T>) -> Command,
    ) -> Result<Vec<oneshot::Receiver<T>>, Rejected> {
        let gate = self.admission.lock().unwrap_or_else(PoisonError::into_inner);
        let senders = gate.as_ref().ok_or(Rejected::Draining)?;
        let tell = |sender: &Sender<Command>| {
            let (reply, answer) = oneshot::channel();
            sender.send(command(reply)).map(|()| answer).map_err(|_| Rejected::DeviceLost)
        };
        senders.iter().map(tell).collect()
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
