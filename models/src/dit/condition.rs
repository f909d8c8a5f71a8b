//! What a sample is told: its time and its class.

use candle_core::{DType, Result, Tensor};

use super::DiTConfig;
use crate::layers::frequencies;
use crate::weights::Weights;

/// Channels of the sines and cosines of the time.
pub(super) const TIME_CHANNELS: usize = 256;

/// What every block embeds in its own way.
pub(super) struct Condition {
    /// Sines and cosines of the time, `[B, 256]`.
    pub(super) phases: Tensor,
    /// Rows of the tables of classes, u32 `[B]`.
    rows: Tensor,
}

impl Condition {
    /// `timesteps` f32 `[B]`; `labels` u32 `[B]`, or nothing where the tables have one row.
    pub(super) fn new(timesteps: &Tensor, labels: Option<&Tensor>, dtype: DType) -> Result<Self> {
        let device = timesteps.device();
        let frequencies = frequencies(TIME_CHANNELS / 2, 1.0, device)?;
        let phase = timesteps.unsqueeze(1)?.broadcast_mul(&frequencies)?;
        let phases = Tensor::cat(&[phase.cos()?, phase.sin()?], 1)?.to_dtype(dtype)?;
        let rows = match labels {
            Some(labels) => labels.clone(),
            None => Tensor::zeros(timesteps.dims(), DType::U32, device)?,
        };
        Ok(Self { phases, rows })
    }

    /// Each sample's row of a table of classes, `[B, channels]`.
    pub(super) fn row_of(&self, table: &Tensor) -> Result<Tensor> {
        table.index_select(&self.rows, 0)
    }
}

/// A block's table of classes, `weights` being where its embedding is; the last row is the class that
/// means "none".
pub(super) fn table(config: &DiTConfig, weights: &Weights) -> crate::Result<Tensor> {
    let place = weights.at("class_embedder.embedding_table");
    place.get("weight", &[config.rows(), config.width()])
}
