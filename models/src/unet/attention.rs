//! Self-attention over the pixels of a feature map.

use candle_core::{Result, Tensor};

use super::UNet2DConfig;
use super::group_norm::{GroupNorm, With};
use super::layers::Pointwise;
use super::resnet::rescale;
use crate::layers::softmax;
use crate::weights::Weights;

/// The three products that make queries, keys and values.
enum Projection {
    /// One product whose output is, head by head, the query, the key and the value, with the scale
    /// of the scores already in the query's weights.
    Merged(Pointwise),
    /// Three products, for weights that change.
    Separate([Pointwise; 3]),
}

/// Norm, multi-head self-attention (Vaswani et al. 2017), and a way around.
///
/// Everything is laid out channels first, `[B, C, L]`, as the feature maps are, so that nothing is
/// ever transposed in memory.
pub(super) struct Attention {
    norm: Option<GroupNorm>,
    projection: Projection,
    output: Pointwise,
    head_dim: usize,
    output_scale: f64,
}

impl Attention {
    /// Over `channels` channels; normalised in `groups` groups, or not at all.
    pub(super) fn new(
        config: &UNet2DConfig,
        weights: &Weights,
        channels: usize,
        groups: Option<usize>,
        output_scale: f64,
    ) -> crate::Result<Self> {
        let head_dim = config.attention_head_dim.unwrap_or(channels);
        let norm = match groups {
            None => None,
            Some(groups) => {
                let place = weights.at("group_norm");
                Some(GroupNorm::new(&place, channels, groups, config.norm_eps)?)
            }
        };
        let linear = |name| Pointwise::linear(&weights.at(name), channels, channels);
        let separate = [linear("to_q")?, linear("to_k")?, linear("to_v")?];
        let projection = if weights.may_merge() {
            Projection::Merged(merge(separate, head_dim)?)
        } else {
            Projection::Separate(separate)
        };
        Ok(Self { norm, projection, output: linear("to_out.0")?, head_dim, output_scale })
    }

    /// `[B, C, H, W]` → the same shape.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let flat = x.flatten_from(2)?;
        let normed = match &self.norm {
            Some(norm) => norm.forward(&flat, With::default())?,
            None => flat.contiguous()?,
        };
        let [query, key, value] = self.project(&normed)?;
        // Scores are [B·heads, queries, keys]; values are gathered as [B·heads, head_dim, queries].
        let attention = softmax(&query.transpose(1, 2)?.matmul(&key)?)?;
        let gathered = value.matmul(&attention.transpose(1, 2)?)?.reshape(flat.shape())?;
        let y = self.output.forward(&gathered)?.reshape(x.shape())?;
        rescale((x + y)?, self.output_scale)
    }

    /// `[B, C, L]` → scaled queries, keys and values, each `[B·heads, head_dim, L]`.
    fn project(&self, x: &Tensor) -> Result<[Tensor; 3]> {
        let (batch, channels, length) = x.dims3()?;
        let all_heads = batch * (channels / self.head_dim);
        match &self.projection {
            Projection::Merged(merged) => {
                let qkv = merged.forward(x)?.reshape((all_heads, 3, self.head_dim, length))?;
                let part = |i| qkv.narrow(1, i, 1)?.squeeze(1);
                Ok([part(0)?, part(1)?, part(2)?])
            }
            Projection::Separate([query, key, value]) => {
                let heads = |y: Tensor| y.reshape((all_heads, self.head_dim, length));
                let query = (query.forward(x)? * score_scale(self.head_dim))?;
                Ok([heads(query)?, heads(key.forward(x)?)?, heads(value.forward(x)?)?])
            }
        }
    }
}

fn score_scale(head_dim: usize) -> f64 {
    1.0 / (head_dim as f64).sqrt()
}

/// Weights and biases of query, key and value as one product, interleaved head by head.
fn merge(separate: [Pointwise; 3], head_dim: usize) -> Result<Pointwise> {
    let [(wq, bq), (wk, bk), (wv, bv)] = separate.map(Pointwise::into_tensors);
    let (channels, _) = wq.dims2()?;
    let scale = score_scale(head_dim);
    let interleave = |parts: [Tensor; 3], width: usize| -> Result<Tensor> {
        let per_head = (channels / head_dim, 1, head_dim, width);
        let parts = parts.map(|part| part.reshape(per_head));
        let [q, k, v] = parts;
        Tensor::cat(&[q?, k?, v?], 1)?.reshape((3 * channels, width))
    };
    let weight = interleave([(wq * scale)?, wk, wv], channels)?;
    let bias = interleave([(bq * scale)?, bk, bv], 1)?.squeeze(1)?;
    Ok(Pointwise::from_tensors(weight, bias))
}
