//! Reading and writing the fields, and what they must be to each other.

use serde_json::{Value, json};

use super::{Activation, DiTConfig};
use crate::Result;
use crate::fields::{ELEMENT_LIMIT, Fields};

const CHANNEL_LIMIT: usize = 1 << 16;
const SIDE_LIMIT: usize = 1 << 14;
const LAYER_LIMIT: usize = 256;
const TABLE_LIMIT: usize = 1 << 24;

impl DiTConfig {
    /// Reads and checks a `config.json`; `file` is what error messages call it.
    ///
    /// Absent fields take diffusers' defaults. Fields that diffusers does not know are ignored, as
    /// diffusers does; `norm_num_groups` has no effect there either.
    ///
    /// # Errors
    /// [`crate::Error::Value`] naming file, field, value and remedy.
    pub fn from_json(value: &Value, file: &str) -> Result<Self> {
        let fields = Fields::new(value, file)?;
        refuse_other_networks(&fields)?;
        let config = Self {
            heads: fields.count("num_attention_heads", 16, CHANNEL_LIMIT)?,
            head_dim: fields.count("attention_head_dim", 72, CHANNEL_LIMIT)?,
            in_channels: fields.count("in_channels", 4, CHANNEL_LIMIT)?,
            out_channels: fields.optional_count("out_channels", CHANNEL_LIMIT)?,
            layers: fields.count("num_layers", 28, LAYER_LIMIT)?,
            dropout: fields.number("dropout", 0.0)?,
            attention_bias: fields.flag("attention_bias", true)?,
            sample_size: fields.count("sample_size", 32, SIDE_LIMIT)?,
            patch_size: fields.count("patch_size", 2, SIDE_LIMIT)?,
            activation: activation(&fields)?,
            classes: classes(&fields)?,
            upcast_attention: fields.flag("upcast_attention", false)?,
            norm_eps: fields.number("norm_eps", 1e-5)?,
        };
        config.check(&fields)?;
        Ok(config)
    }

    fn check(&self, fields: &Fields) -> Result<()> {
        fields.check_token_width(self.width(), self.heads, CHANNEL_LIMIT)?;
        if !self.sample_size.is_multiple_of(self.patch_size) {
            let remedy = format!("must divide sample_size, {}", self.sample_size);
            return Err(fields.refuse("patch_size", remedy));
        }
        if !(0.0..=1.0).contains(&self.dropout) {
            return Err(fields.refuse("dropout", "must be from 0 to 1"));
        }
        if self.norm_eps < 0.0 {
            return Err(fields.refuse("norm_eps", "must not be negative"));
        }
        self.check_size(fields)
    }

    /// Refuses what could not be held in memory, before anything is allocated for it.
    fn check_size(&self, fields: &Fields) -> Result<()> {
        let tokens = (self.patches() * self.patches()) as u64;
        fields.check_tokens(tokens, self.heads, self.width())?;
        fields.check_weights("num_layers", &self.graph().shapes(), ELEMENT_LIMIT)
    }

    /// The same configuration as diffusers writes it, every field present.
    pub fn to_json(&self) -> Value {
        json!({
            "_class_name": "DiTTransformer2DModel",
            "num_attention_heads": self.heads,
            "attention_head_dim": self.head_dim,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "num_layers": self.layers,
            "dropout": self.dropout,
            "norm_num_groups": 32,
            "attention_bias": self.attention_bias,
            "sample_size": self.sample_size,
            "patch_size": self.patch_size,
            "activation_fn": match self.activation {
                Activation::Gelu => "gelu",
                Activation::GeluTanh => "gelu-approximate",
            },
            "num_embeds_ada_norm": self.classes,
            "upcast_attention": self.upcast_attention,
            "norm_type": "ada_norm_zero",
            "norm_elementwise_affine": false,
            "norm_eps": self.norm_eps,
        })
    }
}

/// What this class can also be told, and what is another network then.
fn refuse_other_networks(fields: &Fields) -> Result<()> {
    if fields.text("_class_name", Some("DiTTransformer2DModel"))? != Some("DiTTransformer2DModel") {
        return Err(fields.refuse("_class_name", "must be DiTTransformer2DModel"));
    }
    if fields.text("norm_type", Some("ada_norm_zero"))? != Some("ada_norm_zero") {
        let remedy = "must be ada_norm_zero, the only one diffusers has for this class";
        return Err(fields.refuse("norm_type", remedy));
    }
    if fields.flag("norm_elementwise_affine", false)? {
        let remedy = "must be false: the norm before the linear layers has no weights here";
        return Err(fields.refuse("norm_elementwise_affine", remedy));
    }
    Ok(())
}

fn activation(fields: &Fields) -> Result<Activation> {
    match fields.text("activation_fn", Some("gelu-approximate"))? {
        Some("gelu-approximate") => Ok(Activation::GeluTanh),
        Some("gelu") => Ok(Activation::Gelu),
        _ => Err(fields.refuse("activation_fn", "must be gelu-approximate or gelu")),
    }
}

fn classes(fields: &Fields) -> Result<usize> {
    match fields.get("num_embeds_ada_norm") {
        Some(Value::Null) => {
            let remedy = "must be the number of classes; 0 for an unconditional network";
            Err(fields.refuse("num_embeds_ada_norm", remedy))
        }
        // Its tables have one row, that of the class that means "none".
        Some(value) if value.as_u64() == Some(0) => Ok(0),
        _ => fields.count("num_embeds_ada_norm", 1000, TABLE_LIMIT),
    }
}
