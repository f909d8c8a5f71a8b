//! The U-Net of denoising diffusion models: diffusers' `UNet2DModel`.
//!
//! Ho et al., *Denoising Diffusion Probabilistic Models* (2020), after Ronneberger et al. (2015);
//! the scale-shift norms and resampling residual blocks are those of Dhariwal & Nichol, *Diffusion
//! Models Beat GANs on Image Synthesis* (2021). Weight names and configuration are diffusers'.

mod attention;
mod blocks;
mod channels;
mod config;
mod embeddings;
mod group_norm;
mod layers;
mod legacy;
mod plan;
mod resnet;

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};

use crate::kernels::{Footprint, Isa, Numbers, Timing};
use crate::layers::working;
use crate::plan::{Plan, Training};
use crate::weight::{Weight, here};
use crate::weights::{self, Shapes, Weights};
use crate::{Denoiser, Error, Geometry, Result};
use blocks::{DownBlock, MidBlock, UpBlock};
pub use config::UNet2DConfig;
use config::{Activation, TimeEmbedding};
use embeddings::Embedding;
use group_norm::{GroupNorm, With};
use layers::Conv2d;

/// A U-Net that answers for a batch of samples, each at a time of its own.
pub struct UNet2DModel {
    /// Of time and class, where the body has none of its own.
    embedding: Option<Embedding>,
    body: Body,
    activation: Activation,
    geometry: Geometry,
    dtype: DType,
    device: Device,
    parameters: usize,
}

/// All but the time embedding.
enum Body {
    /// Operations that have a gradient and run on any device.
    Layers(Box<Layers>),
    /// Kernels for the CPU, over weights that do not change.
    Plan(Plan),
    /// Kernels for the CPU, over weights that are trained.
    Training(Training),
    /// Kernels for a GPU, over weights that do not change, those of the time embedding among them.
    #[cfg(feature = "cuda")]
    Gpu(crate::gpu::Program),
    /// Kernels for a GPU, over weights that are trained.
    #[cfg(feature = "cuda")]
    GpuTraining(crate::gpu::Training),
}

impl Body {
    fn new(config: &UNet2DConfig, weights: &Weights, numbers: Numbers) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if crate::gpu::compiles(weights) {
            return Ok(if weights.trained() {
                Self::GpuTraining(plan::compile_trained_for_gpu(config, weights)?)
            } else {
                Self::Gpu(plan::compile_for_gpu(config, weights)?)
            });
        }
        // Where weights may be merged they do not change either, so they may be packed as well.
        let compiled = weights.dtype() == DType::F32 && weights.device().is_cpu();
        Ok(if compiled && weights.may_merge() {
            Self::Plan(plan::compile(config, weights, Isa::detect(), numbers)?)
        } else if compiled && weights.trained() {
            Self::Training(plan::compile_trained(config, weights, Isa::detect())?)
        } else {
            Self::Layers(Box::new(Layers::new(config, weights)?))
        })
    }
}

struct Layers {
    conv_in: Conv2d,
    down_blocks: Vec<DownBlock>,
    mid_block: Option<MidBlock>,
    up_blocks: Vec<UpBlock>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
    center_input: bool,
    divide_by_time: bool,
}

impl UNet2DModel {
    /// Builds the network from its weights, named as in diffusers (today's names or those from
    /// before 0.15), converted to `dtype` on `device`.
    ///
    /// On the CPU, bf16 is what products take and what is kept between layers, where the processor
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
    /// [`crate::Error::Weights`] naming what is missing, what does not belong, and what has another
    /// shape (up to eight of each); [`crate::Error::Value`] for bf16 on a CPU that does not multiply it.
    pub fn load(
        config: &UNet2DConfig,
        weights: HashMap<String, Tensor>,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        Self::load_weights(config, here(weights), dtype, device)
    }

    /// As [`UNet2DModel::load`], of weights that may be read only when their layer is built.
    pub(crate) fn load_weights(
        config: &UNet2DConfig,
        weights: HashMap<String, Weight>,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let weights = Self::fit(config, weights)?;
        // The compiled network packs its weights from f32, whatever its products are of.
        let (dtype, numbers) = match dtype {
            DType::BF16 if device.is_cpu() && !weights.values().any(Weight::trained) => {
                (DType::F32, bf16()?)
            }
            other => (other, Numbers::F32),
        };
        weights::build(weights, dtype, device, |weights| Self::build(config, weights, numbers))
    }

    /// The weights under today's names, checked to be exactly those the network needs.
    ///
    /// # Errors
    /// As [`UNet2DModel::load`].
    pub(crate) fn fit(
        config: &UNet2DConfig,
        mut weights: HashMap<String, Weight>,
    ) -> Result<HashMap<String, Weight>> {
        legacy::rename_attention(&mut weights);
        weights::fit(&Self::weight_shapes(config)?, weights)
    }

    /// Names and shapes of all weights, without a tensor.
    pub fn weight_shapes(config: &UNet2DConfig) -> Result<Shapes> {
        weights::shapes(|weights| Self::build(config, weights, Numbers::F32))
    }

    fn build(config: &UNet2DConfig, weights: &Weights, numbers: Numbers) -> Result<Self> {
        let (dtype, device) = (weights.dtype(), weights.device());
        let body = Body::new(config, weights, numbers)?;
        let embedding = match &body {
            #[cfg(feature = "cuda")]
            Body::Gpu(_) => None,
            // Weights that are trained stay as they are, so that what is made of them follows.
            #[cfg(feature = "cuda")]
            Body::GpuTraining(_) => {
                Some(Embedding::new(config, &weights.in_f32(), DType::F32, device)?)
            }
            _ => Some(Embedding::new(config, weights, dtype, device)?),
        };
        Ok(Self {
            embedding,
            body,
            activation: config.activation,
            geometry: config.geometry(),
            dtype,
            device: device.clone(),
            parameters: weights.parameters(),
        })
    }
}

impl UNet2DModel {
    /// What the body is told: the time embedding, or the condition where it has one of its own.
    fn told(&self, timesteps: &Tensor, condition: Option<&Tensor>) -> candle_core::Result<Tensor> {
        match &self.embedding {
            // Every residual block begins its use of the embedding with the same activation.
            Some(embedding) => self.activation.forward(&embedding.forward(timesteps, condition)?),
            None => Ok(condition.unwrap_or(timesteps).clone()),
        }
    }
}

/// bf16, where this processor multiplies it.
fn bf16() -> Result<Numbers> {
    if Isa::detect().multiplies_bf16() {
        return Ok(Numbers::Bf16);
    }
    let remedy = "this processor does not multiply bf16 (AVX512-BF16); use f32";
    Err(Error::value("dtype", "bf16", remedy))
}

impl Denoiser for UNet2DModel {
    #[cfg(feature = "cuda")]
    fn pin(&mut self) {
        if let Body::Gpu(program) = &mut self.body {
            program.pin();
        }
    }

    #[cfg(feature = "cuda")]
    fn follows(&self) -> bool {
        self.dtype == DType::F32 || matches!(self.body, Body::GpuTraining(_))
    }

    fn forward(
        &self,
        x: &Tensor,
        timesteps: &Tensor,
        condition: Option<&Tensor>,
    ) -> candle_core::Result<Tensor> {
        self.geometry.check(self.dtype, x, timesteps, condition)?;
        let told = self.told(timesteps, condition)?;
        match &self.body {
            Body::Layers(layers) => layers.forward(x, &told, timesteps),
            Body::Plan(plan) => plan.forward([x, &told, timesteps]),
            Body::Training(plan) => plan.forward([x, &told, timesteps]),
            #[cfg(feature = "cuda")]
            Body::Gpu(program) => program.forward([x, &told, timesteps]),
            #[cfg(feature = "cuda")]
            Body::GpuTraining(training) => training.forward([x, &told, timesteps]),
        }
    }

    fn profile(
        &self,
        x: &Tensor,
        timesteps: &Tensor,
        condition: Option<&Tensor>,
    ) -> candle_core::Result<Vec<Timing>> {
        self.geometry.check(self.dtype, x, timesteps, condition)?;
        let told = self.told(timesteps, condition)?;
        match &self.body {
            Body::Layers(_) => Ok(Vec::new()),
            Body::Plan(plan) => plan.profile([x, &told, timesteps]),
            Body::Training(plan) => plan.profile([x, &told, timesteps]),
            #[cfg(feature = "cuda")]
            Body::Gpu(_) | Body::GpuTraining(_) => Ok(Vec::new()),
        }
    }

    fn footprint(&self) -> Option<Footprint> {
        let mut footprint = match &self.body {
            Body::Layers(_) => return None,
            Body::Plan(plan) => plan.footprint(),
            Body::Training(plan) => plan.footprint(),
            #[cfg(feature = "cuda")]
            Body::Gpu(_) | Body::GpuTraining(_) => return None,
        };
        footprint.weight_bytes += self.embedding.as_ref().map_or(0, Embedding::weight_bytes);
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

impl Layers {
    fn new(config: &UNet2DConfig, weights: &Weights) -> Result<Self> {
        let top = config.channels[0];
        let levels = 0..config.levels();
        let (groups, eps) = (config.norm_num_groups, config.norm_eps);
        let down = |i| DownBlock::new(config, &weights.at(format_args!("down_blocks.{i}")), i);
        let up = |i| UpBlock::new(config, &weights.at(format_args!("up_blocks.{i}")), i);
        let mid_block = if config.mid_block {
            Some(MidBlock::new(config, &weights.at("mid_block"))?)
        } else {
            None
        };
        Ok(Self {
            conv_in: Conv2d::same(&weights.at("conv_in"), config.in_channels, top)?,
            down_blocks: levels.clone().map(down).collect::<Result<_>>()?,
            mid_block,
            up_blocks: levels.map(up).collect::<Result<_>>()?,
            norm_out: GroupNorm::new(&weights.at("conv_norm_out"), top, groups, eps)?,
            conv_out: Conv2d::same(&weights.at("conv_out"), top, config.out_channels)?,
            center_input: config.center_input_sample,
            divide_by_time: config.time_embedding == TimeEmbedding::Fourier,
        })
    }

    fn forward(
        &self,
        x: &Tensor,
        time: &Tensor,
        timesteps: &Tensor,
    ) -> candle_core::Result<Tensor> {
        let x = if self.center_input { x.affine(2.0, -1.0)? } else { x.clone() };
        let mut x = self.conv_in.forward(&x)?;
        let mut skips = vec![x.clone()];
        for block in &self.down_blocks {
            x = block.forward(x, time, &mut skips)?;
        }
        if let Some(block) = &self.mid_block {
            x = block.forward(&x, time)?;
        }
        for block in &self.up_blocks {
            x = block.forward(x, time, &mut skips)?;
        }
        let x = self
            .conv_out
            .forward(&self.norm_out.forward(&x, With::activation(Activation::Silu))?)?;

        if self.divide_by_time {
            // Time is a noise level here, and the answer a score.
            let sigma = timesteps.to_dtype(working(x.dtype()))?.reshape(((), 1, 1, 1))?;
            return x.to_dtype(sigma.dtype())?.broadcast_div(&sigma)?.to_dtype(x.dtype());
        }
        Ok(x)
    }
}
