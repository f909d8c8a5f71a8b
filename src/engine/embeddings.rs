//! What prompts come to, kept as long as there is room: most requests say what was said before.

use std::{
    num::NonZeroUsize,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use candle_core::{Result, Tensor};
use lru::LruCache;

/// A prompt's tokens.
pub type Tokens = Arc<Words>;

/// The numbers of a prompt's tokens, and how much each counts.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct Words {
    ids: Vec<u32>,
    /// The bits of f32, one for each; nothing where all count alike.
    weights: Vec<u32>,
    /// Whether they are told as zeros, and not read.
    unsaid: bool,
}

/// What a prompt comes to.
#[derive(Debug, Clone)]
pub(crate) struct States {
    /// f32 `[tokens, width]`.
    pub(crate) hidden: Tensor,
    /// The whole prompt as one vector, where the network takes one; empty otherwise.
    pub(crate) pooled: Arc<[f32]>,
}

impl States {
    /// As many zeros.
    pub(super) fn zeros(&self) -> Result<Self> {
        let pooled = vec![0.0; self.pooled.len()].into();
        Ok(Self { hidden: self.hidden.zeros_like()?, pooled })
    }

    /// The same where the network is, which is told of so many tokens: those that a prompt does not have are zeros.
    pub(super) fn on(&self, device: &candle_core::Device, tokens: usize) -> Result<Self> {
        let (own, pooled) = (self.hidden.dim(0)?, Arc::clone(&self.pooled));
        let hidden = self.hidden.pad_with_zeros(0, 0, tokens.saturating_sub(own))?;
        Ok(Self { hidden: hidden.to_device(device)?, pooled })
    }
}

impl Words {
    /// Tokens that count alike.
    pub fn new(ids: Vec<u32>) -> Self {
        Self { ids, weights: Vec::new(), unsaid: false }
    }

    /// Tokens with as many weights; 1 is usual.
    pub fn weighted(ids: Vec<u32>, weights: &[f32]) -> Self {
        if weights.iter().all(|weight| *weight == 1.0) {
            return Self::new(ids);
        }
        let weights = weights.iter().map(|weight| weight.to_bits()).collect();
        Self { ids, weights, unsaid: false }
    }

    /// As many tokens that are told as zeros.
    #[must_use]
    pub fn unsaid(self) -> Self {
        Self { unsaid: true, ..self }
    }

    /// Whether they are told as zeros, and not read.
    pub fn are_unsaid(&self) -> bool {
        self.unsaid
    }

    /// The numbers.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// How much each counts, where they differ.
    pub fn weights(&self) -> Option<Vec<f32>> {
        let weights = self.weights.iter().map(|bits| f32::from_bits(*bits));
        (!self.weights.is_empty()).then(|| weights.collect())
    }
}

/// Prompts of a model that are kept: of CLIP's largest text encoders one takes half a megabyte, of T5's at most five, of both
/// together five and a half.
const KEPT: NonZeroUsize = NonZeroUsize::new(256).unwrap();

/// What a model's prompts came to, on the CPU, by their tokens; the least recently used are forgotten.
#[derive(Debug)]
pub(crate) struct Embeddings {
    kept: Mutex<LruCache<Tokens, States>>,
    /// The empty prompt's, which every guided request has, and which is never forgotten.
    empty: OnceLock<(Tokens, States)>,
}

impl Default for Embeddings {
    fn default() -> Self {
        Self { kept: Mutex::new(LruCache::new(KEPT)), empty: OnceLock::new() }
    }
}

impl Embeddings {
    pub(crate) fn get(&self, tokens: &Tokens) -> Option<States> {
        if let Some((_, states)) = self.empty.get().filter(|(empty, _)| empty == tokens) {
            return Some(states.clone());
        }
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).get(tokens).cloned()
    }

    pub(super) fn keep(&self, tokens: Tokens, states: States) {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).put(tokens, states);
    }

    /// Keeps it for good; the first counts.
    pub(super) fn pin(&self, tokens: Tokens, states: States) {
        let _ = self.empty.set((tokens, states));
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn the_least_recently_used_is_forgotten_and_the_empty_prompt_never() {
        let embeddings = Embeddings::default();
        let tokens = |id: u32| -> Tokens { Words::new(vec![id]).into() };
        let hidden = Tensor::zeros((1, 1), DType::F32, &Device::Cpu).unwrap();
        let states = States { hidden, pooled: [].into() };
        embeddings.pin(tokens(0), states.clone());
        for id in 1..=KEPT.get() as u32 {
            embeddings.keep(tokens(id), states.clone());
        }
        assert!(embeddings.get(&tokens(1)).is_some());
        embeddings.keep(tokens(999_999), states);
        let kept = [0, 1, 2, 3, 999_999].map(|id| embeddings.get(&tokens(id)).is_some());
        assert_eq!(kept, [true, true, false, true, true]);
    }
}
