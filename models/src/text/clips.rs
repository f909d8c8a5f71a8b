//! What one of CLIP's encoders makes of prompts, or two side by side.

use candle_core::{DType, Device, Tensor};

use super::clip::{ClipEncoder, ClipStates};
use crate::Result;

/// What becomes of a prompt, on the CPU.
pub struct PromptStates {
    /// What the network attends to: f32 `[tokens, width]`, one for each token of the prompt.
    pub states: Tensor,
    /// The whole prompt as one vector, where the network takes one; empty otherwise.
    pub pooled: Vec<f32>,
}

/// The second of two, as Stable Diffusion XL has them (Podell et al. 2023, §2).
pub(super) struct Second {
    pub(super) encoder: ClipEncoder,
    /// The token that fills its prompts up: its tokenizer differs in this alone.
    pub(super) pad: u32,
}

impl Second {
    /// What it makes of parts of prompts as `first` takes them, one behind the other.
    ///
    /// # Errors
    /// As [`ClipEncoder::forward`].
    pub(super) fn forward(&self, first: &ClipEncoder, mut ids: Vec<u32>) -> Result<ClipStates> {
        let length = first.config().tokens();
        for part in ids.chunks_mut(length) {
            // The same prompt, filled up with another token after the one that ends it.
            let end = first.end(part)?;
            part[end + 1..].fill(self.pad);
        }
        Ok(self.encoder.forward(&rows(ids, length)?)?)
    }

    pub(super) fn parameters(&self) -> usize {
        self.encoder.parameters()
    }
}

/// Tokens as parts of so many: u32 `[parts, length]`.
pub(super) fn rows(ids: Vec<u32>, length: usize) -> Result<Tensor> {
    let shape = (ids.len() / length, length);
    Ok(Tensor::from_vec(ids, shape, &Device::Cpu)?)
}

/// As [`super::PromptEncoder::read`], of one encoder or two.
pub(super) fn read(
    first: &ClipEncoder,
    second: Option<&Second>,
    prompts: &[&[u32]],
) -> Result<Vec<PromptStates>> {
    if prompts.is_empty() {
        return Ok(Vec::new());
    }
    let length = first.config().tokens();
    let ids = prompts.concat();
    let ClipStates { last, penultimate, .. } = first.forward(&rows(ids.clone(), length)?)?;
    let (states, pooled) = match second {
        None => (last, None),
        Some(second) => {
            let second = second.forward(first, ids)?;
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
