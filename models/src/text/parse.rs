//! Files of Hugging Face's `tokenizers`, as they are read here.

use std::path::Path;

use tokenizers::Tokenizer;

use crate::{Error, Result};

/// The tokenizer that a `file` describes with `text`. What it says of cutting and filling texts up is what it was last used with, which transformers
/// sets anew at every call, and is left out: nothing is cut here, and who reads tokens fills them up.
///
/// # Errors
/// [`Error::Format`] naming the file.
pub(super) fn tokenizer(text: &str, file: &Path) -> Result<Tokenizer> {
    let refuse = |error: tokenizers::Error| Error::Format {
        path: file.to_owned(),
        problem: format!("is not a tokenizer that its vocabulary allows ({error})"),
    };
    let mut tokenizer: Tokenizer = text.parse().map_err(refuse)?;
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(refuse)?;
    Ok(tokenizer)
}
