//! The critic: a network that learns the score of the student's own images while the student moves.

use candle_core::{DType, Device, Tensor};
use understudy_models::schedule::PredictionType;
use understudy_models::{Denoiser, Geometry, NetworkConfig, Result};

use super::levels::Levels;
use crate::checkpoint::Snapshot;
use crate::guard::check_weights;
use crate::objective::{Linear, apply, column, to_x0};
use crate::optimizer::{self, AdamW, Gradients};
use crate::parameters::Parameters;
use crate::teacher::Teacher;
use crate::training_batch::TrainingBatch;

/// What the critic learns from: images of the student, noised again.
#[derive(Debug, Clone)]
pub struct Renoised {
    /// x_τ, without a gradient, at timesteps τ; the answer is the estimate of the clean image that is to be learned.
    pub batch: TrainingBatch,
    /// How much each row's squared error counts.
    pub weights: Vec<f64>,
}

/// The network, its optimizer and their state.
pub(super) struct Critic {
    config: NetworkConfig,
    prediction: PredictionType,
    dtype: DType,
    parameters: Parameters,
    optimizer: AdamW,
    network: Box<dyn Denoiser>,
}

impl Critic {
    /// One that begins as the teacher, and learns in `dtype`. It takes a guidance scale where the teacher draws after text.
    ///
    /// # Errors
    /// Weights that cannot be read; whatever the device says.
    pub(super) fn new(
        teacher: &Teacher,
        settings: optimizer::Settings,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let takes_scale = teacher.geometry().prompt.is_some();
        let config = teacher.config.with_guidance(takes_scale).unwrap_or(teacher.config.clone());
        let parameters = super::parameters(teacher, &config, device)?;
        let network = config.load(parameters.tensors(), dtype, device)?;
        Ok(Self {
            config,
            prediction: teacher.schedule.prediction_type(),
            dtype,
            optimizer: AdamW::new(&parameters, settings)?,
            parameters,
            network,
        })
    }

    /// Its shapes.
    pub(super) fn geometry(&self) -> &Geometry {
        self.network.geometry()
    }

    /// Where it is.
    pub(super) fn device(&self) -> &Device {
        self.network.device()
    }

    /// Its estimate of the clean images of `batch`, f32 `[B, C, H, W]`, with gradients to its weights and to x.
    pub(super) fn estimate(&self, batch: &TrainingBatch, levels: &Levels) -> Result<Tensor> {
        estimate(self.network.as_ref(), self.prediction, batch, levels)
    }

    /// The gradients of its loss, and the loss: the mean squared error in the clean image, by row weighted; both over `parts`.
    pub(super) fn gradients(
        &self,
        shown: &Renoised,
        levels: &Levels,
        parts: usize,
    ) -> Result<(Gradients, f32)> {
        let Renoised { batch, weights } = shown;
        let squares = (self.estimate(batch, levels)? - &batch.answer)?.sqr()?;
        let weights = column(weights.iter().copied(), squares.device())?;
        let loss = (squares.broadcast_mul(&weights)?.mean_all()? / parts as f64)?;
        let gradients = Gradients::take(&self.parameters, &mut loss.backward()?)?;
        Ok((gradients, loss.to_scalar()?))
    }

    /// Changes the weights; gives the gradients' norm.
    pub(super) fn step(&mut self, gradients: &Gradients) -> Result<f64> {
        let norm = self.optimizer.step(&self.parameters, gradients)?;
        self.reload()?;
        Ok(norm)
    }

    /// The network after a change of its weights, where it does not follow them.
    fn reload(&mut self) -> Result<()> {
        if !self.network.follows() {
            let device = self.parameters.device();
            self.network = self.config.load(self.parameters.tensors(), self.dtype, &device)?;
        }
        Ok(())
    }

    /// Refuses weights that are not finite after `step`.
    pub(super) fn check(&self, step: u64) -> Result<()> {
        let weights = self.parameters.iter().map(|(name, var)| (name, var.as_tensor()));
        check_weights("critic's weight", weights, Some(step))
    }

    /// Bytes of its state.
    pub(super) fn bytes(&self) -> u64 {
        let weights: usize = self.parameters.iter().map(|(_, weight)| weight.elem_count()).sum();
        // And the optimizer's two moments.
        (3 * weights * size_of::<f32>()) as u64
    }

    pub(super) fn save(&self, snapshot: &mut Snapshot) -> Result<()> {
        self.parameters.save(snapshot)?;
        Ok(self.optimizer.save(&self.parameters, snapshot)?)
    }

    pub(super) fn restore(&mut self, snapshot: &Snapshot) -> Result<()> {
        self.parameters.restore(snapshot)?;
        self.optimizer.restore(&self.parameters, snapshot)?;
        self.reload()
    }
}

/// A network's estimate of the clean images of a batch, f32 `[B, C, H, W]`.
pub(super) fn estimate(
    network: &dyn Denoiser,
    prediction: PredictionType,
    batch: &TrainingBatch,
    levels: &Levels,
) -> Result<Tensor> {
    clean(&batch.ask(network)?.to_dtype(DType::F32)?, prediction, batch, levels)
}

/// The clean images that an answer to a batch means, f32 `[B, C, H, W]`: of one that tells a variance by its mean half.
pub(super) fn clean(
    answer: &Tensor,
    prediction: PredictionType,
    batch: &TrainingBatch,
    levels: &Levels,
) -> Result<Tensor> {
    let answer = answer.narrow(1, 0, batch.x.dim(1)?)?;
    let rows: Vec<Linear> =
        batch.timesteps.iter().map(|&t| to_x0(prediction, levels.alpha_bar(t))).collect();
    Ok(apply(&rows, &batch.x, &answer)?)
}
