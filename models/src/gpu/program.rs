//! A list of steps over maps in one piece of memory, run for any batch.

use candle_core::{DType, Result, Tensor, bail};

use super::SAMPLE;
use super::builder::{Builder, PendingEpilogue, Projection};
use super::context::Context;
use super::convolution::Scratch;
use super::kernels::{Finish, PerSample};
use super::parameters::{Current, Parameter, part};
use crate::graph::{Graph, Size, lower};
use crate::kernels::Buffer;
use crate::weights::Weights;

/// Does something with the maps that there are.
pub(super) type Step = Box<dyn Fn(&Context, &mut Run) -> Result<()> + Send + Sync>;

/// A compiled network.
pub(crate) struct Program {
    pub(super) context: Context,
    pub(super) steps: Vec<Step>,
    /// Numbers of each sample that all maps need.
    pub(super) memory: usize,
    /// Whether the fastest way to do a convolution is looked for, or the same is taken in every process.
    pub(super) searches: bool,
}

impl Program {
    /// Has every evaluation done the same way in every process from now on.
    pub(crate) fn pin(&mut self) {
        self.searches = false;
    }

    /// Of a network whose weights stay as they are, on the GPU where they are.
    ///
    /// # Errors
    /// Those of weights that cannot be read, and of the device.
    pub(crate) fn new(graph: &Graph, weights: &Weights) -> crate::Result<Self> {
        let mut builder = Builder::new(graph, weights)?;
        lower(graph, weights, &mut builder)?;
        Ok(builder.finish()?)
    }

    /// One evaluation of `x` `[B, channels, height, width]`, times f32 `[B]` and the condition: such a tensor.
    ///
    /// # Errors
    /// Whatever the device says.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        timesteps: &Tensor,
        condition: Option<&Tensor>,
    ) -> Result<Tensor> {
        let none;
        let condition = match condition {
            Some(condition) => condition,
            None => {
                // A table of one row is read without one.
                none = Tensor::zeros(timesteps.dims(), DType::U32, timesteps.device())?;
                &none
            }
        };
        let inputs = [x, condition, timesteps];
        let batch = inputs[SAMPLE].dim(0)?;
        let memory = self.context.empty(batch * self.memory, self.context.dtype)?;
        // That takes seconds, so it is done for the sizes that a server warms up, and not while it serves.
        let search = self.searches && batch.is_power_of_two();
        let mut run = Run::new(inputs, batch, memory, search);
        for step in &self.steps {
            step(&self.context, &mut run)?;
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

/// One evaluation, or the gradients of one.
pub(super) struct Run<'a> {
    pub(super) inputs: [&'a Tensor; 3],
    pub(super) batch: usize,
    memory: Tensor,
    /// For convolutions.
    pub(super) scratch: Scratch,
    /// All projections of the time embedding, f32 `[B, 1, 1, …]`.
    pub(super) projected: Option<Tensor>,
    pub(super) answer: Option<Tensor>,
    /// The weights of a network that is trained, and where each begins.
    pub(super) trained: Option<(&'a Current, &'a [usize])>,
    pub(super) back: Option<Back>,
}

/// What gradients come from and go to.
pub(super) struct Back {
    /// `[B, channels, height, width]`.
    pub(super) of_answer: Tensor,
    /// Of all projections of the time embedding, f32.
    pub(super) of_projected: Tensor,
    /// f32, for what is on its way.
    pub(super) sums: Tensor,
    /// f32, of all trained tensors, one after another.
    pub(super) of_weights: Tensor,
    pub(super) of_features: Option<Tensor>,
    pub(super) of_x: Option<Tensor>,
}

impl<'a> Run<'a> {
    pub(super) fn new(
        inputs: [&'a Tensor; 3],
        batch: usize,
        memory: Tensor,
        searches: bool,
    ) -> Self {
        let scratch = Scratch::new(searches);
        let (projected, answer, trained, back) = (None, None, None, None);
        Self { inputs, batch, memory, scratch, projected, answer, trained, back }
    }

    /// A weight as it is now.
    pub(super) fn value(&self, parameter: &Parameter) -> Result<Tensor> {
        match (parameter, self.trained) {
            (Parameter::Own(tensor), _) => Ok(tensor.clone()),
            (_, Some((weights, starts))) => weights.get(parameter, starts),
            (_, None) => bail!("a weight that is trained, in a network that is not"),
        }
    }

    /// Where a trained weight's gradient goes, f32.
    pub(super) fn of(&self, parameter: &Parameter) -> Result<Tensor> {
        match (parameter, self.trained) {
            (Parameter::Trained { first, shape, .. }, Some((_, starts))) => {
                part(&self.back()?.of_weights, starts[*first], shape)
            }
            _ => bail!("a gradient of a weight that is not trained"),
        }
    }

    pub(super) fn back(&self) -> Result<&Back> {
        match &self.back {
            Some(back) => Ok(back),
            None => bail!("gradients are not what is asked for"),
        }
    }

    pub(super) fn back_mut(&mut self) -> Result<&mut Back> {
        match &mut self.back {
            Some(back) => Ok(back),
            None => bail!("gradients are not what is asked for"),
        }
    }

    /// The map `[B, height, width, channels]` that is there.
    pub(super) fn at(&self, Place { buffer, size }: Place) -> Result<Tensor> {
        let Size { height, width, channels } = size;
        let numbers = self.batch * height * width * channels;
        let there = self.memory.narrow(0, self.batch * buffer.offset, numbers)?;
        there.reshape((self.batch, height, width, channels))
    }

    /// What is still to be added to a map, as the kernels take it.
    pub(super) fn finish_of(&self, pending: &PendingEpilogue) -> Result<Finish> {
        Ok(Finish {
            residual: pending.residual.map(|(_, place)| self.at(place)).transpose()?,
            bias: Some(self.value(&pending.bias)?),
            offset: self.per_sample(pending.offset)?,
            factor: pending.factor,
        })
    }

    /// A projection of the time embedding, if there is to be one.
    pub(super) fn per_sample(&self, projection: Option<Projection>) -> Result<Option<PerSample>> {
        match (projection, &self.projected) {
            (None, _) => Ok(None),
            (Some(Projection(start)), Some(all)) => Ok(Some(PerSample { all: all.clone(), start })),
            (Some(_), None) => bail!("the time embedding is not projected yet"),
        }
    }

    /// Where the gradient of such a projection goes.
    pub(super) fn gradient_per_sample(
        &self,
        projection: Option<Projection>,
    ) -> Result<Option<PerSample>> {
        let Some(Projection(start)) = projection else { return Ok(None) };
        let all = &self.back()?.of_projected;
        Ok(Some(PerSample { all: all.reshape((self.batch, 1, 1, ()))?, start }))
    }
}
