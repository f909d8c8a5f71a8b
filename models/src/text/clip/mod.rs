//! CLIP's text encoder (Radford et al. 2021): transformers' `CLIPTextModel`, `CLIPTextModelWithProjection` and `CLIPTokenizer`.

mod encoder;
mod tokenizer;
mod vocabulary;

pub use encoder::{ClipConfig, ClipEncoder, ClipStates};
pub(crate) use encoder::{file_name, renamed};
pub use tokenizer::ClipTokenizer;
pub(crate) use vocabulary::clip_vocabulary;
