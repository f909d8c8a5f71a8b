//! What a `UNet2DConditionModel` consists of, and the vector that tells it time, class and guidance.

use super::{ClassEmbedType, Down, Middle, SIZES, TimeScaleShift, UNet2DConditionConfig, Up};
use crate::each::Each;
use crate::graph::{Epilogue, Graph, GraphBuilder, Map, Name, Scalar, Size, Wave};
use crate::kernels::Function;
use crate::unet::graph::{embedded, graph};
use crate::unet::plan::{self, After, Block, Level, Plan, Transformer};

impl UNet2DConditionConfig {
    /// What the network does.
    pub(crate) fn graph(&self) -> Graph {
        let mut builder = GraphBuilder::new(1);
        let vector = self.embedding(&mut builder);
        let prompt = self.prompt().map(|prompt| builder.prompt(prompt.tokens, prompt.width));
        graph(&self.plan(prompt), builder, vector)
    }

    /// Depths of the transformers of a block on the way up.
    pub(super) fn up_depths(&self, index: usize) -> Option<&Each<usize>> {
        match &self.reverse_transformer_layers_per_block {
            Some(depths) => depths.at(index),
            None => self.transformer_layers_per_block.at(self.levels() - 1 - index),
        }
    }

    fn plan(&self, prompt: Option<Map>) -> Plan {
        let last = self.levels() - 1;
        let level = |level: usize| {
            let layers = self.layers_per_block.at(level).copied().unwrap_or(1);
            let only = self.only_cross_attention.at(level).copied().unwrap_or(false);
            let after = |sees: bool, depths: Option<&Each<usize>>, layers: usize| match sees {
                true => self.transformer(prompt, level, depths, layers, only),
                false => After::Nothing,
            };
            let (down, up) = (self.down_block_types[level], self.up_block_types[last - level]);
            let down_depths = self.transformer_layers_per_block.at(level);
            let up_depths = self.up_depths(last - level);
            Level {
                channels: self.block_out_channels[level],
                layers,
                down: Block {
                    after: after(down == Down::CrossAttention, down_depths, layers),
                    resample: down.resample(),
                },
                up: Block {
                    after: after(up == Up::CrossAttention, up_depths, layers + 1),
                    resample: up.resample(),
                },
            }
        };
        let middle = match self.mid_block_type {
            None => plan::Middle::Nothing,
            Some(Middle::Plain) => plan::Middle::One,
            Some(Middle::CrossAttention) => {
                // There is one, the first of the last level's depths.
                let depths = self.transformer_layers_per_block.at(last);
                plan::Middle::Two(self.transformer(prompt, last, depths, 1, false))
            }
        };
        let [height, width] = self.sides();
        Plan {
            sample: Size { height, width, channels: self.in_channels },
            centered: self.center_input_sample,
            outputs: self.out_channels,
            kernels: [self.conv_in_kernel, self.conv_out_kernel],
            levels: (0..self.levels()).map(level).collect(),
            middle,
            middle_scale: self.mid_block_scale_factor,
            norm: (self.norm_num_groups, self.norm_eps),
            function: self.act_fn.into(),
            last_function: self.act_fn.into(),
            modulated: self.resnet_time_scale_shift == TimeScaleShift::ScaleShift,
            padding: self.downsample_padding,
            divided: false,
        }
    }

    /// Transformers behind `layers` residual blocks of a level.
    fn transformer(
        &self,
        prompt: Option<Map>,
        level: usize,
        depths: Option<&Each<usize>>,
        layers: usize,
        only_prompt: bool,
    ) -> After {
        let depth = |layer| depths.and_then(|depths| depths.at(layer)).copied().unwrap_or(1);
        After::Transformer(Transformer {
            heads: self.attention_head_dim.at(level).copied().unwrap_or(1),
            depths: (0..layers).map(depth).collect(),
            linear: self.use_linear_projection,
            only_prompt,
            prompt: prompt.expect("where there is a transformer there is a prompt"),
        })
    }

    /// Time, class and guidance as one vector, through the activation with which every residual block begins its use of it.
    fn embedding(&self, g: &mut GraphBuilder) -> Map {
        let root = Name::default();
        let (width, function) = (self.time_width(), self.act_fn.into());
        let place = root.at("class_embedding");
        let vector = self.projection_class_embeddings_input_dim.unwrap_or(1);
        let class = match (self.class_embed_type, self.num_class_embeds) {
            (None, None) => None,
            (None, Some(rows)) => Some(g.row(&place.at("weight"), Scalar::Condition, rows, width)),
            (Some(ClassEmbedType::Timestep), _) => {
                let number = self.projected(g, Scalar::Condition);
                Some(embedded(g, &place, number, width, function, None))
            }
            (Some(ClassEmbedType::Identity), _) => Some(g.condition(width)),
            (Some(ClassEmbedType::Projection), _) => {
                let given = g.condition(vector);
                Some(embedded(g, &place, given, width, Function::Silu, None))
            }
            (Some(ClassEmbedType::SimpleProjection), _) => {
                let given = g.condition(vector);
                Some(g.linear(&place, given, width))
            }
        };
        let place = root.at("time_embedding");
        let mut time = self.projected(g, Scalar::Time);
        if let Some(channels) = self.time_cond_proj_dim {
            let wave = Wave::Positional { shift: 1.0, cosines_first: false };
            let guidance = g.sinusoid(Scalar::Guidance, wave, channels);
            let epilogue = Epilogue { residual: Some(time), ..Epilogue::default() };
            time = g.linear_unbiased(
                &place.at("cond_proj"),
                guidance,
                self.block_out_channels[0],
                epilogue,
            );
        }
        let more = match self.pooled() {
            Some(text) => {
                let wave = (self.freq_shift, self.flip_sin_to_cos);
                let each = self.addition_time_embed_dim.unwrap_or(0);
                let told = g.text_time([text, SIZES], wave, each);
                Some(embedded(g, &root.at("add_embedding"), told, width, Function::Silu, class))
            }
            None => class,
        };
        let sum = embedded(g, &place, time, width, function, more);
        g.activate(sum, function)
    }

    /// A number as a vector, without the two layers that follow.
    fn projected(&self, g: &mut GraphBuilder, of: Scalar) -> Map {
        let wave = Wave::Positional { shift: self.freq_shift, cosines_first: self.flip_sin_to_cos };
        g.sinusoid(of, wave, self.block_out_channels[0])
    }
}
