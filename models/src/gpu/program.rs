//! A list of steps over maps, run for any batch.

use candle_core::{Result, Tensor, bail};

use super::kernels::Told;
use crate::assembly::{Map, Projection};

/// Does something with the maps that there are.
pub(super) type Step = Box<dyn Fn(&mut Run) -> Result<()> + Send + Sync>;

/// A compiled network.
pub(crate) struct Program {
    pub(super) steps: Vec<Step>,
    /// Maps that its steps speak of.
    pub(super) maps: usize,
}

impl Program {
    /// Of tensors that begin with the batch ([`crate::assembly`] says which), one evaluation: `[B, channels, height,
    /// width]`.
    ///
    /// # Errors
    /// Whatever the device says.
    pub(crate) fn forward(&self, inputs: [&Tensor; 3]) -> Result<Tensor> {
        let mut run = Run { inputs, maps: vec![None; self.maps], projected: None, answer: None };
        for step in &self.steps {
            step(&mut run)?;
        }
        match run.answer {
            Some(answer) => Ok(answer),
            None => bail!("the network exports no answer"),
        }
    }
}

/// One evaluation.
pub(super) struct Run<'a> {
    pub(super) inputs: [&'a Tensor; 3],
    maps: Vec<Option<Tensor>>,
    /// All projections of the time embedding, f32 `[B, 1, 1, …]`.
    pub(super) projected: Option<Tensor>,
    pub(super) answer: Option<Tensor>,
}

impl Run<'_> {
    /// `[B, height, width, channels]`.
    pub(super) fn map(&self, map: Map) -> Result<&Tensor> {
        match &self.maps[map.0] {
            Some(tensor) => Ok(tensor),
            None => bail!("map {} is read before it is written, or after its last use", map.0),
        }
    }

    pub(super) fn set(&mut self, map: Map, tensor: Tensor) {
        self.maps[map.0] = Some(tensor);
    }

    /// Its memory may be another's.
    pub(super) fn forget(&mut self, map: Map) {
        self.maps[map.0] = None;
    }

    /// A projection of the time embedding, if there is to be one.
    pub(super) fn told(&self, projection: Option<Projection>) -> Result<Option<Told<'_>>> {
        match (projection, &self.projected) {
            (None, _) => Ok(None),
            (Some(Projection(start)), Some(all)) => Ok(Some(Told { all, start })),
            (Some(_), None) => bail!("the time embedding is not projected yet"),
        }
    }
}
