//! Where model folders are looked for.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The folder asked for, else the bundled models, wherever the binary runs.
pub(crate) fn models_folder(asked: Option<&Path>) -> Result<PathBuf, String> {
    if let Some(folder) = asked {
        return Ok(folder.to_owned());
    }
    let zoo = Path::new("models/zoo");
    let executable = std::env::current_exe().ok().and_then(|path| fs::canonicalize(path).ok());
    let beside = executable.and_then(|path| Some(path.parent()?.join(zoo)));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(zoo);
    let places = [Some(zoo.to_owned()), beside, Some(source)];
    let there = places.iter().flatten().find(|folder| folder.is_dir());
    there.cloned().ok_or_else(|| {
        let places: Vec<_> =
            places.iter().flatten().map(|folder| format!("\n  {}", folder.display())).collect();
        format!(
            "the bundled models are in none of these places; name a folder with --models{}",
            places.concat()
        )
    })
}
