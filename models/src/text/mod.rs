//! Text encoders: a prompt's words as numbers, and those as the hidden states that a U-Net is conditioned on.
//!
//! CLIP's (Radford et al. 2021): transformers' `CLIPTextModel`, `CLIPTextModelWithProjection` and `CLIPTokenizer`.

mod encoder;
mod tokenizer;

pub use encoder::{TextEncoder, TextEncoderConfig, TextStates};
pub use tokenizer::Tokenizer;
