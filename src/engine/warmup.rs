//! Warm-up: what evaluations of a model cost, by batch size.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, Instant},
};

use candle_core::{DType, Result, Tensor};
use tokio::sync::oneshot;
use understudy_models::{Conditioning, Denoiser, noise};

use super::{
    cost::{CostModel, worth_doubling},
    worker::Failed,
};
use crate::registry::Model;

/// A model's warm-up stops here, if it has measured anything.
const BUDGET: Duration = Duration::from_secs(4);
/// Least evaluations per batch size, of which the median counts.
const REPEATS: usize = 3;
/// Least seconds per batch size. Small batches take a thousandth of that, and over so short a time one is
/// luckier than another.
const WINDOW_SECONDS: f64 = 0.06;
/// The largest batch ever tried.
const LARGEST: usize = 256;

/// A warm-up under way. It is done an evaluation at a time, between those that serve clients.
pub(super) struct WarmUp {
    model: Arc<Model>,
    /// The device's number.
    device: usize,
    max_rows: Option<usize>,
    reply: Option<oneshot::Sender<std::result::Result<(), String>>>,
    began: Option<Instant>,
    rows: usize,
    /// Seconds of the evaluations at `rows`, ascending.
    measured: Vec<f64>,
    points: Vec<(usize, f64)>,
}

impl WarmUp {
    pub(super) fn new(
        model: Arc<Model>,
        device: usize,
        max_rows: Option<usize>,
        reply: oneshot::Sender<std::result::Result<(), String>>,
    ) -> Self {
        Self {
            model,
            device,
            max_rows,
            reply: Some(reply),
            began: None,
            rows: 1,
            measured: Vec::new(),
            points: Vec::new(),
        }
    }

    /// One evaluation; true when the warm-up is over and whoever asked has been told.
    pub(super) fn evaluate(&mut self) -> bool {
        let started = Instant::now();
        let began = *self.began.get_or_insert(started);
        let timestep = self.model.schedule.train_timesteps() - 1;
        let result = catch_unwind(AssertUnwindSafe(|| {
            probe(self.model.on(self.device).network(), self.rows, timestep as f32)
        }));
        match result {
            Ok(Ok(true)) => {}
            Ok(Ok(false)) => return self.tell(Err("its answer to noise is not finite: the weights are damaged; fetch or convert them again".into())),
            Ok(Err(error)) => {
                return match Failed::of(&error) {
                    // What fits is known now: smaller batches have been measured.
                    Failed::OutOfMemory(_) if !self.points.is_empty() => {
                        let fits = self.points.last().map_or(1, |&(rows, _)| rows);
                        self.max_rows = self.max_rows.map(|asked| asked.min(fits));
                        self.done()
                    }
                    Failed::OutOfMemory(reason) => self.tell(Err(format!(
                        "the device has no memory for one row of it ({reason}); unload other models, or use \
                         a device with more"
                    ))),
                    Failed::Otherwise(reason) => self.tell(Err(reason)),
                };
            }
            Err(_) => return self.tell(Err("its evaluation panicked".into())),
        }
        self.measured.push(started.elapsed().as_secs_f64());
        self.measured.sort_by(f64::total_cmp);
        let median = self.measured[self.measured.len() / 2];
        let spent = began.elapsed();
        let enough =
            self.measured.len() >= REPEATS && self.measured.iter().sum::<f64>() >= WINDOW_SECONDS;
        if !enough && spent + Duration::from_secs_f64(median) < BUDGET {
            return false;
        }
        self.points.push((self.rows, median));
        self.measured.clear();
        let affordable = spent + Duration::from_secs_f64(2.0 * median) < BUDGET;
        let allowed = self.rows * 2 <= self.max_rows.unwrap_or(LARGEST);
        if affordable && allowed && worth_doubling(&self.points) {
            self.rows *= 2;
            return false;
        }
        self.done()
    }

    /// What was measured is what the model costs.
    fn done(&mut self) -> bool {
        let cost = CostModel::new(std::mem::take(&mut self.points), self.max_rows);
        self.model.on(self.device).set_cost(cost);
        self.tell(Ok(()))
    }

    fn tell(&mut self, result: std::result::Result<(), String>) -> bool {
        if let Some(reply) = self.reply.take() {
            let _ = reply.send(result);
        }
        true
    }
}

/// One evaluation of noise; whether the answer is finite.
///
/// # Errors
/// When a tensor operation fails.
pub fn probe(network: &dyn Denoiser, rows: usize, timestep: f32) -> Result<bool> {
    let ProbeInputs { x, timesteps, condition } = probe_inputs(network, rows, timestep)?;
    let answer = network.forward(&x, &timesteps, condition.as_ref())?;
    Ok(answer.to_dtype(DType::F32)?.sum_all()?.to_scalar::<f32>()?.is_finite())
}

/// What [`probe`] asks a network about.
pub(crate) struct ProbeInputs {
    pub(crate) x: Tensor,
    pub(crate) timesteps: Tensor,
    pub(crate) condition: Option<Tensor>,
}

/// Noise at one timestep, and the first class.
///
/// # Errors
/// When a tensor operation fails.
pub(crate) fn probe_inputs(
    network: &dyn Denoiser,
    rows: usize,
    timestep: f32,
) -> Result<ProbeInputs> {
    let geometry = network.geometry();
    let shape = (rows, geometry.in_channels, geometry.height, geometry.width);
    let mut values = vec![0.0; rows * geometry.in_channels * geometry.height * geometry.width];
    noise::normal(0, 0, &mut values);
    let device = network.device();
    let x = Tensor::from_vec(values, shape, device)?.to_dtype(network.dtype())?;
    let timesteps = Tensor::full(timestep, rows, device)?;
    let condition = match geometry.conditioning {
        Conditioning::None => None,
        Conditioning::Classes(_) => Some(Tensor::zeros(rows, DType::U32, device)?),
        Conditioning::Timestep => Some(Tensor::zeros(rows, DType::F32, device)?),
        Conditioning::Embedding(width) => Some(Tensor::zeros((rows, width), DType::F32, device)?),
    };
    Ok(ProbeInputs { x, timesteps, condition })
}
