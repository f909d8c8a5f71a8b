//! The network as a graph: the way down, the bottom, the way up, and the vector that tells the time and the class.

use super::UNet2DConfig;
use super::config::{Block, ClassEmbedding, Resample, TimeEmbedding};
use crate::blocks::{self, Resize, Style, Time};
use crate::graph::{Epilogue, Graph, GraphBuilder, Map, Name, Scalar, Size, Wave};
use crate::kernels::{Function, Taps};

impl UNet2DConfig {
    /// What the network does.
    pub(crate) fn graph(&self) -> Graph {
        let mut builder = GraphBuilder::new(1);
        let embedding = embedding(self, &mut builder);
        let unet = UNet { config: self, builder, embedding, skips: Vec::new() };
        unet.network()
    }
}

/// Time and class as one vector, through the activation with which every residual block begins its use of it.
fn embedding(config: &UNet2DConfig, g: &mut GraphBuilder) -> Map {
    let root = Name::default();
    let width = config.time_width();
    let place = root.at("class_embedding");
    let class = match config.class_embedding {
        ClassEmbedding::None => None,
        ClassEmbedding::Table(rows) => {
            Some(g.row(&place.at("weight"), Scalar::Condition, rows, width))
        }
        ClassEmbedding::Timestep => {
            let number = projected(config, g, Scalar::Condition);
            Some(mlp(g, &place, number, width, None))
        }
        ClassEmbedding::Identity => Some(g.condition(width)),
    };
    let time = projected(config, g, Scalar::Time);
    let sum = mlp(g, &root.at("time_embedding"), time, width, class);
    g.activate(sum, config.activation.into())
}

/// A number as a vector, without the two layers that follow.
fn projected(config: &UNet2DConfig, g: &mut GraphBuilder, of: Scalar) -> Map {
    let (width, channels) = (config.projected_width(), config.channels[0]);
    let name = Name::default().at("time_proj.weight");
    let wave = match config.time_embedding {
        TimeEmbedding::Positional => {
            Wave::Positional { shift: config.freq_shift, cosines_first: config.flip_sin_to_cos }
        }
        TimeEmbedding::Fourier => Wave::Fourier { weight: g.weight(&name, &[channels]) },
        TimeEmbedding::Learned => {
            return g.row(&name, of, config.num_train_timesteps.unwrap_or(1), channels);
        }
    };
    g.sinusoid(of, wave, width)
}

/// Two linear layers with SiLU between them, plus `more`.
fn mlp(g: &mut GraphBuilder, name: &Name, x: Map, width: usize, more: Option<Map>) -> Map {
    let hidden = g.linear(&name.at("linear_1"), x, width);
    let active = g.activate(hidden, Function::Silu);
    let epilogue = Epilogue { residual: more, ..Epilogue::default() };
    g.linear_with(&name.at("linear_2"), active, width, epilogue)
}

struct UNet<'a> {
    config: &'a UNet2DConfig,
    builder: GraphBuilder,
    embedding: Map,
    /// What the way down leaves for the way up.
    skips: Vec<Map>,
}

impl UNet<'_> {
    fn network(mut self) -> Graph {
        let config = self.config;
        let UNet2DConfig { height, width, in_channels, .. } = *config;
        let root = Name::default();
        let (factor, shift) = if config.center_input_sample { (2.0, -1.0) } else { (1.0, 0.0) };
        let sample = Size { height, width, channels: in_channels };
        let x = self.builder.sample(sample, factor, shift);
        let mut x = self.convolve(&root.at("conv_in"), x, config.channels[0], Taps::SAME);

        self.skips.push(x);
        for level in 0..config.levels() {
            x = self.down(&root.at(format_args!("down_blocks.{level}")), level, x);
        }
        if config.mid_block {
            x = self.middle(&root.at("mid_block"), x);
        }
        for index in 0..config.levels() {
            x = self.up(&root.at(format_args!("up_blocks.{index}")), index, x);
        }

        let groups = (config.norm_num_groups, config.norm_eps);
        let name = root.at("conv_norm_out");
        let normed = self.builder.group_norm(&name, &[x], groups, None, Function::Silu);
        let y = self.convolve(&root.at("conv_out"), normed, config.out_channels, Taps::SAME);
        // With a Fourier embedding time is a noise level, and the answer a score (Song et al. 2021).
        self.builder.finish(y, config.time_embedding == TimeEmbedding::Fourier)
    }

    fn convolve(&mut self, name: &Name, x: Map, channels: usize, taps: Taps) -> Map {
        self.builder.convolve(name, x, channels, taps, Epilogue::default())
    }

    fn down(&mut self, name: &Name, level: usize, mut x: Map) -> Map {
        let config = self.config;
        let (block, channels) = (config.down_blocks[level], config.channels[level]);
        for index in 0..config.layers_per_block {
            x = self.layer(name, index, &[x], channels, block);
            self.skips.push(x);
        }
        if level + 1 < config.levels() {
            let place = name.at("downsamplers.0");
            x = match resample(block, config.downsample) {
                Resample::Resnet => self.resnet(&place, &[x], channels, Resize::Down, 1.0),
                Resample::Conv => {
                    // Without padding above and left there is one row and column of zeros below and right.
                    let padding = config.downsample_padding;
                    let taps = Taps { side: 3, stride: 2, padding, doubled: false };
                    self.convolve(&place.at("conv"), x, channels, taps)
                }
            };
            self.skips.push(x);
        }
        x
    }

    fn middle(&mut self, name: &Name, x: Map) -> Map {
        let config = self.config;
        let channels = config.channels[config.levels() - 1];
        let scale = config.mid_block_scale_factor;
        let mut y = self.resnet(&name.at("resnets.0"), &[x], channels, Resize::Keep, scale);
        if config.add_attention {
            // Without a number of its own the mid block's attention is normalised as the residual blocks
            // are, except beside scale-shift norms, where it is not normalised at all.
            let groups = config
                .attn_norm_num_groups
                .or_else(|| (!config.scale_shift).then_some(config.norm_num_groups));
            y = self.attention(&name.at("attentions.0"), y, groups, scale);
        }
        self.resnet(&name.at("resnets.1"), &[y], channels, Resize::Keep, scale)
    }

    fn up(&mut self, name: &Name, index: usize, mut x: Map) -> Map {
        let config = self.config;
        let level = config.levels() - 1 - index;
        let (block, channels) = (config.up_blocks[index], config.channels[level]);
        for i in 0..=config.layers_per_block {
            let skip = self.skips.pop();
            let skip = skip.expect("the way down left one map for each layer of the way up");
            x = self.layer(name, i, &[x, skip], channels, block);
        }
        if level > 0 {
            let place = name.at("upsamplers.0");
            x = match resample(block, config.upsample) {
                Resample::Resnet => self.resnet(&place, &[x], channels, Resize::Up, 1.0),
                Resample::Conv => {
                    let taps = Taps { doubled: true, ..Taps::SAME };
                    self.convolve(&place.at("conv"), x, channels, taps)
                }
            };
        }
        x
    }

    /// A residual block and the attention that may follow it.
    fn layer(
        &mut self,
        name: &Name,
        index: usize,
        sources: &[Map],
        channels: usize,
        block: Block,
    ) -> Map {
        let place = name.at(format_args!("resnets.{index}"));
        let x = self.resnet(&place, sources, channels, Resize::Keep, 1.0);
        if block != Block::Attention {
            return x;
        }
        let groups = Some(self.config.norm_num_groups);
        self.attention(&name.at(format_args!("attentions.{index}")), x, groups, 1.0)
    }

    /// A residual block that is told the time.
    fn resnet(
        &mut self,
        name: &Name,
        sources: &[Map],
        channels: usize,
        resize: Resize,
        scale: f64,
    ) -> Map {
        let config = self.config;
        let time = if config.scale_shift { Time::Modulates } else { Time::Added };
        let style = Style {
            norm: (config.norm_num_groups, config.norm_eps),
            function: config.activation.into(),
            time: Some(time(self.embedding)),
        };
        blocks::resnet(&mut self.builder, name, sources, channels, style, resize, scale)
    }

    /// Self-attention over the pixels of `x`, normalised in `groups` groups or not at all.
    fn attention(&mut self, name: &Name, x: Map, groups: Option<usize>, scale: f64) -> Map {
        let config = self.config;
        let channels = self.builder.size(x).channels;
        let heads = channels / config.attention_head_dim.unwrap_or(channels);
        let norm = groups.map(|groups| (groups, config.norm_eps));
        blocks::attention(&mut self.builder, name, x, heads, norm, scale)
    }
}

/// What resamples at the end of a block, `asked` being what blocks with attention do.
fn resample(block: Block, asked: Resample) -> Resample {
    match block {
        Block::Plain => Resample::Conv,
        Block::Resnet => Resample::Resnet,
        Block::Attention => asked,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;

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
            let channels = config.graph().channels().unwrap();
            let shapes = config.graph().shapes();
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
