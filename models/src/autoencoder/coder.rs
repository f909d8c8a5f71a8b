//! The two halves of `AutoencoderKL` and `VQModel`: residual blocks that halve an image, or double a latent, level by level.

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::activation::Activation;
use crate::blocks::{self, Resize, Style};
use crate::fields::Fields;
use crate::graph::{Epilogue, GraphBuilder, Map, Name};
use crate::kernels::{Function, Taps};

/// What a norm adds to a variance.
const EPS: f64 = 1e-6;
/// More levels would make a latent pixel of more than 2048 × 2048 pixels.
const LEVELS: usize = 12;
const CHANNELS: usize = 1 << 16;
const LAYERS: usize = 64;

/// A level of an encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Down {
    /// Residual blocks, then a convolution that halves the image, but for the last level.
    #[serde(rename = "DownEncoderBlock2D")]
    Plain,
}

/// A level of a decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Up {
    /// Residual blocks, then a convolution of the map at twice its size, but for the last level.
    #[serde(rename = "UpDecoderBlock2D")]
    Plain,
}

/// What both halves are told.
pub(super) struct Coder<'a> {
    /// Of each level, the one with the largest map first.
    pub(super) channels: &'a [usize],
    /// Residual blocks of a level of the encoder; the decoder's have one more.
    pub(super) layers: usize,
    pub(super) groups: usize,
    pub(super) activation: Activation,
    /// Whether the pixels of the smallest map attend to each other.
    pub(super) attends: bool,
}

impl Coder<'_> {
    /// Refuses what diffusers could not build.
    pub(super) fn check(&self, fields: &Fields, types: [usize; 2]) -> Result<()> {
        let levels = self.channels.len();
        if levels == 0 || levels > LEVELS {
            let remedy = format!("must have 1 to {LEVELS} entries");
            return Err(fields.refuse("block_out_channels", remedy));
        }
        for (name, found) in ["down_block_types", "up_block_types"].into_iter().zip(types) {
            if found != levels {
                let remedy = format!("must have as many entries as block_out_channels, {levels}");
                return Err(fields.refuse(name, remedy));
            }
        }
        fields.bounded("norm_num_groups", self.groups, CHANNELS)?;
        fields.bounded("layers_per_block", self.layers, LAYERS)?;
        for (i, &channels) in self.channels.iter().enumerate() {
            if channels == 0 || channels > CHANNELS || !channels.is_multiple_of(self.groups) {
                let groups = self.groups;
                let remedy = format!(
                    "must be a multiple of norm_num_groups, {groups}, of at most {CHANNELS}"
                );
                return Err(fields.refuse_entry("block_out_channels", i, remedy));
            }
        }
        Ok(())
    }

    /// Pixels of an image's side for each of a latent's.
    pub(super) fn factor(&self) -> usize {
        1 << (self.channels.len() - 1)
    }

    /// An image to `outputs` channels of latent pixels.
    pub(super) fn encode(&self, g: &mut GraphBuilder, image: Map, outputs: usize) -> Map {
        let root = Name::default().at("encoder");
        let mut x = convolve(g, &root.at("conv_in"), image, self.channels[0]);
        for (level, &channels) in self.channels.iter().enumerate() {
            let name = root.at(format_args!("down_blocks.{level}"));
            x = self.layers(g, &name, x, channels, self.layers);
            if level + 1 < self.channels.len() {
                // One row and column of zeros below and right.
                let taps = Taps { side: 3, stride: 2, padding: 0, doubled: false };
                let place = name.at("downsamplers.0.conv");
                x = g.convolve(&place, x, channels, taps, Epilogue::default());
            }
        }
        x = self.middle(g, &root.at("mid_block"), x);
        self.end(g, &root, x, outputs)
    }

    /// Latent pixels to an image of `outputs` channels.
    pub(super) fn decode(&self, g: &mut GraphBuilder, latent: Map, outputs: usize) -> Map {
        let root = Name::default().at("decoder");
        let deepest = self.channels[self.channels.len() - 1];
        let x = convolve(g, &root.at("conv_in"), latent, deepest);
        let mut x = self.middle(g, &root.at("mid_block"), x);
        for (index, &channels) in self.channels.iter().rev().enumerate() {
            let name = root.at(format_args!("up_blocks.{index}"));
            x = self.layers(g, &name, x, channels, self.layers + 1);
            if index + 1 < self.channels.len() {
                let taps = Taps { doubled: true, ..Taps::SAME };
                let place = name.at("upsamplers.0.conv");
                x = g.convolve(&place, x, channels, taps, Epilogue::default());
            }
        }
        self.end(g, &root, x, outputs)
    }

    fn style(&self) -> Style {
        Style { norm: (self.groups, EPS), function: self.activation.into(), time: None }
    }

    fn layers(
        &self,
        g: &mut GraphBuilder,
        name: &Name,
        mut x: Map,
        channels: usize,
        count: usize,
    ) -> Map {
        for index in 0..count {
            let place = name.at(format_args!("resnets.{index}"));
            x = blocks::resnet(g, &place, &[x], channels, self.style(), Resize::Keep, 1.0);
        }
        x
    }

    fn middle(&self, g: &mut GraphBuilder, name: &Name, x: Map) -> Map {
        let (channels, style) = (g.size(x).channels, self.style());
        let resnet = |g: &mut GraphBuilder, index: usize, x: Map| {
            let place = name.at(format_args!("resnets.{index}"));
            blocks::resnet(g, &place, &[x], channels, style, Resize::Keep, 1.0)
        };
        let mut x = resnet(g, 0, x);
        if self.attends {
            x = blocks::attention(g, &name.at("attentions.0"), x, 1, Some(style.norm), 1.0);
        }
        resnet(g, 1, x)
    }

    fn end(&self, g: &mut GraphBuilder, root: &Name, x: Map, outputs: usize) -> Map {
        let norm = (self.groups, EPS);
        let normed = g.group_norm(&root.at("conv_norm_out"), &[x], norm, None, Function::Silu);
        convolve(g, &root.at("conv_out"), normed, outputs)
    }
}

/// A 3×3 convolution that keeps the map's size.
fn convolve(g: &mut GraphBuilder, name: &Name, x: Map, channels: usize) -> Map {
    g.convolve(name, x, channels, Taps::SAME, Epilogue::default())
}

/// A convolution of one pixel.
pub(super) fn point(g: &mut GraphBuilder, name: &Name, x: Map, channels: usize) -> Map {
    let kernel = [channels, g.size(x).channels, 1, 1];
    g.kernel(name, &[x], &kernel, Epilogue::default())
}

/// Refuses channels of images and latents that are none, or so many that a mistake is likelier.
pub(super) fn bounded_channels(fields: &Fields, counts: [(&str, usize); 3]) -> Result<()> {
    counts.into_iter().try_for_each(|(name, count)| fields.bounded(name, count, CHANNELS))
}

/// Refuses a scale of latents by which nothing can be divided.
pub(super) fn check_scale(fields: &Fields, scale: f64, shift: f64) -> Result<()> {
    let usable = |x: f64| (x as f32).is_finite();
    if scale as f32 == 0.0 || !usable(scale) || !usable(1.0 / scale) {
        return Err(fields.refuse("scaling_factor", "must be a number that f32 holds, but not 0"));
    }
    if !usable(shift) {
        return Err(fields.refuse("shift_factor", "must be a number that f32 holds"));
    }
    Ok(())
}
