//! Which tensor of a guided-diffusion state dict is which of a `UNet2DModel`.

use super::architecture::Architecture;
use crate::Result;
use crate::unet::UNet2DConfig;
use crate::weights::Shapes;

/// What becomes of a tensor.
pub(super) enum Target {
    /// It is the tensor of this name.
    Same(String),
    /// It is the three tensors of these names on top of each other.
    QueryKeyValue { names: [String; 3], heads: usize },
}

/// A tensor of the state dict.
pub(super) struct Entry {
    /// Its name there.
    pub(super) source: String,
    /// Its shape there.
    pub(super) shape: Vec<usize>,
    /// Its shape in the `UNet2DModel`.
    pub(super) reshaped: Vec<usize>,
    /// Where it goes.
    pub(super) target: Target,
}

/// Every tensor that the state dict must have.
pub(super) fn entries(architecture: &Architecture, config: &UNet2DConfig) -> Result<Vec<Entry>> {
    let shapes = config.graph().shapes();
    let mut walk = Walk { architecture, shapes, entries: Vec::new() };
    walk.network();
    debug_assert!(walk.shapes.is_empty(), "not mapped: {:?}", walk.shapes);
    Ok(walk.entries)
}

struct Walk<'a> {
    architecture: &'a Architecture,
    /// Tensors of the `UNet2DModel` that have no source yet.
    shapes: Shapes,
    entries: Vec<Entry>,
}

impl Walk<'_> {
    /// Follows the order in which guided-diffusion numbers its blocks.
    fn network(&mut self) {
        let Architecture { ref channels, ref attends, num_res_blocks, resblock_updown, .. } =
            *self.architecture;
        let last = channels.len() - 1;
        self.layer("time_embed.0", "time_embedding.linear_1");
        self.layer("time_embed.2", "time_embedding.linear_2");
        self.layer("label_emb", "class_embedding");
        self.layer("input_blocks.0.0", "conv_in");
        let mut block = 1;
        for (level, &attends) in attends.iter().enumerate() {
            let to = format!("down_blocks.{level}");
            for i in 0..num_res_blocks {
                self.resnet(&format!("input_blocks.{block}.0"), &format!("{to}.resnets.{i}"));
                if attends {
                    self.attention(
                        &format!("input_blocks.{block}.1"),
                        &format!("{to}.attentions.{i}"),
                    );
                }
                block += 1;
            }
            if level != last {
                let (from, to) =
                    (format!("input_blocks.{block}.0"), format!("{to}.downsamplers.0"));
                if resblock_updown {
                    self.resnet(&from, &to);
                } else {
                    self.layer(&format!("{from}.op"), &format!("{to}.conv"));
                }
                block += 1;
            }
        }
        self.resnet("middle_block.0", "mid_block.resnets.0");
        self.attention("middle_block.1", "mid_block.attentions.0");
        self.resnet("middle_block.2", "mid_block.resnets.1");
        let mut block = 0;
        for (index, level) in (0..=last).rev().enumerate() {
            let to = format!("up_blocks.{index}");
            for i in 0..=num_res_blocks {
                self.resnet(&format!("output_blocks.{block}.0"), &format!("{to}.resnets.{i}"));
                let mut next = 1;
                if attends[level] {
                    self.attention(
                        &format!("output_blocks.{block}.1"),
                        &format!("{to}.attentions.{i}"),
                    );
                    next = 2;
                }
                if level != 0 && i == num_res_blocks {
                    let from = format!("output_blocks.{block}.{next}");
                    let to = format!("{to}.upsamplers.0");
                    if resblock_updown {
                        self.resnet(&from, &to);
                    } else {
                        self.layer(&format!("{from}.conv"), &format!("{to}.conv"));
                    }
                }
                block += 1;
            }
        }
        self.layer("out.0", "conv_norm_out");
        self.layer("out.2", "conv_out");
    }

    fn resnet(&mut self, from: &str, to: &str) {
        const LAYERS: [(&str, &str); 6] = [
            ("in_layers.0", "norm1"),
            ("in_layers.2", "conv1"),
            ("emb_layers.1", "time_emb_proj"),
            ("out_layers.0", "norm2"),
            ("out_layers.3", "conv2"),
            ("skip_connection", "conv_shortcut"),
        ];
        for (source, target) in LAYERS {
            self.layer(&format!("{from}.{source}"), &format!("{to}.{target}"));
        }
    }

    fn attention(&mut self, from: &str, to: &str) {
        self.layer(&format!("{from}.norm"), &format!("{to}.group_norm"));
        for end in ["weight", "bias"] {
            // Linear layers here are one-dimensional convolutions there, with a kernel of one.
            let kernel = |shape: &[usize]| match *shape {
                [output, input] => vec![output, input, 1],
                _ => shape.to_vec(),
            };
            let names = ["to_q", "to_k", "to_v"].map(|name| format!("{to}.{name}.{end}"));
            if let [Some(shape), Some(_), Some(_)] =
                names.each_ref().map(|name| self.shapes.remove(name))
            {
                let heads = self.architecture.heads(shape[0]);
                let mut stacked = kernel(&shape);
                stacked[0] *= 3;
                let target = Target::QueryKeyValue { names, heads };
                let source = format!("{from}.qkv.{end}");
                self.entries.push(Entry { source, shape: stacked, reshaped: shape, target });
            }
            let name = format!("{to}.to_out.0.{end}");
            if let Some(reshaped) = self.shapes.remove(&name) {
                let (source, shape) = (format!("{from}.proj_out.{end}"), kernel(&reshaped));
                self.entries.push(Entry { source, shape, reshaped, target: Target::Same(name) });
            }
        }
    }

    /// Weight and bias of a layer, as far as the `UNet2DModel` has them.
    fn layer(&mut self, from: &str, to: &str) {
        for end in ["weight", "bias"] {
            let name = format!("{to}.{end}");
            if let Some(shape) = self.shapes.remove(&name) {
                let reshaped = shape.clone();
                let source = format!("{from}.{end}");
                self.entries.push(Entry { source, shape, reshaped, target: Target::Same(name) });
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    /// Tensors and weights that the state dict of these flags must have.
    fn size(flags: &Value) -> (usize, usize) {
        let architecture = Architecture::from_json(flags, "arch.json").unwrap();
        let entries = entries(&architecture, &architecture.config().unwrap()).unwrap();
        let weights = entries.iter().map(|entry| entry.shape.iter().product::<usize>());
        (entries.len(), weights.sum())
    }

    #[test]
    fn published_models_have_as_many_tensors_and_weights_as_their_own_code_makes() {
        let imagenet_64 = json!({
            "image_size": 64, "num_channels": 192, "num_res_blocks": 3, "num_head_channels": 64,
            "attention_resolutions": "32,16,8", "resblock_updown": true,
            "use_new_attention_order": true, "use_scale_shift_norm": true, "learn_sigma": true,
            "class_cond": true, "dropout": 0.1, "diffusion_steps": 1000,
            "noise_schedule": "cosine", "use_fp16": true,
        });
        assert_eq!(size(&imagenet_64), (541, 295_904_454));
        let lsun_256 = json!({
            "image_size": 256, "num_channels": 256, "num_res_blocks": 2, "num_head_channels": 64,
            "attention_resolutions": "32,16,8", "resblock_updown": true,
            "use_scale_shift_norm": true, "learn_sigma": true, "class_cond": false,
        });
        assert_eq!(size(&lsun_256), (566, 552_814_086));
    }
}
