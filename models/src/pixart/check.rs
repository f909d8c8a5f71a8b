//! What the fields must be to each other, and how large.

use super::PixArtConfig;
use crate::Result;
use crate::fields::{ELEMENT_LIMIT, Fields};

const CHANNEL_LIMIT: usize = 1 << 16;
const SIDE_LIMIT: usize = 1 << 14;
const LAYER_LIMIT: usize = 256;
const TABLE_LIMIT: usize = 1 << 24;
const TOKEN_LIMIT: usize = 1 << 16;
const FACTOR_LIMIT: usize = 1 << 10;

impl PixArtConfig {
    /// Refuses what diffusers could not build, what is not supported, and what no memory could hold.
    pub(super) fn check(&self, fields: &Fields) -> Result<()> {
        fields.bounded("num_attention_heads", self.num_attention_heads, CHANNEL_LIMIT)?;
        fields.bounded("attention_head_dim", self.attention_head_dim, CHANNEL_LIMIT)?;
        fields.bounded("in_channels", self.in_channels, CHANNEL_LIMIT)?;
        fields.bounded("out_channels", self.out_channels, CHANNEL_LIMIT)?;
        fields.bounded("num_layers", self.num_layers, LAYER_LIMIT)?;
        fields.bounded("sample_size", self.sample_size, SIDE_LIMIT)?;
        fields.bounded("patch_size", self.patch_size, SIDE_LIMIT)?;
        fields.bounded("caption_channels", self.caption_channels, CHANNEL_LIMIT)?;
        fields.bounded(
            "num_embeds_ada_norm",
            self.num_embeds_ada_norm.unwrap_or(0),
            TABLE_LIMIT,
        )?;
        fields.bounded("tokens of a prompt", self.asked.tokens, TOKEN_LIMIT)?;
        fields.bounded("pixels for one of a latent's", self.asked.factor, FACTOR_LIMIT)?;
        if self.norm_elementwise_affine {
            let remedy = "must be false: the norm before the linear layers has no weights here";
            return Err(fields.refuse("norm_elementwise_affine", remedy));
        }
        if !(0.0..=1.0).contains(&self.dropout) {
            return Err(fields.refuse("dropout", "must be from 0 to 1"));
        }
        if !(0.0..=f64::from(f32::MAX)).contains(&self.norm_eps) {
            return Err(fields.refuse("norm_eps", "must not be negative"));
        }
        let possible = f64::from(f32::MIN_POSITIVE)..=f64::from(f32::MAX);
        if self.interpolation_scale.is_some_and(|scale| !possible.contains(&scale)) {
            return Err(fields.refuse("interpolation_scale", "must be above 0, or null"));
        }
        self.check_widths(fields)?;
        self.check_size(fields)
    }

    fn check_widths(&self, fields: &Fields) -> Result<()> {
        let (width, heads) = (self.width(), self.num_attention_heads);
        fields.check_token_width(width, heads, CHANNEL_LIMIT)?;
        if self.is_told_size() && !width.is_multiple_of(3) {
            let remedy = format!(
                "times num_attention_heads, {heads}, must be a multiple of 3, for the height, width and aspect ratio \
                 that the network is told (use_additional_conditions)"
            );
            return Err(fields.refuse("attention_head_dim", remedy));
        }
        match (self.cross_attention_dim, self.caption_channels) {
            (None, _) => {
                let remedy = "must be set: a network that sees no prompt is not supported";
                Err(fields.refuse("cross_attention_dim", remedy))
            }
            (Some(seen), Some(_)) if seen != width => {
                let remedy = format!(
                    "must be {width}, num_attention_heads times attention_head_dim, to which caption_channels are \
                     projected"
                );
                Err(fields.refuse("cross_attention_dim", remedy))
            }
            (seen, _) => fields.bounded("cross_attention_dim", seen, CHANNEL_LIMIT),
        }
    }

    /// Refuses what could not be held in memory, before anything is allocated for it.
    fn check_size(&self, fields: &Fields) -> Result<()> {
        for side in self.size().into_iter().chain([self.sample_size]) {
            if side == 0 || side > SIDE_LIMIT || !side.is_multiple_of(self.patch_size) {
                let remedy = format!(
                    "a side of {side} must be a multiple of patch_size, {}, of at most {SIDE_LIMIT}",
                    self.patch_size
                );
                return Err(fields.refuse("sample_size", remedy));
            }
        }
        let patches = self.size().map(|side| (side / self.patch_size) as u64);
        let tokens = patches[0] * patches[1];
        fields.check_tokens(tokens, self.num_attention_heads, self.width())?;
        fields.check_weights("num_layers", &self.graph().shapes(), ELEMENT_LIMIT)
    }
}
