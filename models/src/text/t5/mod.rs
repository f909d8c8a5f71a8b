//! T5's encoder (Raffel et al. 2020): transformers' `T5EncoderModel` and `T5Tokenizer`.
//!
//! The network is candle-transformers'. It takes no mask, so each prompt is encoded by itself, and only its own tokens.

mod config;
mod encoder;
mod sentencepiece;
mod tokenizer;

pub use config::T5Config;
pub use encoder::T5Encoder;
pub use tokenizer::T5Tokenizer;
