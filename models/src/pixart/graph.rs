//! The network as a graph: patches to tokens, the prompt's to as wide ones, blocks, and what follows the last.

use super::PixArtConfig;
use crate::graph::{Epilogue, Graph, GraphBuilder, Map, Name, Scalar, Sees, Size, Wave};
use crate::kernels::Function;

/// What the last norm adds to a variance.
const NORM_EPS: f64 = 1e-6;
/// Width of the hidden layer, in widths of a token.
const EXPANSION: usize = 4;
/// Channels of the sines and cosines of a number.
const WAVE_CHANNELS: usize = 256;
const WAVE: Wave = Wave::Positional { shift: 0.0, cosines_first: true };
/// Each block's own part of scales, shifts and gates.
const TABLE: &str = "scale_shift_table";

impl PixArtConfig {
    /// What the network does.
    pub(crate) fn graph(&self) -> Graph {
        let mut g = GraphBuilder::new(self.patch_size);
        let root = Name::default();
        let width = self.width();
        let [height, across] = self.size().map(|side| side / self.patch_size);
        let pixels = self.patch_size * self.patch_size;
        let patch = Size { height, width: across, channels: self.in_channels * pixels };

        let time = self.told(&mut g, &root.at("adaln_single.emb"));
        let active = g.activate(time, Function::Silu);
        let shared = g.linear(&root.at("adaln_single.linear"), active, 6 * width);

        let patches = g.sample(patch, 1.0, 0.0);
        let positions = g.positions(Size { channels: width, ..patch }, self.grid());
        let kernel = [width, self.in_channels, self.patch_size, self.patch_size];
        let mut x = g.kernel(&root.at("pos_embed.proj"), &[patches], &kernel, around(positions));

        let prompt = self.prompt(&mut g, &root);
        for index in 0..self.num_layers {
            let name = root.at(format_args!("transformer_blocks.{index}"));
            x = self.block(&mut g, &name, x, (shared, prompt));
        }
        let table = g.table(&root.at(TABLE), [2, width]);
        let parts = g.sum(table, &[time, time]);
        let normed = g.modulate(x, NORM_EPS, parts, [1, 0]);
        let y = g.linear(&root.at("proj_out"), normed, pixels * self.geometry().out_channels);
        g.finish(y, false)
    }

    /// The time, and, of a network that is told them, height, width and aspect ratio of the image, as one vector.
    fn told(&self, g: &mut GraphBuilder, name: &Name) -> Map {
        let time = embedded(g, &name.at("timestep_embedder"), Scalar::Time, self.width());
        if !self.is_told_size() {
            return time;
        }
        let [height, width] = self.size().map(|side| side * self.asked.factor);
        let ratio = (height as f64 / width as f64) as f32;
        let numbers = [
            ("resolution_embedder", height as f32),
            ("resolution_embedder", width as f32),
            ("aspect_ratio_embedder", ratio),
        ];
        let parts = numbers.map(|(place, number)| {
            embedded(g, &name.at(place), Scalar::Number(number), self.width() / 3)
        });
        g.sum(time, &parts)
    }

    /// The prompt's tokens, as wide as cross-attention takes them.
    fn prompt(&self, g: &mut GraphBuilder, root: &Name) -> Map {
        let prompt = g.prompt(self.asked.tokens, self.prompt_width());
        if self.caption_channels.is_none() {
            return prompt;
        }
        let (place, width) = (root.at("caption_projection"), self.width());
        let hidden = g.linear(&place.at("linear_1"), prompt, width);
        let active = g.activate(hidden, Function::GeluTanh);
        g.linear(&place.at("linear_2"), active, width)
    }

    /// Attention to the other patches, to the prompt, and two linear layers; the first and the last after a norm, scaled,
    /// shifted and gated (Chen et al. 2023, §2.3).
    fn block(
        &self,
        g: &mut GraphBuilder,
        name: &Name,
        x: Map,
        (shared, prompt): (Map, Map),
    ) -> Map {
        let (width, heads, bias) = (self.width(), self.num_attention_heads, self.attention_bias);
        let table = g.table(&name.at(TABLE), [6, width]);
        let parts = g.sum(table, &[shared]);

        let normed = g.modulate(x, self.norm_eps, parts, [1, 0]);
        let place = name.at("attn1");
        let gathered = g.self_attention(&place, normed, heads, bias);
        let y = g.linear(&place.at("to_out.0"), gathered, width);
        let x = g.gate(y, x, parts, 2);

        let place = name.at("attn2");
        let gathered = g.cross_attention(&place, x, prompt, heads, (bias, Sees::Prompt));
        let x = g.linear_with(&place.at("to_out.0"), gathered, width, around(x));

        let normed = g.modulate(x, self.norm_eps, parts, [4, 3]);
        let wide = g.linear(&name.at("ff.net.0.proj"), normed, EXPANSION * width);
        let hidden = g.activate(wide, self.activation_fn.into());
        let y = g.linear(&name.at("ff.net.2"), hidden, width);
        g.gate(y, x, parts, 5)
    }
}

/// A number as a vector of `width` numbers.
fn embedded(g: &mut GraphBuilder, name: &Name, of: Scalar, width: usize) -> Map {
    let wave = g.sinusoid(of, WAVE, WAVE_CHANNELS);
    let hidden = g.linear(&name.at("linear_1"), wave, width);
    let active = g.activate(hidden, Function::Silu);
    g.linear(&name.at("linear_2"), active, width)
}

/// What is added to sums.
fn around(residual: Map) -> Epilogue {
    Epilogue { residual: Some(residual), ..Epilogue::default() }
}
