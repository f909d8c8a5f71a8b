//! T5 encoders in folders of transformers.

use std::path::Path;

use candle_core::Device;

use super::file::read_json;
use super::parts::shown;
use super::weight_files::{self, TRANSFORMERS};
use crate::text::t5::{T5Config, T5Encoder};
use crate::{Error, Result};

/// The encoder in a folder, whose weights, in one file or shards, are read when it is first asked; their names and shapes are
/// checked now.
///
/// # Errors
/// [`Error::Io`] or [`Error::Format`] naming the file; [`Error::Value`] naming the field of `config.json` that cannot be
/// honoured.
pub fn t5_encoder(folder: &Path, device: &Device) -> Result<T5Encoder> {
    let file = folder.join("config.json");
    encoder(T5Config::from_json(&read_json(&file)?, &shown(&file))?, folder, device)
}

/// The same, whose configuration has been read.
///
/// # Errors
/// As there.
pub(super) fn encoder(config: T5Config, folder: &Path, device: &Device) -> Result<T5Encoder> {
    let (own, shapes) = (folder.to_owned(), config.clone());
    let open = move || {
        let names = || shapes.weight_shapes().into_keys().collect();
        weight_files::open(&TRANSFORMERS.files(&own)?, names)
    };
    T5Encoder::of_files(config, Box::new(open), device).map_err(|error| match error {
        Error::Weights(problem) => Error::Format { path: folder.to_owned(), problem },
        error => error,
    })
}
