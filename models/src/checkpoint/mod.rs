//! Model folders on disk: the diffusers layout plus a model card.

pub mod card;
