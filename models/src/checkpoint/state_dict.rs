//! State dicts that other programs saved: files of `torch.save` (from PyTorch 1.6 on) and safetensors, told apart
//! by their first bytes.
//!
//! What training programs put around a network is taken off: dicts such as `{"model": …, "ema": …}`, and what
//! wrappers put before names, such as `module.`. Only what is known is taken off, and the log says what; the rest is
//! refused by its name. No code in a pickle is run.

mod pickle;
mod torch;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io::Read,
    path::{Path, PathBuf},
};

use candle_core::Tensor;

use super::{read, tensors};
use crate::{
    Error, Result,
    weight::Weight,
    wrappers::{self, Naming},
};

/// Keys under which programs keep a network's state dict.
const KEYS: [&str; 20] = [
    "state_dict",
    "model_state_dict",
    "model_state",
    "model_dict",
    "model",
    "module",
    "net",
    "network",
    "unet",
    "denoiser",
    "weights",
    "params",
    "state",
    "ema",
    "ema_state_dict",
    "ema_model",
    "ema_model_state_dict",
    "model_ema",
    "params_ema",
    "ema_params",
];

/// A dict of tensors inside of a file.
struct Candidate {
    /// The keys that lead to it.
    keys: Vec<String>,
    weights: HashMap<String, Weight>,
}

impl Candidate {
    /// The first key that is none of the known wrappers.
    fn unknown(&self) -> Option<&str> {
        self.keys.iter().map(String::as_str).find(|key| !KEYS.contains(key))
    }
}

/// The tensors of a file, as [`StateDict::open`] finds them.
///
/// # Errors
/// As there.
pub(super) fn weights(path: &Path, names: &BTreeSet<String>) -> Result<HashMap<String, Weight>> {
    Ok(StateDict::open(path, names)?.weights)
}

/// A network's tensors in a file; each is read when it is taken.
pub struct StateDict {
    path: PathBuf,
    weights: HashMap<String, Weight>,
}

impl StateDict {
    /// Finds the state dict that has tensors of these `names`, which are as the network has them. Of several that
    /// have as many, a running average (EMA) is preferred.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] naming the file: corrupt, of another kind, or inside of a wrapper that is
    /// not known.
    pub fn open(path: &Path, names: &BTreeSet<String>) -> Result<Self> {
        let refuse = |problem: String| Error::Format { path: path.to_owned(), problem };
        let (mut file, _) = read::open(path)?;
        let mut magic = [0; 2];
        file.read_exact(&mut magic)
            .map_err(|source| Error::Io { path: path.to_owned(), source })?;
        let (candidates, instead) = match magic {
            [b'P', b'K'] => {
                let found = torch::open(path)?;
                (found.candidates, found.instead)
            }
            [0x80, 2..=5] => {
                return Err(refuse(
                    "this is PyTorch's format from before version 1.6; convert it with \
                     `python -c \"import torch; torch.save(torch.load('old.pt', map_location='cpu'), 'new.pt')\"`"
                        .into(),
                ));
            }
            _ => {
                let weights = tensors::open(path).map_err(|error| match error {
                    Error::Format { .. } => refuse(
                        "this is neither a file written by torch.save nor a whole safetensors file"
                            .into(),
                    ),
                    error => error,
                })?;
                (vec![Candidate { keys: Vec::new(), weights }], "no tensors".into())
            }
        };
        let named = candidates.into_iter().map(|candidate| {
            let naming = Naming::find(names, candidate.weights.keys().map(String::as_str));
            (naming, candidate)
        });
        let average = |naming: &Naming, candidate: &Candidate| {
            naming.prefix.contains("ema") || candidate.keys.iter().any(|key| key.contains("ema"))
        };
        // The first of the best; of equals the one that can be taken.
        let best = named.reduce(|best, next| {
            let rank = |(naming, candidate): &(Naming, Candidate)| {
                let known = candidate.unknown().is_none() && naming.unknown().is_none();
                (naming.hits, known, average(naming, candidate))
            };
            if rank(&next) > rank(&best) { next } else { best }
        });
        let Some((naming, candidate)) = best else {
            return Err(refuse(format!("has no tensors by name; it holds {instead}")));
        };
        if naming.hits == 0 && !candidate.keys.is_empty() {
            return Err(refuse(format!("has no tensors of this network; it holds {instead}")));
        }
        let place: String = candidate.keys.iter().map(|key| format!("[{key:?}]")).collect();
        if let Some(key) = candidate.unknown() {
            return Err(refuse(format!(
                "its tensors lie under {place}, and `{key}` is none of the known wrappers ({}); save \
                 torch.load(…){place} alone with torch.save",
                KEYS.join(", ")
            )));
        }
        let Candidate { keys, weights } = candidate;
        if !keys.is_empty() {
            tracing::info!("{}: the tensors are those of {place}", path.display());
        }
        let weights =
            wrappers::take_off(&naming, weights, &path.display().to_string()).map_err(refuse)?;
        Ok(Self { path: path.to_owned(), weights })
    }

    /// Names and shapes of all tensors.
    pub fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        self.weights.iter().map(|(name, weight)| (name.clone(), weight.dims().to_vec())).collect()
    }

    /// Reads a tensor, on the CPU; each can be taken once.
    ///
    /// # Errors
    /// [`Error::Format`] naming file and tensor: not there, or damaged.
    pub fn take(&mut self, name: &str) -> Result<Tensor> {
        let weight = self.weights.remove(name).ok_or_else(|| Error::Format {
            path: self.path.clone(),
            problem: format!("has no tensor `{name}`"),
        })?;
        weight.take()
    }
}
