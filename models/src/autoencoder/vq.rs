//! `VQModel`, whose latents are rows of a table (van den Oord et al. 2017; Esser et al. 2021): the autoencoder of the first
//! latent diffusion models.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::coder::{Coder, Down, Up, bounded_channels, check_scale, point};
use super::{Half, Latents, SampleSize};
use crate::Result;
use crate::activation::Activation;
use crate::fields::{Fields, typed};
use crate::graph::{Graph, GraphBuilder, Map, Name, Size};

/// More rows than this are a mistake.
const ROWS: usize = 1 << 24;

/// What is normalised; diffusers has another one, which this is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum NormType {
    /// Groups of channels.
    Group,
}

/// A checked configuration of diffusers' `VQModel`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VQModelConfig {
    in_channels: usize,
    out_channels: usize,
    down_block_types: Vec<Down>,
    up_block_types: Vec<Up>,
    block_out_channels: Vec<usize>,
    layers_per_block: usize,
    act_fn: Activation,
    latent_channels: usize,
    /// Of tiles alone, in which nothing is decoded here.
    sample_size: SampleSize,
    num_vq_embeddings: usize,
    norm_num_groups: usize,
    vq_embed_dim: Option<usize>,
    scaling_factor: f64,
    norm_type: NormType,
    mid_block_add_attention: bool,
    /// Of latents that are numbers of rows, which no pipeline that is served here has.
    lookup_from_codebook: bool,
    /// Of half types alone, which are not used here.
    force_upcast: bool,
}

impl Default for VQModelConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            down_block_types: vec![Down::Plain],
            up_block_types: vec![Up::Plain],
            block_out_channels: vec![64],
            layers_per_block: 1,
            act_fn: Activation::Silu,
            latent_channels: 3,
            sample_size: SampleSize::Side(32),
            num_vq_embeddings: 256,
            norm_num_groups: 32,
            vq_embed_dim: None,
            scaling_factor: 0.18215,
            norm_type: NormType::Group,
            mid_block_add_attention: true,
            lookup_from_codebook: false,
            force_upcast: false,
        }
    }
}

impl VQModelConfig {
    /// As [`super::AutoencoderConfig::from_json`].
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
        fields.bounded("num_vq_embeddings", config.num_vq_embeddings, ROWS)?;
        fields.bounded("vq_embed_dim", config.code_width(), ROWS)?;
        check_scale(&fields, config.scaling_factor, 0.0)?;
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

    /// Numbers of a row of the table, which is what the diffusion model's latents have for channels.
    fn code_width(&self) -> usize {
        self.vq_embed_dim.unwrap_or(self.latent_channels)
    }

    /// Latents snapped to the rows that are nearest.
    fn codes(&self, g: &mut GraphBuilder, [height, width]: [usize; 2]) -> Map {
        let (factor, shift) = self.latents().unscaling();
        let x = g.sample(Size { height, width, channels: self.code_width() }, factor, shift);
        let table = Name::default().at("quantize.embedding.weight");
        g.nearest(&table, x, self.num_vq_embeddings)
    }
}

impl Half for VQModelConfig {
    fn latents(&self) -> Latents {
        Latents {
            channels: self.code_width(),
            factor: self.coder().factor(),
            scale: self.scaling_factor,
            shift: 0.0,
        }
    }

    fn images(&self) -> [usize; 2] {
        [self.in_channels, self.out_channels]
    }

    fn decoder(&self, latent: [usize; 2]) -> Graph {
        let mut g = GraphBuilder::new(1);
        let codes = self.codes(&mut g, latent);
        let place = Name::default().at("post_quant_conv");
        let x = point(&mut g, &place, codes, self.latent_channels);
        let y = self.coder().decode(&mut g, x, self.out_channels);
        g.finish(y, false)
    }

    /// Latents as they are before they are snapped.
    fn encoder(&self, [height, width]: [usize; 2]) -> Graph {
        let mut g = GraphBuilder::new(1);
        let image = g.sample(Size { height, width, channels: self.in_channels }, 1.0, 0.0);
        let y = self.coder().encode(&mut g, image, self.latent_channels);
        let y = point(&mut g, &Name::default().at("quant_conv"), y, self.code_width());
        let (factor, shift) = self.latents().scaling();
        g.finish_with(y, factor, shift)
    }

    fn varies(&self) -> bool {
        false
    }
}
