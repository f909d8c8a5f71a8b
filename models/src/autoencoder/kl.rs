//! `AutoencoderKL`, the autoencoder of Stable Diffusion (Rombach et al. 2022, §3.1).

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::coder::{Coder, Down, Up, bounded_channels, check_scale, point};
use super::{Half, Latents, SampleSize};
use crate::Result;
use crate::activation::Activation;
use crate::fields::{Fields, typed};
use crate::graph::{Graph, GraphBuilder, Name, Size};

/// A checked configuration of diffusers' `AutoencoderKL`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AutoencoderKLConfig {
    in_channels: usize,
    out_channels: usize,
    down_block_types: Vec<Down>,
    up_block_types: Vec<Up>,
    block_out_channels: Vec<usize>,
    layers_per_block: usize,
    act_fn: Activation,
    latent_channels: usize,
    norm_num_groups: usize,
    /// Of tiles alone, in which nothing is decoded here.
    sample_size: SampleSize,
    scaling_factor: f64,
    shift_factor: Option<f64>,
    latents_mean: Option<Vec<f64>>,
    latents_std: Option<Vec<f64>>,
    /// Of half types alone, which are not used here.
    force_upcast: bool,
    use_quant_conv: bool,
    use_post_quant_conv: bool,
    mid_block_add_attention: bool,
}

impl Default for AutoencoderKLConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            down_block_types: vec![Down::Plain],
            up_block_types: vec![Up::Plain],
            block_out_channels: vec![64],
            layers_per_block: 1,
            act_fn: Activation::Silu,
            latent_channels: 4,
            norm_num_groups: 32,
            sample_size: SampleSize::Side(32),
            scaling_factor: 0.18215,
            shift_factor: None,
            latents_mean: None,
            latents_std: None,
            force_upcast: true,
            use_quant_conv: true,
            use_post_quant_conv: true,
            mid_block_add_attention: true,
        }
    }
}

impl AutoencoderKLConfig {
    /// Reads and checks a `config.json`; `file` is what error messages call it.
    ///
    /// # Errors
    /// [`crate::Error::Value`] naming file, field, value and remedy for anything that cannot be honoured.
    pub(super) fn from_json(value: &Value, file: &str) -> Result<Self> {
        let config: Self = typed(value, file)?;
        let fields = Fields::new(value, file)?;
        let types = [config.down_block_types.len(), config.up_block_types.len()];
        config.coder().check(&fields, types)?;
        let channels = [
            ("in_channels", config.in_channels),
            ("out_channels", config.out_channels),
            ("latent_channels", config.latent_channels),
        ];
        bounded_channels(&fields, channels)?;
        check_scale(&fields, config.scaling_factor, config.shift_factor.unwrap_or(0.0))?;
        for (name, list) in
            [("latents_mean", &config.latents_mean), ("latents_std", &config.latents_std)]
        {
            if list.is_some() {
                let remedy = "must be null: only scaling_factor and shift_factor are supported";
                return Err(fields.refuse(name, remedy));
            }
        }
        Ok(config)
    }

    fn coder(&self) -> Coder<'_> {
        Coder {
            channels: &self.block_out_channels,
            layers: self.layers_per_block,
            groups: self.norm_num_groups,
            activation: self.act_fn,
            attends: self.mid_block_add_attention,
        }
    }
}

impl Half for AutoencoderKLConfig {
    fn latents(&self) -> Latents {
        Latents {
            channels: self.latent_channels,
            factor: self.coder().factor(),
            scale: self.scaling_factor,
            shift: self.shift_factor.unwrap_or(0.0),
        }
    }

    fn images(&self) -> [usize; 2] {
        [self.in_channels, self.out_channels]
    }

    fn decoder(&self, [height, width]: [usize; 2]) -> Graph {
        let mut g = GraphBuilder::new(1);
        let (factor, shift) = self.latents().unscaling();
        let mut x = g.sample(Size { height, width, channels: self.latent_channels }, factor, shift);
        if self.use_post_quant_conv {
            x = point(&mut g, &Name::default().at("post_quant_conv"), x, self.latent_channels);
        }
        let y = self.coder().decode(&mut g, x, self.out_channels);
        g.finish(y, false)
    }

    /// Means and logarithms of variances, in the autoencoder's own scale.
    fn encoder(&self, [height, width]: [usize; 2]) -> Graph {
        let mut g = GraphBuilder::new(1);
        let image = g.sample(Size { height, width, channels: self.in_channels }, 1.0, 0.0);
        let outputs = 2 * self.latent_channels;
        let mut y = self.coder().encode(&mut g, image, outputs);
        if self.use_quant_conv {
            y = point(&mut g, &Name::default().at("quant_conv"), y, outputs);
        }
        g.finish(y, false)
    }

    fn varies(&self) -> bool {
        true
    }
}
