//! Prompts that CLIP and T5 read together, as Stable Diffusion 3 has them (Esser et al. 2024, §4): the states of two encoders
//! of CLIP's side by side, with zeros to T5's width, and behind them those of T5's encoder.

use std::{sync::Arc, time::Duration};

use candle_core::{DType, Device, Tensor};

use super::clip::{ClipEncoder, ClipStates, ClipTokenizer};
use super::clips::{PromptStates, Second, rows};
use super::t5::{T5Encoder, T5Tokenizer};
use crate::{Error, Result};

/// Tokens of T5's part, whatever a prompt says: diffusers' pipeline fills it up, and masks nothing.
pub const T5_TOKENS: usize = 256;

/// The tokenizers of CLIP's part and of T5's, which need not be there.
pub struct JointTokenizer {
    clip: ClipTokenizer,
    t5: Option<T5Tokenizer>,
}

impl JointTokenizer {
    /// Of one tokenizer for both of CLIP's encoders.
    pub fn new(clip: ClipTokenizer, t5: Option<T5Tokenizer>) -> Self {
        Self { clip, t5 }
    }

    /// The `all` tokens of a prompt: CLIP's, then [`T5_TOKENS`] of T5's, 0 where there is no T5.
    ///
    /// With T5, which reads all of it, a prompt that is too long for CLIP is cut there, as diffusers does.
    ///
    /// # Errors
    /// [`Error::Value`] telling how many tokens there are, and how many may be, where they are too many for T5, or, without
    /// it, for CLIP.
    pub fn encode(&self, prompt: &str, all: usize) -> Result<Vec<u32>> {
        let length = all.saturating_sub(T5_TOKENS);
        let Some(t5) = &self.t5 else {
            let mut ids = self.clip.encode(prompt, length)?;
            ids.resize(all, 0);
            return Ok(ids);
        };
        let mut ids = self.clip.chunks(prompt, length)?.swap_remove(0);
        ids.extend(t5.filled(prompt, T5_TOKENS)?);
        Ok(ids)
    }

    /// Most tokens of a prompt of `all`, without beginnings and ends.
    pub fn most(&self, all: usize) -> usize {
        match self.t5 {
            Some(_) => T5_TOKENS - 1,
            None => all.saturating_sub(T5_TOKENS + 2),
        }
    }
}

/// The encoders.
pub(super) struct Joint {
    first: ClipEncoder,
    second: Second,
    t5: Option<Arc<T5Encoder>>,
    /// Numbers of a token's state.
    width: usize,
}

impl Joint {
    /// Of encoders that are no wider, CLIP's two together, and T5's exactly; without T5 its states are zeros.
    pub(super) fn new(
        first: ClipEncoder,
        second: Second,
        t5: Option<T5Encoder>,
        width: usize,
    ) -> Self {
        Self { first, second, t5: t5.map(Arc::new), width }
    }

    /// What becomes of prompts, each of which is [`Joint::tokens`] tokens.
    ///
    /// # Errors
    /// As [`ClipEncoder::forward`] and [`T5Encoder::forward`].
    pub(super) fn read(&self, prompts: &[&[u32]]) -> Result<Vec<PromptStates>> {
        if prompts.is_empty() {
            return Ok(Vec::new());
        }
        let (length, all) = (self.first.config().tokens(), self.tokens());
        if let Some(other) = prompts.iter().find(|prompt| prompt.len() != all) {
            let remedy = format!("must be {all}: CLIP's {length} and T5's {T5_TOKENS}");
            return Err(Error::value("tokens of a prompt", other.len(), remedy));
        }
        let ids: Vec<u32> = prompts.iter().flat_map(|prompt| &prompt[..length]).copied().collect();
        let second = self.second.forward(&self.first, ids.clone())?;
        let ClipStates { penultimate, pooled, .. } = self.first.forward(&rows(ids, length)?)?;
        let here = |tensor: Tensor| tensor.to_dtype(DType::F32)?.to_device(&Device::Cpu);
        let states = here(Tensor::cat(&[penultimate, second.penultimate], 2)?)?;
        let narrower = self.width.saturating_sub(states.dim(2)?);
        let states = states.pad_with_zeros(2, 0, narrower)?;
        let pooled = here(Tensor::cat(&[pooled, second.pooled], 1)?)?.to_vec2::<f32>()?;
        let of = |(row, (prompt, pooled)): (usize, (&&[u32], Vec<f32>))| {
            let behind = match &self.t5 {
                Some(t5) => t5.forward(&prompt[length..])?.to_device(&Device::Cpu)?,
                None => Tensor::zeros((T5_TOKENS, self.width), DType::F32, &Device::Cpu)?,
            };
            let states = Tensor::cat(&[states.get(row)?, behind], 0)?;
            Ok(PromptStates { states, pooled })
        };
        prompts.iter().zip(pooled).enumerate().map(of).collect()
    }

    /// Tokens of a prompt, those that begin, end and fill it among them.
    pub(super) fn tokens(&self) -> usize {
        self.first.config().tokens() + T5_TOKENS
    }

    /// Number of weights.
    pub(super) fn parameters(&self) -> usize {
        let t5 = self.t5.as_ref().map_or(0, |t5| t5.config().parameters());
        self.first.parameters() + self.second.parameters() + t5
    }

    /// Whether some weights are read when it is first asked.
    pub(super) fn is_lazy(&self) -> bool {
        self.t5.is_some()
    }

    /// Has the other's T5 for its own.
    pub(super) fn share(&mut self, other: &Self) {
        self.t5.clone_from(&other.t5);
    }

    /// Reads T5's weights, if they are not in memory.
    ///
    /// # Errors
    /// As [`T5Encoder::forward`].
    pub(super) fn load(&self) -> Result<()> {
        self.t5.as_ref().map_or(Ok(()), |t5| t5.load())
    }

    /// As [`T5Encoder::unload_if_idle`].
    pub(super) fn unload_if_idle(&self, idle: Duration) -> bool {
        self.t5.as_ref().is_some_and(|t5| t5.unload_if_idle(idle))
    }
}
