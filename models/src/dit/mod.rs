//! The diffusion transformer: diffusers' `DiTTransformer2DModel`.
//!
//! Peebles & Xie, *Scalable Diffusion Models with Transformers* (2023): a vision transformer over
//! patches of the image, told time and class by the scales, shifts and gates of its norms
//! (adaLN-Zero). Weight names and configuration are diffusers'.

mod blocks;
mod condition;
mod config;
mod initial;
mod layers;
mod patches;
mod plan;

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};

use crate::kernels::{Footprint, Isa, Timing};
use crate::plan::{Plan, Training};
use crate::weight::Weight;
use crate::weights::{self, Shapes, Weights};
use crate::{Denoiser, Error, Geometry, Result};
use blocks::Layers;
use condition::Condition;
pub use config::DiTConfig;
use patches::Patches;
use plan::Tables;

/// A transformer that answers for a batch of samples, each at a time of its own.
pub struct DiTTransformer2DModel {
    patches: Patches,
    body: Body,
    geometry: Geometry,
    dtype: DType,
    device: Device,
    parameters: usize,
}

/// From patches to patches.
enum Body {
    /// Operations that have a gradient and run on any device.
    Layers(Box<Layers>),
    /// Kernels for the CPU, over weights that do not change.
    Plan(Plan, Tables),
    /// Kernels for the CPU, over weights that are trained.
    Training(Training, Tables),
    /// Kernels for a GPU, over weights that do not change.
    #[cfg(feature = "cuda")]
    Gpu(crate::gpu::Program, Tables),
}

impl Body {
    fn new(config: &DiTConfig, weights: &Weights) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if crate::gpu::compiles(weights) && weights.may_merge() {
            let program = plan::compile_for_gpu(config, weights)?;
            return Ok(Self::Gpu(program, Tables::new(config, weights)?));
        }
        let (compiled, isa) =
            (weights.dtype() == DType::F32 && weights.device().is_cpu(), Isa::detect());
        Ok(if compiled && weights.may_merge() {
            Self::Plan(plan::compile(config, weights, isa)?, Tables::new(config, weights)?)
        } else if compiled && weights.trained() {
            let plan = plan::compile_trained(config, weights, isa)?;
            Self::Training(plan, Tables::new(config, weights)?)
        } else {
            Self::Layers(Box::new(Layers::new(config, weights)?))
        })
    }
}

impl DiTTransformer2DModel {
    /// Builds the network from its weights, named as in diffusers, converted to `dtype` on `device`.
    ///
    /// Where a weight tracks gradients (a [`candle_core::Var`]), the network has gradients with respect
    /// to its weights and its input, and a later `Var::set` is seen by the network; such weights should
    /// already be of `dtype` and on `device`, since a converted copy would not follow. In f32 on the CPU the
    /// network is compiled then too, as the U-Net is, and an evaluation's gradient can be taken once.
    ///
    /// # Errors
    /// [`Error::Weights`] naming what is missing, what does not belong, and what has another
    /// shape (up to eight of each); [`Error::Value`] for bf16 on a CPU.
    pub(crate) fn load(
        config: &DiTConfig,
        weights: HashMap<String, Weight>,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        if dtype == DType::BF16 && device.is_cpu() {
            let remedy = "a DiT runs in f32 on a CPU; use f32";
            return Err(Error::value("dtype", "bf16", remedy));
        }
        let weights = Self::fit(config, weights)?;
        weights::build(weights, dtype, device, |weights| Self::build(config, weights))
    }

    /// The weights, checked to be exactly those the network needs.
    ///
    /// # Errors
    /// As [`DiTTransformer2DModel::load`].
    pub(crate) fn fit(
        config: &DiTConfig,
        weights: HashMap<String, Weight>,
    ) -> Result<HashMap<String, Weight>> {
        weights::fit(&Self::weight_shapes(config)?, weights)
    }

    /// Names and shapes of all weights, without a tensor.
    pub(crate) fn weight_shapes(config: &DiTConfig) -> Result<Shapes> {
        weights::shapes(|weights| Self::build(config, weights))
    }

    fn build(config: &DiTConfig, weights: &Weights) -> Result<Self> {
        Ok(Self {
            patches: Patches::new(config),
            body: Body::new(config, weights)?,
            geometry: config.geometry(),
            dtype: weights.dtype(),
            device: weights.device().clone(),
            parameters: weights.parameters(),
        })
    }
}

impl Denoiser for DiTTransformer2DModel {
    fn forward(
        &self,
        x: &Tensor,
        timesteps: &Tensor,
        condition: Option<&Tensor>,
    ) -> candle_core::Result<Tensor> {
        self.geometry.check(self.dtype, x, timesteps, condition)?;
        let condition = Condition::new(timesteps, condition, self.dtype)?;
        let patches = self.patches.cut(x)?;
        let y = match &self.body {
            Body::Layers(layers) => layers.forward(&patches, &condition)?,
            Body::Plan(plan, tables) => {
                plan.forward([&patches, &tables.rows(&condition)?, &condition.phases])?
            }
            Body::Training(plan, tables) => {
                plan.forward([&patches, &tables.rows(&condition)?, &condition.phases])?
            }
            #[cfg(feature = "cuda")]
            Body::Gpu(program, tables) => {
                program.forward([&patches, &tables.rows(&condition)?, &condition.phases])?
            }
        };
        self.patches.join(&y)
    }

    fn profile(
        &self,
        x: &Tensor,
        timesteps: &Tensor,
        condition: Option<&Tensor>,
    ) -> candle_core::Result<Vec<Timing>> {
        self.geometry.check(self.dtype, x, timesteps, condition)?;
        let condition = Condition::new(timesteps, condition, self.dtype)?;
        let patches = self.patches.cut(x)?;
        match &self.body {
            Body::Layers(_) => Ok(Vec::new()),
            Body::Plan(plan, tables) => {
                plan.profile([&patches, &tables.rows(&condition)?, &condition.phases])
            }
            Body::Training(plan, tables) => {
                plan.profile([&patches, &tables.rows(&condition)?, &condition.phases])
            }
            #[cfg(feature = "cuda")]
            Body::Gpu(..) => Ok(Vec::new()),
        }
    }

    fn footprint(&self) -> Option<Footprint> {
        let (mut footprint, tables) = match &self.body {
            Body::Layers(_) => return None,
            Body::Plan(plan, tables) => (plan.footprint(), tables),
            Body::Training(plan, tables) => (plan.footprint(), tables),
            #[cfg(feature = "cuda")]
            Body::Gpu(..) => return None,
        };
        footprint.weight_bytes += tables.weight_bytes();
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
