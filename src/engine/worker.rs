//! The thread that owns a device: it gathers, evaluates, hands out.

use std::{
    collections::{BTreeMap, BTreeSet},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        mpsc::{Receiver, TryRecvError},
    },
    time::{Duration, Instant},
};

use tokio::sync::oneshot;
use understudy_models::DeviceFault;

use super::{
    Event, SampleTimings,
    batcher::{Batch, SampleKey},
    calibration::Calibrator,
    cost::StageCosts,
    device_queue::DeviceQueue,
    job::Failure,
    observer::Observer,
    sample::Sample,
    stage::Stage,
    step::{self, Begun, Check, Outcome},
    warmup::{WarmUp, Warmed},
};
use crate::registry::Model;

/// What the worker is to do.
pub(super) enum Command {
    /// Take these in.
    Run(Vec<Sample>),
    /// Find out what evaluations of this model cost.
    WarmUp {
        model: Arc<Model>,
        max_rows: Option<usize>,
        known: StageCosts,
        reply: oneshot::Sender<Warmed>,
    },
}

pub(super) struct Worker {
    /// The device's number.
    device: usize,
    commands: Receiver<Command>,
    samples: BTreeMap<SampleKey, Sample>,
    warm_ups: Vec<WarmUp>,
    queue: Arc<DeviceQueue>,
    calibrator: Calibrator,
    observer: Observer,
    pending: Option<Pending>,
    /// When the device was last seen to have ended an evaluation.
    free: Instant,
    /// Since when a warm-up waits for its turn.
    warmed: Instant,
}

/// An evaluation that the device has been asked for, and at which nobody has looked since.
struct Pending {
    batch: Batch,
    model: Arc<Model>,
    began: Instant,
    check: Check,
}

/// Evaluations of this length and more are waited for: those who arrive in the meantime join the next, and the time that
/// the device waits for it is little beside theirs.
const SHORT_SECONDS: f64 = 5e-3;

/// How long requests with deadlines may hold a warm-up's next evaluation up.
const WARM_UP_PATIENCE: Duration = Duration::from_secs(5);

impl Worker {
    pub(super) fn new(
        device: usize,
        commands: Receiver<Command>,
        queue: Arc<DeviceQueue>,
        calibrator: Calibrator,
        observer: Observer,
    ) -> Self {
        Self {
            device,
            commands,
            samples: BTreeMap::new(),
            warm_ups: Vec::new(),
            queue,
            calibrator,
            observer,
            pending: None,
            free: Instant::now(),
            warmed: Instant::now(),
        }
    }

    /// Runs until no handle is left and nothing is in flight.
    pub(super) fn run(mut self) {
        while self.receive() {
            self.drop_abandoned();
            self.warm_up();
            self.evaluate();
        }
    }

    /// Takes in what has arrived, waiting only when there is nothing else to do; false at the end.
    fn receive(&mut self) -> bool {
        loop {
            let command = if self.samples.is_empty() && self.warm_ups.is_empty() {
                self.settle(&mut []);
                match self.commands.recv() {
                    Ok(command) => command,
                    Err(_) => return false,
                }
            } else {
                match self.commands.try_recv() {
                    Ok(command) => command,
                    Err(TryRecvError::Empty | TryRecvError::Disconnected) => return true,
                }
            };
            self.obey(command);
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Run(samples) => {
                self.samples
                    .extend(samples.into_iter().map(|sample| (sample.admission.key, sample)));
            }
            Command::WarmUp { model, max_rows, known, reply } => {
                if self.warm_ups.is_empty() {
                    self.warmed = Instant::now();
                }
                self.warm_ups.push(WarmUp::new(model, self.device, max_rows, known, reply));
            }
        }
    }

    /// Frees the slots of those whose client is gone or whose deadline has passed.
    fn drop_abandoned(&mut self) {
        let now = Instant::now();
        let gone: Vec<SampleKey> = self
            .samples
            .iter()
            .filter(|(_, sample)| sample.abandoned() || sample.expired(now).is_some())
            .map(|(&key, _)| key)
            .collect();
        // A request is late once, however many images it has; they have one deadline.
        let (mut missed, mut late) = (BTreeSet::new(), Vec::new());
        for key in gone {
            if let Some(sample) = self.samples.remove(&key) {
                let failure = sample.expired(now).filter(|_| !sample.abandoned());
                self.leave(&sample, failure.as_ref());
                if let Some(failure) = failure {
                    missed.extend(sample.admission.deadline);
                    late.push((sample, failure));
                }
            }
        }
        for _ in missed {
            self.observer.margin(self.calibrator.deadline_ended(false, None).margin());
        }
        // Whoever is told finds it counted.
        for (sample, failure) in late {
            sample.finish(|index| Event::Failed { index, failure });
        }
    }

    /// One evaluation of a model that is warming up, if there is one. Whoever has a deadline goes first, for a while: a
    /// forecast knows the evaluation that is under way, and none after it.
    fn warm_up(&mut self) {
        let waits = || self.warmed.elapsed() < WARM_UP_PATIENCE && self.queue.has_deadlines();
        if self.warm_ups.is_empty() || waits() {
            return;
        }
        self.settle(&mut []);
        if let Some(warm_up) = self.warm_ups.first_mut() {
            self.queue.warms(warm_up.expected_seconds());
            if warm_up.evaluate() {
                self.warm_ups.remove(0);
            }
            self.queue.warmed();
            self.warmed = Instant::now();
        }
    }

    /// One evaluation of the batch that is due, if there is one.
    ///
    /// A device that has to be waited for gets the next evaluation before the last one is looked at, where that one was
    /// short and made nothing that anybody waits for: the time in which it would have nothing to do would be long
    /// beside it.
    fn evaluate(&mut self) {
        let Some(batch) = self.queue.begin() else {
            self.settle(&mut []);
            return;
        };
        // Who was admitted since commands were last read may be in it, and was sent before.
        while let Ok(command) = self.commands.try_recv() {
            self.obey(command);
        }
        let samples: Vec<Sample> =
            batch.samples.iter().filter_map(|key| self.samples.remove(key)).collect();
        let Some(first) = samples.first() else { return };
        let model = Arc::clone(&first.admission.model);
        if batch.stage == Stage::Denoise {
            self.denoise(batch, &model, samples);
        } else {
            self.transcode(batch, &model, samples);
        }
    }

    /// One evaluation of a text encoder or a decoder, or a part of one.
    fn transcode(&mut self, batch: Batch, model: &Arc<Model>, mut samples: Vec<Sample>) {
        let failures = self.settle(&mut samples);
        let began = Instant::now();
        for sample in &mut samples {
            if !sample.clock.started() {
                self.observer.began(&sample.admission);
            }
            sample.clock.starts(began);
        }
        let replica = model.on(self.device);
        let result = self.caught(|| match batch.stage {
            Stage::Encode => step::encode(replica, model.embeddings(), &mut samples),
            Stage::Embed => step::embed(replica, &mut samples),
            _ => step::decode(replica, &mut samples),
        });
        let seconds = self.ended(&batch, model, began, result.is_ok());
        self.queue.ran(&batch, seconds);
        for sample in &mut samples {
            sample.clock.passed(batch.stage, began, self.free);
            let rows = sample.admission.parts[batch.stage].rows;
            sample.clock.shared(seconds, rows, batch.rows);
        }
        let result = result.map_err(|failed| self.failure(failed, model, &batch));
        self.conclude(samples, result, failures);
    }

    /// One evaluation of a network.
    fn denoise(&mut self, batch: Batch, model: &Arc<Model>, mut samples: Vec<Sample>) {
        let replica = model.on(self.device);
        let asked = Instant::now();
        let begun = self.caught(|| step::begin(replica, &mut samples));
        for sample in &mut samples {
            if !sample.clock.started() {
                self.observer.began(&sample.admission);
            }
            sample.clock.starts(asked);
        }
        let failures = self.settle(&mut samples);
        let began = asked.max(self.free);
        let short = replica.evaluation_seconds(batch.stage, batch.rows) < SHORT_SECONDS;
        let goes_on = replica.network().defers() && short && !Begun::due(&samples);
        let result = match begun {
            Ok(begun) if goes_on => {
                self.queue.asked(&batch);
                let outcomes = samples.iter().map(|_| Outcome::Going(None)).collect();
                let model = Arc::clone(model);
                self.pending = Some(Pending { batch, model, began, check: begun.check() });
                Ok(outcomes)
            }
            begun => {
                let ended = begun.and_then(|begun| self.caught(|| begun.end(&samples)));
                let seconds = self.ended(&batch, model, began, ended.is_ok());
                self.queue.ran(&batch, seconds);
                for sample in &mut samples {
                    sample.clock.passed(batch.stage, began, self.free);
                    sample.clock.evaluated(seconds, sample.admission.rows(), batch.rows);
                }
                ended.map_err(|failed| self.failure(failed, model, &batch))
            }
        };
        self.conclude(samples, result, failures);
    }

    /// Gives each sample what an evaluation made of it; `failures` are those of the one before.
    fn conclude(
        &mut self,
        samples: Vec<Sample>,
        result: Result<Vec<Outcome>, Failure>,
        mut failures: BTreeMap<SampleKey, Failure>,
    ) {
        match result {
            Ok(outcomes) => {
                for (sample, outcome) in samples.into_iter().zip(outcomes) {
                    match failures.remove(&sample.admission.key) {
                        Some(failure) => self.fail(sample, failure),
                        None => self.hand_out(sample, outcome),
                    }
                }
            }
            Err(failure) => {
                for sample in samples {
                    self.fail(sample, failure.clone());
                }
            }
        }
    }

    /// Waits for the evaluation that nobody has looked at, if there is one. Those of its samples that failed leave,
    /// unless they are in the `next` one, whose failures the answer is.
    fn settle(&mut self, next: &mut [Sample]) -> BTreeMap<SampleKey, Failure> {
        let Some(Pending { batch, model, began, check }) = self.pending.take() else {
            return BTreeMap::new();
        };
        let bad = self.caught(|| check.bad());
        let seconds = self.ended(&batch, &model, began, bad.is_ok());
        let mut failures = match bad {
            Ok(bad) => bad
                .into_iter()
                .map(|(key, timestep)| (key, Failure::NonFinite { timestep }))
                .collect(),
            Err(failed) => {
                let failure = self.failure(failed, &model, &batch);
                batch.samples.iter().map(|&key| (key, failure.clone())).collect::<BTreeMap<_, _>>()
            }
        };
        // Who has left since has been told why.
        let mut left = BTreeMap::new();
        for key in &batch.samples {
            let in_next = next.iter_mut().find(|sample| sample.admission.key == *key);
            let stays = in_next.is_some();
            let Some(sample) = in_next.or_else(|| self.samples.get_mut(key)) else { continue };
            sample.clock.passed(batch.stage, began, self.free);
            sample.clock.evaluated(seconds, sample.admission.rows(), batch.rows);
            let Some(failure) = failures.remove(key) else { continue };
            if let Failure::NonFinite { timestep } = failure {
                not_finite(&model, timestep);
            }
            if stays {
                left.insert(*key, failure);
            } else if let Some(sample) = self.samples.remove(key) {
                self.fail(sample, failure);
            }
        }
        left
    }

    /// An evaluation has ended, which is how long it took.
    fn ended(&mut self, batch: &Batch, model: &Model, began: Instant, well: bool) -> f64 {
        self.free = Instant::now();
        let seconds = self.free.duration_since(began).as_secs_f64();
        if well {
            model.on(self.device).observe(batch.stage, batch.rows, seconds);
        }
        self.observer.evaluated(model, batch, seconds);
        seconds
    }

    /// What is to follow when an evaluation of a batch failed, and what its samples are told.
    fn failure(&mut self, failed: DeviceFault, model: &Model, batch: &Batch) -> Failure {
        let (device, stage, rows) = (self.device, batch.stage, batch.rows);
        match failed {
            DeviceFault::OutOfMemory(reason) => {
                let limit = model.on(device).shrink(stage, rows);
                self.queue.limit(model.key, stage, limit);
                tracing::error!(model = model.id, device, rows, limit, reason, "no memory");
                Failure::OutOfMemory { rows, limit }
            }
            DeviceFault::Lost(reason) => {
                self.queue.lose();
                let problem = "the GPU answers nothing any more; start the server anew";
                tracing::error!(device, reason, "{problem}");
                Failure::Evaluation(reason)
            }
            DeviceFault::Otherwise(reason) => {
                tracing::error!(model = model.id, rows, reason, "evaluation failed");
                Failure::Evaluation(reason)
            }
        }
    }

    /// What a device is asked to do, which may fail. A panic concerns what was asked alone: the samples are dropped then,
    /// and nothing else is shared.
    fn caught<T>(&self, ask: impl FnOnce() -> candle_core::Result<T>) -> Result<T, DeviceFault> {
        match catch_unwind(AssertUnwindSafe(ask)) {
            Ok(asked) => asked.map_err(|error| DeviceFault::of(&error)),
            Err(panic) => {
                self.observer.panicked("evaluation");
                Err(DeviceFault::Otherwise(panic_text(panic.as_ref())))
            }
        }
    }

    fn hand_out(&mut self, sample: Sample, outcome: Outcome) {
        match outcome {
            Outcome::Going(preview) => {
                if let Some((partial_index, image)) = preview {
                    sample.send(|index| Event::Partial { index, partial_index, image });
                }
                self.samples.insert(sample.admission.key, sample);
            }
            Outcome::Image(image) => {
                let timings = self.finished(&sample);
                sample.finish(|index| Event::Completed { index, image, timings });
            }
            Outcome::Raw(output) => {
                let timings = self.finished(&sample);
                sample.finish(|index| Event::Inferred { index, output, timings });
            }
            Outcome::Undecodable => {
                let reason = "the decoder answered NaN or infinity";
                tracing::error!(model = sample.admission.model.id, reason, "decoding failed");
                self.fail(sample, Failure::Evaluation(reason.into()));
            }
            Outcome::NonFinite { timestep } => {
                not_finite(&sample.admission.model, timestep);
                self.fail(sample, Failure::NonFinite { timestep });
            }
        }
    }

    fn finished(&mut self, sample: &Sample) -> SampleTimings {
        let timings = sample.clock.read(Instant::now());
        self.forget(sample, true);
        self.observer.finished(sample, &timings);
        timings
    }

    fn fail(&mut self, sample: Sample, failure: Failure) {
        self.leave(&sample, Some(&failure));
        sample.finish(|index| Event::Failed { index, failure });
    }

    /// A sample leaves unfinished; without a failure its client went away.
    fn leave(&mut self, sample: &Sample, failure: Option<&Failure>) {
        self.forget(sample, sample.expired(Instant::now()).is_some());
        self.observer.unfinished(&sample.admission, failure);
    }

    /// Its place is free before any metric says so.
    fn forget(&mut self, sample: &Sample, done_or_late: bool) {
        let ratio = self.queue.left(&sample.admission, done_or_late);
        self.observer.gone(&sample.admission, sample.clock.started());
        if let Some(ratio) = ratio {
            self.observer.compared(&sample.admission, ratio);
        }
    }
}

fn not_finite(model: &Model, timestep: f64) {
    tracing::error!(model = model.id, timestep, "network answered NaN or infinity");
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    format!("panic: {}", text.unwrap_or_else(|| "no message".into()))
}
