//! The residual block: `ResnetBlock2D` of diffusers, `ResBlock` of Dhariwal & Nichol (2021).

use candle_core::{Result, Tensor};

use super::UNet2DConfig;
use super::config::Activation;
use super::group_norm::{GroupNorm, With};
use super::layers::{Conv2d, Pointwise, downsample_mean, upsample_nearest};
use crate::layers::Linear;
use crate::weights::Weights;

/// Whether a residual block changes the image's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Resize {
    /// It does not.
    Keep,
    /// Twice the size, by repetition.
    Up,
    /// Half the size, by averaging.
    Down,
}

/// Norm, activation, convolution, twice, with the time embedding in between and a way around.
pub(super) struct ResnetBlock {
    norm1: GroupNorm,
    conv1: Conv2d,
    time: Linear,
    norm2: GroupNorm,
    conv2: Conv2d,
    shortcut: Option<Pointwise>,
    resize: Resize,
    scale_shift: bool,
    activation: Activation,
    output_scale: f64,
}

impl ResnetBlock {
    /// From `input` to `output` channels; the result is divided by `output_scale`.
    pub(super) fn new(
        config: &UNet2DConfig,
        weights: &Weights,
        (input, output): (usize, usize),
        resize: Resize,
        output_scale: f64,
    ) -> crate::Result<Self> {
        let norm = |name, channels| {
            GroupNorm::new(&weights.at(name), channels, config.norm_num_groups, config.norm_eps)
        };
        let time_output = if config.scale_shift { 2 * output } else { output };
        let shortcut = if input == output {
            None
        } else {
            Some(Pointwise::convolution(&weights.at("conv_shortcut"), input, output)?)
        };
        Ok(Self {
            norm1: norm("norm1", input)?,
            conv1: Conv2d::same(&weights.at("conv1"), input, output)?,
            time: Linear::new(&weights.at("time_emb_proj"), config.time_width(), time_output)?,
            norm2: norm("norm2", output)?,
            conv2: Conv2d::same(&weights.at("conv2"), output, output)?,
            shortcut,
            resize,
            scale_shift: config.scale_shift,
            activation: config.activation,
            output_scale,
        })
    }

    /// `x` `[B, input, H, W]`, `time` `[B, time width]`, already through the activation →
    /// `[B, output, H', W']`.
    pub(super) fn forward(&self, x: &Tensor, time: &Tensor) -> Result<Tensor> {
        let h = self.norm1.forward(x, With::activation(self.activation))?;
        let (x, h) = match self.resize {
            Resize::Keep => (x.clone(), h),
            Resize::Up => (upsample_nearest(x)?, upsample_nearest(&h)?),
            Resize::Down => (downsample_mean(x)?, downsample_mean(&h)?),
        };
        let time = self.time.forward(time)?;
        let h = self.conv1.without_bias(&h)?;
        let (bias, activation) = (self.conv1.bias(), Some(self.activation));
        let h = if self.scale_shift {
            let offset = bias.unsqueeze(0)?.broadcast_as((h.dim(0)?, h.dim(1)?))?;
            let with = With { offset: Some(&offset), modulation: Some(&time), activation };
            self.norm2.forward(&h, with)?
        } else {
            let offset = time.broadcast_add(bias)?;
            self.norm2.forward(&h, With { offset: Some(&offset), modulation: None, activation })?
        };
        let h = self.conv2.forward(&h)?;
        let around = match &self.shortcut {
            None => x,
            Some(shortcut) => shortcut.forward(&x.flatten_from(2)?)?.reshape(h.shape())?,
        };
        rescale((around + h)?, self.output_scale)
    }
}

/// `x / scale`, and no pass over `x` where that changes nothing.
pub(super) fn rescale(x: Tensor, scale: f64) -> Result<Tensor> {
    if scale == 1.0 { Ok(x) } else { x / scale }
}
