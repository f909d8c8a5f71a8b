//! What a new network's weights are drawn from: Peebles & Xie 2023, §3.2 and their code.

use super::DiTConfig;
use crate::initial::Distribution;

impl DiTConfig {
    /// How the weight `name` is drawn. Every block begins as the identity and the answer as zero, since
    /// the layers that make scales, shifts and gates, and the last one, begin with zeros (adaLN-Zero);
    /// what embeds time and class has a scale of 0.02, other products are Xavier-uniform.
    pub(super) fn initial(&self, name: &str) -> Option<Distribution> {
        let zero = ["norm1.linear.", "proj_out_1.", "proj_out_2."];
        if name.ends_with(".bias") || zero.iter().any(|layer| name.contains(layer)) {
            return Some(Distribution::Constant(0.0));
        }
        if name.contains(".emb.") {
            return Some(Distribution::Normal(0.02));
        }
        let width = self.width();
        let input_and_output = match name {
            "pos_embed.proj.weight" => self.in_channels * self.patch_size * self.patch_size + width,
            name if name.contains(".ff.") => 5 * width,
            _ => 2 * width,
        };
        Some(Distribution::Uniform((6.0 / input_and_output as f64).sqrt()))
    }
}
