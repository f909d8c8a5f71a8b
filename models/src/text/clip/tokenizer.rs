//! `CLIPTokenizer`: text to the numbers of tokens, by byte-pair encoding (Sennrich et al. 2016).

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::checkpoint::read;
use crate::text::parse;
use crate::{Error, Result};

/// Bytes of the largest vocabulary that is read.
const LIMIT: u64 = 64 << 20;

/// Words as CLIP has them: pieces of what is not white space, letters apart from digits and other characters.
const WORDS: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// A tokenizer of CLIP's kind.
pub struct ClipTokenizer {
    inner: tokenizers::Tokenizer,
    start: u32,
    end: u32,
    pad: u32,
}

impl ClipTokenizer {
    /// Reads a folder as transformers writes it: `tokenizer.json`, or `vocab.json` and `merges.txt`, and, where it is
    /// there, `tokenizer_config.json` (or `special_tokens_map.json`) for the tokens that begin, end and fill a text.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Format`] naming the file; [`Error::Value`] for a special token that is not in the
    /// vocabulary.
    pub fn open(folder: &Path) -> Result<Self> {
        let special = Special::read(folder)?;
        let whole = folder.join("tokenizer.json");
        let (file, text) = if whole.exists() {
            let text = read::text(&whole, LIMIT)?;
            (whole, text)
        } else {
            let file = folder.join("merges.txt");
            (file, assembled(folder, &special)?.to_string())
        };
        let inner = parse::tokenizer(&text, &file)?;
        let id = |role: &str, token: &str| {
            inner.token_to_id(token).ok_or_else(|| {
                let field = format!("{}: {role}", folder.join(CONFIG).display());
                Error::value(field, token, "must be in the vocabulary")
            })
        };
        let [start, end, pad] = [
            id("bos_token", &special.start)?,
            id("eos_token", &special.end)?,
            id("pad_token", &special.pad)?,
        ];
        Ok(Self { inner, start, end, pad })
    }

    /// Tokens of the vocabulary, special ones among them.
    pub fn vocabulary(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The token that fills a text up.
    pub(crate) fn pad(&self) -> u32 {
        self.pad
    }

    /// Whether another has the same words and merges, and begins and ends a text alike.
    pub(crate) fn reads_like(&self, other: &Self) -> bool {
        let told = |one: &Self| (one.start, one.end, one.inner.get_vocab(true));
        told(self) == told(other)
    }

    /// The tokens of a text, without those that begin and end it.
    ///
    /// # Errors
    /// [`Error::Value`] for a text that its model cannot encode.
    pub fn ids(&self, text: &str) -> Result<Vec<u32>> {
        let encoded = self.inner.encode_fast(text, false);
        let encoded = encoded
            .map_err(|error| Error::value("prompt", format!("{text:.60?}"), error.to_string()))?;
        Ok(encoded.get_ids().to_vec())
    }

    /// The tokens of a prompt between those that begin and end it, filled to `length`, as a text encoder of so many
    /// ([`super::ClipConfig::tokens`]) takes them.
    ///
    /// # Errors
    /// [`Error::Value`] telling how many tokens there are, and how many may be, where they are too many: nothing is cut.
    pub fn encode(&self, text: &str, length: usize) -> Result<Vec<u32>> {
        let ids = self.ids(text)?;
        let most = length.saturating_sub(2);
        if ids.len() > most {
            let remedy = format!("at most {most} fit; shorten the prompt");
            return Err(Error::value("prompt", format!("{} tokens long", ids.len()), remedy));
        }
        Ok(self.framed(&ids, length))
    }

    /// A prompt of any length as one or more of `length` tokens, each with a beginning and an end: what diffusers' users do
    /// with long ones, whose hidden states they put one behind the other.
    ///
    /// # Errors
    /// As [`ClipTokenizer::ids`]; a length that holds no token between beginning and end.
    pub fn chunks(&self, text: &str, length: usize) -> Result<Vec<Vec<u32>>> {
        self.parts(&self.ids(text)?, length)
    }

    /// The same of tokens, as [`ClipTokenizer::ids`] gives them.
    ///
    /// # Errors
    /// A length that holds no token between beginning and end.
    pub fn parts(&self, ids: &[u32], length: usize) -> Result<Vec<Vec<u32>>> {
        let most = length.saturating_sub(2);
        if most == 0 {
            let remedy = "must be at least 3: a beginning, a token and an end";
            return Err(Error::value("tokens of a chunk", length, remedy));
        }
        if ids.is_empty() {
            return Ok(vec![self.framed(&[], length)]);
        }
        Ok(ids.chunks(most).map(|part| self.framed(part, length)).collect())
    }

    fn framed(&self, ids: &[u32], length: usize) -> Vec<u32> {
        let mut all = vec![self.start];
        all.extend(ids);
        all.push(self.end);
        all.resize(length, self.pad);
        all
    }
}

pub(super) const CONFIG: &str = "tokenizer_config.json";

/// The tokens that begin, end and fill a text.
struct Special {
    start: String,
    end: String,
    pad: String,
}

impl Special {
    /// Those that a folder tells, or CLIP's.
    fn read(folder: &Path) -> Result<Self> {
        let mut told = Map::new();
        for name in ["special_tokens_map.json", CONFIG] {
            let path = folder.join(name);
            if path.exists() {
                told.extend(object(&path)?);
            }
        }
        let token = |role: &str, default: &str| match told.get(role) {
            Some(Value::String(token)) => token.clone(),
            // With what is around it.
            Some(Value::Object(token)) => token
                .get("content")
                .and_then(Value::as_str)
                .map_or_else(|| default.to_owned(), str::to_owned),
            _ => default.to_owned(),
        };
        let end = token("eos_token", "<|endoftext|>");
        Ok(Self {
            start: token("bos_token", "<|startoftext|>"),
            pad: token("pad_token", &end),
            end,
        })
    }
}

/// What `tokenizer.json` would hold, as transformers makes it of a vocabulary and merges.
fn assembled(folder: &Path, special: &Special) -> Result<Value> {
    let vocabulary_path = folder.join("vocab.json");
    let vocabulary = object(&vocabulary_path)?;
    let merges_path = folder.join("merges.txt");
    let text = read::text(&merges_path, LIMIT)?;
    let lines = text.lines().enumerate().filter(|(i, line)| {
        let header = *i == 0 && line.starts_with("#version");
        !header && !line.trim().is_empty()
    });
    let merges: Result<Vec<Value>> = lines
        .map(|(i, line)| match line.split_once(' ') {
            Some((left, right)) if !right.contains(' ') => Ok(json!([left, right])),
            _ => Err(Error::Format {
                path: merges_path.clone(),
                problem: format!("line {} must be two tokens and a space between them", i + 1),
            }),
        })
        .collect();
    let mut added = Vec::new();
    for token in [&special.start, &special.end, &special.pad] {
        let Some(id) = vocabulary.get(token) else { continue };
        let known = |one: &Value| one["content"] == **token;
        if !added.iter().any(known) {
            added.push(json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true,
            }));
        }
    }
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFC"},
            {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
            {"type": "Lowercase"},
        ]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Removed", "invert": true},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        ]},
        "post_processor": null,
        "decoder": null,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": special.end, "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>", "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": false, "vocab": vocabulary, "merges": merges?,
        },
    }))
}

/// A file that holds one JSON object.
fn object(path: &Path) -> Result<Map<String, Value>> {
    let text = read::text(path, LIMIT)?;
    serde_json::from_str(&text).map_err(|error| Error::Format {
        path: path.to_owned(),
        problem: format!("must hold one JSON object ({error})"),
    })
}
