//! A list of steps over maps in one piece of memory, run for any batch.

use candle_core::{Result, Tensor, bail};

use super::builder::Owed;
use super::kernels::{Ending, Told};
use super::machine::Machine;
use crate::assembly::{Projection, Size, X};
use crate::kernels::Buffer;

/// Does something with the maps that there are.
pub(super) type Step = Box<dyn Fn(&Machine, &mut Run) -> Result<()> + Send + Sync>;

/// A compiled network.
pub(crate) struct Program {
    pub(super) machine: Machine,
    pub(super) steps: Vec<Step>,
    /// Numbers of each sample that all maps need.
    pub(super) memory: usize,
}

impl Program {
    /// Of tensors that begin with the batch ([`crate::assembly`] says which), one evaluation: `[B, channels, height,
    /// width]`.
    ///
    /// # Errors
    /// Whatever the device says.
    pub(crate) fn forward(&self, inputs: [&Tensor; 3]) -> Result<Tensor> {
        let batch = inputs[X].dim(0)?;
        let memory = self.machine.empty(batch * self.memory, self.machine.dtype)?;
        let mut run = Run { inputs, batch, memory, projected: None, answer: None };
        for step in &self.steps {
            step(&self.machine, &mut run)?;
        }
        match run.answer {
            Some(answer) => Ok(answer),
            None => bail!("the network exports no answer"),
        }
    }
}

/// Where a map is.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) buffer: Buffer,
    pub(super) size: Size,
}

/// One evaluation.
pub(super) struct Run<'a> {
    pub(super) inputs: [&'a Tensor; 3],
    pub(super) batch: usize,
    memory: Tensor,
    /// All projections of the time embedding, f32 `[B, 1, 1, …]`.
    pub(super) projected: Option<Tensor>,
    pub(super) answer: Option<Tensor>,
}

impl Run<'_> {
    /// The map `[B, height, width, channels]` that is there.
    pub(super) fn at(&self, Place { buffer, size }: Place) -> Result<Tensor> {
        let Size { height, width, channels } = size;
        let numbers = self.batch * height * width * channels;
        let there = self.memory.narrow(0, self.batch * buffer.offset, numbers)?;
        there.reshape((self.batch, height, width, channels))
    }

    /// What is owed to a map, as the kernels take it.
    pub(super) fn ending(&self, owed: &Owed) -> Result<Ending> {
        Ok(Ending {
            residual: owed.residual.map(|(_, place)| self.at(place)).transpose()?,
            bias: Some(owed.bias.clone()),
            offset: self.told(owed.offset)?,
            factor: owed.factor,
        })
    }

    /// A projection of the time embedding, if there is to be one.
    pub(super) fn told(&self, projection: Option<Projection>) -> Result<Option<Told>> {
        match (projection, &self.projected) {
            (None, _) => Ok(None),
            (Some(Projection(start)), Some(all)) => Ok(Some(Told { all: all.clone(), start })),
            (Some(_), None) => bail!("the time embedding is not projected yet"),
        }
    }
}
