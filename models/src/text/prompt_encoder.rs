//! What a network is told of a prompt: the states of CLIP's text encoder, of two of these, or of T5's.

use std::time::Duration;

use candle_core::{DType, Device, Tensor};

use super::{
    clip::{ClipEncoder, ClipStates},
    t5::T5Encoder,
};
use crate::Result;

/// The text encoders of a model.
pub struct PromptEncoder(Kind);

enum Kind {
    Clip { first: ClipEncoder, second: Option<Box<Second>> },
    T5 { encoder: T5Encoder, most: usize },
}

/// The second of two, as Stable Diffusion XL has them (Podell et al. 2023, §2).
struct Second {
    encoder: ClipEncoder,
    /// The token that fills its prompts up: its tokenizer differs in this alone.
    pad: u32,
}

/// What becomes of a prompt, on the CPU.
pub struct PromptStates {
    /// What the network attends to: f32 `[tokens, width]`, one for each token of the prompt.
    pub states: Tensor,
    /// The whole prompt as one vector, where the network takes one; empty otherwise.
    pub pooled: Vec<f32>,
}

impl PromptEncoder {
    /// Of one encoder of CLIP's, whose last states are told, after its last norm.
    pub fn clip(encoder: ClipEncoder) -> Self {
        Self(Kind::Clip { first: encoder, second: None })
    }

    /// Of two encoders of as many tokens, whose states before their last layers are told side by side, and what the second one
    /// pools. `pad` fills the second one's prompts up.
    pub fn two_clips(first: ClipEncoder, encoder: ClipEncoder, pad: u32) -> Self {
        Self(Kind::Clip { first, second: Some(Box::new(Second { encoder, pad })) })
    }

    /// Of T5's encoder, for prompts of at most so many tokens.
    pub fn t5(encoder: T5Encoder, most: usize) -> Self {
        Self(Kind::T5 { encoder, most })
    }

    /// What becomes of prompts, each of which is its tokens: of CLIP's one or several times [`PromptEncoder::tokens`], each part
    /// with a beginning and an end, whose states stand one behind the other, while what is pooled is the first part's; of T5's
    /// at most that many, its end among them.
    ///
    /// On the CPU a prompt's states depend, to the bit, only on its own tokens.
    ///
    /// # Errors
    /// As [`ClipEncoder::forward`] and [`T5Encoder::forward`].
    pub fn read(&self, prompts: &[&[u32]]) -> Result<Vec<PromptStates>> {
        match &self.0 {
            Kind::Clip { first, second } => read(first, second.as_deref(), prompts),
            Kind::T5 { encoder, .. } => {
                let read = |prompt: &&[u32]| {
                    let states = encoder.forward(prompt)?.to_device(&Device::Cpu)?;
                    Ok(PromptStates { states, pooled: Vec::new() })
                };
                prompts.iter().map(read).collect()
            }
        }
    }

    /// Tokens of a prompt, those that begin and end it among them: of CLIP's each part has as many, of T5's a prompt at most.
    pub fn tokens(&self) -> usize {
        match &self.0 {
            Kind::Clip { first, .. } => first.config().tokens(),
            Kind::T5 { most, .. } => *most,
        }
    }

    /// Number of weights, also of an encoder that is not in memory now.
    pub fn parameters(&self) -> usize {
        match &self.0 {
            Kind::Clip { first, second } => {
                let second = second.as_ref().map_or(0, |second| second.encoder.parameters());
                first.parameters() + second
            }
            Kind::T5 { encoder, .. } => encoder.config().parameters(),
        }
    }

    /// Whether its weights are read when it is first asked, and may be forgotten until the next time.
    pub fn is_lazy(&self) -> bool {
        matches!(self.0, Kind::T5 { .. })
    }

    /// Reads the weights, if they are not in memory.
    ///
    /// # Errors
    /// As [`T5Encoder::forward`].
    pub fn load(&self) -> Result<()> {
        match &self.0 {
            Kind::Clip { .. } => Ok(()),
            Kind::T5 { encoder, .. } => encoder.load(),
        }
    }

    /// Forgets weights that can be read again and were not used for so long; whether there were some. Waits for nobody.
    pub fn unload_if_idle(&self, idle: Duration) -> bool {
        match &self.0 {
            Kind::Clip { .. } => false,
            Kind::T5 { encoder, .. } => encoder.unload_if_idle(idle),
        }
    }
}

/// As [`PromptEncoder::read`], of CLIP's.
fn read(
    first: &ClipEncoder,
    second: Option<&Second>,
    prompts: &[&[u32]],
) -> Result<Vec<PromptStates>> {
    if prompts.is_empty() {
        return Ok(Vec::new());
    }
    let length = first.config().tokens();
    let ids = prompts.concat();
    let parts =
        |ids: Vec<u32>| Tensor::from_vec(ids.clone(), (ids.len() / length, length), &Device::Cpu);
    let ClipStates { last, penultimate, .. } = first.forward(&parts(ids.clone())?)?;
    let (states, pooled) = match second {
        None => (last, None),
        Some(Second { encoder, pad }) => {
            let mut ids = ids;
            for part in ids.chunks_mut(length) {
                // The same prompt, filled up with another token after the one that ends it.
                let end = first.end(part)?;
                part[end + 1..].fill(*pad);
            }
            let second = encoder.forward(&parts(ids)?)?;
            (Tensor::cat(&[penultimate, second.penultimate], 2)?, Some(second.pooled))
        }
    };
    let here = |tensor: Tensor| tensor.to_dtype(DType::F32)?.to_device(&Device::Cpu);
    let states = here(states)?.flatten_to(1)?;
    let pooled = pooled.map(|pooled| here(pooled)?.to_vec2::<f32>()).transpose()?;
    let mut begin = 0;
    let of = |prompt: &&[u32]| {
        let pooled = pooled.as_ref().map(|pooled| pooled[begin / length].clone());
        // Memory of its own, so that keeping it keeps nothing else.
        let states = states.narrow(0, begin, prompt.len())?.copy()?;
        begin += prompt.len();
        Ok(PromptStates { states, pooled: pooled.unwrap_or_default() })
    };
    prompts.iter().map(of).collect()
}
