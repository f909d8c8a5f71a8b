//! The network of candle's operations: patches to tokens, blocks, and what follows the last.

use candle_core::{Result, Tensor, bail};

use super::DiTConfig;
use super::condition::{Condition, TIME_CHANNELS, table};
use super::config::Activation;
use super::layers::{Linear, normalise};
use super::patches::positions;
use crate::layers::{self, Mlp, softmax};
use crate::weights::Weights;

/// What norms add to a variance, where the configuration does not say.
pub(super) const NORM_EPS: f64 = 1e-6;
/// Width of the hidden layer, in widths of a token.
pub(super) const EXPANSION: usize = 4;

/// Operations that have a gradient and run on any device.
pub(super) struct Layers {
    projection: Linear,
    /// `[1, tokens, channels]`.
    positions: Tensor,
    blocks: Vec<Block>,
    output: Output,
    count: usize,
}

impl Layers {
    pub(super) fn new(config: &DiTConfig, weights: &Weights) -> crate::Result<Self> {
        let (width, count) = (config.width(), config.patches());
        let (channels, side) = (config.in_channels, config.patch_size);
        let place = weights.at("pos_embed.proj");
        let positions = positions(count, width);
        let positions = Tensor::from_vec(positions, (1, count * count, width), weights.device())?;
        let block = |i| Block::new(config, &weights.at(format_args!("transformer_blocks.{i}")));
        Ok(Self {
            projection: Linear::of_patches(&place, channels, side, width)?,
            positions: positions.to_dtype(weights.dtype())?,
            blocks: (0..config.layers).map(block).collect::<crate::Result<_>>()?,
            output: Output::new(config, weights)?,
            count,
        })
    }

    /// Patches `[B, C·side·side, count, count]` → `[B, side·side·C', count, count]`.
    pub(super) fn forward(&self, patches: &Tensor, condition: &Condition) -> Result<Tensor> {
        let tokens = patches.flatten_from(2)?.transpose(1, 2)?;
        // Not `contiguous`, which leaves a single token the strides of the other order: products go wrong.
        let tokens = tokens.reshape(tokens.dims3()?)?;
        let mut x = self.projection.forward(&tokens)?.broadcast_add(&self.positions)?;
        let mut first = None;
        for block in &self.blocks {
            let told = block.embedding.forward(condition)?;
            x = block.forward(&x, &told)?;
            first.get_or_insert(told);
        }
        // The first block's embedding of time and class is the output's, too.
        let Some(told) = first else { bail!("a network of no blocks") };
        let y = self.output.forward(&x, &told)?.transpose(1, 2)?;
        y.reshape((y.dim(0)?, y.dim(1)?, self.count, self.count))
    }
}

/// Time and class as one vector per sample.
struct Embedding {
    time: Mlp,
    classes: Tensor,
}

impl Embedding {
    fn new(config: &DiTConfig, weights: &Weights) -> crate::Result<Self> {
        let width = config.width();
        Ok(Self {
            time: Mlp::new(&weights.at("timestep_embedder"), TIME_CHANNELS, width)?,
            classes: table(config, weights)?,
        })
    }

    /// `[B, channels]`.
    fn forward(&self, condition: &Condition) -> Result<Tensor> {
        self.time.forward(&condition.phases)? + condition.row_of(&self.classes)?
    }
}

/// `count` vectors `[B, 1, channels]` out of the embedding: a linear layer after SiLU.
struct Modulation(layers::Linear);

impl Modulation {
    fn new(weights: &Weights, width: usize, count: usize) -> crate::Result<Self> {
        Ok(Self(layers::Linear::new(weights, width, count * width)?))
    }

    fn forward<const COUNT: usize>(&self, told: &Tensor) -> Result<[Tensor; COUNT]> {
        let all = self.0.forward(&told.silu()?)?.unsqueeze(1)?;
        let parts = all.chunk(COUNT, 2)?;
        parts.try_into().map_err(|_| candle_core::Error::Msg("a product of another width".into()))
    }
}

/// Attention and two linear layers, each after a norm, each scaled, shifted and gated by time and
/// class (Peebles & Xie 2023, figure 3: adaLN-Zero).
struct Block {
    embedding: Embedding,
    modulation: Modulation,
    attention: Attention,
    widen: Linear,
    narrow: Linear,
    activation: Activation,
    norm_eps: f64,
}

impl Block {
    fn new(config: &DiTConfig, weights: &Weights) -> crate::Result<Self> {
        let (width, hidden) = (config.width(), EXPANSION * config.width());
        let norm = weights.at("norm1");
        Ok(Self {
            embedding: Embedding::new(config, &norm.at("emb"))?,
            modulation: Modulation::new(&norm.at("linear"), width, 6)?,
            attention: Attention::new(config, &weights.at("attn1"))?,
            widen: Linear::new(&weights.at("ff.net.0.proj"), width, hidden)?,
            narrow: Linear::new(&weights.at("ff.net.2"), hidden, width)?,
            activation: config.activation,
            norm_eps: config.norm_eps,
        })
    }

    /// `[B, tokens, channels]` → the same shape; `told` `[B, channels]` is its embedding of time and class.
    fn forward(&self, x: &Tensor, told: &Tensor) -> Result<Tensor> {
        let [shift, scale, gate, shift_after, scale_after, gate_after] =
            self.modulation.forward(told)?;
        let normed = normalise(x, NORM_EPS, &scale, &shift)?;
        let x = (self.attention.forward(&normed)?.broadcast_mul(&gate)? + x)?;

        let normed = normalise(&x, self.norm_eps, &scale_after, &shift_after)?;
        let hidden = self.activation.forward(&self.widen.forward(&normed)?)?;
        self.narrow.forward(&hidden)?.broadcast_mul(&gate_after)? + x
    }
}

/// Multi-head self-attention over tokens (Vaswani et al. 2017).
struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    heads: usize,
    upcast: bool,
}

impl Attention {
    fn new(config: &DiTConfig, weights: &Weights) -> crate::Result<Self> {
        let width = config.width();
        let linear = |name| {
            let place = weights.at(name);
            match config.attention_bias {
                true => Linear::new(&place, width, width),
                false => Linear::unbiased(&place, width, width),
            }
        };
        Ok(Self {
            query: linear("to_q")?,
            key: linear("to_k")?,
            value: linear("to_v")?,
            output: Linear::new(&weights.at("to_out.0"), width, width)?,
            heads: config.heads,
            upcast: config.upcast_attention,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, tokens, width) = x.dims3()?;
        let head_dim = width / self.heads;
        // `[B·heads, tokens, head channels]`.
        let heads = |y: Tensor| -> Result<Tensor> {
            y.reshape((batch, tokens, self.heads, head_dim))?.transpose(1, 2)?.reshape((
                batch * self.heads,
                tokens,
                head_dim,
            ))
        };
        let query = (self.query.forward(x)? * (1.0 / (head_dim as f64).sqrt()))?;
        let (mut query, mut key) = (heads(query)?, heads(self.key.forward(x)?)?);
        let value = heads(self.value.forward(x)?)?;
        if self.upcast {
            let dtype = layers::working(x.dtype());
            (query, key) = (query.to_dtype(dtype)?, key.to_dtype(dtype)?);
        }
        let weights = softmax(&query.matmul(&key.t()?)?)?.to_dtype(x.dtype())?;
        let gathered = weights.matmul(&value)?;
        let joined = gathered
            .reshape((batch, self.heads, tokens, head_dim))?
            .transpose(1, 2)?
            .reshape((batch, tokens, width))?;
        self.output.forward(&joined)
    }
}

/// The last norm, and the product that makes a patch of every token.
struct Output {
    modulation: Modulation,
    projection: Linear,
}

impl Output {
    /// `weights` is where the whole network is.
    fn new(config: &DiTConfig, weights: &Weights) -> crate::Result<Self> {
        let width = config.width();
        let pixels = config.patch_size * config.patch_size * config.geometry().out_channels;
        Ok(Self {
            modulation: Modulation::new(&weights.at("proj_out_1"), width, 2)?,
            projection: Linear::new(&weights.at("proj_out_2"), width, pixels)?,
        })
    }

    /// `[B, tokens, channels]`, with time and class `[B, channels]` → `[B, tokens, side·side·C']`.
    fn forward(&self, x: &Tensor, told: &Tensor) -> Result<Tensor> {
        let [shift, scale] = self.modulation.forward(told)?;
        self.projection.forward(&normalise(x, NORM_EPS, &scale, &shift)?)
    }
}
