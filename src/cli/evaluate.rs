//! `understudy evaluate`: how good a model's images are.

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use candle_core::DType;
use serde_json::{Map, Value, json};
use understudy_distill::{
    data::Images,
    evaluate::{FeatureNetwork, Gaussian, Inception, Judge, Observer, Reference, Scores, compare},
    generate::{Classes, Sampling},
};
use understudy_models::{
    Image,
    checkpoint::{Loaded, ModelFolder, check_target, hub, write_atomically},
    noise, sampler,
};

use super::{compute::Compute, models_folder, open_images, print, progress::Progress};

/// Sample a model and score its images: Fréchet distance, Inception score, kernel distance, precision and
/// recall.
///
/// Distances are taken in the features of a network. Inception's is called FID; a judge's, a small
/// classifier such as the bundled ones, is called FD-<judge> and compares only with itself.
#[derive(Debug, clap::Args)]
pub(super) struct EvaluateArgs {
    /// The model: a folder, a name inside --models, or a Hub id (owner/name).
    #[arg(long, required_unless_present = "samples", conflicts_with = "samples")]
    model: Option<String>,
    /// Score these images instead: an idx file, a folder of images, a .tar of one, an .npz.
    #[arg(long, value_name = "PATH")]
    samples: Option<PathBuf>,
    /// Folder of model folders [default: ./models/zoo, else the bundled one].
    #[arg(long, env = "UNDERSTUDY_MODELS", value_name = "DIR")]
    models: Option<PathBuf>,
    /// What to compare with: images as for --samples, or an .npz of statistics (mu, sigma), which tell the
    /// Fréchet distance alone.
    #[arg(long, value_name = "PATH", required_unless_present = "write_stats")]
    reference: Option<PathBuf>,
    /// The feature network: a bundled judge's name, a judge's folder, or inception.
    #[arg(long, value_name = "NETWORK", default_value = "fashion-mnist-judge")]
    features: String,
    /// Inception's weights: pytorch-fid's pt_inception-2015-12-05, .pth or .safetensors.
    #[arg(long, value_name = "FILE")]
    weights: Option<PathBuf>,
    /// Images to sample.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(2..=1_000_000))]
    n: u32,
    /// Network steps per image.
    #[arg(long, default_value_t = 20)]
    steps: usize,
    /// Sampler: ddpm, ddim, dpm++, euler or heun.
    #[arg(long, default_value = "ddim")]
    scheduler: String,
    /// Seed of the first image; image i uses seed + i.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(..noise::SEEDS))]
    seed: u64,
    /// Repeat with so many sets of n fresh seeds, and tell mean and standard deviation.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=100))]
    seeds: u16,
    /// Images per network evaluation.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1024))]
    batch: u32,
    /// Write the scores here as well, as JSON.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Write the samples' statistics here (.npz with mu and sigma, as pytorch-fid's).
    #[arg(long, value_name = "FILE")]
    write_stats: Option<PathBuf>,
    /// One JSON object on standard output, everything else on standard error.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    pub(super) compute: Compute,
}

/// Runs the command.
///
/// # Errors
/// A sentence naming what to mend.
pub(super) fn run(args: &EvaluateArgs) -> Result<(), String> {
    let network = feature_network(args)?;
    let network = network.as_ref();
    // All that can be refused is refused before the first image is made.
    for (flag, path) in [("--out", &args.out), ("--write-stats", &args.write_stats)] {
        if let Some(path) = path {
            check_target(path).map_err(|error| format!("{flag} {error}"))?;
        }
    }
    let source = Source::open(args, network)?;
    let n = source.len();
    Observer::new(network, source.flag(), n, 0).map_err(|error| error.to_string())?;
    let reference = match &args.reference {
        Some(path) => Some(reference(path, network, n)?),
        None => None,
    };

    let began = Instant::now();
    let mut runs = Vec::new();
    for run in 0..source.runs(args) {
        let mut observer =
            Observer::new(network, source.flag(), n, n).map_err(|error| error.to_string())?;
        source.observe(args, run, &mut observer)?;
        if let (Some(path), Some(gaussian)) = (&args.write_stats, observer.gaussian()) {
            gaussian.write(path, network).map_err(|error| error.to_string())?;
        }
        if let Some(reference) = &reference {
            runs.push(compare(&observer, reference).map_err(|error| error.to_string())?);
        }
    }
    let mut report = json!({
        "features": network.name(),
        "samples": n,
        "seconds": began.elapsed().as_secs_f64(),
    });
    if let Some(report) = report.as_object_mut() {
        report.extend(source.describe(args));
        if let Some(path) = &args.reference {
            report.insert("reference".into(), json!(file_name(path)));
        }
        report.insert("scores".into(), summary(network, &runs));
    }
    if let Some(path) = &args.out {
        write_atomically(path, format!("{report:#}\n").as_bytes())
            .map_err(|error| error.to_string())?;
    }
    if args.json { print(report) } else { print(format!("{report:#}")) }
}

fn feature_network(args: &EvaluateArgs) -> Result<Box<dyn FeatureNetwork>, String> {
    let sentence = |error: understudy_models::Error| format!("--features: {error}");
    if args.features == "inception" {
        let weights = args.weights.as_deref().ok_or(
            "--features inception: needs --weights FILE, pytorch-fid's pt_inception-2015-12-05",
        )?;
        return Ok(Box::new(Inception::open(weights).map_err(|e| format!("--weights: {e}"))?));
    }
    if args.weights.is_some() {
        return Err("--weights: only --features inception takes any; leave it out".into());
    }
    let mut folder = PathBuf::from(&args.features);
    if !folder.is_dir() {
        folder = models_folder(None)?.join("judges").join(&args.features);
    }
    if !folder.is_dir() {
        return Err(format!(
            "--features {}: neither a folder nor a bundled judge ({} is not there); make a judge with \
             `understudy train-judge`, or use inception with --weights",
            args.features,
            folder.display()
        ));
    }
    Ok(Box::new(Judge::open(&folder).map_err(sentence)?))
}

/// Images in the shape that the network takes.
fn fitted(flag: &str, images: Images, network: &dyn FeatureNetwork) -> Result<Images, String> {
    match network.input() {
        Some((channels, height, width)) => {
            images.fit(flag, channels, height, width).map_err(|error| error.to_string())
        }
        None => Ok(images),
    }
}

/// Where the samples come from.
enum Source {
    Images(Images),
    Model { loaded: Box<Loaded>, dtype: DType, id: String, sampling: Sampling, n: usize },
}

impl Source {
    fn open(args: &EvaluateArgs, network: &dyn FeatureNetwork) -> Result<Self, String> {
        if let Some(path) = &args.samples {
            let images = open_images("--samples", path)?;
            return Ok(Self::Images(fitted("--samples", images, network)?));
        }
        let model = args.model.as_deref().ok_or("--model or --samples: name one of them")?;
        let explain = |error| format!("--model {model}: {error}");
        let models = models_folder(args.models.as_deref())?;
        let folder = hub::resolve(model, &models).map_err(explain)?;
        // Features are taken on the CPU, wherever the samples are made.
        let device = args.compute.device()?;
        let dtype = args.compute.dtype(&device)?;
        let loaded = ModelFolder::open_for_images(&folder)
            .and_then(|folder| folder.load(dtype, &device))
            .map_err(explain)?;
        let geometry = loaded.network.geometry();
        let shape = (geometry.in_channels, geometry.height, geometry.width);
        if network.input().is_some_and(|input| input != shape) {
            return Err(format!(
                "--model {model}: makes {}×{} images of {} channels, {} looks at {:?} \
                 (channels, height, width); use another feature network",
                shape.2,
                shape.1,
                shape.0,
                network.name(),
                network.input().unwrap_or_default()
            ));
        }
        let kind = args.scheduler.parse().map_err(|error| format!("--scheduler: {error}"))?;
        let learned = geometry.learned_variance();
        let trajectory = sampler::trajectory(&loaded.schedule, kind, args.steps, 0.0, learned)
            .map_err(|error| format!("--steps, --scheduler: {error}"))?;
        let classes =
            Classes::all(geometry.conditioning, loaded.card.null_class).map_err(explain)?;
        let sampling =
            Sampling { trajectory, classes, first_seed: args.seed, batch: args.batch as usize };
        let (loaded, n) = (Box::new(loaded), args.n as usize);
        Ok(Self::Model { loaded, dtype, id: hub::id_of(model), sampling, n })
    }

    fn len(&self) -> usize {
        match self {
            Self::Images(images) => images.len(),
            Self::Model { n, .. } => *n,
        }
    }

    fn flag(&self) -> &'static str {
        match self {
            Self::Images(_) => "--samples",
            Self::Model { .. } => "--n",
        }
    }

    /// Images that are there are there once.
    fn runs(&self, args: &EvaluateArgs) -> usize {
        match self {
            Self::Images(_) => 1,
            Self::Model { .. } => args.seeds.into(),
        }
    }

    fn describe(&self, args: &EvaluateArgs) -> Map<String, Value> {
        let description = match self {
            Self::Images(_) => json!({ "images": args.samples.as_deref().map(file_name) }),
            Self::Model { id, dtype, .. } => json!({
                "model": id,
                "dtype": dtype.as_str(),
                "scheduler": args.scheduler,
                "num_inference_steps": args.steps,
                "seed": args.seed,
                "seeds": args.seeds,
            }),
        };
        description.as_object().cloned().unwrap_or_default()
    }

    /// Shows run number `run` to the network.
    fn observe(
        &self,
        args: &EvaluateArgs,
        run: usize,
        observer: &mut Observer<'_>,
    ) -> Result<(), String> {
        let mut progress = Progress::new("images", 0, self.len());
        match self {
            Self::Images(images) => watch(images, observer, &mut progress),
            Self::Model { loaded, sampling, n, .. } => {
                let sampling = Sampling {
                    first_seed: (args.seed + (run * n) as u64) % noise::SEEDS,
                    ..sampling.clone()
                };
                let mut done = 0;
                for batch in sampling.batches(loaded.network.as_ref(), 0..*n) {
                    let batch = batch.map_err(|error| error.to_string())?;
                    let pictures = batch.images().map_err(|error| error.to_string())?;
                    done += pictures.len();
                    let images = set_of(pictures, batch.labels);
                    observer.add(&images).map_err(|error| error.to_string())?;
                    progress.at(done, "");
                }
                Ok(())
            }
        }
    }
}

/// Pictures of one size as a set.
fn set_of(pictures: Vec<Image>, labels: Option<Vec<u32>>) -> Images {
    let shape = pictures.first().map(|first| (first.channels, first.height, first.width));
    let (channels, height, width) = shape.unwrap_or_default();
    let pixels = pictures.into_iter().flat_map(|picture| picture.pixels).collect();
    Images { channels, height, width, pixels, labels, ..Images::default() }
}

/// Shows a set to the network, a thousand images at a time.
fn watch(
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
fn reference(path: &Path, network: &dyn FeatureNetwork, n: usize) -> Result<Reference, String> {
    let explain = |error: understudy_models::Error| format!("--reference: {error}");
    if let Some(statistics) = Gaussian::find(path, network).map_err(explain)? {
        return Ok(Reference::from_statistics(statistics));
    }
    let images = fitted("--reference", open_images("--reference", path)?, network)?;
    let mut observer = Observer::new(network, "--reference", images.len(), n)
        .map_err(|error| error.to_string())?;
    let mut progress = Progress::new("reference images", 0, images.len());
    watch(&images, &mut observer, &mut progress)?;
    Reference::from_images(&observer).map_err(|error| error.to_string())
}

/// Each score's mean over the runs, and between several runs its standard deviation (divisor N − 1).
fn summary(network: &dyn FeatureNetwork, runs: &[Scores]) -> Value {
    type Score = fn(&Scores) -> Option<f64>;
    let distance = network.distance();
    let scores: [(&str, Score); 8] = [
        (&distance, |scores| Some(scores.distance)),
        ("inception_score", |scores| scores.inception_score.map(|score| score.0)),
        ("inception_score_deviation", |scores| scores.inception_score.map(|score| score.1)),
        ("kernel_distance", |scores| scores.kernel_distance.map(|score| score.0)),
        ("kernel_distance_deviation", |scores| scores.kernel_distance.map(|score| score.1)),
        ("precision", |scores| scores.precision_and_recall.map(|score| score.0)),
        ("recall", |scores| scores.precision_and_recall.map(|score| score.1)),
        ("class_agreement", |scores| scores.class_agreement),
    ];
    let mut summary = Map::new();
    for (name, score) in scores {
        let values: Vec<f64> = runs.iter().filter_map(score).collect();
        if values.is_empty() {
            continue;
        }
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        summary.insert(name.into(), json!(mean));
        if values.len() > 1 {
            let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
            let deviation = (squares / (values.len() - 1) as f64).sqrt();
            summary.insert(format!("{name}_between_seeds"), json!(deviation));
        }
    }
    summary.into()
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}
