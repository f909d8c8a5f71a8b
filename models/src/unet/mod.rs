//! The U-Net of denoising diffusion models: diffusers' `UNet2DModel`.
//!
//! Ho et al., *Denoising Diffusion Probabilistic Models* (2020), after Ronneberger et al. (2015);
//! the scale-shift norms and resampling residual blocks are those of Dhariwal & Nichol, *Diffusion
//! Models Beat GANs on Image Synthesis* (2021). Weight names and configuration are diffusers'.

mod attention;
mod blocks;
mod channels;
mod config;
mod convolution;
mod embeddings;
pub(crate) mod fields;
mod layers;
mod plan;
mod resnet;
pub(crate) mod weights;

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Device, Tensor, bail};

use crate::kernels::{Footprint, Isa, Numbers, Timing};
use crate::weight::{Weight, here};
use crate::{Conditioning, Denoiser, Geometry, Result};
use blocks::{DownBlock, MidBlock, UpBlock};
pub use config::UNet2DConfig;
use config::{Activation, TimeEmbedding};
use embeddings::Embedding;
use layers::{Conv2d, GroupNorm, working};
use plan::{Plan, Training};
use weights::Weights;

/// A U-Net that answers for a batch of samples, each at a time of its own.
pub struct UNet2DModel {
    embedding: Embedding,
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
    /// to its weights, its input and its condition, and a later `Var::set` is seen by the network; such
    /// weights should already be of `dtype` and on `device`, since a converted copy would not follow. In
    /// f32 on the CPU the network is compiled then too, and each evaluation keeps its intermediate
    /// results until its gradient is taken, which can be done once, or until it is dropped. Norms, and
    /// the frequencies of a Fourier time embedding, are kept in f32.
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
        weights::build(config, weights, dtype, device)
    }

    /// The weights under today's names, checked to be exactly those the network needs.
    ///
    /// # Errors
    /// As [`UNet2DModel::load`].
    pub(crate) fn fit(
        config: &UNet2DConfig,
        weights: HashMap<String, Weight>,
    ) -> Result<HashMap<String, Weight>> {
        weights::fit(config, weights)
    }

    /// Names and shapes of all weights, without a tensor.
    pub fn weight_shapes(config: &UNet2DConfig) -> Result<BTreeMap<String, Vec<usize>>> {
        weights::shapes(config)
    }

    fn build(config: &UNet2DConfig, weights: &Weights, numbers: Numbers) -> Result<Self> {
        let (dtype, device) = (weights.dtype(), weights.device());
        // Where weights may be merged they do not change either, so they may be packed as well.
        let compiled = dtype == DType::F32 && device.is_cpu();
        let body = if compiled && weights.may_merge() {
            Body::Plan(Plan::new(config, weights, Isa::detect(), numbers)?)
        } else if compiled && weights.trained() {
            Body::Training(Training::new(config, weights, Isa::detect())?)
        } else {
            Body::Layers(Box::new(Layers::new(config, weights)?))
        };
        Ok(Self {
            embedding: Embedding::new(config, weights, dtype, device)?,
            body,
            activation: config.activation,
            geometry: config.geometry(),
            dtype,
            device: device.clone(),
            parameters: weights.parameters(),
        })
    }

    /// Refuses inputs of the wrong shape or type, so that a mistake is named where it is made.
    fn check(
        &self,
        x: &Tensor,
        timesteps: &Tensor,
        condition: Option<&Tensor>,
    ) -> candle_core::Result<()> {
        let Geometry { in_channels, height, width, conditioning, .. } = self.geometry;
        let batch = x.dims().first().copied().unwrap_or(0);
        if batch == 0 || x.dims() != [batch, in_channels, height, width] || x.dtype() != self.dtype
        {
            bail!(
                "x is {:?} {:?}, not {:?} [B, {in_channels}, {height}, {width}] with B ≥ 1",
                x.dtype(),
                x.dims(),
                self.dtype
            )
        }
        if timesteps.dims() != [batch] || timesteps.dtype() != DType::F32 {
            bail!("timesteps are {:?} {:?}, not F32 [{batch}]", timesteps.dtype(), timesteps.dims())
        }
        let expected = match conditioning {
            Conditioning::None => None,
            Conditioning::Classes(_) => Some((DType::U32, vec![batch])),
            Conditioning::Timestep => Some((DType::F32, vec![batch])),
            Conditioning::Embedding(width) => Some((DType::F32, vec![batch, width])),
        };
        let found = condition.map(|condition| (condition.dtype(), condition.dims().to_vec()));
        if expected != found {
            bail!("the condition is {found:?}, not {expected:?}")
        }
        Ok(())
    }
}

impl Denoiser for UNet2DModel {
    fn forward(
        &self,
        x: &Tensor,
        timesteps: &Tensor,
        condition: Option<&Tensor>,
    ) -> candle_core::Result<Tensor> {
        self.check(x, timesteps, condition)?;
        // Every residual block begins its use of the embedding with the same activation.
        let time = self.activation.forward(&self.embedding.forward(timesteps, condition)?)?;

        match &self.body {
            Body::Layers(layers) => layers.forward(x, &time, timesteps),
            Body::Plan(plan) => plan.forward(x, &time, timesteps),
            Body::Training(plan) => plan.forward(x, &time, timesteps),
        }
    }

    fn profile(
        &self,
        x: &Tensor,
        timesteps: &Tensor,
        condition: Option<&Tensor>,
    ) -> candle_core::Result<Vec<Timing>> {
        self.check(x, timesteps, condition)?;
        let time = self.activation.forward(&self.embedding.forward(timesteps, condition)?)?;
        match &self.body {
            Body::Layers(_) => Ok(Vec::new()),
            Body::Plan(plan) => plan.profile(x, &time, timesteps),
            Body::Training(plan) => plan.profile(x, &time, timesteps),
        }
    }

    fn footprint(&self) -> Option<Footprint> {
        let mut footprint = match &self.body {
            Body::Layers(_) => return None,
            Body::Plan(plan) => plan.footprint(),
            Body::Training(plan) => plan.footprint(),
        };
        footprint.weight_bytes += self.embedding.weight_bytes();
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
        let x = self.conv_out.forward(&Activation::Silu.forward(&self.norm_out.forward(&x)?)?)?;

        if self.divide_by_time {
            // Time is a noise level here, and the answer a score.
            let sigma = timesteps.to_dtype(working(x.dtype()))?.reshape(((), 1, 1, 1))?;
            return x.to_dtype(sigma.dtype())?.broadcast_div(&sigma)?.to_dtype(x.dtype());
        }
        Ok(x)
    }
}
