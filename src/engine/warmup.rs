//! Warm-up: a model is evaluated until it is known what that costs.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, Instant},
};

use candle_core::{DType, Result, Tensor};
use tokio::sync::oneshot;
use understudy_models::{
    Conditioning, Conditions, Denoiser, DeviceFault, autoencoder::Decoder, memory, noise,
};

use super::{
    batch_calibration::{BUDGET_SECONDS, BatchCalibration},
    cost::{CostModel, StageCosts},
    cost_check::{Checked, CostCheck},
    stage::{PerStage, Stage},
    step,
};
use crate::registry::Model;

/// A warm-up under way. It is done an evaluation at a time, between those that serve clients.
pub(super) struct WarmUp {
    model: Arc<Model>,
    /// The device's number.
    device: usize,
    max_rows: Option<usize>,
    /// What is being measured; the stages that are still to be follow.
    stage: Stage,
    next: Vec<Stage>,
    /// What an earlier run measured.
    known: StageCosts,
    /// Of the stage, while it is not known whether that holds.
    check: Option<CostCheck>,
    /// What will be worth keeping.
    lasting: StageCosts,
    /// Whether something was measured, rather than known.
    measured: bool,
    calibration: BatchCalibration,
    began: Option<Instant>,
    /// Seconds of a row in the last evaluation of this stage; none before there was one.
    row_seconds: f64,
    /// Rows at most of an evaluation that is prepared, and the time that this took: on a GPU the first of a size has
    /// kernels compiled, algorithms searched and a graph captured.
    prepared: usize,
    preparing: Duration,
    reply: Option<oneshot::Sender<Warmed>>,
}

/// How a warm-up ended: the costs, where they were measured and are worth keeping, or why the network cannot be evaluated.
pub(super) type Warmed = std::result::Result<Option<StageCosts>, String>;

impl WarmUp {
    pub(super) fn new(
        model: Arc<Model>,
        device: usize,
        max_rows: Option<usize>,
        known: StageCosts,
        reply: oneshot::Sender<Warmed>,
    ) -> Self {
        let replica = model.on(device);
        // A model's stages share the time that there is.
        let mut next = vec![Stage::Denoise];
        next.extend(replica.decoder().map(|_| Stage::Decode));
        next.extend(model.has(Stage::Encode).then_some(Stage::Encode));
        let budget_seconds = BUDGET_SECONDS / next.len() as f64;
        let prepared = if replica.network().device().is_cpu() { usize::MAX } else { 0 };
        let stage = next.remove(0);
        Self {
            calibration: BatchCalibration::new(max_rows, budget_seconds),
            model,
            device,
            max_rows,
            stage,
            next,
            check: known[stage].clone().map(CostCheck::new),
            known,
            lasting: PerStage::default(),
            measured: false,
            began: None,
            row_seconds: 0.0,
            prepared,
            preparing: Duration::ZERO,
            reply: Some(reply),
        }
    }

    /// Rows of the next evaluation.
    fn rows(&self) -> usize {
        self.check.as_ref().map_or_else(|| self.calibration.rows(), CostCheck::rows)
    }

    /// What the next evaluation is expected to take, after the last one.
    pub(super) fn expected_seconds(&self) -> f64 {
        self.row_seconds * self.rows() as f64
    }

    /// One evaluation; true when the warm-up is over and whoever asked has been told.
    pub(super) fn evaluate(&mut self) -> bool {
        let started = Instant::now();
        let timestep = self.model.schedule.train_timesteps() - 1;
        let rows = self.rows();
        let result = catch_unwind(AssertUnwindSafe(|| {
            let replica = self.model.on(self.device);
            match self.stage {
                Stage::Encode => self.read(rows),
                // Measured by nobody before it is asked for.
                Stage::Embed => Ok(true),
                Stage::Denoise => probe(replica.network(), rows, timestep as f32),
                Stage::Decode => replica.decoder().map_or(Ok(true), |it| probe_decoder(it, rows)),
            }
        }));
        match result {
            Ok(Ok(true)) => {}
            Ok(Ok(false)) => return self.tell(Err("its answer to noise is not finite: the weights are damaged; fetch or convert them again".into())),
            // The calibration finds out what fits.
            Ok(Err(_)) if self.check.take().is_some() => return false,
            Ok(Err(error)) => {
                return match (DeviceFault::of(&error), self.calibration.found_no_memory()) {
                    // What fits is known now: smaller batches have been measured.
                    (DeviceFault::OutOfMemory(_), Some(costs)) => self.ends(costs, None),
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
        self.row_seconds = seconds.as_secs_f64() / rows as f64;
        if rows > self.prepared {
            self.prepared = rows;
            self.preparing += seconds;
            return false;
        }
        if let Some(check) = &mut self.check {
            match check.timed(seconds.as_secs_f64()) {
                None => {}
                Some(Checked::Hold(costs)) => {
                    let before = self.known[self.stage].clone();
                    return self.ends(costs, before);
                }
                Some(Checked::Stale) => self.check = None,
            }
            return false;
        }
        let began = *self.began.get_or_insert(started);
        let spent = began.elapsed().saturating_sub(self.preparing);
        let Some(costs) = self.calibration.timed(seconds.as_secs_f64(), spent.as_secs_f64()) else {
            return false;
        };
        self.measured = true;
        self.ends(costs.clone(), Some(costs))
    }

    /// That is what the stage costs, now or for longer; the next one is looked at, if there is one.
    fn ends(&mut self, costs: CostModel, lasting: Option<CostModel>) -> bool {
        let replica = self.model.on(self.device);
        replica.set_cost(self.stage, costs);
        self.lasting[self.stage] = lasting;
        let Some(next) = self.next.pop() else {
            replica.split_decode();
            replica.guess_encode();
            let stages = Stage::ALL.into_iter().filter(|&stage| self.model.has(stage));
            let all = stages.into_iter().all(|stage| self.lasting[stage].is_some());
            let lasting = std::mem::take(&mut self.lasting);
            return self.tell(Ok((all && self.measured).then_some(lasting)));
        };
        self.stage = next;
        self.check = self.known[next].clone().map(CostCheck::new);
        // Where every evaluation is to have the same bits, one row at a time has.
        let max_rows = if replica.padded() { Some(1) } else { self.max_rows };
        self.calibration = BatchCalibration::new(max_rows, self.calibration.budget_seconds());
        (self.began, self.row_seconds) = (None, 0.0);
        if self.prepared != usize::MAX {
            self.prepared = 0;
        }
        self.preparing = Duration::ZERO;
        false
    }

    /// Reads the empty prompt so many times over, and keeps what it comes to.
    fn read(&self, rows: usize) -> Result<bool> {
        let Some(text) = self.model.text() else { return Ok(true) };
        let prompts = vec![text.read_empty(); rows];
        let states = step::read(self.model.on(self.device), &prompts)?;
        let Some(first) = states.into_iter().next() else { return Ok(true) };
        let sum = first.hidden.sum_all()?.to_scalar::<f32>()? + first.pooled.iter().sum::<f32>();
        let empty = text.empty();
        let first = if empty.are_unsaid() { first.zeros()? } else { first };
        self.model.embeddings().pin(empty, first);
        Ok(sum.is_finite())
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
    let inputs = probe_inputs(network, rows, timestep)?;
    let answer = network.evaluate(&inputs.x, &inputs.timesteps, inputs.conditions())?;
    Ok(answer.to_dtype(DType::F32)?.sum_all()?.to_scalar::<f32>()?.is_finite())
}

/// Decodes noise; whether the images are finite.
fn probe_decoder(decoder: &Decoder, rows: usize) -> Result<bool> {
    let ([channels, height, width], [colours, tall, wide]) =
        (decoder.latent_shape(), decoder.image_shape());
    let floats = channels * height * width + colours * tall * wide;
    memory::admit((2 * size_of::<f32>() * rows * floats) as u64)?;
    let mut values = vec![0.0; rows * channels * height * width];
    noise::normal(0, 0, &mut values);
    let latents = Tensor::from_vec(values, (rows, channels, height, width), decoder.device())?;
    let images = decoder.forward(&latents.to_dtype(decoder.dtype())?)?;
    Ok(images.to_dtype(DType::F32)?.sum_all()?.to_scalar::<f32>()?.is_finite())
}

/// What [`probe`] asks a network about.
pub(crate) struct ProbeInputs {
    pub(crate) x: Tensor,
    pub(crate) timesteps: Tensor,
    condition: Option<Tensor>,
    prompt: Option<Tensor>,
    guidance: Option<Tensor>,
}

impl ProbeInputs {
    /// What it is told beside noise and time.
    pub(crate) fn conditions(&self) -> Conditions<'_> {
        Conditions {
            condition: self.condition.as_ref(),
            prompt: self.prompt.as_ref(),
            guidance: self.guidance.as_ref(),
        }
    }
}

/// Noise at one timestep, and the first class, or a prompt of noise.
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
        Conditioning::TextTime { text, numbers } => {
            Some(Tensor::zeros((rows, text + numbers), DType::F32, device)?)
        }
    };
    let prompt = geometry.prompt.map(|prompt| {
        let mut values = vec![0.0; rows * prompt.tokens * prompt.width];
        noise::normal(0, 1, &mut values);
        Tensor::from_vec(values, (rows, prompt.tokens, prompt.width), device)
    });
    let guidance = geometry.guidance.then(|| Tensor::zeros(rows, DType::F32, device));
    let (prompt, guidance) = (prompt.transpose()?, guidance.transpose()?);
    Ok(ProbeInputs { x, timesteps, condition, prompt, guidance })
}
