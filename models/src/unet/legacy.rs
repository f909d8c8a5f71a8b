//! Weight names of the past.

use std::collections::HashMap;

use crate::weight::Weight;

/// Checkpoints written before diffusers 0.15, most of those on the Hub among them, have other names
/// for the four products of an attention.
pub(crate) fn rename_attention(weights: &mut HashMap<String, Weight>) {
    const RENAMED: [(&str, &str); 4] =
        [("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")];
    let legacy: Vec<String> =
        weights.keys().filter(|name| name.contains("attentions.")).cloned().collect();
    for name in legacy {
        for (old, new) in RENAMED {
            for end in ["weight", "bias"] {
                let Some(path) = name.strip_suffix(&format!(".{old}.{end}")) else {
                    continue;
                };
                if let Some(weight) = weights.remove(&name) {
                    weights.insert(format!("{path}.{new}.{end}"), weight);
                }
            }
        }
    }
}
