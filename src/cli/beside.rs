//! A student is measured beside its teacher: for `evaluate --against`, for `report`, and at the end of `distill`.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use understudy_distill::evaluate::FeatureNetwork;
use understudy_models::checkpoint::{ModelFolder, Pipeline, card::Card};

use super::{
    compute::Compute,
    folder_name,
    measure::{MeasureArgs, feature_network, reference},
    progress::Progress,
    sampled::Sampled,
    table,
};
use crate::{
    model_folders::bundled,
    report::{self, Comparison, Settings, Side, Verdict},
};

/// What was measured, and what it comes to.
pub(super) struct Measured {
    pub(super) comparison: Comparison,
    pub(super) verdict: Verdict,
    pub(super) teacher: Pipeline,
}

/// Images where nobody says how many, and least images.
const USUAL_IMAGES: usize = 2000;
const LEAST_IMAGES: usize = 20;

/// Measures the model in one folder beside that in another. Where `--n` does not say how many images are made,
/// `seconds` may: as many as they are enough for.
///
/// # Errors
/// A sentence naming what to mend.
pub(super) fn measure(
    student: &Path,
    teacher: &Path,
    args: &MeasureArgs,
    compute: &Compute,
    seconds: Option<f64>,
) -> Result<Measured, String> {
    let (student_name, teacher_name) = (folder_name(student), folder_name(teacher));
    // Both are guided alike, as the student's card says: it may have learned a part of the scales.
    let student = Sampled::open(student, args, compute, args.guidance_scale)?;
    let scale = student.sampling.captions.as_ref().map(|captions| captions.scale);
    let teacher = Sampled::open(teacher, args, compute, scale)?;
    if teacher.shape != student.shape {
        return Err(format!(
            "{student_name} makes images of {:?} (channels, height, width), {teacher_name} of {:?}; compare models of one size",
            student.shape, teacher.shape
        ));
    }
    let runs = usize::from(args.seeds.unwrap_or(if seconds.is_some() { 1 } else { 2 }));
    let images = match (args.n, seconds) {
        (Some(n), _) => n as usize,
        (None, None) => USUAL_IMAGES,
        (None, Some(seconds)) => affordable([&teacher, &student], runs, seconds)?,
    };
    let network = network(args, teacher.shape)?;
    let reference = match (&args.reference, network.as_deref()) {
        (None, _) => None,
        (Some(path), Some(network)) => Some(reference(path, network, images)?),
        (Some(_), None) => {
            return Err("--reference: needs a feature network for images of this size; name one with --features".into());
        }
    };
    let settings =
        Settings { images, runs, features: network.as_deref(), reference: reference.as_ref() };
    let mut progress = Progress::new("Comparing", 0, 100);
    let comparison = report::compare(
        &side(&teacher_name, &teacher),
        &side(&student_name, &student),
        &settings,
        &mut |share| progress.at((100.0 * share) as usize, ""),
    );
    drop(progress);
    let comparison = comparison.map_err(|error| error.to_string())?;
    let verdict = Verdict::of(&comparison);
    Ok(Measured { comparison, verdict, teacher: teacher.model })
}

/// The table of a comparison, as lines.
pub(super) fn table(comparison: &Comparison) -> Vec<String> {
    let mut rows = vec![["", "TEACHER", "STUDENT", "STUDENT ÷ TEACHER"].map(String::from)];
    rows.extend(report::rows(comparison));
    let mut lines = table::lines(&rows);
    lines.push(report::how(comparison));
    lines
}

/// Writes the scores into the card of the model in `folder`, and gives the card's path. A folder without a card stays
/// without one, and the bundled models' cards stay as they are.
///
/// # Errors
/// A sentence naming the file.
pub(super) fn write_scores(
    folder: &Path,
    measured: &Measured,
    args: &MeasureArgs,
) -> Result<Option<PathBuf>, String> {
    let path = folder.join("understudy.json");
    let real = |path: &Path| std::fs::canonicalize(path).ok();
    let is_bundled = bundled().is_ok_and(|zoo| folder.parent().and_then(real) == real(&zoo));
    if is_bundled || !path.is_file() {
        return Ok(None);
    }
    let model = ModelFolder::open(folder).map_err(|error| error.to_string())?;
    let card = Card { scores: scores(&measured.comparison, args), ..model.card.clone() };
    model.write_card(&card).map_err(|error| error.to_string())?;
    Ok(Some(path))
}

/// What a card says of a comparison.
fn scores(comparison: &Comparison, args: &MeasureArgs) -> Map<String, Value> {
    let mean = |values: &[f64]| report::mean(values);
    let mut scores = Map::new();
    for score in &comparison.scores {
        let name = match score.name.as_str() {
            name if name.starts_with("Fréchet") => {
                let distance = comparison.distance.as_deref().unwrap_or_default();
                match comparison.against_teacher {
                    false => distance.to_owned(),
                    true => format!("{distance}-to-teacher"),
                }
            }
            "Kernel distance (KID)" => "kernel_distance".into(),
            name => name.to_lowercase().replace(' ', "_"),
        };
        scores.insert(name.clone(), json!(mean(&score.student)));
        scores.insert(format!("{name}_teacher"), json!(mean(&score.teacher)));
    }
    scores.insert("psnr_db_to_teacher".into(), json!(mean(&comparison.psnr_db)));
    if !comparison.ssim.is_empty() {
        scores.insert("ssim_to_teacher".into(), json!(mean(&comparison.ssim)));
    }
    if let Some(speed_up) = comparison.speed_up() {
        scores.insert("speed_up".into(), json!(speed_up));
    }
    let reference = args.reference.as_deref().and_then(Path::file_name);
    let reference = reference.map_or("the teacher's own images".into(), |it| it.to_string_lossy());
    scores.insert("samples".into(), json!(comparison.images * comparison.runs));
    scores.insert("num_inference_steps".into(), json!(comparison.steps[1]));
    scores.insert("scheduler".into(), json!(args.scheduler.name()));
    scores.insert("seed".into(), json!(args.seed));
    scores.insert("reference".into(), json!(reference));
    scores
}

fn side<'a>(id: &'a str, sampled: &'a Sampled) -> Side<'a> {
    let Pipeline { network, decoder, .. } = &sampled.model;
    Side { id, network: network.as_ref(), decoder: decoder.as_ref(), sampling: &sampled.sampling }
}

/// As many images as `seconds` are enough for: the teacher makes them twice, once to compare with.
fn affordable(models: [&Sampled; 2], runs: usize, seconds: f64) -> Result<usize, String> {
    const ROWS: usize = 8;
    let mut image = 0.0;
    for (Sampled { model, sampling, .. }, sets) in models.into_iter().zip([runs + 1, runs]) {
        let network = model.network.as_ref();
        let time = || report::timed_image(network, model.decoder.as_ref(), sampling, ROWS);
        time().map_err(|error| error.to_string())?;
        image += sets as f64 * time().map_err(|error| error.to_string())?;
    }
    Ok(((seconds / image) as usize).clamp(LEAST_IMAGES, USUAL_IMAGES))
}

/// The feature network asked for, else the bundled judge for images of this size, where there is one.
fn network(
    args: &MeasureArgs,
    [channels, height, width]: [usize; 3],
) -> Result<Option<Box<dyn FeatureNetwork>>, String> {
    let shape = (channels, height, width);
    let fits = |network: &dyn FeatureNetwork| network.input().is_none_or(|input| input == shape);
    if let Some(features) = &args.features {
        let network = feature_network(features, args.weights.as_deref())?;
        if !fits(network.as_ref()) {
            return Err(format!(
                "--features {features}: looks at {:?} (channels, height, width), the models make {:?}; use another",
                network.input().unwrap_or_default(),
                shape
            ));
        }
        return Ok(Some(network));
    }
    let Ok(zoo) = bundled() else { return Ok(None) };
    let judges = zoo.join("judges");
    let names = std::fs::read_dir(&judges).into_iter().flatten().flatten();
    let mut names: Vec<String> = names.filter_map(|it| it.file_name().into_string().ok()).collect();
    names.sort();
    for name in names {
        let network = feature_network(&name, None)?;
        if fits(network.as_ref()) {
            return Ok(Some(network));
        }
    }
    Ok(None)
}
