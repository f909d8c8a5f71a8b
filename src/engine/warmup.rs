//! Warm-up: a model is evaluated until it is known what that costs.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, Instant},
};

use candle_core::{DType, Result, Tensor};
use tokio::sync::oneshot;
use understudy_models::{Conditioning, Denoiser, DeviceFault, memory, noise};

use super::{
    batch_calibration::BatchCalibration,
    cost::CostModel,
    cost_check::{Checked, CostCheck},
};
use crate::registry::Model;

/// A warm-up under way. It is done an evaluation at a time, between those that serve clients.
pub(super) struct WarmUp {
    model: Arc<Model>,
    /// The device's number.
    device: usize,
    /// What an earlier run measured, while it is not known whether that holds.
    check: Option<CostCheck>,
    calibration: BatchCalibration,
    began: Option<Instant>,
    /// Rows at most of an evaluation that is prepared, and the time that this took: on a GPU the first of a size has
    /// kernels compiled, algorithms searched and a graph captured.
    prepared: usize,
    preparing: Duration,
    reply: Option<oneshot::Sender<Warmed>>,
}

/// How a warm-up ended: the costs, where they were measured and are worth keeping, or why the network cannot be evaluated.
pub(super) type Warmed = std::result::Result<Option<CostModel>, String>;

impl WarmUp {
    pub(super) fn new(
        model: Arc<Model>,
        device: usize,
        max_rows: Option<usize>,
        known: Option<CostModel>,
        reply: oneshot::Sender<Warmed>,
    ) -> Self {
        let prepared = if model.on(device).network().device().is_cpu() { usize::MAX } else { 0 };
        Self {
            model,
            device,
            check: known.map(CostCheck::new),
            calibration: BatchCalibration::new(max_rows),
            began: None,
            prepared,
            preparing: Duration::ZERO,
            reply: Some(reply),
        }
    }

    /// One evaluation; true when the warm-up is over and whoever asked has been told.
    pub(super) fn evaluate(&mut self) -> bool {
        let started = Instant::now();
        let timestep = self.model.schedule.train_timesteps() - 1;
        let rows = self.check.as_ref().map_or_else(|| self.calibration.rows(), CostCheck::rows);
        let result = catch_unwind(AssertUnwindSafe(|| {
            probe(self.model.on(self.device).network(), rows, timestep as f32)
        }));
        match result {
            Ok(Ok(true)) => {}
            Ok(Ok(false)) => return self.tell(Err("its answer to noise is not finite: the weights are damaged; fetch or convert them again".into())),
            // The calibration finds out what fits.
            Ok(Err(_)) if self.check.take().is_some() => return false,
            Ok(Err(error)) => {
                return match (DeviceFault::of(&error), self.calibration.found_no_memory()) {
                    // What fits is known now: smaller batches have been measured.
                    (DeviceFault::OutOfMemory(_), Some(costs)) => self.known(costs, false),
                    (DeviceFault::OutOfMemory(reason), None) => self.tell(Err(format!(
                        "the device has no memory for one row of it ({reason}); unload other models, or use \
                         a device with more"
                    ))),
                    (DeviceFault::Lost(reason), _) => self.tell(Err(format!(
                        "the GPU answers nothing any more ({reason}); start the server anew"
                    ))),
                    (DeviceFault::Otherwise(reason), _) => self.tell(Err(reason)),
                };
            }
            Err(_) => return self.tell(Err("its evaluation panicked".into())),
        }
        let seconds = started.elapsed();
        if rows > self.prepared {
            self.prepared = rows;
            self.preparing += seconds;
            return false;
        }
        if let Some(check) = &mut self.check {
            match check.timed(seconds.as_secs_f64()) {
                None => {}
                Some(Checked::Hold(costs)) => return self.known(costs, false),
                Some(Checked::Stale) => self.check = None,
            }
            return false;
        }
        let began = *self.began.get_or_insert(started);
        let spent = began.elapsed().saturating_sub(self.preparing);
        let Some(costs) = self.calibration.timed(seconds.as_secs_f64(), spent.as_secs_f64()) else {
            return false;
        };
        // Rounds that do not agree are of a machine with other things to do.
        let lasting = self.calibration.settled();
        self.known(costs, lasting)
    }

    /// That is what the model costs, now or for longer.
    fn known(&mut self, costs: CostModel, lasting: bool) -> bool {
        self.model.on(self.device).set_cost(costs.clone());
        self.tell(Ok(lasting.then_some(costs)))
    }

    fn tell(&mut self, result: Warmed) -> bool {
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
    let floats = (geometry.in_channels + geometry.out_channels) * geometry.height * geometry.width;
    // Inputs and answer, each in two forms for a moment; what the network takes besides is its own affair.
    memory::admit((2 * size_of::<f32>() * rows * floats) as u64)?;
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
