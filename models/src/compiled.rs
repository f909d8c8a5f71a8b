//! A network of whichever architecture, made of its graph and its weights.

mod network;

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor, bail};

use crate::cpu::{Inference, Mode, Training, Unfinished};
use crate::denoiser::Conditions;
use crate::eager::Eager;
use crate::features::Features;
use crate::graph::Graph;
use crate::kernels::{ElementType, Footprint, Isa, Timing};
use crate::weight::Weight;
use crate::weights::Weights;
use crate::{Error, patches};

pub(crate) use network::{Network, Sizes};

/// A graph with its weights, in the form that its device and element type ask for.
pub(crate) struct Compiled {
    body: Body,
    /// Pixels of a patch's side.
    patch: usize,
    /// Whether operations look at the time.
    timed: bool,
    dtype: DType,
    device: Device,
    parameters: usize,
}

enum Body {
    /// Kernels for the CPU, over weights that do not change.
    Inference(Inference, Features),
    /// Kernels for the CPU, over weights that are trained.
    Training(Training, Features),
    /// candle's operations.
    Eager(Eager),
    /// Kernels for a GPU, over weights that do not change; those of features are among them.
    #[cfg(feature = "cuda")]
    Gpu(crate::gpu::Program),
    /// Kernels for a GPU, over weights that are trained; what time and condition come to is worked out in f32.
    #[cfg(feature = "cuda")]
    GpuTraining(crate::gpu::Training, Eager),
}

impl Compiled {
    /// From weights that fit the graph, converted to `dtype` on `device`.
    ///
    /// On the CPU, bf16 is what products take and what is kept between operations, where the processor
    /// multiplies it; such a network still takes and gives f32, and so says [`Compiled::dtype`].
    ///
    /// Where a weight tracks gradients (a [`candle_core::Var`]), the network has gradients with respect
    /// to its weights, its input and its condition, and a later `Var::set` is seen by the network
    /// ([`Compiled::follows`]); such weights should already be on `device` and of `dtype`, or, on a GPU, f32,
    /// since a converted copy would not follow. In f32 on the CPU, and on a GPU in f32, bf16 and f16, the network
    /// is compiled then too, and each evaluation keeps its intermediate results until its gradient is taken, which
    /// can be done once, or until it is dropped. Norms, and the frequencies of a Fourier time embedding, are kept
    /// in f32.
    ///
    /// # Errors
    /// Those of weights that cannot be read; [`crate::Error::Value`] for bf16 on a CPU that does not multiply it.
    pub(crate) fn new(
        graph: Graph,
        weights: HashMap<String, Weight>,
        dtype: DType,
        device: &Device,
    ) -> crate::Result<Self> {
        Self::in_mode(graph, weights, dtype, device, Mode::Plain)
    }

    /// The same in f32 on the CPU, with weights that stay as they are, in a mode.
    ///
    /// # Errors
    /// As [`Compiled::new`]; [`crate::Error::Weights`] for weights that are not what their codes say.
    pub(crate) fn in_mode(
        graph: Graph,
        weights: HashMap<String, Weight>,
        dtype: DType,
        device: &Device,
        mode: Mode,
    ) -> crate::Result<Self> {
        // The compiled network packs its weights from f32, whatever its products are of.
        let (dtype, element) = match dtype {
            DType::BF16 if device.is_cpu() && !weights.values().any(Weight::trained) => {
                (DType::F32, bf16()?)
            }
            other => (other, ElementType::F32),
        };
        let weights = Weights::new(weights, dtype, device);
        let (patch, parameters, (_, divided)) = (graph.patch, weights.parameters(), graph.answer());
        let timed = divided || mode.timed();
        let body = Body::new(graph, &weights, element, mode)?;
        Ok(Self { body, patch, timed, dtype, device: device.clone(), parameters })
    }

    /// The same operations over maps of other sizes, by a graph that records them; the weights are shared.
    ///
    /// # Errors
    /// [`Error::Value`] for a network that is trained, or compiled for a GPU.
    pub(crate) fn at(&self, graph: Graph) -> crate::Result<Self> {
        let body = match &self.body {
            Body::Inference(network, features) => {
                Body::Inference(network.at(&graph)?, features.at(&graph))
            }
            Body::Eager(network) => Body::Eager(network.at(graph, &self.device)?),
            _ => {
                let remedy = "a network that is trained, or runs on a GPU by kernels, has one size; load it anew";
                return Err(Error::value("size", "another", remedy));
            }
        };
        Ok(Self { body, device: self.device.clone(), ..*self })
    }

    /// Has evaluations of one size done the same way in every process from now on.
    #[cfg(feature = "cuda")]
    pub(crate) fn pin(&mut self) {
        if let Body::Gpu(program) = &mut self.body {
            program.pin();
        }
    }

    /// Whether it sees later changes of the variables that it was made of.
    pub(crate) fn follows(&self) -> bool {
        #[cfg(feature = "cuda")]
        if matches!(self.body, Body::GpuTraining(..)) {
            return true;
        }
        self.dtype == DType::F32
    }

    /// The last answer of one evaluation, as [`Compiled::answers`].
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        timesteps: Option<&Tensor>,
        conditions: Conditions,
    ) -> Result<Tensor> {
        match self.answers(x, timesteps, conditions)?.pop() {
            Some(answer) => Ok(answer),
            None => bail!("the network has no answer"),
        }
    }

    /// All answers of one evaluation of `x` `[B, channels, height, width]`, in [`Compiled::dtype`], or of the numbers of
    /// tokens, u32 `[B, tokens]`; `timesteps` f32 `[B]` are the times, for a network that takes them.
    pub(crate) fn answers(
        &self,
        x: &Tensor,
        timesteps: Option<&Tensor>,
        conditions: Conditions,
    ) -> Result<Vec<Tensor>> {
        let x = patches::cut(x, self.patch)?;
        let nothing = Tensor::zeros((x.dim(0)?, 0), DType::F32, &self.device)?;
        let times = timesteps.unwrap_or(&nothing);
        let answers = match &self.body {
            Body::Inference(network, features) => {
                let features = features.forward(times, conditions)?;
                let (time, prompt) = self.rest(times, conditions, &nothing)?;
                // Numbers of tokens are floats there.
                network.forward([&x.to_dtype(DType::F32)?, &features, time, &prompt])?
            }
            Body::Training(network, features) => {
                let features = features.forward(times, conditions)?;
                let (time, prompt) = self.rest(times, conditions, &nothing)?;
                vec![network.forward([&x, &features, time, &prompt])?]
            }
            Body::Eager(network) => network.forward(&x, times, conditions)?,
            #[cfg(feature = "cuda")]
            Body::Gpu(program) => vec![program.forward(&x, times, conditions.condition)?],
            #[cfg(feature = "cuda")]
            Body::GpuTraining(network, embedding) => {
                let embedding = embedding.forward(&x, times, conditions)?;
                let embedding = embedding[0].flatten_from(1)?;
                vec![network.forward([&x, &embedding, times])?]
            }
        };
        answers.iter().map(|answer| patches::join(answer, self.patch)).collect()
    }

    /// Whether an evaluation can be done a stretch at a time.
    pub(crate) fn stretches(&self) -> bool {
        matches!(self.body, Body::Inference(..))
    }

    /// As [`Compiled::forward`] of a network that takes neither time nor conditions, to be done in so many stretches.
    ///
    /// # Errors
    /// Those of [`Compiled::forward`], and where a network has no stretches.
    pub(crate) fn begin(&self, x: &Tensor, stretches: usize) -> Result<Unfinished> {
        let Body::Inference(network, features) = &self.body else {
            bail!("the network is evaluated as a whole")
        };
        let x = patches::cut(x, self.patch)?.to_dtype(DType::F32)?;
        let nothing = Tensor::zeros((x.dim(0)?, 0), DType::F32, &self.device)?;
        let features = features.forward(&nothing, Conditions::default())?;
        network.begin([&x, &features, &nothing, &nothing], stretches)
    }

    /// Does the next stretch; the answer after the last one.
    ///
    /// # Errors
    /// As [`Compiled::begin`].
    pub(crate) fn go_on(&self, unfinished: &mut Unfinished) -> Result<Option<Tensor>> {
        let Body::Inference(network, _) = &self.body else {
            bail!("the network is evaluated as a whole")
        };
        let answers = network.go_on(unfinished)?.and_then(|mut answers| answers.pop());
        answers.map(|answer| patches::join(&answer, self.patch)).transpose()
    }

    /// The inputs of a compiled network beside samples and features: times, where it divides by them, and prompts with
    /// their channels first.
    fn rest<'a>(
        &self,
        times: &'a Tensor,
        conditions: Conditions,
        nothing: &'a Tensor,
    ) -> Result<(&'a Tensor, Tensor)> {
        let time = if self.timed { times } else { nothing };
        let prompt = match conditions.prompt {
            Some(states) => states.transpose(1, 2)?.contiguous()?,
            None => nothing.clone(),
        };
        Ok((time, prompt))
    }

    /// The same evaluation, kernel by kernel; nothing where it is not compiled into kernels.
    pub(crate) fn profile(
        &self,
        x: &Tensor,
        timesteps: Option<&Tensor>,
        conditions: Conditions,
    ) -> Result<Vec<Timing>> {
        let x = patches::cut(x, self.patch)?;
        let nothing = Tensor::zeros((x.dim(0)?, 0), DType::F32, &self.device)?;
        let times = timesteps.unwrap_or(&nothing);
        let (time, prompt) = self.rest(times, conditions, &nothing)?;
        match &self.body {
            Body::Inference(network, features) => {
                network.profile([&x, &features.forward(times, conditions)?, time, &prompt])
            }
            Body::Training(network, features) => {
                network.profile([&x, &features.forward(times, conditions)?, time, &prompt])
            }
            _ => Ok(Vec::new()),
        }
    }

    /// What it keeps in memory; nothing where it is not compiled into kernels.
    pub(crate) fn footprint(&self) -> Option<Footprint> {
        let (mut footprint, features) = match &self.body {
            Body::Inference(network, features) => (network.footprint(), features),
            Body::Training(network, features) => (network.footprint(), features),
            _ => return None,
        };
        footprint.weight_bytes += features.weight_bytes();
        Some(footprint)
    }

    /// The element type of what it takes and gives.
    pub(crate) fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the weights live.
    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    /// Number of weights.
    pub(crate) fn parameters(&self) -> usize {
        self.parameters
    }
}

impl Body {
    fn new(
        graph: Graph,
        weights: &Weights,
        element: ElementType,
        mode: Mode,
    ) -> crate::Result<Self> {
        #[cfg(feature = "cuda")]
        match crate::gpu::compiles(&graph, weights) {
            true if !weights.trained() => {
                return Ok(Self::Gpu(crate::gpu::Program::new(&graph, weights)?));
            }
            true if crate::gpu::trains(&graph) => {
                if let Some([embedding, rest]) = graph.split() {
                    let embedding = Eager::new(embedding, weights, DType::F32)?;
                    let training = crate::gpu::Training::new(&rest, weights)?;
                    return Ok(Self::GpuTraining(training, embedding));
                }
            }
            _ => {}
        }
        if weights.dtype() != DType::F32 || !weights.device().is_cpu() {
            return Ok(Self::Eager(Eager::new(graph, weights, weights.dtype())?));
        }
        let features = Features::new(&graph, weights)?;
        if weights.trained() && !graph.has_gradients() {
            return Ok(Self::Eager(Eager::new(graph, weights, weights.dtype())?));
        }
        Ok(if weights.trained() {
            Self::Training(Training::new(&graph, weights, Isa::detect())?, features)
        } else {
            let isa = Isa::detect();
            Self::Inference(Inference::new(&graph, weights, isa, element, mode)?, features)
        })
    }
}

/// bf16, where this processor multiplies it.
fn bf16() -> crate::Result<ElementType> {
    if Isa::detect().multiplies_bf16() {
        return Ok(ElementType::Bf16);
    }
    let remedy = "this processor does not multiply bf16 (AVX512-BF16); use f32";
    Err(Error::value("dtype", "bf16", remedy))
}
