//! Model folders on disk: the diffusers layout plus a model card.

pub mod adm;
mod around;
pub mod card;
mod draft;
mod file;
mod folder;
pub mod hub;
mod joint;
mod lora;
mod partial;
mod parts;
pub mod read;
mod readme;
pub mod single_file;
mod state_dict;
mod t5;
mod tensors;
mod weight_files;
mod write;

pub use draft::Draft;
pub use file::{check_target, reclaim, sync_folder, write_atomically, write_with};
pub use folder::{ModelFolder, Pipeline, Reader, is_model};
pub use lora::Lora;
pub use parts::{Part, TextConfig, TextPart};
pub use state_dict::StateDict;
pub use t5::t5_encoder;
pub use write::is_finite;
