//! The network as a graph: the way down, the bottom, and the way up, all conditioned on one vector.

use super::plan::{After, Block, Middle, Plan, Resample, Transformer};
use crate::blocks::{self, Resize, Style, Time};
use crate::graph::{Epilogue, Graph, GraphBuilder, Map, Name, Sees};
use crate::kernels::{Function, Taps};

/// What a transformer's own norms add to a variance: groups of channels, and layers.
const GROUP_EPS: f64 = 1e-6;
const LAYER_EPS: f64 = 1e-5;
/// Width of a transformer's hidden layer, in widths of a token.
const EXPANSION: usize = 4;

/// The U-Net of a plan, conditioned on `vector`, which the builder's operations end with.
pub(super) fn graph(plan: &Plan, builder: GraphBuilder, vector: Map) -> Graph {
    UNet { plan, builder, vector, skips: Vec::new() }.network()
}

/// A number as a vector of `width` numbers: two linear layers with `function` between them, plus `more`.
pub(super) fn embedded(
    g: &mut GraphBuilder,
    name: &Name,
    x: Map,
    width: usize,
    function: Function,
    more: Option<Map>,
) -> Map {
    let hidden = g.linear(&name.at("linear_1"), x, width);
    let active = g.activate(hidden, function);
    let epilogue = Epilogue { residual: more, ..Epilogue::default() };
    g.linear_with(&name.at("linear_2"), active, width, epilogue)
}

struct UNet<'a> {
    plan: &'a Plan,
    builder: GraphBuilder,
    vector: Map,
    /// What the way down leaves for the way up.
    skips: Vec<Map>,
}

impl UNet<'_> {
    fn network(mut self) -> Graph {
        let plan = self.plan;
        let root = Name::default();
        let (factor, shift) = if plan.centered { (2.0, -1.0) } else { (1.0, 0.0) };
        let x = self.builder.sample(plan.sample, factor, shift);
        let [first, last] =
            plan.kernels.map(|side| Taps { side, stride: 1, padding: side / 2, doubled: false });
        let mut x = self.convolve(&root.at("conv_in"), x, plan.levels[0].channels, first);

        self.skips.push(x);
        for level in 0..plan.levels.len() {
            x = self.down(&root.at(format_args!("down_blocks.{level}")), level, x);
        }
        x = self.middle(&root.at("mid_block"), x);
        for index in 0..plan.levels.len() {
            x = self.up(&root.at(format_args!("up_blocks.{index}")), index, x);
        }

        let name = root.at("conv_norm_out");
        let normed = self.builder.group_norm(&name, &[x], plan.norm, None, plan.last_function);
        let y = self.convolve(&root.at("conv_out"), normed, plan.outputs, last);
        self.builder.finish(y, plan.divided)
    }

    fn convolve(&mut self, name: &Name, x: Map, channels: usize, taps: Taps) -> Map {
        self.builder.convolve(name, x, channels, taps, Epilogue::default())
    }

    fn down(&mut self, name: &Name, level: usize, mut x: Map) -> Map {
        let plan = self.plan;
        let (channels, block) = (plan.levels[level].channels, &plan.levels[level].down);
        for index in 0..plan.levels[level].layers {
            x = self.layer(name, index, &[x], channels, block);
            self.skips.push(x);
        }
        if level + 1 < plan.levels.len() {
            let place = name.at("downsamplers.0");
            x = match block.resample {
                Resample::Resnet => self.resnet(&place, &[x], channels, Resize::Down, 1.0),
                Resample::Conv => {
                    // Without padding above and left there is one row and column of zeros below and right.
                    let taps = Taps { side: 3, stride: 2, padding: plan.padding, doubled: false };
                    self.convolve(&place.at("conv"), x, channels, taps)
                }
            };
            self.skips.push(x);
        }
        x
    }

    fn middle(&mut self, name: &Name, x: Map) -> Map {
        let (channels, scale) = (self.builder.size(x).channels, self.plan.middle_scale);
        let after = match &self.plan.middle {
            Middle::Nothing => return x,
            Middle::One => None,
            Middle::Two(after) => Some(after),
        };
        let y = self.resnet(&name.at("resnets.0"), &[x], channels, Resize::Keep, scale);
        let Some(after) = after else { return y };
        let y = self.after(name, 0, y, after, scale);
        self.resnet(&name.at("resnets.1"), &[y], channels, Resize::Keep, scale)
    }

    fn up(&mut self, name: &Name, index: usize, mut x: Map) -> Map {
        let plan = self.plan;
        let level = plan.levels.len() - 1 - index;
        let (channels, block) = (plan.levels[level].channels, &plan.levels[level].up);
        for i in 0..=plan.levels[level].layers {
            let skip = self.skips.pop();
            let skip = skip.expect("the way down left one map for each layer of the way up");
            x = self.layer(name, i, &[x, skip], channels, block);
        }
        if level > 0 {
            let place = name.at("upsamplers.0");
            x = match block.resample {
                Resample::Resnet => self.resnet(&place, &[x], channels, Resize::Up, 1.0),
                Resample::Conv => {
                    let taps = Taps { doubled: true, ..Taps::SAME };
                    self.convolve(&place.at("conv"), x, channels, taps)
                }
            };
        }
        x
    }

    /// A residual block and what follows it.
    fn layer(
        &mut self,
        name: &Name,
        index: usize,
        sources: &[Map],
        channels: usize,
        block: &Block,
    ) -> Map {
        let place = name.at(format_args!("resnets.{index}"));
        let x = self.resnet(&place, sources, channels, Resize::Keep, 1.0);
        self.after(name, index, x, &block.after, 1.0)
    }

    /// A residual block conditioned on the time.
    fn resnet(
        &mut self,
        name: &Name,
        sources: &[Map],
        channels: usize,
        resize: Resize,
        scale: f64,
    ) -> Map {
        let plan = self.plan;
        let time = if plan.modulated { Time::Modulates } else { Time::Added };
        let time = Some(time(self.vector));
        let style = Style { norm: plan.norm, function: plan.function, time };
        blocks::resnet(&mut self.builder, name, sources, channels, style, resize, scale)
    }

    fn after(&mut self, name: &Name, index: usize, x: Map, after: &After, scale: f64) -> Map {
        let place = name.at(format_args!("attentions.{index}"));
        match after {
            After::Nothing => x,
            After::Attention { heads, groups } => {
                let norm = groups.map(|groups| (groups, self.plan.norm.1));
                blocks::attention(&mut self.builder, &place, x, *heads, norm, scale)
            }
            After::Transformer(transformer) => self.transformer(&place, index, x, transformer),
        }
    }

    /// A transformer over the pixels of `x`, and a way around it.
    fn transformer(&mut self, name: &Name, index: usize, x: Map, told: &Transformer) -> Map {
        let (groups, g) = (self.plan.norm.0, &mut self.builder);
        let channels = g.size(x).channels;
        let normed =
            g.group_norm(&name.at("norm"), &[x], (groups, GROUP_EPS), None, Function::Identity);
        let through = |g: &mut GraphBuilder, name: &Name, x: Map, epilogue: Epilogue| {
            if told.linear {
                g.linear_with(name, x, channels, epilogue)
            } else {
                g.kernel(name, &[x], &[channels, channels, 1, 1], epilogue)
            }
        };
        let mut h = through(g, &name.at("proj_in"), normed, Epilogue::default());
        for block in 0..told.depths[index] {
            h = transformer_block(g, &name.at(format_args!("transformer_blocks.{block}")), h, told);
        }
        through(g, &name.at("proj_out"), h, around(x))
    }
}

/// What is added to sums.
fn around(residual: Map) -> Epilogue {
    Epilogue { residual: Some(residual), ..Epilogue::default() }
}

/// Attention to the other pixels, attention to the prompt and a gated hidden layer (Shazeer 2020), each after a norm and
/// with a way around: `BasicTransformerBlock`.
fn transformer_block(g: &mut GraphBuilder, name: &Name, x: Map, told: &Transformer) -> Map {
    let width = g.size(x).channels;
    let normed = g.layer_norm(&name.at("norm1"), x, LAYER_EPS);
    let place = name.at("attn1");
    let gathered = if told.only_prompt {
        g.cross_attention(&place, normed, told.prompt, told.heads, (false, Sees::All))
    } else {
        g.self_attention(&place, normed, told.heads, false)
    };
    let x = g.linear_with(&place.at("to_out.0"), gathered, width, around(x));

    let normed = g.layer_norm(&name.at("norm2"), x, LAYER_EPS);
    let place = name.at("attn2");
    let gathered = g.cross_attention(&place, normed, told.prompt, told.heads, (false, Sees::All));
    let x = g.linear_with(&place.at("to_out.0"), gathered, width, around(x));

    let normed = g.layer_norm(&name.at("norm3"), x, LAYER_EPS);
    let wide = g.linear(&name.at("ff.net.0.proj"), normed, 2 * EXPANSION * width);
    let gated = g.geglu(wide);
    g.linear_with(&name.at("ff.net.2"), gated, width, around(x))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::super::{UNet2DConditionConfig, UNet2DConfig};
    use crate::graph::Graph;

    /// Sets lie along every dimension of every weight, as wide as it is.
    fn check(what: &str, graph: &Graph) {
        let (channels, shapes) = (graph.channels().unwrap(), graph.shapes());
        let names: Vec<_> = shapes.keys().collect();
        assert_eq!(channels.weights.keys().collect::<Vec<_>>(), names, "{what}");
        for (name, shape) in shapes {
            let dimensions = &channels.weights[&name];
            assert_eq!(dimensions.len(), shape.len(), "{name}");
            for (sets, side) in dimensions.iter().zip(shape) {
                let width: usize = sets.iter().map(|&set| channels.sets[set].width).sum();
                assert!(sets.is_empty() || width == side, "{name}: {width}, not {side}");
            }
        }
    }

    /// Of a network that sees a prompt, whose channels alone are in no set.
    #[test]
    fn sets_account_for_every_weight_of_a_text_to_image_network() {
        for more in [
            json!({}),
            json!({"use_linear_projection": true, "only_cross_attention": [false, true]}),
            json!({"time_cond_proj_dim": 16, "mid_block_type": null}),
        ] {
            let mut config = json!({
                "_class_name": "UNet2DConditionModel", "sample_size": 8, "norm_num_groups": 4,
                "block_out_channels": [16, 32], "layers_per_block": 1, "attention_head_dim": 4,
                "cross_attention_dim": 24,
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            });
            for (name, value) in more.as_object().unwrap() {
                config[name] = value.clone();
            }
            let config = UNet2DConditionConfig::from_json(&config, "config.json").unwrap();
            check(&more.to_string(), &config.graph());
            let channels = config.graph().channels().unwrap();
            let along = |name: &str| {
                let block = "down_blocks.1.attentions.0.transformer_blocks.0";
                &channels.weights[&format!("{block}.{name}")]
            };
            assert!(along("attn2.to_k.weight")[1].is_empty());
            let gated = &along("ff.net.0.proj.weight")[0];
            assert!(gated.len() == 2 && gated[0] == gated[1]);
            assert_eq!(along("ff.net.2.weight")[1], gated[..1]);
        }
    }

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
            check(&more.to_string(), &config.graph());
        }
    }
}
