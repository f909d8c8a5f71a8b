//! What wrappers put before and into the names of a network's weights, and taking it off.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::weight::Weight;

/// Parts of a name that a wrapper of PyTorch adds around a module, at any depth: compiled, sharded and
/// checkpointed ones.
const ANYWHERE: [&str; 4] =
    ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"];

/// What stands before every name: `DataParallel`'s `module`, and what programs call their network or its average.
const BEFORE: [&str; 17] = [
    "module",
    "model",
    "diffusion_model",
    "diffusion",
    "denoise_fn",
    "denoiser",
    "net",
    "network",
    "unet",
    "transformer",
    "online_model",
    "ema",
    "ema_model",
    "model_ema",
    "averaged_model",
    "inner_model",
    "_model",
];

/// How a file names the weights of a network.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Naming {
    /// What stands before every name, with its last dot; often nothing.
    pub(crate) prefix: String,
    /// How many of the network's names there are behind it.
    pub(crate) hits: usize,
}

impl Naming {
    /// The naming under which most of the `expected` names are `found`; of several, a running average's.
    pub(crate) fn find<'a>(
        expected: &BTreeSet<String>,
        found: impl Iterator<Item = &'a str>,
    ) -> Self {
        let mut hits: BTreeMap<String, usize> = BTreeMap::new();
        for name in found {
            let name = bare(name);
            let starts = name.match_indices('.').map(|(dot, _)| dot + 1);
            for start in [0].into_iter().chain(starts) {
                if expected.contains(&name[start..]) {
                    *hits.entry(name[..start].to_owned()).or_default() += 1;
                }
            }
        }
        let best = hits.into_iter().max_by_key(|(prefix, hits)| {
            let known = unknown(prefix).is_none();
            (*hits, known, prefix.contains("ema"), std::cmp::Reverse(prefix.len()))
        });
        let (prefix, hits) = best.unwrap_or_default();
        Self { prefix, hits }
    }

    /// The part of the prefix that is none of the known wrappers.
    pub(crate) fn unknown(&self) -> Option<&str> {
        unknown(&self.prefix)
    }
}

fn unknown(prefix: &str) -> Option<&str> {
    prefix.split_terminator('.').find(|part| !BEFORE.contains(part))
}

/// The weights under the network's own names. What is taken off, and how many weights of others stay behind, is
/// logged for `file`.
///
/// # Errors
/// A sentence naming a wrapper that is not known.
pub(crate) fn take_off(
    naming: &Naming,
    weights: HashMap<String, Weight>,
    file: &str,
) -> Result<HashMap<String, Weight>, String> {
    let Naming { prefix, .. } = naming;
    if let Some(part) = naming.unknown() {
        return Err(format!(
            "the names of its weights begin with `{prefix}`, and `{part}` is none of the known wrappers ({}); \
             save them without it",
            BEFORE.join(", ")
        ));
    }
    let all = weights.len();
    let mut changed = !prefix.is_empty();
    let mut taken = HashMap::new();
    for (name, weight) in weights {
        let bare = bare(&name);
        changed |= bare.len() != name.len();
        if let Some(own) = bare.strip_prefix(prefix.as_str()) {
            taken.insert(own.to_owned(), weight);
        }
    }
    if changed {
        let what = if prefix.is_empty() { "wrappers'" } else { prefix };
        let others = match all - taken.len() {
            0 => String::new(),
            others => format!("; {others} tensors without it are left out"),
        };
        tracing::info!("{file}: took {what} off the names of {} weights{others}", taken.len());
    }
    Ok(taken)
}

/// The name without what wrappers add anywhere.
fn bare(name: &str) -> String {
    let parts = name.split('.').filter(|part| !ANYWHERE.contains(part));
    parts.collect::<Vec<_>>().join(".")
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};

    use super::*;

    fn weights(names: &[&str]) -> HashMap<String, Weight> {
        let zero = || Weight::Here(Tensor::zeros((), DType::F32, &Device::Cpu).unwrap());
        names.iter().map(|name| ((*name).to_owned(), zero())).collect()
    }

    /// The names after everything known was taken off.
    fn taken(found: &[&str]) -> Result<Vec<String>, String> {
        let expected = ["a.weight", "a.bias", "b.0.weight"].map(String::from).into();
        let naming = Naming::find(&expected, found.iter().copied());
        let mut names: Vec<_> = take_off(&naming, weights(found), "x.pt")?.into_keys().collect();
        names.sort();
        Ok(names)
    }

    #[test]
    fn known_wrappers_are_taken_off() {
        let own = ["a.bias", "a.weight", "b.0.weight"];
        for wrapped in [
            own,
            ["module.a.bias", "module.a.weight", "module.b.0.weight"],
            ["_orig_mod.a.bias", "_orig_mod.a.weight", "_orig_mod.b.0.weight"],
            [
                "model._orig_mod.module.a.bias",
                "model._orig_mod.module.a.weight",
                "model._orig_mod.module.b.0.weight",
            ],
            ["a.bias", "a._fsdp_wrapped_module.weight", "b._orig_mod.0.weight"],
        ] {
            assert_eq!(taken(&wrapped).unwrap(), own);
        }
    }

    #[test]
    fn what_lies_beside_the_network_stays_behind_and_an_average_is_preferred() {
        let names = ["model.a.bias", "ema_model.a.bias", "ema_model.initted", "first_stage.a"];
        assert_eq!(taken(&names).unwrap(), ["a.bias", "initted"]);
    }

    #[test]
    fn unknown_wrappers_are_named_and_a_strange_file_stays_as_it_is() {
        let problem = taken(&["model.student.a.bias", "model.student.a.weight"]).unwrap_err();
        assert!(problem.contains("`model.student.`") && problem.contains("`student`"), "{problem}");
        assert_eq!(taken(&["c", "d"]).unwrap(), ["c", "d"]);
        // Fewer names than its own under a wrapper are weights that do not belong.
        assert_eq!(
            taken(&["a.bias", "a.weight", "c.a.bias"]).unwrap(),
            ["a.bias", "a.weight", "c.a.bias"]
        );
    }
}
