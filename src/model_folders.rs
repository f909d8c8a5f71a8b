//! Where model folders are looked for.

use std::{
    fs,
    path::{Path, PathBuf},
};

use understudy_models::checkpoint::{ModelFolder, is_model};

/// Between several folders in one value of `--models` or `UNDERSTUDY_MODELS`, as in `PATH`.
pub(crate) const SEPARATOR: char = if cfg!(windows) { ';' } else { ':' };

/// Folders whose direct subfolders are models.
#[derive(Debug, Clone)]
pub struct ModelFolders {
    /// Those whose models are all meant; none where none were named and none are bundled.
    asked: Vec<PathBuf>,
    /// Single models: their names and folders.
    named: Vec<(String, PathBuf)>,
    /// The bundled ones, of which those are meant that are named.
    bundled: Option<PathBuf>,
}

impl ModelFolders {
    /// The folders asked for, else the bundled models, wherever the binary runs.
    pub(crate) fn new(asked: &[PathBuf], named: Vec<(String, PathBuf)>) -> Self {
        let bundled = bundled().ok();
        if asked.is_empty() && named.is_empty() {
            return Self { asked: bundled.into_iter().collect(), named, bundled: None };
        }
        Self { asked: asked.to_vec(), named, bundled }
    }

    /// These folders alone.
    pub fn only(asked: Vec<PathBuf>) -> Self {
        Self { asked, named: Vec::new(), bundled: None }
    }

    /// All folders, in the order in which a name is looked for.
    pub(crate) fn all(&self) -> Vec<&Path> {
        self.asked.iter().chain(&self.bundled).map(PathBuf::as_path).collect()
    }

    /// The folder of the model with that name.
    pub(crate) fn find(&self, name: &str) -> Option<PathBuf> {
        let named = self.named.iter().find(|(it, _)| it == name);
        if let Some((_, folder)) = named {
            return Some(folder.clone());
        }
        self.all().into_iter().map(|folder| folder.join(name)).find(|model| is_model(model))
    }

    /// The names of all models that are meant: those named, those in the folders asked for, and those among the bundled
    /// ones whose students are among these.
    ///
    /// # Errors
    /// A sentence for a folder that cannot be read, for a name that is in two, and where there is no folder at all.
    pub(crate) fn names(&self) -> Result<Vec<String>, String> {
        if self.asked.is_empty() && self.named.is_empty() {
            return Err(bundled().map_or_else(
                |places| format!("{places}\nname a folder of models with --models"),
                |_| "name a folder of models with --models".into(),
            ));
        }
        let mut found: Vec<(String, PathBuf)> = Vec::new();
        for (name, folder) in &self.named {
            if !is_model(folder) {
                return Err(format!(
                    "--model {name}={}: no model_index.json is in it; name the folder of one model",
                    folder.display()
                ));
            }
            if found.iter().any(|(other, _)| other == name) {
                return Err(format!("--model {name}: given twice; give each model its own name"));
            }
            found.push((name.clone(), folder.clone()));
        }
        let mut read = Vec::new();
        for folder in &self.asked {
            let shown = folder.display();
            let explain = |error| {
                format!("--models {shown}: {error}; name a folder that holds model folders")
            };
            let real = fs::canonicalize(folder).map_err(explain)?;
            if read.contains(&real) {
                continue;
            }
            let entries = fs::read_dir(folder).map_err(explain)?.filter_map(Result::ok);
            for name in entries.filter_map(|entry| entry.file_name().into_string().ok()) {
                let model = folder.join(&name);
                if !is_model(&model) {
                    continue;
                }
                if let Some((_, other)) = found.iter().find(|(other, _)| *other == name) {
                    return Err(format!(
                        "--models {shown}: {} and {} have one name; rename one of them",
                        other.display(),
                        model.display()
                    ));
                }
                found.push((name, model));
            }
            read.push(real);
        }
        let teachers =
            found.iter().filter_map(|(_, model)| ModelFolder::open(model).ok()?.card.teacher);
        let teachers: Vec<_> = teachers.collect();
        let mut names: Vec<String> = found.into_iter().map(|(name, _)| name).collect();
        for teacher in teachers {
            let is_bundled = self.bundled.as_ref().is_some_and(|it| is_model(&it.join(&teacher)));
            if is_bundled && !names.contains(&teacher) {
                names.push(teacher);
            }
        }
        names.sort();
        Ok(names)
    }

    /// The folders, for messages.
    pub(crate) fn shown(&self) -> String {
        let named = self.named.iter().map(|(name, folder)| format!("{name}={}", folder.display()));
        let asked = self.asked.iter().map(|it| it.display().to_string());
        named.chain(asked).collect::<Vec<_>>().join(", ")
    }
}

/// The folder of the models that come with the program.
///
/// # Errors
/// A sentence with the places where it is not.
pub(crate) fn bundled() -> Result<PathBuf, String> {
    let zoo = Path::new("models/zoo");
    let executable = std::env::current_exe().ok().and_then(|path| fs::canonicalize(path).ok());
    let folder = executable.as_deref().and_then(Path::parent);
    let beside = folder.map(|folder| folder.join(zoo));
    // As packages lay it out: PREFIX/bin/understudy and PREFIX/share/understudy.
    let shared =
        folder.and_then(Path::parent).map(|prefix| prefix.join("share/understudy").join(zoo));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(zoo);
    let places = [Some(zoo.to_owned()), beside, shared, Some(source)];
    let there = places.iter().flatten().find(|folder| folder.is_dir());
    there.cloned().ok_or_else(|| {
        let places: Vec<_> =
            places.iter().flatten().map(|folder| format!("\n  {}", folder.display())).collect();
        format!(
            "the models that come with the program are in none of these places:{}",
            places.concat()
        )
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use understudy_models::checkpoint::hub;

    use super::*;

    #[test]
    fn a_single_model_has_the_name_it_is_given() {
        let zoo = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/zoo");
        let student = zoo.join("fashion-mnist-student");
        let named = |names: &[&str], folder: &Path| {
            let named = names.iter().map(|name| ((*name).to_owned(), folder.to_owned()));
            ModelFolders::new(&[], named.collect())
        };
        let folders = named(&["sd"], &student);
        assert_eq!(folders.find("sd"), Some(student.clone()));
        // The student's teacher is served beside it, and nothing else of the bundled models.
        assert_eq!(folders.names().unwrap(), ["fashion-mnist-teacher", "sd"]);
        let no_model = named(&["sd"], &zoo).names().unwrap_err();
        assert!(no_model.contains("--model sd=") && no_model.contains("model_index.json"));
        let twice = named(&["sd", "sd"], &student).names().unwrap_err();
        assert!(twice.contains("--model sd: given twice"), "{twice}");
    }

    #[test]
    fn a_program_without_the_bundled_models_takes_folders_all_the_same() {
        let none = ModelFolders::only(Vec::new());
        let said = none.names().unwrap_err();
        assert!(said.contains("--models"), "{said}");
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/zoo/fashion-mnist-student");
        let model = model.to_str().unwrap();
        assert_eq!(hub::resolve(model, &none.all()).unwrap(), Path::new(model));
        let said = hub::resolve("nope", &none.all()).unwrap_err().to_string();
        assert!(
            said.contains("name a folder with a model_index.json, or a Hugging Face"),
            "{said}"
        );
    }
}
