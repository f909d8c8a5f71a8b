//! `AutoencoderTiny` (TAESD, Bohan 2023): convolutions with ReLU, without norms and attention.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::coder::{bounded_channels, check_scale};
use super::{Half, Latents};
use crate::Result;
use crate::activation::Activation;
use crate::fields::{Fields, typed};
use crate::graph::{Epilogue, Graph, GraphBuilder, Map, Name, Size};
use crate::kernels::{Function, Taps};

const LEVELS: usize = 12;
const CHANNELS: usize = 1 << 16;
const BLOCKS: usize = 64;
/// Each level of the decoder doubles its map.
const DOUBLING: usize = 2;

/// How a map is doubled; diffusers has others, which this is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Upsample {
    /// Each pixel becomes four.
    Nearest,
}

/// A checked configuration of diffusers' `AutoencoderTiny`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AutoencoderTinyConfig {
    in_channels: usize,
    out_channels: usize,
    encoder_block_out_channels: Vec<usize>,
    decoder_block_out_channels: Vec<usize>,
    act_fn: Activation,
    upsample_fn: Upsample,
    latent_channels: usize,
    upsampling_scaling_factor: usize,
    num_encoder_blocks: Vec<usize>,
    num_decoder_blocks: Vec<usize>,
    /// Of latents as 8-bit pictures alone.
    latent_magnitude: f64,
    /// Likewise.
    latent_shift: f64,
    /// Of half types alone, which are not used here.
    force_upcast: bool,
    scaling_factor: f64,
    shift_factor: f64,
    /// A copy of the decoder's, which diffusers writes.
    #[serde(skip_serializing_if = "Option::is_none")]
    block_out_channels: Option<Vec<usize>>,
}

impl Default for AutoencoderTinyConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            encoder_block_out_channels: vec![64; 4],
            decoder_block_out_channels: vec![64; 4],
            act_fn: Activation::Relu,
            upsample_fn: Upsample::Nearest,
            latent_channels: 4,
            upsampling_scaling_factor: DOUBLING,
            num_encoder_blocks: vec![1, 3, 3, 3],
            num_decoder_blocks: vec![3, 3, 3, 1],
            latent_magnitude: 3.0,
            latent_shift: 0.5,
            force_upcast: false,
            scaling_factor: 1.0,
            shift_factor: 0.0,
            block_out_channels: None,
        }
    }
}

impl AutoencoderTinyConfig {
    /// As [`super::AutoencoderConfig::from_json`].
    pub(super) fn from_json(value: &Value, file: &str) -> Result<Self> {
        let config: Self = typed(value, file)?;
        let fields = Fields::new(value, file)?;
        let channels = [
            ("in_channels", config.in_channels),
            ("out_channels", config.out_channels),
            ("latent_channels", config.latent_channels),
        ];
        bounded_channels(&fields, channels)?;
        let [encoder, decoder] = [
            ("encoder_block_out_channels", &config.encoder_block_out_channels),
            ("decoder_block_out_channels", &config.decoder_block_out_channels),
        ];
        let counts = [
            ("num_encoder_blocks", &config.num_encoder_blocks),
            ("num_decoder_blocks", &config.num_decoder_blocks),
        ];
        for ((name, widths), (blocks, counts)) in [encoder, decoder].into_iter().zip(counts) {
            let levels = widths.len();
            if levels == 0 || levels > LEVELS {
                return Err(fields.refuse(name, format!("must have 1 to {LEVELS} entries")));
            }
            if let Some(i) = widths.iter().position(|&width| width != widths[0]) {
                let remedy = format!(
                    "must be {}, as the first: a level takes as many as it gives",
                    widths[0]
                );
                return Err(fields.refuse_entry(name, i, remedy));
            }
            if widths[0] == 0 || widths[0] > CHANNELS {
                let remedy = format!("must be a whole number from 1 to {CHANNELS}");
                return Err(fields.refuse_entry(name, 0, remedy));
            }
            if counts.len() != levels {
                let remedy = format!("must have as many entries as {name}, {levels}");
                return Err(fields.refuse(blocks, remedy));
            }
            if let Some(i) = counts.iter().position(|&count| count > BLOCKS) {
                let remedy = format!("must be a whole number from 0 to {BLOCKS}");
                return Err(fields.refuse_entry(blocks, i, remedy));
            }
        }
        if encoder.1.len() != decoder.1.len() {
            let remedy = format!(
                "must have as many entries as encoder_block_out_channels, {}: \
                latents have one size",
                encoder.1.len()
            );
            return Err(fields.refuse("decoder_block_out_channels", remedy));
        }
        if config.upsampling_scaling_factor != DOUBLING {
            return Err(fields.refuse("upsampling_scaling_factor", "must be 2"));
        }
        check_scale(&fields, config.scaling_factor, config.shift_factor)?;
        Ok(config)
    }

    /// Three convolutions and a way around.
    fn block(&self, g: &mut GraphBuilder, name: &Name, x: Map) -> Map {
        let channels = g.size(x).channels;
        let mut h = x;
        for index in [0, 2] {
            let place = name.at(format_args!("conv.{index}"));
            h = g.convolve(&place, h, channels, Taps::SAME, Epilogue::default());
            h = g.activate(h, self.act_fn.into());
        }
        let around = Epilogue { residual: Some(x), ..Epilogue::default() };
        let sum = g.convolve(&name.at("conv.4"), h, channels, Taps::SAME, around);
        g.activate(sum, Function::Relu)
    }
}

/// The layers of a half, which have numbers for names.
struct Layers {
    root: Name,
    next: usize,
}

impl Layers {
    fn of(half: &str) -> Self {
        Self { root: Name::default().at(half).at("layers"), next: 0 }
    }

    /// The next one's name.
    fn name(&mut self) -> Name {
        self.next += 1;
        self.root.at(self.next - 1)
    }

    /// One without weights.
    fn skip(&mut self) {
        self.next += 1;
    }
}

impl Half for AutoencoderTinyConfig {
    fn latents(&self) -> Latents {
        Latents {
            channels: self.latent_channels,
            factor: 1 << (self.decoder_block_out_channels.len() - 1),
            scale: self.scaling_factor,
            shift: self.shift_factor,
        }
    }

    fn images(&self) -> [usize; 2] {
        [self.in_channels, self.out_channels]
    }

    fn decoder(&self, [height, width]: [usize; 2]) -> Graph {
        let (mut g, mut layers) = (GraphBuilder::new(1), Layers::of("decoder"));
        let (factor, shift) = self.latents().unscaling();
        let x = g.sample(Size { height, width, channels: self.latent_channels }, factor, shift);
        let mut x = g.activate(x, Function::SoftClamp);
        let channels = self.decoder_block_out_channels[0];
        x = g.convolve(&layers.name(), x, channels, Taps::SAME, Epilogue::default());
        x = g.activate(x, self.act_fn.into());
        layers.skip();
        let last = self.num_decoder_blocks.len() - 1;
        for (level, &count) in self.num_decoder_blocks.iter().enumerate() {
            for _ in 0..count {
                x = self.block(&mut g, &layers.name(), x);
            }
            if level < last {
                layers.skip();
                let taps = Taps { doubled: true, ..Taps::SAME };
                x = g.convolve_unbiased(&layers.name(), x, channels, taps);
            }
        }
        let y = g.convolve(&layers.name(), x, self.out_channels, Taps::SAME, Epilogue::default());
        // From [0, 1] to [−1, 1].
        g.finish_with(y, 2.0, -1.0)
    }

    fn encoder(&self, [height, width]: [usize; 2]) -> Graph {
        let (mut g, mut layers) = (GraphBuilder::new(1), Layers::of("encoder"));
        // From [−1, 1] to [0, 1].
        let mut x = g.sample(Size { height, width, channels: self.in_channels }, 0.5, 0.5);
        let channels = self.encoder_block_out_channels[0];
        for (level, &count) in self.num_encoder_blocks.iter().enumerate() {
            x = if level == 0 {
                g.convolve(&layers.name(), x, channels, Taps::SAME, Epilogue::default())
            } else {
                let taps = Taps { stride: 2, ..Taps::SAME };
                g.convolve_unbiased(&layers.name(), x, channels, taps)
            };
            for _ in 0..count {
                x = self.block(&mut g, &layers.name(), x);
            }
        }
        let y =
            g.convolve(&layers.name(), x, self.latent_channels, Taps::SAME, Epilogue::default());
        let (factor, shift) = self.latents().scaling();
        g.finish_with(y, factor, shift)
    }

    fn varies(&self) -> bool {
        false
    }
}
