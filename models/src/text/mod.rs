//! Text encoders: a prompt's words as numbers, and those as the hidden states that a network is conditioned on; CLIP's
//! ([`clip`]) and T5's ([`t5`]).

pub mod clip;
mod prompt_encoder;
pub mod t5;
mod tokenizer;
mod weighting;

pub use prompt_encoder::{PromptEncoder, PromptStates};
pub use tokenizer::Tokenizer;
pub use weighting::weighted;
