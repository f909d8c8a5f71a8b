//! A network of whichever architecture, made of its graph and its weights.

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor};

use crate::cpu::{Inference, Training};
use crate::eager::Eager;
use crate::features::Features;
use crate::graph::{Graph, Op};
use crate::kernels::{ElementType, Footprint, Isa, Timing};
use crate::weight::Weight;
use crate::weights::Weights;
use crate::{Denoiser, Error, Geometry, patches};

/// A network that answers for a batch of samples, each at a time of its own.
pub(crate) struct Network {
    body: Body,
    /// Pixels of a patch's side.
    patch: usize,
    geometry: Geometry,
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

impl Network {
    /// From weights that fit the graph, converted to `dtype` on `device`.
    ///
    /// On the CPU, bf16 is what products take and what is kept between operations, where the processor
    /// multiplies it; such a network still takes and gives f32, and so says [`Denoiser::dtype`].
    ///
    /// Where a weight tracks gradients (a [`candle_core::Var`]), the network has gradients with respect
    /// to its weights, its input and its condition, and a later `Var::set` is seen by the network
    /// ([`Denoiser::follows`]); such weights should already be on `device` and of `dtype`, or, on a GPU, f32,
    /// since a converted copy would not follow. In f32 on the CPU, and on a GPU in f32, bf16 and f16, the network
    /// is compiled then too, and each evaluation keeps its intermediate results until its gradient is taken, which
    /// can be done once, or until it is dropped. Norms, and the frequencies of a Fourier time embedding, are kept
    /// in f32.
    ///
    /// # Errors
    /// Those of weights that cannot be read; [`crate::Error::Value`] for bf16 on a CPU that does not multiply it, or of
    /// an architecture that has no kernels for it.
    pub(crate) fn new(
        graph: Graph,
        geometry: Geometry,
        weights: HashMap<String, Weight>,
        dtype: DType,
        device: &Device,
    ) -> crate::Result<Self> {
        // The compiled network packs its weights from f32, whatever its products are of.
        let (dtype, element) = match dtype {
            DType::BF16 if device.is_cpu() && !weights.values().any(Weight::trained) => {
                (DType::F32, bf16(&graph)?)
            }
            other => (other, ElementType::F32),
        };
        let weights = Weights::new(weights, dtype, device);
        let (patch, parameters) = (graph.patch, weights.parameters());
        let body = Body::new(graph, &weights, element)?;
        Ok(Self { body, patch, geometry, dtype, device: device.clone(), parameters })
    }
}

impl Body {
    fn new(graph: Graph, weights: &Weights, element: ElementType) -> crate::Result<Self> {
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
        Ok(if weights.trained() {
            Self::Training(Training::new(&graph, weights, Isa::detect())?, features)
        } else {
            Self::Inference(Inference::new(&graph, weights, Isa::detect(), element)?, features)
        })
    }
}

/// bf16, where this processor multiplies it and every operation has kernels for it.
fn bf16(graph: &Graph) -> crate::Result<ElementType> {
    let tokens = |op: &Op| matches!(op, Op::Modulate { .. } | Op::Gate { .. } | Op::Geglu { .. });
    if graph.ops.iter().any(tokens) {
        let remedy = "this architecture runs in f32 on a CPU; use f32";
        return Err(Error::value("dtype", "bf16", remedy));
    }
    if Isa::detect().multiplies_bf16() {
        return Ok(ElementType::Bf16);
    }
    let remedy = "this processor does not multiply bf16 (AVX512-BF16); use f32";
    Err(Error::value("dtype", "bf16", remedy))
}

impl Denoiser for Network {
    #[cfg(feature = "cuda")]
    fn pin(&mut self) {
        if let Body::Gpu(program) = &mut self.body {
            program.pin();
        }
    }

    #[cfg(feature = "cuda")]
    fn follows(&self) -> bool {
        self.dtype == DType::F32 || matches!(self.body, Body::GpuTraining(..))
    }

    fn forward(
        &self,
        x: &Tensor,
        timesteps: &Tensor,
        condition: Option<&Tensor>,
    ) -> Result<Tensor> {
        self.geometry.check(self.dtype, x, timesteps, condition)?;
        let x = patches::cut(x, self.patch)?;
        let y = match &self.body {
            Body::Inference(network, features) => {
                network.forward([&x, &features.forward(timesteps, condition)?, timesteps])?
            }
            Body::Training(network, features) => {
                network.forward([&x, &features.forward(timesteps, condition)?, timesteps])?
            }
            Body::Eager(network) => network.forward(&x, timesteps, condition)?,
            #[cfg(feature = "cuda")]
            Body::Gpu(program) => program.forward(&x, timesteps, condition)?,
            #[cfg(feature = "cuda")]
            Body::GpuTraining(network, embedding) => {
                let embedding = embedding.forward(&x, timesteps, condition)?.flatten_from(1)?;
                network.forward([&x, &embedding, timesteps])?
            }
        };
        patches::join(&y, self.patch)
    }

    fn profile(
        &self,
        x: &Tensor,
        timesteps: &Tensor,
        condition: Option<&Tensor>,
    ) -> Result<Vec<Timing>> {
        self.geometry.check(self.dtype, x, timesteps, condition)?;
        let x = patches::cut(x, self.patch)?;
        match &self.body {
            Body::Inference(network, features) => {
                network.profile([&x, &features.forward(timesteps, condition)?, timesteps])
            }
            Body::Training(network, features) => {
                network.profile([&x, &features.forward(timesteps, condition)?, timesteps])
            }
            _ => Ok(Vec::new()),
        }
    }

    fn footprint(&self) -> Option<Footprint> {
        let (mut footprint, features) = match &self.body {
            Body::Inference(network, features) => (network.footprint(), features),
            Body::Training(network, features) => (network.footprint(), features),
            _ => return None,
        };
        footprint.weight_bytes += features.weight_bytes();
        Some(footprint)
    }

    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn parameters(&self) -> usize {
        self.parameters
    }
}
