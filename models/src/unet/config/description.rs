//! What a `UNet2DModel` consists of, and the vector that tells it time and class.

use super::{Block, ClassEmbedding, TimeEmbedding, UNet2DConfig};
use crate::graph::{Graph, GraphBuilder, Map, Name, Scalar, Size, Wave};
use crate::kernels::Function;
use crate::unet::graph::{embedded, graph};
use crate::unet::plan::{self, After, Level, Middle, Plan, Resample};

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
            channels: self.channels[level],
            layers: self.layers_per_block,
            down: self.block(self.down_blocks[level], self.channels[level], self.downsample),
            up: self.block(self.up_blocks[last - level], self.channels[level], self.upsample),
        };
        let deepest = self.channels[last];
        let middle = match (self.mid_block, self.add_attention) {
            (false, _) => Middle::Nothing,
            (true, false) => Middle::Two(After::Nothing),
            (true, true) => {
                // Without a number of its own the mid block's attention is normalised as the residual blocks
                // are, except beside scale-shift norms, where it is not normalised at all.
                let groups = self
                    .attn_norm_num_groups
                    .or_else(|| (!self.scale_shift).then_some(self.norm_num_groups));
                Middle::Two(After::Attention { heads: self.heads_of(deepest), groups })
            }
        };
        let Self { height, width, in_channels, .. } = *self;
        Plan {
            sample: Size { height, width, channels: in_channels },
            centered: self.center_input_sample,
            outputs: self.out_channels,
            kernels: [3, 3],
            levels: (0..self.levels()).map(level).collect(),
            middle,
            middle_scale: self.mid_block_scale_factor,
            norm: (self.norm_num_groups, self.norm_eps),
            function: self.activation.into(),
            last_function: Function::Silu,
            modulated: self.scale_shift,
            padding: self.downsample_padding,
            // With a Fourier embedding time is a noise level, and the answer a score (Song et al. 2021).
            divided: self.time_embedding == TimeEmbedding::Fourier,
        }
    }

    /// A block that ends with what it is asked to resample with, where its kind does not tell.
    fn block(&self, block: Block, channels: usize, asked: Resample) -> plan::Block {
        let (after, resample) = match block {
            Block::Plain => (After::Nothing, Resample::Conv),
            Block::Resnet => (After::Nothing, Resample::Resnet),
            Block::Attention => {
                let groups = Some(self.norm_num_groups);
                (After::Attention { heads: self.heads_of(channels), groups }, asked)
            }
        };
        plan::Block { after, resample }
    }

    fn heads_of(&self, channels: usize) -> usize {
        channels / self.attention_head_dim.unwrap_or(channels)
    }

    /// Time and class as one vector, through the activation with which every residual block begins its use of it.
    fn embedding(&self, g: &mut GraphBuilder) -> Map {
        let root = Name::default();
        let width = self.time_width();
        let place = root.at("class_embedding");
        let class = match self.class_embedding {
            ClassEmbedding::None => None,
            ClassEmbedding::Table(rows) => {
                Some(g.row(&place.at("weight"), Scalar::Condition, rows, width))
            }
            ClassEmbedding::Timestep => {
                let number = self.projected(g, Scalar::Condition);
                Some(embedded(g, &place, number, width, Function::Silu, None))
            }
            ClassEmbedding::Identity => Some(g.condition(width)),
        };
        let time = self.projected(g, Scalar::Time);
        let sum = embedded(g, &root.at("time_embedding"), time, width, Function::Silu, class);
        g.activate(sum, self.activation.into())
    }

    /// A number as a vector, without the two layers that follow.
    fn projected(&self, g: &mut GraphBuilder, of: Scalar) -> Map {
        let (width, channels) = (self.projected_width(), self.channels[0]);
        let name = Name::default().at("time_proj.weight");
        let wave = match self.time_embedding {
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
