//! The network as a graph: patches to tokens, blocks, and what follows the last.

use super::DiTConfig;
use super::config::Activation;
use crate::graph::{Epilogue, Graph, GraphBuilder, Grid, Map, Name, Scalar, Size, Wave};
use crate::kernels::Function;

/// What norms add to a variance, where the configuration does not say.
const NORM_EPS: f64 = 1e-6;
/// Width of the hidden layer, in widths of a token.
const EXPANSION: usize = 4;
/// Channels of the sines and cosines of the time.
const TIME_CHANNELS: usize = 256;

impl DiTConfig {
    /// What the network does.
    pub(crate) fn graph(&self) -> Graph {
        let mut g = GraphBuilder::new(self.patch_size);
        let root = Name::default();
        let (width, side) = (self.width(), self.patches());
        let pixels = self.patch_size * self.patch_size;
        let wave = Wave::Positional { shift: 1.0, cosines_first: true };
        let time = g.sinusoid(Scalar::Time, wave, TIME_CHANNELS);
        let patch = Size { height: side, width: side, channels: self.in_channels * pixels };
        let patches = g.sample(patch, 1.0, 0.0);

        let positions = g.positions(Size { channels: width, ..patch }, Grid { side, scale: 1.0 });
        let kernel = [width, self.in_channels, self.patch_size, self.patch_size];
        let epilogue = Epilogue { residual: Some(positions), ..Epilogue::default() };
        let mut x = g.kernel(&root.at("pos_embed.proj"), &[patches], &kernel, epilogue);

        let mut first = None;
        for index in 0..self.layers {
            let name = root.at(format_args!("transformer_blocks.{index}"));
            let embedding = self.embedding(&mut g, &name.at("norm1.emb"), time);
            x = self.block(&mut g, &name, x, embedding);
            first.get_or_insert(embedding);
        }
        // The first block's embedding of time and class is the output's, too.
        let embedding = first.expect("a configuration has at least one layer");
        let parts = g.linear(&root.at("proj_out_1"), embedding, 2 * width);
        let normed = g.modulate(x, NORM_EPS, parts, [1, 0]);
        let answer = pixels * self.geometry().out_channels;
        let y = g.linear(&root.at("proj_out_2"), normed, answer);
        g.finish(y, false)
    }

    /// Time and class as a block sees them, through SiLU.
    fn embedding(&self, g: &mut GraphBuilder, name: &Name, time: Map) -> Map {
        let width = self.width();
        let place = name.at("timestep_embedder");
        let hidden = g.linear(&place.at("linear_1"), time, width);
        let active = g.activate(hidden, Function::Silu);
        let table = name.at("class_embedder.embedding_table.weight");
        let class = g.row(&table, Scalar::Condition, self.rows(), width);
        let epilogue = Epilogue { residual: Some(class), ..Epilogue::default() };
        let sum = g.linear_with(&place.at("linear_2"), active, width, epilogue);
        g.activate(sum, Function::Silu)
    }

    /// Attention and two linear layers, each after a norm, each scaled, shifted and gated by time and class (Peebles &
    /// Xie 2023, figure 3: adaLN-Zero).
    fn block(&self, g: &mut GraphBuilder, name: &Name, x: Map, embedding: Map) -> Map {
        let width = self.width();
        let parts = g.linear(&name.at("norm1.linear"), embedding, 6 * width);

        let normed = g.modulate(x, NORM_EPS, parts, [1, 0]);
        let place = name.at("attn1");
        let gathered = g.self_attention(&place, normed, self.heads, self.attention_bias);
        let y = g.linear(&place.at("to_out.0"), gathered, width);
        let sum = g.gate(y, x, parts, 2);

        let normed = g.modulate(sum, self.norm_eps, parts, [4, 3]);
        let wide = g.linear(&name.at("ff.net.0.proj"), normed, EXPANSION * width);
        let hidden = g.activate(wide, self.activation.into());
        let y = g.linear(&name.at("ff.net.2"), hidden, width);
        g.gate(y, sum, parts, 5)
    }
}

impl From<Activation> for Function {
    fn from(activation: Activation) -> Self {
        match activation {
            Activation::Gelu => Self::Gelu,
            Activation::GeluTanh => Self::GeluTanh,
        }
    }
}
