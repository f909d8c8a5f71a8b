//! What the fields must be to each other, and how large.

use super::SD3Config;
use crate::Result;
use crate::fields::Fields;

const CHANNEL_LIMIT: usize = 1 << 16;
const SIDE_LIMIT: usize = 1 << 14;
const LAYER_LIMIT: usize = 256;
const PLACE_LIMIT: usize = 1 << 10;
const TOKEN_LIMIT: usize = 1 << 16;
/// Twice those of Stable Diffusion 3.5 Large.
const WEIGHT_LIMIT: u64 = 1 << 34;

impl SD3Config {
    /// Refuses what diffusers could not build, what is not supported, and what no memory could hold.
    pub(super) fn check(&self, fields: &Fields) -> Result<()> {
        fields.bounded("sample_size", self.sample_size, SIDE_LIMIT)?;
        fields.bounded("patch_size", self.patch_size, SIDE_LIMIT)?;
        fields.bounded("in_channels", self.in_channels, CHANNEL_LIMIT)?;
        fields.bounded("num_layers", self.num_layers, LAYER_LIMIT)?;
        fields.bounded("attention_head_dim", self.attention_head_dim, CHANNEL_LIMIT)?;
        fields.bounded("num_attention_heads", self.num_attention_heads, CHANNEL_LIMIT)?;
        fields.bounded("joint_attention_dim", self.joint_attention_dim, CHANNEL_LIMIT)?;
        fields.bounded("pooled_projection_dim", self.pooled_projection_dim, CHANNEL_LIMIT)?;
        fields.bounded("out_channels", self.out_channels, CHANNEL_LIMIT)?;
        fields.bounded("pos_embed_max_size", self.pos_embed_max_size, PLACE_LIMIT)?;
        fields.bounded("tokens of a prompt", self.asked.tokens, TOKEN_LIMIT)?;
        self.check_width(fields)?;
        self.check_size(fields)
    }

    fn check_width(&self, fields: &Fields) -> Result<()> {
        let (width, heads) = (self.width(), self.num_attention_heads);
        fields.check_token_width(width, heads, CHANNEL_LIMIT)?;
        if self.caption_projection_dim != width {
            let remedy = format!(
                "must be {width}, num_attention_heads times attention_head_dim: tokens of prompts are as wide as patches"
            );
            return Err(fields.refuse("caption_projection_dim", remedy));
        }
        Ok(())
    }

    /// Refuses what could not be held in memory, before anything is allocated for it.
    fn check_size(&self, fields: &Fields) -> Result<()> {
        let most = self.patch_size.saturating_mul(self.pos_embed_max_size).min(SIDE_LIMIT);
        for side in self.size().into_iter().chain([self.sample_size]) {
            if side == 0 || side > most || !side.is_multiple_of(self.patch_size) {
                let remedy = format!(
                    "a side of {side} must be a multiple of patch_size, {}, of at most {most}: there are \
                     pos_embed_max_size, {}, places for patches",
                    self.patch_size, self.pos_embed_max_size
                );
                return Err(fields.refuse("sample_size", remedy));
            }
        }
        let patches = self.size().map(|side| (side / self.patch_size) as u64);
        let tokens = patches[0] * patches[1] + self.asked.tokens as u64;
        fields.check_tokens(tokens, self.num_attention_heads, self.width())?;
        fields.check_weights("num_layers", &self.graph().shapes(), WEIGHT_LIMIT)
    }
}
