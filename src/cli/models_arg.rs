//! Where a command looks for models.

use std::path::PathBuf;

use understudy_models::checkpoint::hub;

use crate::model_folders::{ModelFolders, SEPARATOR};

/// Folders whose subfolders are models.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ModelsArg {
    /// Folder whose subfolders are models; may be given several times, or several in one with `:` between them (`;` on
    /// Windows) [default: the bundled models].
    #[arg(
        long,
        env = "UNDERSTUDY_MODELS",
        value_name = "DIR",
        value_delimiter = SEPARATOR
    )]
    pub models: Vec<PathBuf>,
}

impl ModelsArg {
    /// The folders asked for, with the bundled ones behind them.
    pub(crate) fn folders(&self) -> ModelFolders {
        self.folders_and(Vec::new())
    }

    /// The same, and single models by name.
    pub(crate) fn folders_and(&self, named: Vec<(String, PathBuf)>) -> ModelFolders {
        ModelFolders::new(&self.models, named)
    }

    /// The folder of the model that `flag` names: a folder, a name in one of these folders, or a Hub id.
    ///
    /// # Errors
    /// A sentence naming the flag and the remedy.
    pub(super) fn resolve(&self, flag: &str, model: &str) -> Result<PathBuf, String> {
        let folders = self.folders();
        hub::resolve(model, &folders.all()).map_err(|error| format!("{flag} {model}: {error}"))
    }
}
