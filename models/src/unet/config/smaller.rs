//! The networks that are one step smaller.

use super::{Down, UNet2DConfig, Up};
use crate::unet::plan::Resample;

/// Widths of a level that are tried below its own, at most.
const WIDTHS: usize = 8;
/// Channels that a narrower level is a multiple of, where the norms' groups allow it: half a vector of a processor.
const UNIT: usize = 8;

impl UNet2DConfig {
    /// Networks like this one with one thing less each, in directions: of every level fewer channels, from many to few; a level
    /// without attention; the middle without attention; no middle. Norms have the most groups that divide all widths; what no
    /// folder could describe is left out.
    pub(super) fn all_smaller(&self) -> Vec<Vec<Self>> {
        let levels = 0..self.levels();
        let narrower = levels.clone().map(|level| {
            let width = self.block_out_channels[level];
            let unit = common(self.norm_num_groups, UNIT);
            let unit = unit * width.div_ceil(unit * WIDTHS);
            let widths = (1..=(width - 1) / unit).rev().map(|units| units * unit);
            widths.map(|width| self.with_width(level, width)).collect()
        });
        let plainer = levels.map(|level| vec![self.without_attention(level)]);
        let middle = Self { add_attention: false, ..self.clone() };
        let bottomless = Self { mid_block_type: None, ..middle.clone() };
        let all = narrower.chain(plainer).chain([vec![middle], vec![bottomless]]);
        let valid = |config: Self| {
            let read = Self::from_json(&config.to_json(), "a smaller config.json").ok()?;
            (read.graph().shapes() != self.graph().shapes()).then_some(read)
        };
        all.map(|direction: Vec<Self>| direction.into_iter().filter_map(valid).collect())
            .filter(|direction: &Vec<Self>| !direction.is_empty())
            .collect()
    }

    fn with_width(&self, level: usize, width: usize) -> Self {
        let mut narrow = self.clone();
        narrow.block_out_channels[level] = width;
        narrow.norm_num_groups =
            narrow.block_out_channels.iter().fold(self.norm_num_groups, |a, &b| common(a, b));
        let deepest = narrow.block_out_channels[self.levels() - 1];
        narrow.attn_norm_num_groups = self.attn_norm_num_groups.map(|it| common(it, deepest));
        narrow.attention_head_dim = self.heads_as_in(&narrow);
        narrow
    }

    fn without_attention(&self, level: usize) -> Self {
        let mut plain = self.clone();
        let (down, up) = (level, self.levels() - 1 - level);
        if plain.down_block_types[down] == Down::Attention {
            plain.down_block_types[down] =
                if self.downsample_type == Resample::Resnet { Down::Resnet } else { Down::Plain };
        }
        if plain.up_block_types[up] == Up::Attention {
            plain.up_block_types[up] =
                if self.upsample_type == Resample::Resnet { Up::Resnet } else { Up::Plain };
        }
        plain
    }
}

/// The greatest common divisor.
fn common(a: usize, b: usize) -> usize {
    if b == 0 { a } else { common(b, a % b) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_direction_has_one_thing_less() {
        let config = json!({
            "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [32, 96],
            "norm_num_groups": 16, "layers_per_block": 1, "attention_head_dim": 32,
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        });
        let config = UNet2DConfig::from_json(&config, "config.json").unwrap();
        let all = config.all_smaller();
        let told: Vec<Vec<_>> = all
            .iter()
            .map(|direction| direction.iter().map(|it| it.block_out_channels.clone()).collect())
            .collect();
        assert_eq!(told[0], [[24, 96], [16, 96], [8, 96]]);
        assert_eq!(told[1], [[32, 80], [32, 64], [32, 48], [32, 32], [32, 16]]);
        assert_eq!(told.len(), 5);
        assert_eq!(all[0][0].norm_num_groups, 8);
        // Three heads, as before; where three do not divide, one.
        let heads: Vec<_> = all[1].iter().map(|it| it.attention_head_dim.unwrap()).collect();
        assert_eq!(heads, [20, 32, 16, 32, 16]);
        assert_eq!(all[2][0].down_block_types, [Down::Plain; 2]);
        assert_eq!(all[2][0].up_block_types, [Up::Plain; 2]);
        assert!(!all[3][0].add_attention && all[3][0].mid_block_type.is_some());
        assert!(all[4][0].mid_block_type.is_none());
    }
}
