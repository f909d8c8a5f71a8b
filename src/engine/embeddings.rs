//! What prompts come to, kept as long as there is room: most requests say what was said before.

use std::{
    num::NonZeroUsize,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use candle_core::Tensor;
use lru::LruCache;

/// The numbers of a prompt's tokens.
pub type Tokens = Arc<[u32]>;

/// Prompts of a model that are kept: of the largest text encoders one takes half a megabyte.
const KEPT: NonZeroUsize = NonZeroUsize::new(256).unwrap();

/// The hidden states of a model's prompts, f32 `[tokens, width]` on the CPU, by their tokens; the least recently used are
/// forgotten.
#[derive(Debug)]
pub(crate) struct Embeddings {
    kept: Mutex<LruCache<Tokens, Tensor>>,
    /// The empty prompt's, which every guided request has, and which is never forgotten.
    empty: OnceLock<(Tokens, Tensor)>,
}

impl Default for Embeddings {
    fn default() -> Self {
        Self { kept: Mutex::new(LruCache::new(KEPT)), empty: OnceLock::new() }
    }
}

impl Embeddings {
    pub(super) fn get(&self, tokens: &Tokens) -> Option<Tensor> {
        if let Some((_, states)) = self.empty.get().filter(|(empty, _)| empty == tokens) {
            return Some(states.clone());
        }
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).get(tokens).cloned()
    }

    pub(super) fn keep(&self, tokens: Tokens, states: Tensor) {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).put(tokens, states);
    }

    /// Keeps it for good; the first counts.
    pub(super) fn pin(&self, tokens: Tokens, states: Tensor) {
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
        let tokens = |id: u32| -> Tokens { [id].into() };
        let states = Tensor::zeros((1, 1), DType::F32, &Device::Cpu).unwrap();
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
