//! What a `UNet2DModel` consists of, and the vector of time and class.

use super::{ClassEmbedType, Down, TimeEmbedding, TimeScaleShift, UNet2DConfig, Up};
use crate::graph::{Graph, GraphBuilder, Map, Name, Scalar, Size, Wave};
use crate::kernels::Function;
use crate::unet::graph::{embedded, graph};
use crate::unet::plan::{After, Block, Level, Middle, Plan, Resample};

impl UNet2DConfig {
    /// What the network does.
    pub(crate) fn graph(&self) -> Graph {
        let mut builder = GraphBuilder::new(1);
        let vector = self.embedding(&mut builder);
        graph(&self.plan(), builder, vector)
    }

    fn plan(&self) -> Plan {
        let last = self.levels() - 1;
        let level = |level: usize| Level {
            channels: self.block_out_channels[level],
            layers: self.layers_per_block,
            down: self.down(level),
            up: self.up(level),
        };
        let deepest = self.block_out_channels[last];
        let middle = match (self.mid_block_type, self.add_attention) {
            (None, _) => Middle::Nothing,
            (Some(_), false) => Middle::Two(After::Nothing),
            (Some(_), true) => {
                // Without a number of its own the mid block's attention is normalised as the residual blocks
                // are, except beside scale-shift norms, where it is not normalised at all.
                let groups = self
                    .attn_norm_num_groups
                    .or_else(|| (!self.modulated()).then_some(self.norm_num_groups));
                Middle::Two(After::Attention { heads: self.heads_of(deepest), groups })
            }
        };
        let [height, width] = self.sides();
        Plan {
            sample: Size { height, width, channels: self.in_channels },
            centered: self.center_input_sample,
            outputs: self.out_channels,
            kernels: [3, 3],
            levels: (0..self.levels()).map(level).collect(),
            middle,
            middle_scale: self.mid_block_scale_factor,
            norm: (self.norm_num_groups, self.norm_eps),
            function: self.act_fn.into(),
            last_function: Function::Silu,
            modulated: self.modulated(),
            padding: self.downsample_padding,
            // With a Fourier embedding time is a noise level, and the answer a score (Song et al. 2021).
            divided: self.time_embedding_type == TimeEmbedding::Fourier,
        }
    }

    /// Whether the time scales and shifts norms.
    fn modulated(&self) -> bool {
        self.resnet_time_scale_shift == TimeScaleShift::ScaleShift
    }

    fn down(&self, level: usize) -> Block {
        match self.down_block_types[level] {
            Down::Plain => Block { after: After::Nothing, resample: Resample::Conv },
            Down::Resnet => Block { after: After::Nothing, resample: Resample::Resnet },
            Down::Attention => {
                Block { after: self.attention(level), resample: self.downsample_type }
            }
        }
    }

    fn up(&self, level: usize) -> Block {
        match self.up_block_types[self.levels() - 1 - level] {
            Up::Plain => Block { after: After::Nothing, resample: Resample::Conv },
            Up::Resnet => Block { after: After::Nothing, resample: Resample::Resnet },
            Up::Attention => Block { after: self.attention(level), resample: self.upsample_type },
        }
    }

    fn attention(&self, level: usize) -> After {
        let heads = self.heads_of(self.block_out_channels[level]);
        After::Attention { heads, groups: Some(self.norm_num_groups) }
    }

    fn heads_of(&self, channels: usize) -> usize {
        channels / self.attention_head_dim.unwrap_or(channels)
    }

    /// Time and class as one vector, through the activation with which every residual block begins its use of it.
    fn embedding(&self, g: &mut GraphBuilder) -> Map {
        let root = Name::default();
        let width = self.time_width();
        let place = root.at("class_embedding");
        let class = match (self.class_embed_type, self.num_class_embeds) {
            (None, None) => None,
            (None, Some(rows)) => Some(g.row(&place.at("weight"), Scalar::Condition, rows, width)),
            (Some(ClassEmbedType::Timestep), _) => {
                let number = self.projected(g, Scalar::Condition);
                Some(embedded(g, &place, number, width, Function::Silu, None))
            }
            (Some(ClassEmbedType::Identity), _) => Some(g.condition(width)),
        };
        let time = self.projected(g, Scalar::Time);
        let sum = embedded(g, &root.at("time_embedding"), time, width, Function::Silu, class);
        g.activate(sum, self.act_fn.into())
    }

    /// A number as a vector, without the two layers that follow.
    fn projected(&self, g: &mut GraphBuilder, of: Scalar) -> Map {
        let (width, channels) = (self.projected_width(), self.block_out_channels[0]);
        let name = Name::default().at("time_proj.weight");
        let wave = match self.time_embedding_type {
            TimeEmbedding::Positional => {
                Wave::Positional { shift: self.freq_shift, cosines_first: self.flip_sin_to_cos }
            }
            TimeEmbedding::Fourier => Wave::Fourier { weight: g.weight(&name, &[channels]) },
            TimeEmbedding::Learned => {
                return g.row(&name, of, self.num_train_timesteps.unwrap_or(1), channels);
            }
        };
        g.sinusoid(of, wave, width)
    }
}
