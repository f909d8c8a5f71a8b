//! The thread that owns a device: it gathers, evaluates, hands out.

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        mpsc::{Receiver, TryRecvError},
    },
    time::Instant,
};

use tokio::sync::oneshot;

use super::{
    Event,
    batcher::SampleKey,
    calibration::Learned,
    job::Failure,
    load::Load,
    sample::{Sample, Task},
    step::{self, Outcome},
    warmup::WarmUp,
};
use crate::{metrics::Metrics, registry::Model};

/// What the worker is told.
pub(super) enum Command {
    /// Take these in.
    Run(Vec<(SampleKey, Sample)>),
    /// Find out what evaluations of this model cost.
    WarmUp {
        model: Arc<Model>,
        max_rows: Option<usize>,
        reply: oneshot::Sender<Result<(), String>>,
    },
}

pub(super) struct Worker {
    /// The device's number.
    device: usize,
    commands: Receiver<Command>,
    samples: BTreeMap<SampleKey, Sample>,
    warm_ups: Vec<WarmUp>,
    load: Arc<Load>,
    learned: Learned,
    metrics: Arc<Metrics>,
}

impl Worker {
    pub(super) fn new(
        device: usize,
        commands: Receiver<Command>,
        load: Arc<Load>,
        learned: Learned,
        metrics: Arc<Metrics>,
    ) -> Self {
        let (samples, warm_ups) = (BTreeMap::new(), Vec::new());
        Self { device, commands, samples, warm_ups, load, learned, metrics }
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
            Command::Run(samples) => self.samples.extend(samples),
            Command::WarmUp { model, max_rows, reply } => {
                self.warm_ups.push(WarmUp::new(model, self.device, max_rows, reply));
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
        for key in gone {
            if let Some(sample) = self.samples.remove(&key) {
                let failure = sample.expired(now).filter(|_| !sample.abandoned());
                self.leave(key, &sample, failure.as_ref().map_or("disconnect", Failure::reason));
                if let Some(failure) = failure {
                    self.learned.promised(false, None);
                    sample.finish(|index| Event::Failed { index, failure });
                }
            }
        }
    }

    /// One evaluation of a model that is warming up, if there is one.
    fn warm_up(&mut self) {
        if let Some(warm_up) = self.warm_ups.first_mut()
            && warm_up.evaluate()
        {
            self.warm_ups.remove(0);
        }
    }

    /// One evaluation of the batch that is due, if there is one.
    fn evaluate(&mut self) {
        let Some(batch) = self.load.begin() else { return };
        // Who was admitted since commands were last read may be in it, and was sent before.
        while let Ok(command) = self.commands.try_recv() {
            self.obey(command);
        }
        let mut samples: Vec<Sample> =
            batch.samples.iter().filter_map(|key| self.samples.remove(key)).collect();
        let Some(model) = samples.first().map(|sample| Arc::clone(&sample.model)) else { return };

        let replica = model.on(self.device);
        let began = Instant::now();
        // A panic concerns this batch alone: its samples are dropped below, nothing else is shared.
        let result = catch_unwind(AssertUnwindSafe(|| {
            step::evaluate(replica.network(), &mut samples).map_err(|error| Failed::of(&error))
        }));
        let seconds = began.elapsed().as_secs_f64();

        self.load.ran(&batch, seconds);
        if matches!(result, Ok(Ok(_))) {
            replica.observe(batch.rows, seconds);
        }
        self.metrics.evaluation_duration.with_label_values(&[&model.id]).observe(seconds);
        self.metrics.batch_samples.with_label_values(&[&model.id]).observe(samples.len() as f64);

        for sample in &mut samples {
            if !sample.clock.started() && !sample.background() {
                self.metrics.samples_waiting.with_label_values(&[&model.id]).dec();
                self.metrics.samples_running.with_label_values(&[&model.id]).inc();
            }
            sample.clock.evaluated(began, seconds, sample.rows(), batch.rows);
        }
        match result.unwrap_or_else(|panic| Err(Failed::Otherwise(panic_text(panic.as_ref())))) {
            Ok(outcomes) => {
                for ((key, sample), outcome) in batch.samples.into_iter().zip(samples).zip(outcomes)
                {
                    self.hand_out(key, sample, outcome);
                }
            }
            Err(failed) => {
                let rows = batch.rows;
                let failure = match failed {
                    Failed::OutOfMemory(reason) => {
                        let limit = replica.shrink(rows);
                        self.load.limit(model.key, limit);
                        let device = self.device;
                        tracing::error!(model = model.id, device, rows, limit, reason, "no memory");
                        Failure::OutOfMemory { rows, limit }
                    }
                    Failed::Lost(reason) => {
                        self.load.lose();
                        let device = self.device;
                        tracing::error!(
                            device,
                            reason,
                            "the GPU answers nothing any more; start the server anew"
                        );
                        Failure::Evaluation(reason)
                    }
                    Failed::Otherwise(reason) => {
                        tracing::error!(model = model.id, rows, reason, "evaluation failed");
                        Failure::Evaluation(reason)
                    }
                };
                for (key, sample) in batch.samples.into_iter().zip(samples) {
                    self.fail(key, sample, failure.clone());
                }
            }
        }
    }

    fn hand_out(&mut self, key: SampleKey, sample: Sample, outcome: Outcome) {
        match outcome {
            Outcome::Going(preview) => {
                if let Some((partial_index, image)) = preview {
                    sample.send(|index| Event::Partial { index, partial_index, image });
                }
                self.samples.insert(key, sample);
            }
            Outcome::Image(image) => {
                let timings = self.finished(key, &sample);
                sample.finish(|index| Event::Completed { index, image, timings });
            }
            Outcome::Raw(output) => {
                self.finished(key, &sample);
                sample.finish(|index| Event::Inferred { index, output });
            }
            Outcome::NonFinite { timestep } => {
                tracing::error!(
                    model = sample.model.id,
                    timestep,
                    "network answered NaN or infinity"
                );
                self.fail(key, sample, Failure::NonFinite { timestep });
            }
        }
    }

    fn finished(&mut self, key: SampleKey, sample: &Sample) -> super::SampleTimings {
        let timings = sample.clock.read(Instant::now());
        self.forget(key, sample, true);
        if !sample.background() {
            let Metrics { queue_duration, device_duration, images, .. } = self.metrics.as_ref();
            let label = &[sample.model.id.as_str()];
            queue_duration.with_label_values(label).observe(timings.queue.as_secs_f64());
            device_duration.with_label_values(label).observe(timings.device.as_secs_f64());
            if let Task::Generate(_) = sample.task {
                images.with_label_values(label).inc();
            }
        }
        timings
    }

    fn fail(&mut self, key: SampleKey, sample: Sample, failure: Failure) {
        self.leave(key, &sample, failure.reason());
        sample.finish(|index| Event::Failed { index, failure });
    }

    /// A sample leaves unfinished.
    fn leave(&mut self, key: SampleKey, sample: &Sample, reason: &str) {
        self.forget(key, sample, sample.expired(Instant::now()).is_some());
        if !sample.background() {
            self.metrics.cancelled.with_label_values(&[sample.model.id.as_str(), reason]).inc();
        }
    }

    /// Its place is free before any metric says so.
    fn forget(&mut self, key: SampleKey, sample: &Sample, done_or_late: bool) {
        let label = &[sample.model.id.as_str()];
        let ratio = self.load.left(sample.model.key, key, done_or_late);
        if !sample.background() {
            let gauge = if sample.clock.started() {
                &self.metrics.samples_running
            } else {
                &self.metrics.samples_waiting
            };
            gauge.with_label_values(label).dec();
        }
        if let Some(ratio) = ratio {
            self.metrics.prediction_ratio.with_label_values(label).observe(ratio);
        }
    }
}

/// Why an evaluation failed, in the device's words.
pub(super) enum Failed {
    /// For want of memory: fewer rows may do.
    OutOfMemory(String),
    /// As all will from now on in this process.
    Lost(String),
    /// For any other reason.
    Otherwise(String),
}

impl Failed {
    /// candle keeps what CUDA's libraries say as text, with their own names of errors: the driver's
    /// `CUDA_ERROR_OUT_OF_MEMORY`, cuBLAS's `CUBLAS_STATUS_ALLOC_FAILED`, cuDNN's
    /// `CUDNN_STATUS_ALLOC_FAILED` and `CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED`.
    pub(super) fn of(error: &candle_core::Error) -> Self {
        const NO_MEMORY: [&str; 3] = ["OUT_OF_MEMORY", "ALLOC_FAILED", "ALLOCATION_FAILED"];
        // Those of which CUDA's documentation says that the process must be ended, and ECC's and NVLink's.
        const LOST: [&str; 12] = [
            "CUDA_ERROR_ILLEGAL_ADDRESS",
            "CUDA_ERROR_LAUNCH_FAILED",
            "CUDA_ERROR_LAUNCH_TIMEOUT",
            "CUDA_ERROR_ILLEGAL_INSTRUCTION",
            "CUDA_ERROR_MISALIGNED_ADDRESS",
            "CUDA_ERROR_INVALID_ADDRESS_SPACE",
            "CUDA_ERROR_INVALID_PC",
            "CUDA_ERROR_HARDWARE_STACK_ERROR",
            "CUDA_ERROR_ASSERT",
            "CUDA_ERROR_CONTAINED",
            "CUDA_ERROR_ECC_UNCORRECTABLE",
            "CUDA_ERROR_NVLINK_UNCORRECTABLE",
        ];
        let text = error.to_string();
        let names = |names: &[&str]| names.iter().any(|name| text.contains(name));
        if names(&NO_MEMORY) {
            Self::OutOfMemory(text)
        } else if names(&LOST) {
            Self::Lost(text)
        } else {
            Self::Otherwise(text)
        }
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    format!("panic: {}", text.unwrap_or_else(|| "no message".into()))
}
