//! What a folder has around its network, for another network that takes its place: a student's pipeline is its teacher's.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{
    file::read_json,
    parts::{IDLE, TOKENIZER_FILES, TOKENIZER_FOLDERS, around},
};
use crate::{Error, NetworkConfig, Result};

/// `model_index.json` of a folder whose network is `own`, for another network of the same kind.
///
/// # Errors
/// [`Error::Value`] for a network of another kind; [`Error::Io`] or [`Error::Format`] naming the index.
pub(super) fn index(folder: &Path, own: &NetworkConfig, network: &NetworkConfig) -> Result<Value> {
    let (own, other) = (own.class_name(), network.class_name());
    if own != other {
        let remedy = format!("must be a {own}, which the pipeline of {} holds", folder.display());
        return Err(Error::value("network", other, remedy));
    }
    let mut index = read_json(&folder.join("model_index.json"))?;
    for name in IDLE.iter().filter(|name| !index[**name].is_null()).collect::<Vec<_>>() {
        index[*name] = json!([null, null]);
    }
    if !index["requires_safety_checker"].is_null() {
        index["requires_safety_checker"] = json!(false);
    }
    Ok(index)
}

/// The files around the network: what each is called inside the folder, and where it is. Weights are called as diffusers
/// and transformers look for them, also where only a variant of them is there.
///
/// # Errors
/// [`Error::Io`] or [`Error::Format`] naming an index that cannot be understood.
pub(super) fn files(folder: &Path) -> Result<Vec<(String, PathBuf)>> {
    let mut files = Vec::new();
    for (component, stem) in around(folder)?.parts {
        let place = folder.join(component);
        let mut put = |name: &str, file: PathBuf| files.push((format!("{component}/{name}"), file));
        put("config.json", place.join("config.json"));
        match &stem.files(&place)?[..] {
            [file] => {
                let pickled = file.extension().is_some_and(|extension| extension == "bin");
                let name = if pickled { stem.usual_pickle() } else { stem.usual() };
                put(&name, file.clone());
            }
            shards => {
                for file in shards.iter().cloned().chain(stem.indices(&place)) {
                    let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
                    put(&name, file);
                }
            }
        }
    }
    for tokenizer in TOKENIZER_FOLDERS {
        files.extend(tokenizer_files(&folder.join(tokenizer)).into_iter().map(|file| {
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            (format!("{tokenizer}/{name}"), file)
        }));
    }
    Ok(files)
}

/// The files of a tokenizer that are there.
pub(super) fn tokenizer_files(folder: &Path) -> Vec<PathBuf> {
    TOKENIZER_FILES.iter().map(|name| folder.join(name)).filter(|file| file.exists()).collect()
}
