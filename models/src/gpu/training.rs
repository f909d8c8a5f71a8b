//! A compiled network whose weights are trained, as an operation of candle's with a gradient.
//!
//! candle's operations have at most three arguments, a network hundreds of weights. So the weights hang on a chain of
//! links, as on the CPU (`crate::cpu`): each link's value is a number that nobody reads, and its gradient hands out what
//! the network's own gradient has left. candle goes through the chain after the network.

use std::sync::{Arc, Mutex, MutexGuard};

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{
    CpuStorage, CudaStorage, CustomOp3, DType, Layout, Result, Shape, Storage, Tensor, bail,
};

use super::builder::Builder;
use super::context::Context;
use super::parameters::{Current, Parameter, part};
use super::program::{Back, Run, Step};
use super::tape::Parts;
use crate::graph::{Graph, lower};
use crate::weights::Weights;

/// A network whose weights are read anew at each evaluation.
pub(crate) struct Training(Arc<Network>);

struct Network {
    context: Context,
    steps: Vec<Step>,
    parts: Parts,
    /// Numbers of each sample that all maps and their gradients need.
    memory: usize,
    /// All weights, f32, those that are read turned, and where each one's gradient begins.
    tensors: Vec<Tensor>,
    filters: Vec<Parameter>,
    starts: Vec<usize>,
    /// Numbers that the time embedding is projected to.
    projected: usize,
    /// Channels at most that anything is summed over the pixels of.
    widest: usize,
    /// Whether the answer is divided by the time.
    divided: bool,
}

impl Training {
    /// # Errors
    /// Those of weights that cannot be read, and of the device.
    pub(crate) fn new(graph: &Graph, weights: &Weights) -> crate::Result<Self> {
        let mut builder = Builder::trained(graph, weights)?;
        lower(graph, weights, &mut builder)?;
        builder.insert_projections()?;
        let parts = builder.differentiate();
        let trained = builder.trained.take().unwrap_or_default();
        Ok(Self(Arc::new(Network {
            starts: trained.starts(),
            tensors: trained.tensors,
            filters: trained.filters,
            parts,
            memory: builder.memory.len(),
            projected: builder.projections.total,
            widest: builder.widest,
            context: builder.context.clone(),
            steps: builder.steps,
            divided: graph.answer().1,
        })))
    }

    /// As [`super::Program::forward`], with a gradient with respect to the weights, the noisy sample, and the
    /// features.
    pub(crate) fn forward(&self, [x, features, time]: [&Tensor; 3]) -> Result<Tensor> {
        let network = &self.0;
        let inputs = [x, features, time].map(|input| input.detach());
        let batch = x.dim(0)?;
        let context = &network.context;
        let weights = Current::new(context, &network.tensors, &network.filters, &network.starts)?;
        let memory = context.empty(batch * network.memory, context.dtype)?;
        let mut state = State { inputs, batch, weights, memory, projected: None };
        let answer = network.evaluate(&mut state)?;

        let gradients = Gradients::default();
        let mut link = Tensor::zeros(1, DType::F32, &context.device)?;
        let mut tensors = network.tensors.iter().enumerate();
        while let Some((first, one)) = tensors.next() {
            // The last may have to be alone.
            let (second, other) = tensors.next().unwrap_or((first, one));
            let starts = [first, second].map(|number| network.starts[number]);
            link = one.apply_op3(other, &link, Link { starts, gradients: gradients.clone() })?;
        }
        let network = Arc::clone(network);
        let state = Mutex::new(Some(state));
        x.apply_op3(features, &link, Evaluation { network, answer, state, gradients })
    }
}

/// What an evaluation leaves for its gradient.
struct State {
    inputs: [Tensor; 3],
    batch: usize,
    weights: Current,
    memory: Tensor,
    projected: Option<Tensor>,
}

impl Network {
    fn evaluate(&self, state: &mut State) -> Result<Tensor> {
        let mut run = Run::new(state.inputs.each_ref(), state.batch, state.memory.clone(), false);
        run.trained = Some((&state.weights, &self.starts));
        for step in &self.steps[self.parts.forward.clone()] {
            step(&self.context, &mut run)?;
        }
        state.projected = run.projected;
        match run.answer {
            Some(answer) => Ok(answer),
            None => bail!("the network exports no answer"),
        }
    }

    /// The gradients of all weights, one after another; of the features; and of the noisy sample, if it is asked
    /// for.
    fn gradients(&self, state: &State, of_answer: &Tensor, input: bool) -> Result<Back> {
        let State { inputs, batch, weights, memory, projected } = state;
        let (context, total) = (&self.context, self.starts[self.starts.len() - 1]);
        let of_answer = of_answer.to_dtype(DType::F32)?;
        let of_answer = if self.divided {
            let [.., time] = inputs;
            of_answer.broadcast_div(&time.to_dtype(DType::F32)?.reshape(((), 1, 1, 1))?)?
        } else {
            of_answer
        };
        let back = Back {
            of_answer: of_answer.to_dtype(context.dtype)?.contiguous()?,
            of_projected: context.empty(batch * self.projected.max(1), DType::F32)?,
            sums: context.empty(batch * self.widest, DType::F32)?,
            of_weights: context.empty(total, DType::F32)?,
            of_features: None,
            of_x: None,
        };
        let mut run = Run::new(inputs.each_ref(), *batch, memory.clone(), false);
        run.trained = Some((weights, &self.starts));
        run.projected.clone_from(projected);
        run.back = Some(back);
        let end = if input { self.parts.input.end } else { self.parts.backward.end };
        for step in &self.steps[self.parts.backward.start..end] {
            step(context, &mut run)?;
        }
        match run.back {
            Some(back) => Ok(back),
            None => bail!("there are no gradients"),
        }
    }
}

/// The gradients of all weights, once there are some.
type Gradients = Arc<Mutex<Option<Tensor>>>;

/// One evaluation, whose maps wait for the gradient.
struct Evaluation {
    network: Arc<Network>,
    answer: Tensor,
    state: Mutex<Option<State>>,
    gradients: Gradients,
}

impl CustomOp3 for Evaluation {
    fn name(&self) -> &'static str {
        "network"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        bail!("this network is compiled for a GPU")
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        match &*self.answer.storage_and_layout().0 {
            Storage::Cuda(answer) => {
                let shape = self.answer.shape().clone();
                Ok((answer.try_clone(&Layout::contiguous(&shape))?, shape))
            }
            _ => bail!("the answer is not on the GPU"),
        }
    }

    fn bwd(
        &self,
        x: &Tensor,
        features: &Tensor,
        link: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let Some(state) = locked(&self.state).take() else {
            bail!("the gradient of an evaluation can be taken once; evaluate the network again")
        };
        let back = self.network.gradients(&state, &gradient.detach(), x.track_op())?;
        *locked(&self.gradients) = Some(back.of_weights);
        let like = |given: Option<Tensor>, input: &Tensor| {
            given.map(|given| given.to_dtype(input.dtype())?.reshape(input.shape())).transpose()
        };
        Ok((like(back.of_x, x)?, like(back.of_features, features)?, Some(link.zeros_like()?)))
    }
}

/// What leads from a network's gradient to those of two of its weights, or of one that is given twice.
struct Link {
    /// Where among the gradients of all weights they begin.
    starts: [usize; 2],
    gradients: Gradients,
}

impl CustomOp3 for Link {
    fn name(&self) -> &'static str {
        "network weights"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        bail!("this network is compiled for a GPU")
    }

    fn cuda_fwd(
        &self,
        weight: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let shape = Shape::from(1);
        Ok((weight.device().zeros_impl(&shape, DType::F32)?, shape))
    }

    fn bwd(
        &self,
        one: &Tensor,
        other: &Tensor,
        _: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let all = locked(&self.gradients);
        let Some(all) = all.as_ref() else { bail!("the network has not made its gradients") };
        let own = |start, weight: &Tensor| {
            // A weight that may not change takes none.
            weight.track_op().then(|| part(all, start, weight.shape())).transpose()
        };
        let [first, second] = self.starts;
        let of_other = if first == second { None } else { own(second, other)? };
        Ok((own(first, one)?, of_other, Some(gradient.clone())))
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
