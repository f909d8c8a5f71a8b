//! `understudy train-judge`: a small classifier whose features `understudy evaluate` measures in.

use std::path::PathBuf;

use serde_json::json;
use understudy_distill::{
    data::Images,
    evaluate::judge::{self, Training},
};
use understudy_models::checkpoint::Draft;

use super::{open_images, progress::Progress};

/// Train a judge: a small classifier in whose features `understudy evaluate` measures distances when Inception weights
/// are unavailable.
///
/// Images of less than 32×32 pixels are padded with background to that. Only an accuracy on the test images of at least
/// --least-accuracy makes a judge.
#[derive(Debug, clap::Args)]
pub(super) struct TrainJudgeArgs {
    /// Labelled training images: an idx file, a folder with one subfolder per class, a .tar of one, an .npz.
    #[arg(long, value_name = "PATH")]
    data: PathBuf,
    /// Labelled images to test it on.
    #[arg(long, value_name = "PATH")]
    test_data: PathBuf,
    /// The judge's folder, new; its name is the judge's.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Times every training image is seen.
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u16).range(1..=1000))]
    epochs: u16,
    /// Seeds weights, order and shifts.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The least share of the test images that it must classify correctly, 0 to 1.
    #[arg(long, value_name = "SHARE", default_value_t = 0.92)]
    least_accuracy: f64,
}

/// Runs the command.
///
/// # Errors
/// A sentence naming what to mend.
pub(super) fn run(args: &TrainJudgeArgs) -> Result<(), String> {
    if !(0.0..=1.0).contains(&args.least_accuracy) {
        return Err(format!(
            "--least-accuracy {}: a share of the test images, so write a number from 0 to 1",
            args.least_accuracy
        ));
    }
    let draft = Draft::new(&args.out).map_err(|error| error.to_string())?;
    let name = args.out.file_name().and_then(|name| name.to_str());
    let name = name.ok_or("--out: must be the path of a new folder, whose name is the judge's")?;
    let read = |flag: &str, path: &PathBuf| {
        let images = open_images(flag, path)?;
        if images.labels.is_none() {
            return Err(format!("{flag} {}: has no labels; a judge needs them", path.display()));
        }
        judge::check_classes(&images)
            .map_err(|problem| format!("{flag} {}: {problem}", path.display()))?;
        // Smaller images are padded.
        let [height, width] = match (images.height, images.width) {
            (..=judge::SIDE, ..=judge::SIDE) => [judge::SIDE; 2],
            (height, width) => [height, width],
        };
        let channels = images.channels;
        images.fit(flag, channels, height, width).map_err(|error| error.to_string())
    };
    let (images, test) = (read("--data", &args.data)?, read("--test-data", &args.test_data)?);
    let kind = |images: &Images| [images.channels, images.height, images.width];
    if kind(&test) != kind(&images) || test.classes() > images.classes() {
        return Err(format!(
            "--test-data {}: images of {:?} (channels, height, width) and {} classes, --data has {:?} and {}; use sets of one \
             kind",
            args.test_data.display(),
            kind(&test),
            test.classes(),
            kind(&images),
            images.classes()
        ));
    }
    let training = Training { name: name.to_owned(), epochs: args.epochs.into(), seed: args.seed };
    let mut progress: Option<Progress> = None;
    let (config, tensors) = judge::train(&training, &images, &test, |done, total, loss| {
        let progress = progress.get_or_insert_with(|| Progress::new("Training", 0, total));
        progress.at(done, &format!("loss {loss:.4}"));
    })
    .map_err(|error| error.to_string())?;
    drop(progress);
    if config.test_accuracy < args.least_accuracy {
        return Err(format!(
            "the judge is right on {:.4} of the test images, fewer than --least-accuracy {}; \
             use more --epochs or another --seed",
            config.test_accuracy, args.least_accuracy
        ));
    }
    judge::write(draft, &config, &tensors).map_err(|error| error.to_string())?;
    super::print(json!({ "judge": name, "test_accuracy": config.test_accuracy }))
}
