//! `T5Tokenizer`: text to the numbers of tokens, by a unigram language model (Kudo 2018).

use std::path::Path;

use serde_json::{Value, json};

use super::sentencepiece::SentencePieces;
use crate::checkpoint::read;
use crate::text::parse;
use crate::{Error, Result};

/// Bytes of the largest vocabulary that is read.
const LIMIT: u64 = 64 << 20;
/// What ends a text.
const END: &str = "</s>";
/// What fills a text up.
const PAD: &str = "<pad>";
/// Tokens that stand for gaps in a text, which a vocabulary ends with.
const EXTRA: usize = 100;

/// A tokenizer of T5's kind.
pub struct T5Tokenizer {
    inner: tokenizers::Tokenizer,
    end: u32,
}

impl T5Tokenizer {
    /// Reads a folder as transformers writes it: `tokenizer.json`, or, of earlier versions, `spiece.model`.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Format`] naming the file.
    pub fn open(folder: &Path) -> Result<Self> {
        let whole = folder.join("tokenizer.json");
        let (file, text) = if whole.exists() {
            let text = read::text(&whole, LIMIT)?;
            (whole, text)
        } else {
            let file = folder.join("spiece.model");
            let pieces = SentencePieces::parse(&read::whole(&file, LIMIT)?);
            let described = pieces.and_then(|pieces| described(&pieces));
            let described = described
                .map_err(|problem| Error::Format { path: file.clone(), problem })?
                .to_string();
            (file, described)
        };
        let inner = parse::tokenizer(&text, &file)?;
        let end = inner.token_to_id(END).ok_or_else(|| Error::Format {
            path: file,
            problem: format!("has no token {END}, which ends a text"),
        })?;
        Ok(Self { inner, end })
    }

    /// Tokens of the vocabulary, special ones among them.
    pub fn vocabulary(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The tokens of a text, the one that ends it among them.
    ///
    /// # Errors
    /// [`Error::Value`] for a text that its model cannot encode.
    pub fn ids(&self, text: &str) -> Result<Vec<u32>> {
        let encoded = self.inner.encode_fast(text, false);
        let encoded = encoded
            .map_err(|error| Error::value("prompt", format!("{text:.60?}"), error.to_string()))?;
        let mut ids = encoded.get_ids().to_vec();
        ids.push(self.end);
        Ok(ids)
    }

    /// The tokens of a prompt as PixArt's pipelines have them: of its text in lower case, without white space around it.
    /// `most` is how many there may be, with the one that ends it.
    ///
    /// # Errors
    /// As [`T5Tokenizer::ids`]; [`Error::Value`] telling how many tokens there are, and how many may be, where they are too
    /// many: nothing is cut.
    pub fn encode(&self, prompt: &str, most: usize) -> Result<Vec<u32>> {
        // What separates files, groups, records and units is white space to Python.
        let white = |c: char| c.is_whitespace() || matches!(c, '\x1c'..='\x1f');
        self.within(self.ids(prompt.to_lowercase().trim_matches(white))?, most)
    }

    /// The tokens of a prompt as Stable Diffusion 3's pipeline has them: of its text as it is, filled up to `length`.
    ///
    /// # Errors
    /// As [`T5Tokenizer::encode`]; [`Error::Value`] for a vocabulary that has nothing to fill with.
    pub fn filled(&self, prompt: &str, length: usize) -> Result<Vec<u32>> {
        let mut ids = self.within(self.ids(prompt)?, length)?;
        let remedy = "must be in the vocabulary, to fill prompts up";
        let pad = self.inner.token_to_id(PAD);
        ids.resize(length, pad.ok_or_else(|| Error::value("pad_token", PAD, remedy))?);
        Ok(ids)
    }

    fn within(&self, ids: Vec<u32>, most: usize) -> Result<Vec<u32>> {
        if ids.len() > most {
            let remedy = format!("at most {most} fit; shorten the prompt");
            return Err(Error::value("prompt", format!("{} tokens long", ids.len()), remedy));
        }
        Ok(ids)
    }
}

/// What `tokenizer.json` would hold, as transformers makes it of sentence pieces.
fn described(pieces: &SentencePieces) -> std::result::Result<Value, String> {
    let mut vocabulary = pieces.vocabulary.clone();
    let gap = |i: usize| format!("<extra_id_{i}>");
    vocabulary.extend((0..EXTRA).rev().map(|i| (gap(i), 0.0)));
    let place = |token: &str| vocabulary.iter().position(|(known, _)| known == token);
    let special = [END, "<unk>", PAD].map(str::to_owned).into_iter();
    let added: Vec<Value> = special
        .chain((0..EXTRA).map(gap))
        .filter_map(|token| Some((place(&token)?, token)))
        .map(|(id, token)| {
            json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true,
            })
        })
        .collect();
    let unknown = place("<unk>").ok_or("has no piece <unk>, for what no other is of")?;
    let normalizer = match &pieces.characters {
        Some(map) => json!({"type": "Precompiled", "precompiled_charsmap": map}),
        None => Value::Null,
    };
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "WhitespaceSplit"},
            {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
        ]},
        "post_processor": null,
        "decoder": null,
        "model": {
            "type": "Unigram", "unk_id": unknown, "byte_fallback": false, "vocab": vocabulary,
        },
    }))
}
