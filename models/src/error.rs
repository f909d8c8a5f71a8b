//! The one error type of the crate.

use std::{io, path::PathBuf};

/// What can go wrong between a file and a network's answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read or written.
    #[error("{}: {source}{}", path.display(), remedy(.source))]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file holds something that is not what its format allows.
    #[error("{}: {problem}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and the remedy.
        problem: String,
    },
    /// A configuration field, or a request's setting, has a value that cannot be honoured.
    #[error("`{field}` is {value}: {remedy}")]
    Value {
        /// The field's name as the user wrote it (`unet/config.json: down_block_types[1]`, `num_inference_steps`).
        field: String,
        /// The value found.
        value: String,
        /// The limit, and what to do instead.
        remedy: String,
    },
    /// A model could not be had from the Hugging Face Hub.
    #[error("Hub model `{id}`: {problem}")]
    Hub {
        /// `owner/name`.
        id: String,
        /// What happened, with the file and the HTTP status where there is one, and the remedy.
        problem: String,
    },
    /// Weights do not fit the network that the configuration describes.
    #[error("weights: {0}")]
    Weights(String),
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// What to do about the commonest of the system's answers.
fn remedy(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::StorageFull => "; make room there, or choose another place",
        io::ErrorKind::PermissionDenied => "; check who may use it, or choose another place",
        _ => "",
    }
}

impl Error {
    /// A [`Error::Value`] from anything printable.
    pub fn value(
        field: impl Into<String>,
        value: impl ToString,
        remedy: impl Into<String>,
    ) -> Self {
        Self::Value { field: field.into(), value: value.to_string(), remedy: remedy.into() }
    }
}

/// The crate's result type.
pub type Result<T, E = Error> = std::result::Result<T, E>;
