//! What the fields must be to each other, and how large.

use super::{TimeEmbedding, UNet2DConfig};
use crate::Result;
use crate::fields::{ELEMENT_LIMIT, Fields};

const CHANNEL_LIMIT: usize = 1 << 16;
const LEVEL_LIMIT: usize = 12;
const LAYER_LIMIT: usize = 64;
const TABLE_LIMIT: usize = 1 << 24;

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
        if self.down_block_types.len() != levels {
            return Err(fields.refuse("down_block_types", remedy));
        }
        if self.up_block_types.len() != levels {
            return Err(fields.refuse("up_block_types", remedy));
        }
        fields.check_sample_size(self.sides(), levels)
    }

    fn check_numbers(&self, fields: &Fields) -> Result<()> {
        fields.bounded("in_channels", self.in_channels, CHANNEL_LIMIT)?;
        fields.bounded("out_channels", self.out_channels, CHANNEL_LIMIT)?;
        fields.bounded("time_embedding_dim", self.time_embedding_dim, 4 * CHANNEL_LIMIT)?;
        fields.bounded("layers_per_block", self.layers_per_block, LAYER_LIMIT)?;
        fields.bounded("norm_num_groups", self.norm_num_groups, CHANNEL_LIMIT)?;
        fields.bounded("attn_norm_num_groups", self.attn_norm_num_groups, CHANNEL_LIMIT)?;
        fields.bounded("num_class_embeds", self.num_class_embeds, TABLE_LIMIT)?;
        fields.bounded("num_train_timesteps", self.num_train_timesteps, TABLE_LIMIT)?;
        for (name, number) in [
            ("freq_shift", self.freq_shift),
            ("mid_block_scale_factor", self.mid_block_scale_factor),
            ("norm_eps", self.norm_eps),
        ] {
            if number.abs() > f64::from(f32::MAX) {
                let remedy = "must be a number of at most 3.4e38, as f32 holds";
                return Err(fields.refuse(name, remedy));
            }
        }
        if self.downsample_padding > 1 {
            let remedy = "must be 0 or 1; others do not halve the image";
            return Err(fields.refuse("downsample_padding", remedy));
        }
        let groups = self.norm_num_groups;
        for (i, &channels) in self.block_out_channels.iter().enumerate() {
            if channels == 0 || channels > CHANNEL_LIMIT || !channels.is_multiple_of(groups) {
                let remedy = format!(
                    "must be a multiple of norm_num_groups, {groups}, of at most {CHANNEL_LIMIT}"
                );
                return Err(fields.refuse_entry("block_out_channels", i, remedy));
            }
        }
        fields.bounded("attention_head_dim", self.attention_head_dim, CHANNEL_LIMIT)?;
        if let Some(head) = self.attention_head_dim
            && let Some(channels) =
                self.attention_widths().find(|width| !width.is_multiple_of(head))
        {
            let remedy =
                format!("must divide the {channels} channels of every block with attention");
            return Err(fields.refuse("attention_head_dim", remedy));
        }
        let last = self.block_out_channels[self.levels() - 1];
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
        if self.time_embedding_type == TimeEmbedding::Learned && self.num_train_timesteps.is_none()
        {
            let remedy = "must be set, since time_embedding_type is learned: it is the number of rows of the table";
            return Err(fields.refuse("num_train_timesteps", remedy));
        }
        if self.time_embedding_type == TimeEmbedding::Positional {
            let half = self.block_out_channels[0] / 2;
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
        self.sides().map(|side| (side >> level) as u64).into_iter().product()
    }

    /// Floats of a level's widest map: what enters its up blocks, what comes from below and the skip.
    fn map(&self, level: usize) -> u64 {
        let below = self.block_out_channels[(level + 1).min(self.levels() - 1)];
        self.pixels(level)
            * (self.block_out_channels[level] + below.max(self.block_out_channels[level])) as u64
    }

    /// Refuses what could not be held in memory, before anything is allocated for it.
    fn check_size(&self, fields: &Fields) -> Result<()> {
        fields.check_weights("block_out_channels", &self.graph().shapes(), ELEMENT_LIMIT)?;
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
