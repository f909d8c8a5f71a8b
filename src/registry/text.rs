//! How a text-to-image model reads prompts.

use understudy_models::{
    Error,
    text::{Tokenizer, weighted},
};

use crate::engine::{Tokens, Words};

/// How prompts are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Syntax {
    /// Every letter is text.
    #[default]
    Plain,
    /// Words may have weights, as [`weighted`] reads them.
    Weighted,
}

/// Bytes of the longest prompt that is looked at: more than is read of any.
const MOST_BYTES: usize = 16 << 10;
/// Parts of the longest prompt: the networks are compiled for each number of them.
const MOST_PARTS: usize = 4;

/// The field that is guided away from.
pub(super) const NEGATIVE: &str = "negative_prompt";

/// A tokenizer, and how many of its tokens the text encoder takes.
///
/// A prompt that is longer than CLIP's takes is read in parts, each with a beginning and an end, whose hidden states stand one
/// behind the other: what compel, A1111's web UI and diffusers' long prompt weighting pipeline do. One that is longer than T5's
/// may be is refused; where both read it, what is too long for CLIP's is cut there, as diffusers does.
pub struct Text {
    tokenizer: Tokenizer,
    /// Tokens of a part, its beginning and its end among them: of CLIP's exactly, and of both together; of T5's, which has one,
    /// at most.
    length: usize,
    empty: Tokens,
    /// Whether a negative prompt that says nothing is told as zeros, instead of being read.
    zeros: bool,
}

impl Text {
    pub(super) fn new(
        tokenizer: Tokenizer,
        length: usize,
        zeros: bool,
    ) -> understudy_models::Result<Self> {
        let empty = Words::new(tokenizer.encode("", length)?).into();
        Ok(Self { tokenizer, length, empty, zeros })
    }

    /// The tokens of prompts, each with the field that says it. All have as many parts as the longest: the others end with
    /// empty ones.
    pub(super) fn prompts(
        &self,
        texts: &[(&str, &str)],
        syntax: Syntax,
    ) -> understudy_models::Result<Vec<Tokens>> {
        let all = texts.iter().map(|(field, text)| self.read(field, text, syntax));
        let all: Vec<(Vec<Vec<u32>>, Vec<f32>)> = all.collect::<understudy_models::Result<_>>()?;
        let most = all.iter().map(|(parts, _)| parts.len()).max().unwrap_or(0);
        let filled = all.into_iter().map(|(mut parts, mut weights)| {
            parts.resize_with(most, || self.empty.ids().to_vec());
            let ids = parts.concat();
            weights.resize(ids.len(), 1.0);
            Words::weighted(ids, &weights)
        });
        let says = |(words, (field, text)): (Words, &(&str, &str))| -> Tokens {
            let nothing = self.zeros && *field == NEGATIVE && text.is_empty();
            if nothing { words.unsaid() } else { words }.into()
        };
        let filled = filled.zip(texts).map(says);
        Ok(filled.collect())
    }

    /// The parts of a prompt, which `field` says, and the weights of their tokens.
    fn read(
        &self,
        field: &str,
        prompt: &str,
        syntax: Syntax,
    ) -> understudy_models::Result<(Vec<Vec<u32>>, Vec<f32>)> {
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
        let tokenizer = match &self.tokenizer {
            Tokenizer::Clip(tokenizer) => tokenizer,
            whole if syntax == Syntax::Plain => {
                let ids = whole.encode(prompt, self.length).map_err(|error| match error {
                    Error::Value { value, remedy, .. } => Error::value(field, value, remedy),
                    error => error,
                })?;
                return Ok((vec![ids], Vec::new()));
            }
            other => {
                let remedy = match other {
                    Tokenizer::Joint(_) => {
                        "text encoders that are read together take no weights; leave it out"
                    }
                    _ => "a text encoder of T5's kind takes no weights; leave it out",
                };
                return Err(Error::value("prompt_syntax", "weighted", remedy));
            }
        };
        let pieces = match syntax {
            Syntax::Plain => vec![(prompt.to_owned(), 1.0)],
            Syntax::Weighted => weighted(prompt).map_err(|error| match error {
                Error::Value { value, remedy, .. } => Error::value(field, value, remedy),
                error => error,
            })?,
        };
        let (mut ids, mut own) = (Vec::new(), Vec::new());
        for (text, weight) in pieces {
            ids.extend(tokenizer.ids(&text)?);
            own.resize(ids.len(), weight as f32);
        }
        let parts = tokenizer.parts(&ids, self.length)?;
        if parts.len() > MOST_PARTS {
            let (count, most) = (ids.len(), self.max_tokens());
            let remedy = format!("at most {most} are read; shorten it");
            return refuse(format!("{count} tokens long"), remedy);
        }
        // Beginnings, ends and what fills a part count as usual.
        let mut weights = Vec::with_capacity(parts.len() * self.length);
        for of_part in own.chunks(self.length.saturating_sub(2)) {
            weights.push(1.0);
            weights.extend_from_slice(of_part);
            weights.resize(weights.len().next_multiple_of(self.length), 1.0);
        }
        Ok((parts, weights))
    }

    /// Those of the empty prompt, as guided requests have it that name none to be guided away from.
    pub fn empty(&self) -> Tokens {
        if self.zeros {
            return Words::new(self.empty.ids().to_vec()).unsaid().into();
        }
        self.read_empty()
    }

    /// Those of the empty prompt, to be read.
    pub(crate) fn read_empty(&self) -> Tokens {
        Tokens::clone(&self.empty)
    }

    /// In how many parts so many tokens are read.
    pub fn parts(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.length)
    }

    /// Most tokens of a prompt, without beginnings and ends.
    pub fn max_tokens(&self) -> usize {
        match &self.tokenizer {
            Tokenizer::Clip(_) => MOST_PARTS * self.length.saturating_sub(2),
            Tokenizer::T5(_) => self.length.saturating_sub(1),
            Tokenizer::Joint(tokenizer) => tokenizer.most(self.length),
        }
    }
}
