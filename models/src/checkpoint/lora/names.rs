//! How LoRA files name what they change.
//!
//! | program | names |
//! | --- | --- |
//! | kohya's sd-scripts | `lora_unet_`, `lora_te_`, `lora_te1_` or `lora_te2_`, the module with `_` for `.`, then `.lora_up.weight`, `.lora_down.weight`, `.alpha` |
//! | the same, of a single file | `lora_unet_input_blocks_…`, under the names of latent diffusion |
//! | diffusers (PEFT) | `unet.`, `transformer.`, `text_encoder.` or `text_encoder_2.`, the module, then `.lora_B.weight`, `.lora_A.weight` |
//! | diffusers before that | `.lora.up.weight`, `.lora_linear_layer.up.weight`, and `.processor.to_q_lora.up.weight` of attentions |

use std::collections::HashMap;

use crate::checkpoint::single_file;
use crate::weights::Shapes;

/// A component of a pipeline that a LoRA changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Component {
    Network,
    /// By its number.
    TextEncoder(usize),
}

/// Which half of a pair a tensor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Up,
    Down,
    Alpha,
}

/// Ends of names.
const PARTS: [(&str, Part); 12] = [
    (".lora_up.weight", Part::Up),
    (".lora_down.weight", Part::Down),
    (".lora_B.weight", Part::Up),
    (".lora_A.weight", Part::Down),
    (".lora_B.default.weight", Part::Up),
    (".lora_A.default.weight", Part::Down),
    (".lora_linear_layer.up.weight", Part::Up),
    (".lora_linear_layer.down.weight", Part::Down),
    (".lora.up.weight", Part::Up),
    (".lora.down.weight", Part::Down),
    ("_lora.up.weight", Part::Up),
    ("_lora.down.weight", Part::Down),
];

/// Parts of names of what adds to weights in other ways.
const OTHERS: [(&str, &str); 7] = [
    (".hada_", "LoHa"),
    (".lokr_", "LoKr"),
    (".dora_scale", "DoRA"),
    ("lora_magnitude_vector", "DoRA"),
    (".lora_mid.", "a LoRA of convolutions in three parts"),
    (".oft_", "OFT"),
    (".diff", "a difference of whole weights"),
];

/// What a tensor of a file changes, and which part of a pair it is.
///
/// # Errors
/// A sentence naming the tensor where it is none of a LoRA.
pub(super) fn split(name: &str) -> Result<(String, Part), String> {
    if let Some((_, what)) = OTHERS.iter().find(|(part, _)| name.contains(part)) {
        return Err(format!("`{name}` is of {what}, which is not supported; use a plain LoRA"));
    }
    if let Some(target) = name.strip_suffix(".alpha") {
        return Ok((target.to_owned(), Part::Alpha));
    }
    let part = PARTS.iter().find_map(|(end, part)| Some((name.strip_suffix(end)?, *part)));
    let Some((target, part)) = part else {
        return Err(format!(
            "`{name}` is no tensor of a LoRA; name a file of kohya's sd-scripts or of diffusers"
        ));
    };
    // Attentions before diffusers 0.22 have a processor, whose parts are named as what they change.
    let target = match target.split_once(".processor.") {
        Some((attention, "to_out")) => format!("{attention}.to_out.0"),
        Some((attention, part)) => format!("{attention}.{part}"),
        None => target.to_owned(),
    };
    Ok((target, part))
}

/// The weights of a component, by all names that files have for them.
#[derive(Debug)]
pub(crate) struct Targets {
    by_name: HashMap<String, (String, Vec<usize>)>,
}

impl Targets {
    /// The weights of these names and shapes that multiply something.
    pub(super) fn new(component: Component, shapes: &Shapes) -> Self {
        let mut by_name = HashMap::new();
        let ldm = matches!(component, Component::Network).then(|| single_file::unet_names(shapes));
        for (name, shape) in shapes.iter().filter(|(_, shape)| shape.len() > 1) {
            let Some(module) = name.strip_suffix(".weight") else { continue };
            let flat = module.replace('.', "_");
            let mut names = match component {
                Component::Network => vec![
                    format!("unet.{module}"),
                    format!("transformer.{module}"),
                    format!("base_model.model.{module}"),
                    module.to_owned(),
                    format!("lora_unet_{flat}"),
                ],
                Component::TextEncoder(number) => {
                    let short = module.strip_prefix("text_model.").unwrap_or(module);
                    let flat_short = short.replace('.', "_");
                    let (folder, kohya): (_, &[&str]) = match number {
                        0 => ("text_encoder", &["lora_te", "lora_te1"]),
                        _ => ("text_encoder_2", &["lora_te2"]),
                    };
                    let mut names =
                        vec![format!("{folder}.{module}"), format!("{folder}.text_model.{short}")];
                    for prefix in kohya {
                        names.push(format!("{prefix}_{flat}"));
                        names.push(format!("{prefix}_text_model_{flat_short}"));
                    }
                    names
                }
            };
            let there = ldm.as_ref().and_then(|names| names.get(name)?.strip_suffix(".weight"));
            if let Some(there) = there {
                names.push(format!("lora_unet_{}", there.replace('.', "_")));
            }
            for known in names {
                by_name.insert(known, (name.clone(), shape.clone()));
            }
        }
        Self { by_name }
    }

    /// The weight that a file calls so, and its shape.
    pub(super) fn find(&self, target: &str) -> Option<(&str, &[usize])> {
        self.by_name.get(target).map(|(name, shape)| (name.as_str(), shape.as_slice()))
    }
}
