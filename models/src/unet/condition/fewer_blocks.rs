//! Smaller networks by leaving out blocks, as BK-SDM does (Kim et al. 2023, arXiv 2305.15798, §3), and where the weights of
//! those that stay stand in the larger one.

use serde_json::{Value, json};

use super::UNet2DConditionConfig;
use crate::{Error, NetworkConfig, Result};

/// How many blocks stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FewerBlocks {
    /// One residual block and its transformer of two at each level on the way down, the first and the last of three on the
    /// way up.
    Base,
    /// Those, and nothing between the two ways.
    Small,
    /// Those, without the deepest level.
    Tiny,
}

impl FewerBlocks {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Base, Self::Small, Self::Tiny];

    /// Its name on a command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Base => "base",
            Self::Small => "small",
            Self::Tiny => "tiny",
        }
    }
}

/// Fields that may have an entry for each level, from the first.
const BY_LEVEL: [&str; 7] = [
    "block_out_channels",
    "down_block_types",
    "layers_per_block",
    "only_cross_attention",
    "cross_attention_dim",
    "attention_head_dim",
    "transformer_layers_per_block",
];
/// The same, from the last.
const BY_LEVEL_UP: [&str; 2] = ["up_block_types", "reverse_transformer_layers_per_block"];

impl UNet2DConditionConfig {
    /// The network with fewer blocks.
    ///
    /// # Errors
    /// [`Error::Value`] for one that has not two residual blocks at each level, or one level only.
    pub(crate) fn fewer_blocks(&self, how: FewerBlocks) -> Result<NetworkConfig> {
        let levels = self.levels();
        if (0..levels).any(|level| self.layers_per_block.at(level) != Some(&2)) {
            let remedy = format!(
                "must be 2 at every level for a student of fewer blocks ({}); take a narrower one, such as 0.5x",
                how.name()
            );
            let value = json!(self.layers_per_block);
            return Err(Error::value("teacher's layers_per_block", value, remedy));
        }
        if how == FewerBlocks::Tiny && levels < 2 {
            let remedy = "must be 2 or more for a student without the deepest (tiny); take small";
            return Err(Error::value("teacher's levels", levels, remedy));
        }
        let mut json = self.to_json();
        json["layers_per_block"] = json!(1);
        if how != FewerBlocks::Base {
            json["mid_block_type"] = Value::Null;
        }
        if how == FewerBlocks::Tiny {
            for name in BY_LEVEL {
                json[name].as_array_mut().map(Vec::pop);
            }
            for name in BY_LEVEL_UP {
                json[name].as_array_mut().map(|list| list.remove(0));
            }
        }
        let config = Self::from_json(&json, "the student of fewer blocks")?;
        Ok(Self { tokens: self.tokens, ..config }.into())
    }

    /// Where the weight `name` of a student of fewer blocks stands in this network: levels are counted from the image, and
    /// on the way up the last block of a level is the last.
    pub(crate) fn larger_name(&self, student: &Self, name: &str) -> String {
        let mut parts: Vec<String> = name.split('.').map(str::to_owned).collect();
        let number = |part: Option<&String>| part.and_then(|part| part.parse::<usize>().ok());
        let (block, layer) = (number(parts.get(1)), number(parts.get(3)));
        let (Some("up_blocks"), Some(block)) = (parts.first().map(String::as_str), block) else {
            return name.to_owned();
        };
        let (Some(deeper), Some(level)) =
            (self.levels().checked_sub(student.levels()), student.levels().checked_sub(block + 1))
        else {
            return name.to_owned();
        };
        parts[1] = (block + deeper).to_string();
        let layers = |config: &Self| config.layers_per_block.at(level).copied();
        let layered = matches!(parts.get(2).map(String::as_str), Some("resnets" | "attentions"));
        if let (true, Some(layer), Some(theirs)) = (layered, layer, layers(self))
            && layers(student) == Some(layer)
        {
            parts[3] = theirs.to_string();
        }
        parts.join(".")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Stable Diffusion 1.5's, narrower.
    fn teacher() -> UNet2DConditionConfig {
        let config = json!({
            "_class_name": "UNet2DConditionModel", "sample_size": 16, "cross_attention_dim": 24,
            "block_out_channels": [16, 32, 64, 64], "norm_num_groups": 4, "attention_head_dim": 4,
        });
        UNet2DConditionConfig::from_json(&config, "config.json").unwrap()
    }

    /// As BK-SDM's files have them: `nota-ai/bk-sdm-base`, `-small` and `-tiny`.
    #[test]
    fn blocks_are_left_out_as_in_bk_sdm() {
        let teacher = teacher();
        let all = teacher.graph().shapes();
        for (how, middle, channels) in [
            (FewerBlocks::Base, json!("UNetMidBlock2DCrossAttn"), json!([16, 32, 64, 64])),
            (FewerBlocks::Small, Value::Null, json!([16, 32, 64, 64])),
            (FewerBlocks::Tiny, Value::Null, json!([16, 32, 64])),
        ] {
            let student = teacher.fewer_blocks(how).unwrap();
            let json = student.to_json();
            assert_eq!(json["layers_per_block"], 1);
            assert_eq!(
                (&json["mid_block_type"], &json["block_out_channels"]),
                (&middle, &channels)
            );
            let NetworkConfig::UNetCondition(own) = &student else { panic!() };
            // Every weight that stays has the shape that it has in the teacher.
            for (name, shape) in student.weight_shapes() {
                let larger = teacher.larger_name(own, &name);
                assert_eq!(all.get(&larger), Some(&shape), "{how:?}: {name} of {larger}");
            }
        }
        let tiny = teacher.fewer_blocks(FewerBlocks::Tiny).unwrap();
        let NetworkConfig::UNetCondition(tiny) = &tiny else { panic!() };
        for (name, larger) in [
            ("down_blocks.1.resnets.0.conv1.weight", "down_blocks.1.resnets.0.conv1.weight"),
            ("up_blocks.0.resnets.1.conv1.weight", "up_blocks.1.resnets.2.conv1.weight"),
            ("up_blocks.2.attentions.0.norm.bias", "up_blocks.3.attentions.0.norm.bias"),
            ("up_blocks.1.upsamplers.0.conv.weight", "up_blocks.2.upsamplers.0.conv.weight"),
        ] {
            assert_eq!(teacher.larger_name(tiny, name), larger);
        }
    }

    #[test]
    fn a_network_without_blocks_to_spare_is_refused() {
        let mut json = teacher().to_json();
        json["layers_per_block"] = json!(1);
        let shallow = UNet2DConditionConfig::from_json(&json, "config.json").unwrap();
        let problem = shallow.fewer_blocks(FewerBlocks::Base).unwrap_err().to_string();
        assert!(problem.contains("layers_per_block") && problem.contains("0.5x"), "{problem}");
    }
}
