//! The network as a graph: patches and a prompt's tokens, blocks that join them, and what follows the last.

use super::SD3Config;
use crate::graph::{
    Epilogue, Graph, GraphBuilder, Map, Name, Scalar, Sees, Size, Slice, Wave, query_scale,
};
use crate::kernels::Function;

/// What norms add to a variance or a mean square.
const NORM_EPS: f64 = 1e-6;
/// Width of the hidden layer, in widths of a token.
const EXPANSION: usize = 4;
/// Channels of the sines and cosines of the time.
const TIME_CHANNELS: usize = 256;
const WAVE: Wave = Wave::Positional { shift: 0.0, cosines_first: true };
/// The table of places.
pub(super) const PLACES: &str = "pos_embed.pos_embed";
/// Products and norms of an attention: a patch's queries, keys and values, and a prompt's token's.
const OF_IMAGE: [&str; 5] = ["to_q", "to_k", "to_v", "norm_q", "norm_k"];
const OF_TEXT: [&str; 5] =
    ["add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k"];

impl SD3Config {
    /// What the network does.
    pub(crate) fn graph(&self) -> Graph {
        let mut g = GraphBuilder::new(self.patch_size);
        let root = Name::default();
        let width = self.width();
        let [height, across] = self.size().map(|side| side / self.patch_size);
        let pixels = self.patch_size * self.patch_size;
        let patch = Size { height, width: across, channels: self.in_channels * pixels };

        let told = self.told(&mut g, &root.at("time_text_embed"));
        let prompt = g.prompt(self.asked.tokens, self.joint_attention_dim);
        let mut text = g.linear(&root.at("context_embedder"), prompt, width);

        let patches = g.sample(patch, 1.0, 0.0);
        let size = Size { channels: width, ..patch };
        let places = g.crop(&root.at(PLACES), self.pos_embed_max_size, size);
        let kernel = [width, self.in_channels, self.patch_size, self.patch_size];
        let mut image = g.kernel(&root.at("pos_embed.proj"), &[patches], &kernel, around(places));

        for index in 0..self.num_layers {
            let name = root.at(format_args!("transformer_blocks.{index}"));
            [image, text] = self.block(&mut g, &name, [image, text], (told, index));
        }
        let parts = g.linear(&root.at("norm_out.linear"), told, 2 * width);
        let normed = g.modulate(image, NORM_EPS, parts, [0, 1]);
        let y = g.linear(&root.at("proj_out"), normed, pixels * self.geometry().out_channels);
        g.finish(y, false)
    }

    /// Time and pooled text as one vector, through SiLU.
    fn told(&self, g: &mut GraphBuilder, name: &Name) -> Map {
        let width = self.width();
        let wave = g.sinusoid(Scalar::Time, WAVE, TIME_CHANNELS);
        let time = embedded(g, &name.at("timestep_embedder"), wave, width, Epilogue::default());
        let pooled = g.condition(self.pooled_projection_dim);
        let sum = embedded(g, &name.at("text_embedder"), pooled, width, around(time));
        g.activate(sum, Function::Silu)
    }

    /// Attention of patches and tokens to all of these, of patches to each other where it is dual, and two linear layers for
    /// either, each after a norm, each scaled, shifted and gated (Esser et al. 2024, figure 2). Nobody reads the last block's
    /// tokens.
    fn block(
        &self,
        g: &mut GraphBuilder,
        name: &Name,
        [image, text]: [Map; 2],
        (told, index): (Map, usize),
    ) -> [Map; 2] {
        let (width, last) = (self.width(), index + 1 == self.num_layers);
        let dual = self.dual_attention_layers.contains(&index);
        let parts = g.linear(&name.at("norm1.linear"), told, if dual { 9 } else { 6 } * width);
        let normed = g.modulate(image, NORM_EPS, parts, [1, 0]);
        let (count, scale_shift) = if last { (2, [0, 1]) } else { (6, [1, 0]) };
        let of_text = g.linear(&name.at("norm1_context.linear"), told, count * width);
        let normed_text = g.modulate(text, NORM_EPS, of_text, scale_shift);

        let place = name.at("attn");
        let own = self.heads(g, &place, OF_IMAGE, normed);
        let others = self.heads(g, &place, OF_TEXT, normed_text);
        let joined = [0, 1, 2].map(|part| g.join(&[own[part], others[part]]));
        let gathered = self.attend(g, joined);
        let of_patches = g.take(gathered, 0, image);
        let y = g.linear(&place.at("to_out.0"), of_patches, width);
        let mut sum = g.gate(y, image, parts, 2);
        if dual {
            let place = name.at("attn2");
            let normed = g.modulate(image, NORM_EPS, parts, [7, 6]);
            let own = self.heads(g, &place, OF_IMAGE, normed);
            let among = self.attend(g, own);
            let y = g.linear(&place.at("to_out.0"), among, width);
            sum = g.gate(y, sum, parts, 8);
        }
        let image_after = self.layers(g, &name.at("ff"), sum, parts);
        if last {
            return [image_after, text];
        }
        let Size { height, width: across, .. } = g.size(image);
        let of_tokens = g.take(gathered, height * across, text);
        let y = g.linear(&place.at("to_add_out"), of_tokens, width);
        let sum = g.gate(y, text, of_text, 2);
        [image_after, self.layers(g, &name.at("ff_context"), sum, of_text)]
    }

    /// Queries, which are scaled, keys and values.
    fn heads(&self, g: &mut GraphBuilder, name: &Name, parts: [&str; 5], source: Map) -> [Map; 3] {
        let [q, k, v, norm_q, norm_k] = parts.map(|part| name.at(part));
        let scale = query_scale(self.width(), self.num_attention_heads);
        let head = self.attention_head_dim;
        if self.qk_norm.is_none() {
            return [(q, scale), (k, 1.0), (v, 1.0)].map(|(name, by)| g.scaled(&name, source, by));
        }
        let [queries, keys, values] = [q, k, v].map(|name| g.scaled(&name, source, 1.0));
        let queries = g.rms_norm(&norm_q, queries, head, (NORM_EPS, scale as f32));
        [queries, g.rms_norm(&norm_k, keys, head, (NORM_EPS, 1.0)), values]
    }

    fn attend(&self, g: &mut GraphBuilder, parts: [Map; 3]) -> Map {
        let width = self.width();
        let slices = parts.map(|map| Slice { map, start: 0, width });
        g.attend(slices, self.num_attention_heads, Sees::All)
    }

    /// Two linear layers after a norm, onto what they read.
    fn layers(&self, g: &mut GraphBuilder, name: &Name, x: Map, parts: Map) -> Map {
        let width = self.width();
        let normed = g.modulate(x, NORM_EPS, parts, [4, 3]);
        let wide = g.linear(&name.at("net.0.proj"), normed, EXPANSION * width);
        let hidden = g.activate(wide, Function::GeluTanh);
        let y = g.linear(&name.at("net.2"), hidden, width);
        g.gate(y, x, parts, 5)
    }
}

/// A vector as one of `width` numbers, plus what `epilogue` says.
fn embedded(
    g: &mut GraphBuilder,
    name: &Name,
    vector: Map,
    width: usize,
    epilogue: Epilogue,
) -> Map {
    let hidden = g.linear(&name.at("linear_1"), vector, width);
    let active = g.activate(hidden, Function::Silu);
    g.linear_with(&name.at("linear_2"), active, width, epilogue)
}

/// What is added to sums.
fn around(residual: Map) -> Epilogue {
    Epilogue { residual: Some(residual), ..Epilogue::default() }
}
