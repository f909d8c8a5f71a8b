//! What a T5 encoder's `config.json` tells.

use candle_nn::Activation;
use candle_transformers::models::t5;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Result;
use crate::fields::{Fields, typed};
use crate::weights::Shapes;

const WIDTH_LIMIT: usize = 1 << 16;
const LAYER_LIMIT: usize = 1 << 10;
const VOCABULARY_LIMIT: usize = 1 << 24;
const DISTANCE_LIMIT: usize = 1 << 20;

/// The hidden layer of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum FeedForward {
    /// `relu(x·W)`, of the first T5.
    Relu,
    /// `relu(x·W)·(x·V)`.
    GatedRelu,
    /// `gelu(x·W)·(x·V)` with the function's approximation by tanh, of T5 1.1.
    GatedGelu,
    /// `silu(x·W)·(x·V)`.
    GatedSilu,
}

/// A checked configuration of transformers' `T5EncoderModel`.
///
/// transformers writes much beside it that is of training, generation and decoders; such fields are not looked at.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct T5Config {
    vocab_size: usize,
    d_model: usize,
    d_kv: usize,
    d_ff: usize,
    num_layers: usize,
    num_heads: usize,
    relative_attention_num_buckets: usize,
    relative_attention_max_distance: usize,
    layer_norm_epsilon: f64,
    feed_forward_proj: FeedForward,
}

impl Default for T5Config {
    fn default() -> Self {
        Self {
            vocab_size: 32_128,
            d_model: 512,
            d_kv: 64,
            d_ff: 2048,
            num_layers: 6,
            num_heads: 8,
            relative_attention_num_buckets: 32,
            relative_attention_max_distance: 128,
            layer_norm_epsilon: 1e-6,
            feed_forward_proj: FeedForward::Relu,
        }
    }
}

impl T5Config {
    /// The transformers class.
    pub const CLASS: &str = "T5EncoderModel";

    /// Reads and checks a `config.json`; `file` is what error messages call it. Absent fields take transformers' defaults.
    ///
    /// # Errors
    /// [`crate::Error::Value`] naming file, field, value and remedy for anything that cannot be honoured.
    pub fn from_json(value: &Value, file: &str) -> Result<Self> {
        let config: Self = typed(value, file)?;
        config.check(&Fields::new(value, file)?)?;
        Ok(config)
    }

    fn check(&self, fields: &Fields) -> Result<()> {
        fields.bounded("vocab_size", self.vocab_size, VOCABULARY_LIMIT)?;
        fields.bounded("d_model", self.d_model, WIDTH_LIMIT)?;
        fields.bounded("d_kv", self.d_kv, WIDTH_LIMIT)?;
        fields.bounded("d_ff", self.d_ff, WIDTH_LIMIT)?;
        fields.bounded("num_layers", self.num_layers, LAYER_LIMIT)?;
        fields.bounded("num_heads", self.num_heads, WIDTH_LIMIT)?;
        let (buckets, distance) =
            (self.relative_attention_num_buckets, self.relative_attention_max_distance);
        fields.bounded("relative_attention_num_buckets", buckets, WIDTH_LIMIT)?;
        if buckets < 4 || !buckets.is_multiple_of(2) {
            let remedy = "must be an even number of at least 4: half are of later tokens";
            return Err(fields.refuse("relative_attention_num_buckets", remedy));
        }
        if distance <= buckets / 4 || distance > DISTANCE_LIMIT {
            let remedy = format!(
                "must be above a quarter of relative_attention_num_buckets, {}, and at most {DISTANCE_LIMIT}",
                buckets / 4
            );
            return Err(fields.refuse("relative_attention_max_distance", remedy));
        }
        if !(0.0..=f64::from(f32::MAX)).contains(&self.layer_norm_epsilon) {
            return Err(fields.refuse("layer_norm_epsilon", "must not be negative"));
        }
        Ok(())
    }

    /// Numbers of a token's hidden state.
    pub fn width(&self) -> usize {
        self.d_model
    }

    /// Tokens that it knows: a tokenizer's numbers must be below.
    pub fn vocabulary(&self) -> usize {
        self.vocab_size
    }

    /// Number of weights.
    pub fn parameters(&self) -> usize {
        self.weight_shapes().values().map(|shape| shape.iter().product::<usize>()).sum()
    }

    /// Names, as transformers has them, and shapes of all weights.
    pub fn weight_shapes(&self) -> Shapes {
        let (wide, inner, hidden) = (self.d_model, self.num_heads * self.d_kv, self.d_ff);
        let mut shapes = Shapes::new();
        let mut put = |name: String, shape: &[usize]| {
            shapes.insert(format!("{name}.weight"), shape.to_vec());
        };
        put("shared".into(), &[self.vocab_size, wide]);
        put("encoder.final_layer_norm".into(), &[wide]);
        for index in 0..self.num_layers {
            let [attention, layer] = [0, 1].map(|i| format!("encoder.block.{index}.layer.{i}"));
            put(format!("{attention}.layer_norm"), &[wide]);
            put(format!("{layer}.layer_norm"), &[wide]);
            for part in ["q", "k", "v"] {
                put(format!("{attention}.SelfAttention.{part}"), &[inner, wide]);
            }
            put(format!("{attention}.SelfAttention.o"), &[wide, inner]);
            if index == 0 {
                let table = [self.relative_attention_num_buckets, self.num_heads];
                put(format!("{attention}.SelfAttention.relative_attention_bias"), &table);
            }
            let parts: &[&str] = match self.feed_forward_proj {
                FeedForward::Relu => &["wi"],
                _ => &["wi_0", "wi_1"],
            };
            for part in parts {
                put(format!("{layer}.DenseReluDense.{part}"), &[hidden, wide]);
            }
            put(format!("{layer}.DenseReluDense.wo"), &[wide, hidden]);
        }
        shapes
    }

    /// The same as candle-transformers has it.
    pub(super) fn theirs(&self) -> t5::Config {
        let (gated, activation) = match self.feed_forward_proj {
            FeedForward::Relu => (false, Activation::Relu),
            FeedForward::GatedRelu => (true, Activation::Relu),
            FeedForward::GatedGelu => (true, Activation::NewGelu),
            FeedForward::GatedSilu => (true, Activation::Silu),
        };
        t5::Config {
            vocab_size: self.vocab_size,
            d_model: self.d_model,
            d_kv: self.d_kv,
            d_ff: self.d_ff,
            num_layers: self.num_layers,
            num_heads: self.num_heads,
            relative_attention_num_buckets: self.relative_attention_num_buckets,
            relative_attention_max_distance: self.relative_attention_max_distance,
            layer_norm_epsilon: self.layer_norm_epsilon,
            feed_forward_proj: t5::ActivationWithOptionalGating { gated, activation },
            is_decoder: false,
            is_encoder_decoder: false,
            use_cache: false,
            ..t5::Config::default()
        }
    }
}
