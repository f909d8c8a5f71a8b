//! Text encoders: a prompt's words as numbers, and those as the hidden states that a U-Net is conditioned on.
//!
//! CLIP's (Radford et al. 2021): transformers' `CLIPTextModel`, `CLIPTextModelWithProjection` and `CLIPTokenizer`; and T5's
//! ([`t5`]).

mod encoder;
mod prompt_encoder;
pub mod t5;
mod tokenizer;
mod vocabulary;
mod weighting;

pub use encoder::{TextEncoder, TextEncoderConfig, TextStates};
pub(crate) use encoder::{file_name, renamed};
pub use prompt_encoder::{PromptEncoder, PromptStates};
pub use tokenizer::Tokenizer;
pub(crate) use vocabulary::clip_vocabulary;
pub use weighting::weighted;
