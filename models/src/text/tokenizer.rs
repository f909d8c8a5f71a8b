//! What numbers a prompt's words.

use super::{clip::ClipTokenizer, joint::JointTokenizer, t5::T5Tokenizer};
use crate::Result;

/// The tokenizer of a model's text encoders.
pub enum Tokenizer {
    /// CLIP's: a prompt has a beginning and an end, and is filled up to as many tokens as the encoder takes.
    Clip(ClipTokenizer),
    /// T5's: a prompt has an end, and its own tokens alone.
    T5(T5Tokenizer),
    /// CLIP's and T5's, one behind the other.
    Joint(Box<JointTokenizer>),
}

impl Tokenizer {
    /// The tokens of a prompt, at most `most` with those that begin and end it, as [`super::PromptEncoder::read`] takes them.
    ///
    /// # Errors
    /// [`crate::Error::Value`] telling how many tokens there are, and how many may be, where they are too many: nothing is cut.
    pub fn encode(&self, prompt: &str, most: usize) -> Result<Vec<u32>> {
        match self {
            Self::Clip(tokenizer) => tokenizer.encode(prompt, most),
            Self::T5(tokenizer) => tokenizer.encode(prompt, most),
            Self::Joint(tokenizer) => tokenizer.encode(prompt, most),
        }
    }
}
