//! What `evaluate` and `report` measure with: their arguments, the feature network, the reference.

use std::path::{Path, PathBuf};

use understudy_distill::{
    data::Images,
    evaluate::{FeatureNetwork, Gaussian, Inception, Judge, Observer, Reference},
};
use understudy_models::{checkpoint::card::Card, noise, sampler::Kind};

use super::{open_images, progress::Progress};
use crate::model_folders::bundled;

/// What is measured, and how much.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Measuring")]
pub(super) struct MeasureArgs {
    /// What to compare with: images as for --samples, or an .npz of statistics (mu, sigma), which tell the
    /// Fréchet distance alone [default: with --against the teacher's own images].
    #[arg(long, value_name = "PATH")]
    pub(super) reference: Option<PathBuf>,
    /// The feature network: a bundled judge's name, a judge's folder, or inception [default: fashion-mnist-judge;
    /// beside a teacher the bundled judge for images of that size, if there is one].
    #[arg(long, value_name = "NETWORK")]
    pub(super) features: Option<String>,
    /// Inception's weights: pytorch-fid's pt_inception-2015-12-05, .pth or .safetensors.
    #[arg(long, value_name = "FILE")]
    pub(super) weights: Option<PathBuf>,
    /// Images to sample [default: 10000; beside a teacher 2000].
    #[arg(long, value_parser = clap::value_parser!(u32).range(2..=1_000_000))]
    pub(super) n: Option<u32>,
    /// What text-to-image models draw after: a file with a prompt a line, or a template such as
    /// "{red|blue} {apple|house}"; image i is drawn after prompt i, and they take turns.
    #[arg(long, value_name = "FILE|TEMPLATE")]
    pub(super) prompts: Vec<String>,
    /// How far text-to-image models are guided; 1 is not at all [default: the model card's; beside a teacher the
    /// student's].
    #[arg(long, value_name = "SCALE")]
    pub(super) guidance_scale: Option<f64>,
    /// Network evaluations per image [default: the model card's, at most 20].
    #[arg(long)]
    pub(super) steps: Option<usize>,
    /// The sampler.
    #[arg(long, default_value = "ddim", value_parser = super::one_of(Kind::ALL, Kind::name))]
    pub(super) scheduler: Kind,
    /// Seed of the first image; image i uses seed + i.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(..noise::SEEDS))]
    pub(super) seed: u64,
    /// Repeat with so many sets of n fresh seeds, and report mean and standard deviation [default: 1; beside a teacher
    /// 2].
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=100))]
    pub(super) seeds: Option<u16>,
    /// Images per network evaluation.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(super) batch: u32,
}

impl Default for MeasureArgs {
    fn default() -> Self {
        Self {
            reference: None,
            features: None,
            weights: None,
            n: None,
            prompts: Vec::new(),
            guidance_scale: None,
            steps: None,
            scheduler: Kind::Ddim,
            seed: 0,
            seeds: None,
            batch: 64,
        }
    }
}

impl MeasureArgs {
    /// Evaluations for an image of a model with this card.
    pub(super) fn steps(&self, card: &Card) -> usize {
        let usual = card.defaults.num_inference_steps.unwrap_or(MOST_STEPS).min(MOST_STEPS);
        self.steps.unwrap_or(usual)
    }
}

/// Evaluations for an image where nobody asked for more.
const MOST_STEPS: usize = 20;

/// The feature network of that name.
///
/// # Errors
/// A sentence naming the flag and the remedy.
pub(super) fn feature_network(
    features: &str,
    weights: Option<&Path>,
) -> Result<Box<dyn FeatureNetwork>, String> {
    let sentence = |error: understudy_models::Error| format!("--features: {error}");
    if features == "inception" {
        let weights = weights.ok_or(
            "--features inception: needs --weights FILE, pytorch-fid's pt_inception-2015-12-05",
        )?;
        return Ok(Box::new(Inception::open(weights).map_err(|e| format!("--weights: {e}"))?));
    }
    if weights.is_some() {
        return Err("--weights: only --features inception takes any; leave it out".into());
    }
    let mut folder = PathBuf::from(features);
    if !folder.is_dir() {
        let zoo = bundled().map_err(|places| {
            format!("--features {features}: {places}\nname the folder of a judge instead")
        })?;
        folder = zoo.join("judges").join(features);
    }
    if !folder.is_dir() {
        return Err(format!(
            "--features {}: neither a folder nor a bundled judge ({} is not there); make a judge with \
             `understudy train-judge`, or use inception with --weights",
            features,
            folder.display()
        ));
    }
    Ok(Box::new(Judge::open(&folder).map_err(sentence)?))
}

/// Images in the shape that the network takes.
pub(super) fn fitted(
    flag: &str,
    images: Images,
    network: &dyn FeatureNetwork,
) -> Result<Images, String> {
    match network.input() {
        Some((channels, height, width)) => {
            images.fit(flag, channels, height, width).map_err(|error| error.to_string())
        }
        None => Ok(images),
    }
}

/// Shows a set to the network, a thousand images at a time.
pub(super) fn watch(
    images: &Images,
    observer: &mut Observer<'_>,
    progress: &mut Progress,
) -> Result<(), String> {
    let mut done = 0;
    while done < images.len() {
        let part = images.slice(done..images.len().min(done + 1000));
        observer.add(&part).map_err(|error| error.to_string())?;
        done += part.len();
        progress.at(done, "");
    }
    Ok(())
}

/// Statistics, or images, of which as many features are kept as there are samples.
pub(super) fn reference(
    path: &Path,
    network: &dyn FeatureNetwork,
    n: usize,
) -> Result<Reference, String> {
    let explain = |error: understudy_models::Error| format!("--reference: {error}");
    if let Some(statistics) = Gaussian::find(path, network).map_err(explain)? {
        return Ok(Reference::from_statistics(statistics));
    }
    let images = fitted("--reference", open_images("--reference", path)?, network)?;
    let mut observer = Observer::new(network, "--reference", images.len(), n)
        .map_err(|error| error.to_string())?;
    let mut progress = Progress::new("Reading the reference", 0, images.len());
    watch(&images, &mut observer, &mut progress)?;
    Reference::from_images(observer).map_err(|error| error.to_string())
}
