//! Model folders on disk: the diffusers layout plus a model card.

pub mod adm;
pub mod card;
mod draft;
mod file;
mod folder;
pub mod hub;
pub mod read;
mod state_dict;
mod tensors;

pub use draft::Draft;
pub use file::write_atomically;
pub use folder::{Loaded, ModelFolder, normal_name};
pub use state_dict::StateDict;
