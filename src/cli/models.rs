//! `understudy models`: what `serve` would serve, and why it would not.

use serde::Serialize;
use understudy_models::{
    Conditioning,
    checkpoint::{ModelFolder, card::Role},
};

use super::{models_arg::ModelsArg, print, table};
use crate::names::{UNUSABLE_NAME, is_id};

/// List the models that `serve` would serve, and why others are left out.
#[derive(Debug, clap::Args)]
pub(super) struct ModelsArgs {
    #[command(flatten)]
    models: ModelsArg,
    /// One JSON array on standard output.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Listed {
    id: String,
    folder: String,
    #[serde(flatten)]
    state: State,
}

#[derive(Serialize)]
#[serde(tag = "state", rename_all = "lowercase")]
enum State {
    Servable {
        role: Role,
        teacher: Option<String>,
        width: usize,
        height: usize,
        channels: usize,
        classes: Option<usize>,
        weight_bytes: Option<u64>,
    },
    Refused {
        problem: String,
    },
}

/// Runs the command. Weights are not read.
///
/// # Errors
/// A sentence naming the folder that cannot be read.
pub(super) fn run(args: &ModelsArgs) -> Result<(), String> {
    let folders = args.models.folders();
    let mut listed = Vec::new();
    for id in folders.names()? {
        let folder = folders.find(&id).unwrap_or_default();
        let state = match ModelFolder::open_for_images(&folder) {
            _ if !is_id(&id) => State::Refused { problem: UNUSABLE_NAME.into() },
            Err(error) => State::Refused { problem: error.to_string() },
            Ok(model) => servable(&model),
        };
        listed.push(Listed { id, folder: folder.display().to_string(), state });
    }
    if args.json {
        let text = serde_json::to_string_pretty(&listed).map_err(|error| error.to_string())?;
        return print(text);
    }
    if listed.is_empty() {
        return print(format!(
            "No model in {}. A model is a subfolder with a model_index.json, as diffusers writes it.",
            folders.shown()
        ));
    }
    let mut rows = vec![["MODEL", "ROLE", "IMAGES", "CLASSES", "WEIGHTS"].map(String::from)];
    let mut refused = Vec::new();
    for Listed { id, state, .. } in &listed {
        match state {
            State::Refused { problem } => refused.push(format!("{id}: not served: {problem}")),
            State::Servable { role, teacher, width, height, channels, classes, weight_bytes } => {
                rows.push([
                    id.clone(),
                    role_of(*role, teacher.as_deref()),
                    format!("{width}x{height}x{channels}"),
                    classes.map_or("-".into(), |classes| classes.to_string()),
                    weight_bytes.map_or("?".into(), |it| indicatif::HumanBytes(it).to_string()),
                ]);
            }
        }
    }
    let mut lines = if rows.len() > 1 { table::lines(&rows) } else { Vec::new() };
    lines.extend(refused);
    lines.extend(missing_teachers(&listed));
    print(lines.join("\n"))
}

fn servable(model: &ModelFolder) -> State {
    let [channels, height, width] = model.image_shape();
    let bytes = |path: &std::path::PathBuf| Some(std::fs::metadata(path).ok()?.len());
    let weights = model.all_weight_files().ok();
    State::Servable {
        role: model.card.role,
        teacher: model.card.teacher.clone(),
        width,
        height,
        channels,
        classes: match model.network.geometry().conditioning {
            Conditioning::Classes(classes) => Some(classes),
            _ => None,
        },
        weight_bytes: weights.and_then(|files| files.iter().map(bytes).sum()),
    }
}

fn role_of(role: Role, teacher: Option<&str>) -> String {
    let role = role.name();
    teacher.map_or(role.into(), |teacher| format!("{role} of {teacher}"))
}

/// Teachers whose students have nobody to be compared with.
fn missing_teachers(listed: &[Listed]) -> impl Iterator<Item = String> {
    listed.iter().filter_map(|it| match &it.state {
        State::Servable { teacher: Some(teacher), .. }
            if !listed.iter().any(|it| it.id == *teacher) =>
        {
            Some(format!(
                "{}: its teacher {teacher} is not here; name its folder with another --models",
                it.id
            ))
        }
        _ => None,
    })
}
