//! The channel sets of the U-Net, in the order in which its blocks are built.

use super::config::{Block, ClassEmbedding, Resample, TimeEmbedding, UNet2DConfig};
use crate::channels::{Channels, Choice};

const PIXELS: &[usize] = &[];
const IMAGE: &[usize] = &[];

impl UNet2DConfig {
    /// Which channels stand or fall together; nothing for networks whose time is told by random
    /// frequencies, or which take a vector as wide as they are: those have no narrower twin.
    pub(crate) fn channels(&self) -> Option<Channels> {
        let unfit = self.time_embedding == TimeEmbedding::Fourier
            || self.class_embedding == ClassEmbedding::Identity;
        (!unfit).then(|| Walk::new(self).network())
    }
}

struct Walk<'a> {
    config: &'a UNet2DConfig,
    channels: Channels,
    /// The vector that tells the time and the class.
    time: usize,
}

impl<'a> Walk<'a> {
    fn new(config: &'a UNet2DConfig) -> Self {
        let mut channels = Channels::default();
        let phases = channels.set(config.projected_width(), 1);
        if config.time_embedding == TimeEmbedding::Positional {
            channels.sets[phases].choice = Choice::Frequencies;
        } else {
            channels.weights.insert("time_proj.weight".into(), vec![vec![], vec![phases]]);
        }
        let time = channels.set(config.time_width(), 1);
        let mut mlp = |place: &str| {
            let hidden = channels.set(config.time_width(), 1);
            channels.layer(&format!("{place}.linear_1"), &[&[hidden], &[phases]]);
            channels.layer(&format!("{place}.linear_2"), &[&[time], &[hidden]]);
        };
        mlp("time_embedding");
        if config.class_embedding == ClassEmbedding::Timestep {
            mlp("class_embedding");
        }
        if let ClassEmbedding::Table(_) = config.class_embedding {
            channels.weights.insert("class_embedding.weight".into(), vec![vec![], vec![time]]);
        }
        Self { config, channels, time }
    }

    fn network(mut self) -> Channels {
        let config = self.config;
        let levels = config.levels();
        let mut x = self.stream(config.channels[0]);
        self.convolution("conv_in", x, IMAGE);
        let mut skips = vec![x];
        for level in 0..levels {
            let (place, block) = (format!("down_blocks.{level}"), config.down_blocks[level]);
            for i in 0..config.layers_per_block {
                x = self.layer(&place, i, &[x], config.channels[level], block);
                skips.push(x);
            }
            if level + 1 < levels {
                let place = format!("{place}.downsamplers.0");
                x = self.resampler(&place, x, block, config.downsample);
                skips.push(x);
            }
        }
        if config.mid_block {
            let width = config.channels[levels - 1];
            x = self.resnet("mid_block.resnets.0", &[x], width);
            if config.add_attention {
                let normed = config.attn_norm_num_groups.is_some() || !config.scale_shift;
                self.attention("mid_block.attentions.0", x, normed);
            }
            x = self.resnet("mid_block.resnets.1", &[x], width);
        }
        for index in 0..levels {
            let level = levels - 1 - index;
            let (place, block) = (format!("up_blocks.{index}"), config.up_blocks[index]);
            for i in 0..=config.layers_per_block {
                // There are as many ways up as ways down.
                let skip = skips.pop().unwrap_or_default();
                x = self.layer(&place, i, &[x, skip], config.channels[level], block);
            }
            if level > 0 {
                x = self.resampler(&format!("{place}.upsamplers.0"), x, block, config.upsample);
            }
        }
        self.norm("conv_norm_out", &[x]);
        self.channels.layer("conv_out", &[IMAGE, &[x], PIXELS, PIXELS]);
        self.channels
    }

    fn stream(&mut self, width: usize) -> usize {
        self.channels.set(width, self.config.norm_num_groups)
    }

    fn norm(&mut self, place: &str, sets: &[usize]) {
        self.channels.layer(place, &[sets]);
    }

    fn convolution(&mut self, place: &str, output: usize, input: &[usize]) {
        self.channels.layer(place, &[&[output], input, PIXELS, PIXELS]);
    }

    /// A residual block and the attention that may follow it.
    fn layer(
        &mut self,
        place: &str,
        index: usize,
        input: &[usize],
        width: usize,
        block: Block,
    ) -> usize {
        let x = self.resnet(&format!("{place}.resnets.{index}"), input, width);
        if block == Block::Attention {
            self.attention(&format!("{place}.attentions.{index}"), x, true);
        }
        x
    }

    /// What is added to its input must have the input's channels; a shortcut may choose others.
    fn resnet(&mut self, place: &str, input: &[usize], width: usize) -> usize {
        let inside = self.stream(width);
        let input_width: usize = input.iter().map(|&set| self.channels.sets[set].width).sum();
        let output = match input {
            [x] if input_width == width => *x,
            _ => {
                let output = self.stream(width);
                self.convolution(&format!("{place}.conv_shortcut"), output, input);
                output
            }
        };
        self.norm(&format!("{place}.norm1"), input);
        self.convolution(&format!("{place}.conv1"), inside, input);
        // Scale and shift.
        let told: &[usize] = if self.config.scale_shift { &[inside, inside] } else { &[inside] };
        let time = self.time;
        self.channels.layer(&format!("{place}.time_emb_proj"), &[told, &[time]]);
        self.norm(&format!("{place}.norm2"), &[inside]);
        self.convolution(&format!("{place}.conv2"), output, &[inside]);
        output
    }

    fn attention(&mut self, place: &str, x: usize, normed: bool) {
        let width = self.channels.sets[x].width;
        let heads = width / self.config.attention_head_dim.unwrap_or(width);
        let scores = self.channels.set(width, heads);
        let values = self.channels.set(width, heads);
        if normed {
            self.norm(&format!("{place}.group_norm"), &[x]);
        }
        self.channels.layer(&format!("{place}.to_q"), &[&[scores], &[x]]);
        self.channels.layer(&format!("{place}.to_k"), &[&[scores], &[x]]);
        self.channels.layer(&format!("{place}.to_v"), &[&[values], &[x]]);
        self.channels.layer(&format!("{place}.to_out.0"), &[&[x], &[values]]);
    }

    fn resampler(&mut self, place: &str, x: usize, block: Block, attention: Resample) -> usize {
        let by = match block {
            Block::Plain => Resample::Conv,
            Block::Resnet => Resample::Resnet,
            Block::Attention => attention,
        };
        let width = self.channels.sets[x].width;
        match by {
            Resample::Resnet => self.resnet(place, &[x], width),
            Resample::Conv => {
                let output = self.stream(width);
                self.convolution(&format!("{place}.conv"), output, &[x]);
                output
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;
    use crate::unet::UNet2DModel;

    /// Sets lie along every dimension of every weight, as wide as it is.
    #[test]
    fn sets_account_for_every_weight() {
        let configs = [
            json!({}),
            json!({"num_class_embeds": 3, "resnet_time_scale_shift": "scale_shift", "out_channels": 2,
                "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
                "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
                "downsample_type": "resnet", "upsample_type": "resnet"}),
            json!({"class_embed_type": "timestep", "block_out_channels": [16, 16]}),
            json!({"mid_block_type": null, "time_embedding_type": "learned",
                "num_train_timesteps": 10, "layers_per_block": 2}),
            json!({"add_attention": false, "attn_norm_num_groups": 2}),
        ];
        for more in configs {
            let mut config = json!({
                "sample_size": 8, "in_channels": 1, "out_channels": 1, "norm_num_groups": 4,
                "block_out_channels": [16, 32], "layers_per_block": 1, "attention_head_dim": 8,
                "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
                "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
            });
            for (name, value) in more.as_object().unwrap() {
                config[name] = value.clone();
            }
            let config = UNet2DConfig::from_json(&config, "config.json").unwrap();
            let channels = config.channels().unwrap();
            let shapes = UNet2DModel::weight_shapes(&config).unwrap();
            let names: Vec<_> = shapes.keys().collect();
            assert_eq!(channels.weights.keys().collect::<Vec<_>>(), names, "{more}");
            for (name, shape) in shapes {
                let dimensions = &channels.weights[&name];
                assert_eq!(dimensions.len(), shape.len(), "{name}");
                for (sets, side) in dimensions.iter().zip(shape) {
                    let width: usize = sets.iter().map(|&set| channels.sets[set].width).sum();
                    assert!(sets.is_empty() || width == side, "{name}: {width}, not {side}");
                }
            }
        }
    }
}
