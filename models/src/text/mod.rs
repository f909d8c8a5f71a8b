//! Text encoders: a prompt's words as numbers, and those as the hidden states that a network is conditioned on; CLIP's
//! ([`clip`]), T5's ([`t5`]), and both together ([`joint`]).

pub mod clip;
mod clips;
pub mod joint;
mod parse;
mod prompt_encoder;
pub mod t5;
mod tokenizer;
mod weighting;

pub use clips::PromptStates;
pub use prompt_encoder::PromptEncoder;
pub use tokenizer::Tokenizer;
pub use weighting::weighted;
