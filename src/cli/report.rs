//! `understudy report`: a page that shows whether a student is good.

use std::path::{Path, PathBuf};

use image::ImageReader;
use understudy_distill::watch::sample_grid;
use understudy_models::{
    Image,
    checkpoint::{ModelFolder, is_model},
};

use super::{
    beside::{self, Measured},
    compute::Compute,
    measure::MeasureArgs,
    models_arg::ModelsArg,
    print,
};
use crate::{
    report::{self, Level, Training},
    similarity::psnr_db,
};

/// Compare a student with its teacher, and write the report: an HTML page that needs nothing else.
#[derive(Debug, clap::Args)]
pub(super) struct ReportArgs {
    /// The student: a model folder, or a name inside --models.
    #[arg(value_name = "MODEL")]
    model: String,
    /// Its teacher [default: the one that its card names].
    #[arg(long, value_name = "MODEL")]
    against: Option<String>,
    /// Where to [default: report in the student's folder].
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    #[command(flatten)]
    models: ModelsArg,
    #[command(flatten)]
    measure: MeasureArgs,
    #[command(flatten)]
    pub(super) compute: Compute,
}

/// The report's folder, inside the student's.
const FOLDER: &str = "report";

/// Runs the command.
///
/// # Errors
/// A sentence naming what to mend.
pub(super) fn run(args: &ReportArgs) -> Result<(), String> {
    let student = args.models.resolve("MODEL", &args.model)?;
    let teacher = match &args.against {
        Some(teacher) => args.models.resolve("--against", teacher)?,
        None => {
            let card = ModelFolder::open(&student).map_err(|error| error.to_string())?.card;
            let teacher = card.teacher.ok_or_else(|| {
                format!("{}: its card names no teacher; name one with --against", args.model)
            })?;
            beside_or_resolved(&student, &teacher, &args.models)?
        }
    };
    let measured = beside::measure(&student, &teacher, &args.measure, &args.compute, None)?;
    beside::write_scores(&student, &measured, &args.measure)?;
    let folder = args.out.clone().unwrap_or_else(|| student.join(FOLDER));
    let page = write(&student, &folder, &measured)?;
    print(format!("{}\nReport: {}", measured.verdict.sentence, page.display()))
}

/// The teacher in the folder where its student is, else wherever models are looked for.
fn beside_or_resolved(
    student: &Path,
    teacher: &str,
    models: &ModelsArg,
) -> Result<PathBuf, String> {
    let beside = student.parent().map(|folder| folder.join(teacher));
    match beside.filter(|folder| is_model(folder)) {
        Some(folder) => Ok(folder),
        None => models.resolve("--against", teacher),
    }
}

/// The report at the end of a distillation: as many images as `seconds` are enough for.
///
/// # Errors
/// As [`run`].
pub(super) fn after_training(
    student: &Path,
    teacher: &Path,
    measure: &MeasureArgs,
    compute: &Compute,
    seconds: f64,
) -> Result<(String, PathBuf), String> {
    let measured = beside::measure(student, teacher, measure, compute, Some(seconds))?;
    // So few images may say nothing that is worth a place in the card.
    if measured.verdict.level != Level::Unknown {
        beside::write_scores(student, &measured, measure)?;
    }
    let page = write(student, &student.join(FOLDER), &measured)?;
    Ok((measured.verdict.sentence, page))
}

fn write(student: &Path, folder: &Path, measured: &Measured) -> Result<PathBuf, String> {
    let training = Training::read(student);
    let samples = samples(&training, measured)?;
    report::write(folder, &measured.comparison, &measured.verdict, &training, &samples)
}

/// How like the teacher's the samples were that the student made on the way: steps, and dB.
fn samples(training: &Training, measured: &Measured) -> Result<Vec<(f64, f64)>, String> {
    if training.grids.is_empty() {
        return Ok(Vec::new());
    }
    let teacher = &measured.teacher;
    // Its prompts and scale are the run's.
    if teacher.reader.is_some() {
        return Ok(Vec::new());
    }
    let (network, decoder) = (teacher.network.as_ref(), teacher.decoder.as_ref());
    let grid = sample_grid(network, decoder, None, (&teacher.schedule, &teacher.card));
    let Some(grid) = grid.map_err(|error| error.to_string())? else { return Ok(Vec::new()) };
    let mut points = Vec::new();
    for (step, path) in &training.grids {
        let same = |image: &Image| {
            (image.width, image.height, image.channels) == (grid.width, grid.height, grid.channels)
        };
        // Of a run with other classes, or cut short by a full disk.
        if let Some(image) = picture(path, grid.channels).filter(same) {
            points.push((*step as f64, psnr_db(&image, &grid)));
        }
    }
    Ok(points)
}

fn picture(path: &Path, channels: usize) -> Option<Image> {
    let decoded = ImageReader::open(path).ok()?.decode().ok()?;
    let (width, height) = (decoded.width() as usize, decoded.height() as usize);
    let pixels = if channels == 1 {
        decoded.into_luma8().into_raw()
    } else {
        decoded.into_rgb8().into_raw()
    };
    Some(Image { width, height, channels, pixels })
}
