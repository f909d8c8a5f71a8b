//! One resolution of the network, on the way down, at the bottom, and on the way up.

use candle_core::{Result, Tensor, bail};

use super::UNet2DConfig;
use super::attention::Attention;
use super::config::{Block, Resample};
use super::layers::{Conv2d, upsample_nearest};
use super::resnet::{Resize, ResnetBlock};
use crate::weights::Weights;

/// A residual block and the attention that may follow it.
struct Layer {
    resnet: ResnetBlock,
    attention: Option<Attention>,
}

impl Layer {
    fn new(
        config: &UNet2DConfig,
        weights: &Weights,
        index: usize,
        (input, output): (usize, usize),
        attends: bool,
    ) -> crate::Result<Self> {
        let place = weights.at(format_args!("resnets.{index}"));
        let resnet = ResnetBlock::new(config, &place, (input, output), Resize::Keep, 1.0)?;
        let attention = if attends {
            let place = weights.at(format_args!("attentions.{index}"));
            Some(Attention::new(config, &place, output, Some(config.norm_num_groups), 1.0)?)
        } else {
            None
        };
        Ok(Self { resnet, attention })
    }

    fn forward(&self, x: &Tensor, time: &Tensor) -> Result<Tensor> {
        let x = self.resnet.forward(x, time)?;
        match &self.attention {
            None => Ok(x),
            Some(attention) => attention.forward(&x),
        }
    }
}

/// What ends a block that is not the last.
enum Resampler {
    None,
    /// Half the size by a strided convolution, which may see one more row and column of zeros at
    /// the lower right only (the original DDPM, from TensorFlow's padding) instead of all around.
    ConvDown {
        conv: Conv2d,
        lower_right: bool,
    },
    /// Twice the size by repetition, then a convolution.
    ConvUp(Conv2d),
    Resnet(ResnetBlock),
}

impl Resampler {
    fn new(
        config: &UNet2DConfig,
        weights: &Weights,
        channels: usize,
        block: Block,
        resize: Resize,
    ) -> crate::Result<Self> {
        let place = match resize {
            Resize::Keep => return Ok(Self::None),
            Resize::Down => weights.at("downsamplers.0"),
            Resize::Up => weights.at("upsamplers.0"),
        };
        let by = match (block, resize) {
            (Block::Plain, _) => Resample::Conv,
            (Block::Resnet, _) => Resample::Resnet,
            (Block::Attention, Resize::Up) => config.upsample,
            (Block::Attention, _) => config.downsample,
        };
        Ok(match (by, resize) {
            (Resample::Resnet, _) => {
                Self::Resnet(ResnetBlock::new(config, &place, (channels, channels), resize, 1.0)?)
            }
            (Resample::Conv, Resize::Up) => {
                Self::ConvUp(Conv2d::same(&place.at("conv"), channels, channels)?)
            }
            (Resample::Conv, _) => {
                let padding = config.downsample_padding;
                let conv = Conv2d::new(&place.at("conv"), channels, channels, 2, padding)?;
                Self::ConvDown { conv, lower_right: padding == 0 }
            }
        })
    }

    fn forward(&self, x: Tensor, time: &Tensor) -> Result<Tensor> {
        match self {
            Self::None => Ok(x),
            Self::ConvDown { conv, lower_right: false } => conv.forward(&x),
            Self::ConvDown { conv, lower_right: true } => {
                conv.forward(&x.pad_with_zeros(2, 0, 1)?.pad_with_zeros(3, 0, 1)?)
            }
            Self::ConvUp(conv) => conv.forward(&upsample_nearest(&x)?),
            Self::Resnet(resnet) => resnet.forward(&x, time),
        }
    }
}

/// A resolution on the way down.
pub(super) struct DownBlock {
    layers: Vec<Layer>,
    resampler: Resampler,
}

impl DownBlock {
    /// Block `level`, counted from the top.
    pub(super) fn new(
        config: &UNet2DConfig,
        weights: &Weights,
        level: usize,
    ) -> crate::Result<Self> {
        let (block, output) = (config.down_blocks[level], config.channels[level]);
        let mut input = config.channels[level.saturating_sub(1)];
        let mut layers = Vec::with_capacity(config.layers_per_block);
        for index in 0..config.layers_per_block {
            let attends = block == Block::Attention;
            layers.push(Layer::new(config, weights, index, (input, output), attends)?);
            input = output;
        }
        let last = level + 1 == config.levels();
        let resize = if last { Resize::Keep } else { Resize::Down };
        Ok(Self { layers, resampler: Resampler::new(config, weights, output, block, resize)? })
    }

    /// Runs the block and pushes every intermediate result onto `skips`.
    pub(super) fn forward(
        &self,
        mut x: Tensor,
        time: &Tensor,
        skips: &mut Vec<Tensor>,
    ) -> Result<Tensor> {
        for layer in &self.layers {
            x = layer.forward(&x, time)?;
            skips.push(x.clone());
        }
        if !matches!(self.resampler, Resampler::None) {
            x = self.resampler.forward(x, time)?;
            skips.push(x.clone());
        }
        Ok(x)
    }
}

/// The bottom: a residual block, attention, and another residual block.
pub(super) struct MidBlock {
    first: ResnetBlock,
    attention: Option<Attention>,
    second: ResnetBlock,
}

impl MidBlock {
    pub(super) fn new(config: &UNet2DConfig, weights: &Weights) -> crate::Result<Self> {
        let channels = config.channels[config.levels() - 1];
        let scale = config.mid_block_scale_factor;
        let resnet = |name| {
            let (place, width) = (weights.at(name), (channels, channels));
            ResnetBlock::new(config, &place, width, Resize::Keep, scale)
        };
        // Without a number of its own the mid block's attention is normalised as the residual blocks
        // are, except beside scale-shift norms, where it is not normalised at all.
        let groups = config
            .attn_norm_num_groups
            .or_else(|| (!config.scale_shift).then_some(config.norm_num_groups));
        let attention = if config.add_attention {
            Some(Attention::new(config, &weights.at("attentions.0"), channels, groups, scale)?)
        } else {
            None
        };
        Ok(Self { first: resnet("resnets.0")?, attention, second: resnet("resnets.1")? })
    }

    /// `[B, C, H, W]` → the same shape.
    pub(super) fn forward(&self, x: &Tensor, time: &Tensor) -> Result<Tensor> {
        let mut x = self.first.forward(x, time)?;
        if let Some(attention) = &self.attention {
            x = attention.forward(&x)?;
        }
        self.second.forward(&x, time)
    }
}

/// A resolution on the way up.
pub(super) struct UpBlock {
    layers: Vec<Layer>,
    resampler: Resampler,
}

impl UpBlock {
    /// Block `index`, counted from the bottom.
    pub(super) fn new(
        config: &UNet2DConfig,
        weights: &Weights,
        index: usize,
    ) -> crate::Result<Self> {
        let level = config.levels() - 1 - index;
        let (block, output) = (config.up_blocks[index], config.channels[level]);
        // Below is where the block's input comes from; the last skip comes from the level above.
        let below = config.channels[(level + 1).min(config.levels() - 1)];
        let above = config.channels[level.saturating_sub(1)];
        let count = config.layers_per_block + 1;
        let mut layers = Vec::with_capacity(count);
        for i in 0..count {
            let input = if i == 0 { below } else { output };
            let skip = if i + 1 == count { above } else { output };
            let attends = block == Block::Attention;
            layers.push(Layer::new(config, weights, i, (input + skip, output), attends)?);
        }
        let resize = if level == 0 { Resize::Keep } else { Resize::Up };
        Ok(Self { layers, resampler: Resampler::new(config, weights, output, block, resize)? })
    }

    /// Runs the block, popping one of `skips` for each layer.
    pub(super) fn forward(
        &self,
        mut x: Tensor,
        time: &Tensor,
        skips: &mut Vec<Tensor>,
    ) -> Result<Tensor> {
        for layer in &self.layers {
            let Some(skip) = skips.pop() else {
                bail!("the way up has more layers than the way down")
            };
            x = layer.forward(&Tensor::cat(&[x, skip], 1)?, time)?;
        }
        self.resampler.forward(x, time)
    }
}
