//! Which files of a component's folder hold its weights: one, or the shards that an index beside it names; in full
//! precision where they are there, else those of a variant.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::file::read_json;
use super::{state_dict, tensors};
use crate::weight::Weight;
use crate::{Error, Result};

/// The stems of diffusers' file names, and of transformers'.
pub(super) const DIFFUSERS: Stem =
    Stem { safetensors: "diffusion_pytorch_model", pickle: "diffusion_pytorch_model" };
pub(super) const TRANSFORMERS: Stem = Stem { safetensors: "model", pickle: "pytorch_model" };

/// What a library calls its files of weights.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stem {
    /// Before `.safetensors`.
    safetensors: &'static str,
    /// Before `.bin`.
    pickle: &'static str,
}

impl Stem {
    /// The file that is there in most folders.
    pub(super) fn usual(self) -> String {
        format!("{}.safetensors", self.safetensors)
    }

    /// The same of what `torch.save` wrote.
    pub(super) fn usual_pickle(self) -> String {
        format!("{}.bin", self.pickle)
    }

    /// The indices of shards in a folder.
    pub(super) fn indices(self, folder: &Path) -> Vec<PathBuf> {
        let whole = [(self.safetensors, "safetensors"), (self.pickle, "bin")]
            .map(|(stem, suffix)| folder.join(format!("{stem}.{suffix}.index.json")));
        let variants = self.variants(folder).into_iter().map(|(_, file)| file);
        let index = |file: &PathBuf| file.extension().is_some_and(|it| it == "json");
        let there = whole.into_iter().filter(|file| file.exists());
        there.chain(variants.filter(index)).collect()
    }

    /// Files that hold weights or name those that do, the best first: what `torch.save` wrote comes last.
    pub(super) fn candidates(self) -> [String; 8] {
        let (stem, pickle) = (self.safetensors, self.pickle);
        [
            (stem, "safetensors"),
            (stem, "safetensors.index.json"),
            (stem, "fp16.safetensors"),
            (stem, "safetensors.index.fp16.json"),
            (pickle, "bin"),
            (pickle, "bin.index.json"),
            (pickle, "fp16.bin"),
            (pickle, "bin.index.fp16.json"),
        ]
        .map(|(stem, suffix)| format!("{stem}.{suffix}"))
    }

    /// The files of `folder`: those of full precision, or else of its only variant; safetensors, or else of
    /// `torch.save`. Where there are none, the usual one, which need not exist.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Format`] naming an index that cannot be read; [`Error::Format`] where there are several
    /// variants and none is of full precision.
    pub(super) fn files(self, folder: &Path) -> Result<Vec<PathBuf>> {
        for (stem, suffix) in [(self.safetensors, "safetensors"), (self.pickle, "bin")] {
            let whole = folder.join(format!("{stem}.{suffix}"));
            if whole.exists() {
                return Ok(vec![whole]);
            }
            let index = folder.join(format!("{stem}.{suffix}.index.json"));
            if index.exists() {
                return shards(&index);
            }
        }
        let mut variants = self.variants(folder).into_iter();
        match (variants.next(), variants.next()) {
            (None, _) => Ok(vec![folder.join(self.usual())]),
            (Some((_, file)), None) if file.extension().is_some_and(|it| it == "json") => {
                shards(&file)
            }
            (Some((_, file)), None) => Ok(vec![file]),
            (Some((one, _)), Some((other, _))) => Err(Error::Format {
                path: folder.to_owned(),
                problem: format!(
                    "has the weights of the variants {one} and {other}, and none without a variant; leave one of them there"
                ),
            }),
        }
    }

    /// Variants by name, each with its file, or the index of its shards; safetensors before what `torch.save` wrote.
    fn variants(self, folder: &Path) -> Vec<(String, PathBuf)> {
        let entries =
            std::fs::read_dir(folder).into_iter().flatten().filter_map(std::result::Result::ok);
        let mut names: Vec<String> =
            entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        let mut found: Vec<(String, PathBuf)> = Vec::new();
        for (stem, suffix) in [(self.safetensors, "safetensors"), (self.pickle, "bin")] {
            for name in &names {
                let Some(rest) = name.strip_prefix(stem).and_then(|rest| rest.strip_prefix('.'))
                else {
                    continue;
                };
                let one = rest.strip_suffix(suffix).and_then(|rest| rest.strip_suffix('.'));
                let sharded = rest
                    .strip_prefix(suffix)
                    .and_then(|rest| rest.strip_prefix(".index."))
                    .and_then(|rest| rest.strip_suffix(".json"));
                let Some(variant) = one.or(sharded) else { continue };
                let shard = variant.contains("-of-") || variant.contains('.');
                if !shard && !found.iter().any(|(known, _)| known == variant) {
                    found.push((variant.to_owned(), folder.join(name)));
                }
            }
        }
        found
    }
}

/// All weights of some files, each read when it is taken. `names` are those that a file of `torch.save` is looked through
/// for.
///
/// # Errors
/// [`Error::Io`], [`Error::Format`] for a corrupt file.
pub(super) fn open(
    files: &[PathBuf],
    names: impl Fn() -> BTreeSet<String>,
) -> Result<HashMap<String, Weight>> {
    let mut weights = HashMap::new();
    for file in files {
        if file.extension().is_some_and(|extension| extension == "bin") {
            weights.extend(state_dict::weights(file, &names())?);
        } else {
            weights.extend(tensors::open(file)?);
        }
    }
    Ok(weights)
}

fn shards(index: &Path) -> Result<Vec<PathBuf>> {
    let malformed = || Error::Format {
        path: index.to_owned(),
        problem: "`weight_map` must map tensor names to file names beside it".into(),
    };
    let value = read_json(index)?;
    let map = value["weight_map"].as_object().ok_or_else(malformed)?;
    let names: Option<BTreeSet<&str>> = map.values().map(Value::as_str).collect();
    // A shard is a file beside its index, never elsewhere.
    let beside = |name: &&str| Path::new(name).components().count() == 1 && *name != "..";
    let names = names.ok_or_else(malformed)?;
    if names.is_empty() || !names.iter().all(beside) {
        return Err(malformed());
    }
    Ok(names.into_iter().map(|name| index.with_file_name(name)).collect())
}
