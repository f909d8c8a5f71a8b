//! What the fields must be to each other, and how large.

use serde_json::Value;

use super::{ClassEmbedType, Down, Middle, SIZES, UNet2DConditionConfig, Up};
use crate::Result;
use crate::each::Each;
use crate::fields::{ELEMENT_LIMIT, Fields};

const CHANNEL_LIMIT: usize = 1 << 16;
const LEVEL_LIMIT: usize = 12;
const LAYER_LIMIT: usize = 64;
const TABLE_LIMIT: usize = 1 << 24;
const KERNEL_LIMIT: usize = 7;
const TOKEN_LIMIT: usize = 1 << 16;

impl UNet2DConditionConfig {
    /// Refuses what diffusers could not build, what is not supported, and what no memory could hold.
    pub(super) fn check(&self, fields: &Fields) -> Result<()> {
        self.check_unsupported(fields)?;
        self.check_levels(fields)?;
        self.check_numbers(fields)?;
        self.check_attention(fields)?;
        self.check_depths(fields)?;
        self.check_size(fields)
    }

    fn check_unsupported(&self, fields: &Fields) -> Result<()> {
        let parts = [
            ("encoder_hid_dim", &self.encoder_hid_dim),
            ("encoder_hid_dim_type", &self.encoder_hid_dim_type),
            ("num_attention_heads", &self.num_attention_heads),
            ("time_embedding_act_fn", &self.time_embedding_act_fn),
            ("timestep_post_act", &self.timestep_post_act),
            ("cross_attention_norm", &self.cross_attention_norm),
        ];
        if let Some((name, _)) = parts.into_iter().find(|(_, part)| part.is_some()) {
            let remedy = match name {
                "num_attention_heads" => "must be null: attention_head_dim is the number of heads",
                _ => "must be null: other models are not supported",
            };
            return Err(fields.refuse(name, remedy));
        }
        let flags = [
            ("dual_cross_attention", self.dual_cross_attention),
            ("resnet_skip_time_act", self.resnet_skip_time_act),
            ("class_embeddings_concat", self.class_embeddings_concat),
        ];
        if let Some((name, _)) = flags.into_iter().find(|(_, flag)| *flag) {
            return Err(fields.refuse(name, "must be false: other models are not supported"));
        }
        if self.resnet_out_scale_factor != 1.0 {
            let remedy = "must be 1: other models are not supported";
            return Err(fields.refuse("resnet_out_scale_factor", remedy));
        }
        Ok(())
    }

    fn check_levels(&self, fields: &Fields) -> Result<()> {
        let levels = self.levels();
        if levels == 0 || levels > LEVEL_LIMIT {
            return Err(fields
                .refuse("block_out_channels", format!("must have 1 to {LEVEL_LIMIT} entries")));
        }
        let lists = [
            ("down_block_types", Some(self.down_block_types.len())),
            ("up_block_types", Some(self.up_block_types.len())),
            ("only_cross_attention", self.only_cross_attention.len()),
            ("layers_per_block", self.layers_per_block.len()),
            ("cross_attention_dim", self.cross_attention_dim.len()),
            ("attention_head_dim", self.attention_head_dim.len()),
            ("transformer_layers_per_block", self.transformer_layers_per_block.len()),
            (
                "reverse_transformer_layers_per_block",
                self.reverse_transformer_layers_per_block.as_ref().and_then(Each::len),
            ),
        ];
        for (name, len) in lists {
            if len.is_some_and(|len| len != levels) {
                let remedy = format!("must have as many entries as block_out_channels, {levels}");
                return Err(fields.refuse(name, remedy));
            }
        }
        fields.check_sample_size(self.sides(), levels)
    }

    fn check_numbers(&self, fields: &Fields) -> Result<()> {
        fields.bounded("in_channels", self.in_channels, CHANNEL_LIMIT)?;
        fields.bounded("out_channels", self.out_channels, CHANNEL_LIMIT)?;
        fields.bounded("norm_num_groups", self.norm_num_groups, CHANNEL_LIMIT)?;
        fields.bounded("time_embedding_dim", self.time_embedding_dim, 4 * CHANNEL_LIMIT)?;
        fields.bounded("num_class_embeds", self.num_class_embeds, TABLE_LIMIT)?;
        let vector = self.projection_class_embeddings_input_dim;
        fields.bounded("projection_class_embeddings_input_dim", vector, TABLE_LIMIT)?;
        fields.bounded("tokens of a prompt", self.tokens, TOKEN_LIMIT)?;
        for level in 0..self.levels() {
            let layers = self.layers_per_block.at(level).copied();
            fields.bounded("layers_per_block", layers, LAYER_LIMIT)?;
        }
        if self.in_channels > self.out_channels {
            let remedy = format!(
                "must be at most out_channels, {}: networks that are shown a mask or another image beside the \
                 noisy sample (inpainting has 9 channels) are not supported",
                self.out_channels
            );
            return Err(fields.refuse("in_channels", remedy));
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
        let half = self.block_out_channels[0] / 2;
        if half == 0 || self.freq_shift >= half as f64 || !self.freq_shift.is_finite() {
            let remedy = format!("must be below block_out_channels[0] / 2, {half}");
            return Err(fields.refuse("freq_shift", remedy));
        }
        for (name, side) in
            [("conv_in_kernel", self.conv_in_kernel), ("conv_out_kernel", self.conv_out_kernel)]
        {
            if side.is_multiple_of(2) || side > KERNEL_LIMIT {
                let remedy = format!("must be odd, and at most {KERNEL_LIMIT}");
                return Err(fields.refuse(name, remedy));
            }
        }
        if self.downsample_padding > 1 {
            let remedy = "must be 0 or 1; others do not halve the image";
            return Err(fields.refuse("downsample_padding", remedy));
        }
        if !(0.0..=f64::from(f32::MAX)).contains(&self.norm_eps) {
            return Err(fields.refuse("norm_eps", "must not be negative"));
        }
        if !(0.0..=1.0).contains(&self.dropout) {
            return Err(fields.refuse("dropout", "must be from 0 to 1"));
        }
        let scale = self.mid_block_scale_factor as f32;
        if scale == 0.0 || !scale.is_finite() {
            let remedy = "must not be 0, since activations are divided by it";
            return Err(fields.refuse("mid_block_scale_factor", remedy));
        }
        // Half of it less one is what frequencies are told apart by.
        if self.time_cond_proj_dim.is_some_and(|width| !(4..=CHANNEL_LIMIT).contains(&width)) {
            let remedy = format!("must be a whole number from 4 to {CHANNEL_LIMIT}, or null");
            return Err(fields.refuse("time_cond_proj_dim", remedy));
        }
        self.check_addition(fields)?;
        let projected = [ClassEmbedType::Projection, ClassEmbedType::SimpleProjection];
        if vector.is_none() && self.class_embed_type.is_some_and(|kind| projected.contains(&kind)) {
            let remedy = "must be set, since class_embed_type projects such a vector";
            return Err(fields.refuse("projection_class_embeddings_input_dim", remedy));
        }
        Ok(())
    }

    /// A pooled text and sines and cosines of sizes make up the vector, and no class is told by another.
    fn check_addition(&self, fields: &Fields) -> Result<()> {
        let width = self.addition_time_embed_dim;
        fields.bounded("addition_time_embed_dim", width, CHANNEL_LIMIT)?;
        if self.addition_embed_type.is_none() {
            return Ok(());
        }
        let vector = self.projection_class_embeddings_input_dim;
        for (name, missing) in [
            ("addition_time_embed_dim", width.is_none()),
            ("projection_class_embeddings_input_dim", vector.is_none()),
        ] {
            if missing {
                let remedy = "must be set, since addition_embed_type is text_time";
                return Err(fields.refuse(name, remedy));
            }
        }
        let half = width.unwrap_or(0) / 2;
        if width.is_some_and(|width| width % 2 == 1) || self.freq_shift >= half as f64 {
            let remedy = "must be even, and its half above freq_shift";
            return Err(fields.refuse("addition_time_embed_dim", remedy));
        }
        if self.pooled().is_none_or(|text| text == 0) {
            let least = SIZES * width.unwrap_or(0);
            let remedy = format!(
                "must be above {least}: {SIZES} times addition_time_embed_dim, and a pooled text"
            );
            return Err(fields.refuse("projection_class_embeddings_input_dim", remedy));
        }
        if self.class_embed_type.is_some() || self.num_class_embeds.is_some() {
            let name = if self.class_embed_type.is_some() {
                "class_embed_type"
            } else {
                "num_class_embeds"
            };
            let remedy = "must be null, since addition_embed_type is text_time";
            return Err(fields.refuse(name, remedy));
        }
        Ok(())
    }

    /// Heads divide the channels of every level that attends, and every level sees the same prompt.
    fn check_attention(&self, fields: &Fields) -> Result<()> {
        let seeing = || (0..self.levels()).filter(|&level| self.sees_prompt(Some(level)));
        for level in seeing() {
            let channels = self.block_out_channels[level];
            let heads = self.attention_head_dim.at(level).copied().unwrap_or(0);
            if heads == 0 || !channels.is_multiple_of(heads) {
                let remedy = format!(
                    "is the number of heads, and must divide the {channels} channels of level {level}"
                );
                return Err(refuse_at(
                    fields,
                    "attention_head_dim",
                    &self.attention_head_dim,
                    level,
                    remedy,
                ));
            }
        }
        let widths: Vec<(usize, usize)> = seeing()
            .filter_map(|level| Some((level, *self.cross_attention_dim.at(level)?)))
            .collect();
        for &(level, width) in &widths {
            let list = &self.cross_attention_dim;
            if width == 0 || width > CHANNEL_LIMIT {
                let remedy = format!("must be a whole number from 1 to {CHANNEL_LIMIT}");
                return Err(refuse_at(fields, "cross_attention_dim", list, level, remedy));
            }
            if width != widths[0].1 {
                let remedy = format!(
                    "must be {}, as at level {}: all see one prompt",
                    widths[0].1, widths[0].0
                );
                return Err(refuse_at(fields, "cross_attention_dim", list, level, remedy));
            }
        }
        Ok(())
    }

    fn check_depths(&self, fields: &Fields) -> Result<()> {
        let (name, reverse) =
            ("transformer_layers_per_block", "reverse_transformer_layers_per_block");
        let levels = self.levels();
        let nested = (0..levels)
            .any(|level| matches!(self.transformer_layers_per_block.at(level), Some(Each::One(_))));
        if nested && self.reverse_transformer_layers_per_block.is_none() {
            let remedy = "must be set, since transformer_layers_per_block has lists";
            return Err(fields.refuse(reverse, remedy));
        }
        for level in 0..levels {
            let layers = self.layers_per_block.at(level).copied().unwrap_or(0);
            let (up, own) = (levels - 1 - level, self.transformer_layers_per_block.at(level));
            let down = self.down_block_types[level] == Down::CrossAttention;
            let middle = level + 1 == levels && self.mid_block_type == Some(Middle::CrossAttention);
            let rising = self.up_block_types[up] == Up::CrossAttention;
            let mut ways = Vec::new();
            if down || middle {
                ways.push((name, level, if down { layers } else { 1 }, own));
            }
            if rising {
                let named = self.reverse_transformer_layers_per_block.as_ref();
                let (name, index) = named.map_or((name, level), |_| (reverse, up));
                ways.push((name, index, layers + 1, self.up_depths(up)));
            }
            for (name, index, layers, depths) in ways {
                let right = |depths: &Each<usize>| {
                    let bounded = |depth: &usize| *depth <= LAYER_LIMIT;
                    depths.len().is_none_or(|len| len == layers)
                        && (0..layers).all(|layer| depths.at(layer).is_some_and(bounded))
                };
                if !depths.is_some_and(right) {
                    let remedy = format!(
                        "entry {index} must be a whole number from 0 to {LAYER_LIMIT}, or {layers} of them"
                    );
                    return Err(fields.refuse(name, remedy));
                }
            }
        }
        Ok(())
    }

    fn check_size(&self, fields: &Fields) -> Result<()> {
        let graph = self.graph();
        fields.check_weights("block_out_channels", &graph.shapes(), ELEMENT_LIMIT)?;
        let map = graph.largest_map();
        if map > ELEMENT_LIMIT {
            let remedy = format!(
                "a map would have {map} numbers per sample; at most {ELEMENT_LIMIT} are supported"
            );
            return Err(fields.refuse("sample_size", remedy));
        }
        Ok(())
    }
}

/// An error about a field, or about an entry where it is a list.
fn refuse_at<T>(
    fields: &Fields,
    name: &str,
    list: &Each<T>,
    level: usize,
    remedy: String,
) -> crate::Error {
    match (list, fields.get(name)) {
        (Each::One(_), Some(Value::Array(_))) => fields.refuse_entry(name, level, remedy),
        _ => fields.refuse(name, remedy),
    }
}
