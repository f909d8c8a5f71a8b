//! What a network is told of a prompt: one text encoder's states, or those of two.

use candle_core::{Device, Result as TensorResult, Tensor};

use super::encoder::{TextEncoder, TextEncoderConfig, TextStates};

/// The text encoders of a model.
pub struct PromptEncoder {
    first: TextEncoder,
    second: Option<Second>,
}

/// The second of two, as Stable Diffusion XL has them (Podell et al. 2023, §2).
struct Second {
    encoder: TextEncoder,
    /// The token that fills its prompts up: its tokenizer differs in this alone.
    pad: u32,
}

/// What becomes of prompts.
pub struct PromptStates {
    /// What the network attends to: `[B, tokens, width]`.
    pub states: Tensor,
    /// The whole prompt as one vector, where the network takes one: `[B, pooled]`.
    pub pooled: Option<Tensor>,
}

impl PromptEncoder {
    /// Of one encoder, whose last states are told, after its last norm.
    pub fn one(encoder: TextEncoder) -> Self {
        Self { first: encoder, second: None }
    }

    /// Of two encoders of as many tokens, whose states before their last layers are told side by side, and what the second one
    /// pools. `pad` fills the second one's prompts up.
    pub fn two(first: TextEncoder, encoder: TextEncoder, pad: u32) -> Self {
        Self { first, second: Some(Second { encoder, pad }) }
    }

    /// The states of prompts, u32 `[B, tokens]` on the CPU as the first tokenizer numbers them.
    ///
    /// On the CPU a prompt's states depend, to the bit, only on its own tokens.
    ///
    /// # Errors
    /// As [`TextEncoder::forward`].
    pub fn forward(&self, ids: &Tensor) -> TensorResult<PromptStates> {
        let TextStates { last, penultimate, .. } = self.first.forward(ids)?;
        let Some(Second { encoder, pad }) = &self.second else {
            return Ok(PromptStates { states: last, pooled: None });
        };
        let rows = ids.to_vec2::<u32>()?.into_iter().map(|row| self.filled(row, *pad));
        let rows = rows.collect::<TensorResult<Vec<_>>>()?.concat();
        let second = encoder.forward(&Tensor::from_vec(rows, ids.dims(), &Device::Cpu)?)?;
        let states = Tensor::cat(&[penultimate, second.penultimate], 2)?;
        Ok(PromptStates { states, pooled: Some(second.pooled) })
    }

    /// The same prompt, filled up with another token after the one that ends it.
    fn filled(&self, mut row: Vec<u32>, pad: u32) -> TensorResult<Vec<u32>> {
        let end = self.first.end(&row)?;
        row[end + 1..].fill(pad);
        Ok(row)
    }

    /// Tokens of a prompt, those that begin and end it among them.
    pub fn tokens(&self) -> usize {
        self.config().tokens()
    }

    /// The first encoder's configuration.
    pub fn config(&self) -> &TextEncoderConfig {
        self.first.config()
    }

    /// Number of weights.
    pub fn parameters(&self) -> usize {
        self.all().map(TextEncoder::parameters).sum()
    }

    fn all(&self) -> impl Iterator<Item = &TextEncoder> {
        std::iter::once(&self.first).chain(self.second.as_ref().map(|second| &second.encoder))
    }
}
