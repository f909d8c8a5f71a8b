//! What a run refuses: folders of others, and numbers that are none.

use std::path::Path;

use serde_json::{Map, Value};
use understudy_models::{Error, Result};

use crate::lesson::Lesson;

/// The folder inside the model folder that belongs to the run.
pub const WORKSHOP: &str = "training";

/// The file in it that holds the run's state.
pub const CHECKPOINT: &str = "checkpoint.safetensors";

/// Refuses a folder that holds something else than a run.
///
/// # Errors
/// [`Error::Value`] naming it.
pub fn check_out(out: &Path) -> Result<()> {
    if out.join(WORKSHOP).join(CHECKPOINT).exists() {
        return Ok(());
    }
    let foreign = match std::fs::read_dir(out) {
        Ok(entries) => {
            let mut names = entries.flatten().map(|entry| entry.file_name());
            names.find(|name| name != WORKSHOP)
        }
        // A file, or nothing yet.
        Err(_) => out.exists().then(|| out.as_os_str().to_owned()),
    };
    match foreign {
        None => Ok(()),
        Some(name) => Err(Error::value(
            "out",
            out.display(),
            format!(
                "holds {}, which is not of an unfinished run; name a new folder",
                name.to_string_lossy()
            ),
        )),
    }
}

/// Refuses to go on with another run's checkpoint.
///
/// # Errors
/// [`Error::Value`] naming the first argument that differs.
pub(crate) fn check_identity(there: &Value, asked: &Map<String, Value>, out: &Path) -> Result<()> {
    // Read back from text as what is there was, which may move the last bit of a number.
    let text = Value::Object(asked.clone()).to_string();
    let asked: Value = serde_json::from_str(&text).unwrap_or_default();
    let differs = |name: &&String| there[name.as_str()] != asked[name.as_str()];
    match asked.as_object().into_iter().flat_map(Map::keys).find(differs) {
        None => Ok(()),
        Some(name) => {
            let show = |value: &Value| {
                let text = value.to_string();
                text.chars().take(60).collect::<String>()
            };
            Err(Error::value(
                "out",
                out.display(),
                format!(
                    "it holds another run: `{name}` is {} there and {} here; give the same arguments to \
                     resume it, or name another folder",
                    show(&there[name.as_str()]),
                    show(&asked[name.as_str()])
                ),
            ))
        }
    }
}

/// Stops a run that would only spoil its weights from here on.
///
/// # Errors
/// [`Error::Value`] naming the step and the lesson's first seed.
pub(crate) fn check_finite(what: &str, value: f64, step: u64, lesson: &Lesson) -> Result<()> {
    if value.is_finite() {
        return Ok(());
    }
    let (seed, t) = (lesson.seeds.first().copied(), lesson.timesteps.first().copied());
    Err(Error::value(
        what,
        format!(
            "not finite at step {step} (its first sample: seed {} at timestep {})",
            seed.unwrap_or_default(),
            t.unwrap_or_default()
        ),
        "the last checkpoint is good; run again with another --out and a lower --learning-rate or \
         --clip-norm",
    ))
}
