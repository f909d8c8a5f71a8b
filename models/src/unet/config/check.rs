//! What the fields must be to each other, and how large.

use super::{TimeEmbedding, UNet2DConfig};
use crate::Result;
use crate::fields::Fields;

pub(super) const CHANNEL_LIMIT: usize = 1 << 16;
pub(super) const SIDE_LIMIT: usize = 1 << 14;
const LEVEL_LIMIT: usize = 12;
pub(super) const LAYER_LIMIT: usize = 64;
pub(super) const TABLE_LIMIT: usize = 1 << 24;
/// The most elements one sample's largest activation, and the most weights the network, may have:
/// 16 GiB in f32, beyond which a mistyped number is likelier than a network.
const ELEMENT_LIMIT: u64 = 1 << 32;

impl UNet2DConfig {
    /// Refuses what diffusers could not build, or what no memory could hold.
    pub(super) fn check(&self, fields: &Fields) -> Result<()> {
        self.check_levels(fields)?;
        self.check_numbers(fields)?;
        self.check_size(fields)
    }

    fn check_levels(&self, fields: &Fields) -> Result<()> {
        let levels = self.levels();
        if levels == 0 || levels > LEVEL_LIMIT {
            return Err(fields
                .refuse("block_out_channels", format!("must have 1 to {LEVEL_LIMIT} entries")));
        }
        let remedy = format!("must have as many entries as block_out_channels, {levels}");
        if self.down_blocks.len() != levels {
            return Err(fields.refuse("down_block_types", remedy));
        }
        if self.up_blocks.len() != levels {
            return Err(fields.refuse("up_block_types", remedy));
        }
        let step = 1 << (levels - 1);
        if !self.height.is_multiple_of(step) || !self.width.is_multiple_of(step) {
            return Err(fields.refuse(
                "sample_size",
                format!(
                    "must be a multiple of {step}, since {levels} levels halve it {} times",
                    levels - 1
                ),
            ));
        }
        Ok(())
    }

    fn check_numbers(&self, fields: &Fields) -> Result<()> {
        let groups = self.norm_num_groups;
        for (i, channels) in self.channels.iter().enumerate() {
            if !channels.is_multiple_of(groups) {
                let remedy = format!("must be a multiple of norm_num_groups, {groups}");
                return Err(fields.refuse_entry("block_out_channels", i, remedy));
            }
        }
        if let Some(head) = self.attention_head_dim
            && let Some(channels) =
                self.attention_widths().find(|width| !width.is_multiple_of(head))
        {
            let remedy =
                format!("must divide the {channels} channels of every block with attention");
            return Err(fields.refuse("attention_head_dim", remedy));
        }
        let last = self.channels[self.levels() - 1];
        if self.attn_norm_num_groups.is_some_and(|groups| !last.is_multiple_of(groups)) {
            let remedy = format!("must divide the {last} channels of the mid block");
            return Err(fields.refuse("attn_norm_num_groups", remedy));
        }
        if self.norm_eps < 0.0 {
            return Err(fields.refuse("norm_eps", "must not be negative"));
        }
        if !(0.0..=1.0).contains(&self.dropout) {
            return Err(fields.refuse("dropout", "must be from 0 to 1"));
        }
        if self.mid_block_scale_factor as f32 == 0.0 {
            return Err(fields.refuse(
                "mid_block_scale_factor",
                "must not be 0, since activations are divided by it",
            ));
        }
        if self.time_embedding == TimeEmbedding::Learned && self.num_train_timesteps.is_none() {
            let remedy = "must be set, since time_embedding_type is learned: it is the number of rows of the table";
            return Err(fields.refuse("num_train_timesteps", remedy));
        }
        if self.time_embedding == TimeEmbedding::Positional {
            let half = self.channels[0] / 2;
            if half == 0 {
                let remedy = "must be at least 2: half of it is the number of frequencies of the time embedding";
                return Err(fields.refuse_entry("block_out_channels", 0, remedy));
            }
            if self.freq_shift >= half as f64 {
                return Err(fields.refuse(
                    "freq_shift",
                    format!("must be below block_out_channels[0] / 2, {half}"),
                ));
            }
        }
        Ok(())
    }

    fn pixels(&self, level: usize) -> u64 {
        ((self.height >> level) * (self.width >> level)) as u64
    }

    /// Floats of a level's widest map: what enters its up blocks, what comes from below and the skip.
    fn map(&self, level: usize) -> u64 {
        let below = self.channels[(level + 1).min(self.levels() - 1)];
        self.pixels(level) * (self.channels[level] + below.max(self.channels[level])) as u64
    }

    /// Refuses what could not be held in memory, before anything is allocated for it.
    fn check_size(&self, fields: &Fields) -> Result<()> {
        let weights: u64 = self
            .graph()
            .shapes()
            .values()
            .map(|shape| shape.iter().map(|&side| side as u64).product::<u64>())
            .sum();
        if weights > ELEMENT_LIMIT {
            let remedy = format!(
                "the network would have {weights} weights; at most {ELEMENT_LIMIT} are supported"
            );
            return Err(fields.refuse("block_out_channels", remedy));
        }
        for level in 0..self.levels() {
            let (pixels, activation) = (self.pixels(level), self.map(level));
            // A 3×3 convolution gathers nine values for each of at most 512 pixels at a time: small beside these.
            let heads = self.heads(level).unwrap_or(0) as u64;
            let scores = pixels.saturating_mul(pixels).saturating_mul(heads);
            if activation.max(scores) > ELEMENT_LIMIT {
                let what = if scores > activation { "attention scores" } else { "activations" };
                let remedy = format!(
                    "level {level} would have {} {what} per sample; at most {ELEMENT_LIMIT} are supported",
                    activation.max(scores)
                );
                return Err(fields.refuse("sample_size", remedy));
            }
        }
        Ok(())
    }
}
