//! How a text-to-image model reads prompts.

use understudy_models::{Error, text::Tokenizer};

use crate::engine::Tokens;

/// Bytes of the longest prompt that is looked at: more than is read of any.
const MOST_BYTES: usize = 16 << 10;
/// Parts of the longest prompt: the networks are compiled for each number of them.
const MOST_PARTS: usize = 4;

/// A tokenizer, and how many of its tokens the text encoder takes.
///
/// A prompt that is longer is read in parts, each with a beginning and an end, whose hidden states stand one behind the
/// other: what compel, A1111's web UI and diffusers' long prompt weighting pipeline do.
pub struct Text {
    tokenizer: Tokenizer,
    /// Tokens of a part, its beginning and its end among them.
    length: usize,
    empty: Tokens,
}

impl Text {
    pub(super) fn new(tokenizer: Tokenizer, length: usize) -> understudy_models::Result<Self> {
        let empty = tokenizer.chunks("", length)?.concat().into();
        Ok(Self { tokenizer, length, empty })
    }

    /// The tokens of prompts, each with the field that says it. All have as many parts as the longest: the others end with
    /// empty ones.
    pub(super) fn prompts(&self, texts: &[(&str, &str)]) -> understudy_models::Result<Vec<Tokens>> {
        let all = texts.iter().map(|(field, text)| self.read(field, text));
        let all: Vec<Vec<Vec<u32>>> = all.collect::<understudy_models::Result<_>>()?;
        let most = all.iter().map(Vec::len).max().unwrap_or(0);
        let filled = all.into_iter().map(|mut parts| {
            parts.resize_with(most, || self.empty.to_vec());
            parts.concat().into()
        });
        Ok(filled.collect())
    }

    /// The parts of a prompt, which `field` says.
    fn read(&self, field: &str, prompt: &str) -> understudy_models::Result<Vec<Vec<u32>>> {
        let refuse = |value: String, remedy: String| Err(Error::value(field, value, remedy));
        if prompt.len() > MOST_BYTES {
            let value = format!("{} bytes long", prompt.len());
            return refuse(value, format!("at most {MOST_BYTES} are read; shorten it"));
        }
        if prompt.contains('\0') {
            let place = prompt.find('\0').unwrap_or_default();
            let value = format!("text with U+0000 at byte {place}");
            return refuse(value, "no text encoder knows it; take it out".into());
        }
        let parts = self.tokenizer.chunks(prompt, self.length)?;
        if parts.len() > MOST_PARTS {
            let (count, most) = (self.tokenizer.ids(prompt)?.len(), self.max_tokens());
            let remedy = format!("at most {most} are read; shorten it");
            return refuse(format!("{count} tokens long"), remedy);
        }
        Ok(parts)
    }

    /// Those of the empty prompt.
    pub fn empty(&self) -> Tokens {
        Tokens::clone(&self.empty)
    }

    /// In how many parts so many tokens are read.
    pub fn parts(&self, tokens: usize) -> usize {
        tokens / self.length
    }

    /// Most tokens of a prompt, without beginnings and ends.
    pub fn max_tokens(&self) -> usize {
        MOST_PARTS * self.length.saturating_sub(2)
    }
}
