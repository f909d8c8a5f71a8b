//! `understudy evaluate`: how good a model's images are.

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use serde_json::{Map, Value, json};
use understudy_distill::{
    data::Images,
    evaluate::{FeatureNetwork, Observer, Scores, compare},
    generate::Sampling,
};
use understudy_models::{
    checkpoint::{check_target, hub, write_atomically},
    noise,
};

use super::{
    beside,
    compute::Compute,
    measure::{MeasureArgs, feature_network, fitted, reference, watch},
    models_arg::ModelsArg,
    open_images, print,
    progress::Progress,
    sampled::Sampled,
    table,
};
use crate::report::{deviation, mean};

/// Score a model's images, alone or beside its teacher's (--against).
///
/// Beside its teacher a student gets a table and a verdict; no data is needed. Alone, a model is scored against
/// --reference: Fréchet distance, Inception score, kernel distance, precision and recall. Distances are in the features
/// of a network. Inception's is called FID; that of a small classifier (a judge, such as the bundled ones) is called
/// FD-<judge> and compares only with itself.
#[derive(Debug, clap::Args)]
pub(super) struct EvaluateArgs {
    /// The model: a folder, a name inside --models, or a Hub id (owner/name).
    #[arg(long, required_unless_present = "samples", conflicts_with = "samples")]
    model: Option<String>,
    /// Its teacher, to compare it with on the same seeds.
    #[arg(long, value_name = "MODEL", conflicts_with_all = ["samples", "write_stats"])]
    against: Option<String>,
    /// Score these images instead: an idx file, a folder of images, a .tar of one, an .npz.
    #[arg(
        long,
        value_name = "PATH",
        conflicts_with_all = ["n", "prompts", "guidance_scale", "steps", "scheduler", "seed", "seeds", "batch"]
    )]
    samples: Option<PathBuf>,
    #[command(flatten)]
    models: ModelsArg,
    #[command(flatten)]
    pub(super) measure: MeasureArgs,
    /// Write the scores here as well, as JSON.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Write the samples' statistics here (.npz with mu and sigma, as pytorch-fid's).
    #[arg(long, value_name = "FILE", conflicts_with = "seeds")]
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
    // All that can be refused is refused before the first image is made.
    for (flag, path) in [("--out", &args.out), ("--write-stats", &args.write_stats)] {
        if let Some(path) = path {
            check_target(path).map_err(|error| format!("{flag} {error}"))?;
        }
    }
    if let (Some(model), Some(teacher)) = (&args.model, &args.against) {
        return against(args, model, teacher);
    }
    if args.measure.reference.is_none() && args.write_stats.is_none() {
        return Err("--reference: name what to compare with, or its teacher with --against".into());
    }
    let features = args.measure.features.as_deref().unwrap_or(USUAL_JUDGE);
    let network = feature_network(features, args.measure.weights.as_deref())?;
    let network = network.as_ref();
    let source = Source::open(args, network)?;
    let n = source.len();
    Observer::new(network, source.flag(), n, 0).map_err(|error| error.to_string())?;
    let reference = match &args.measure.reference {
        Some(path) => Some(reference(path, network, n)?),
        None => None,
    };

    let began = Instant::now();
    let mut runs = Vec::new();
    for run in 0..source.runs(args) {
        let mut observer =
            Observer::new(network, source.flag(), n, n).map_err(|error| error.to_string())?;
        if matches!(source, Source::Images(_)) {
            observer = observer.in_order();
        }
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
        if let Some(path) = &args.measure.reference {
            report.insert("reference".into(), json!(file_name(path)));
        }
        report.insert("scores".into(), summary(network, &runs));
    }
    if let Some(path) = &args.out {
        write_atomically(path, format!("{report:#}\n").as_bytes())
            .map_err(|error| error.to_string())?;
    }
    match (args.json, report.as_object()) {
        (false, Some(report)) => print(table::fields(report).join("\n")),
        _ => print(report),
    }
}

/// The judge of images of the bundled models' size.
const USUAL_JUDGE: &str = "fashion-mnist-judge";

/// Compares a student with its teacher: a table, a verdict, and the scores in the student's card.
fn against(args: &EvaluateArgs, model: &str, teacher: &str) -> Result<(), String> {
    let student = args.models.resolve("--model", model)?;
    let teacher = args.models.resolve("--against", teacher)?;
    let measured = beside::measure(&student, &teacher, &args.measure, &args.compute, None)?;
    let report = json!({"comparison": measured.comparison, "verdict": measured.verdict});
    if let Some(path) = &args.out {
        write_atomically(path, format!("{report:#}\n").as_bytes())
            .map_err(|error| error.to_string())?;
    }
    let written = beside::write_scores(&student, &measured, &args.measure)?;
    if args.json {
        return print(report);
    }
    let mut lines = beside::table(&measured.comparison);
    lines.extend([String::new(), measured.verdict.sentence.clone(), measured.verdict.next.into()]);
    if let Some(card) = written {
        lines.push(format!("The scores are in {}.", card.display()));
    }
    print(lines.join("\n"))
}

/// Where the samples come from.
enum Source {
    Images(Images),
    Model { sampled: Box<Sampled>, id: String, n: usize },
}

impl Source {
    fn open(args: &EvaluateArgs, network: &dyn FeatureNetwork) -> Result<Self, String> {
        if let Some(path) = &args.samples {
            let images = open_images("--samples", path)?;
            return Ok(Self::Images(fitted("--samples", images, network)?));
        }
        let model = args.model.as_deref().ok_or("--model or --samples: name one of them")?;
        let folder = args.models.resolve("--model", model)?;
        let scale = args.measure.guidance_scale;
        // Features are taken on the CPU, wherever the samples are made.
        let sampled = Sampled::open(&folder, &args.measure, &args.compute, scale)?;
        let [channels, height, width] = sampled.shape;
        if network.input().is_some_and(|input| input != (channels, height, width)) {
            return Err(format!(
                "--model {model}: makes {width}×{height} images of {channels} channels, {} looks at {:?} \
                 (channels, height, width); use another feature network",
                network.name(),
                network.input().unwrap_or_default()
            ));
        }
        let n = args.measure.n.unwrap_or(10_000) as usize;
        Ok(Self::Model { sampled: Box::new(sampled), id: hub::id_of(model), n })
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
            Self::Model { .. } => args.measure.seeds.unwrap_or(1).into(),
        }
    }

    fn describe(&self, args: &EvaluateArgs) -> Map<String, Value> {
        let description = match self {
            Self::Images(_) => json!({ "images": args.samples.as_deref().map(file_name) }),
            Self::Model { id, sampled, .. } => json!({
                "model": id,
                "dtype": sampled.model.network.dtype().as_str(),
                "scheduler": args.measure.scheduler.name(),
                "num_inference_steps": sampled.sampling.trajectory.len(),
                "guidance_scale": sampled.sampling.captions.as_ref().map(|it| it.scale),
                "seed": args.measure.seed,
                "seeds": args.measure.seeds.unwrap_or(1),
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
        let mut progress = Progress::new("Sampling", 0, self.len());
        match self {
            Self::Images(images) => watch(images, observer, &mut progress),
            Self::Model { sampled, n, .. } => {
                let sampling = Sampling {
                    first_seed: (args.measure.seed + (run * n) as u64) % noise::SEEDS,
                    ..sampled.sampling.clone()
                };
                let (network, decoder) = (&sampled.model.network, &sampled.model.decoder);
                let mut done = 0;
                for batch in sampling.batches(network.as_ref(), 0..*n) {
                    let batch = batch.map_err(|error| error.to_string())?;
                    let images = batch.images(decoder.as_ref());
                    let images = batch.set(&images.map_err(|error| error.to_string())?);
                    done += images.len();
                    observer.add(&images).map_err(|error| error.to_string())?;
                    progress.at(done, "");
                }
                Ok(())
            }
        }
    }
}

/// Each score's mean over the runs, and between several runs its standard deviation (divisor N − 1).
fn summary(network: &dyn FeatureNetwork, runs: &[Scores]) -> Value {
    type Score = fn(&Scores) -> Option<f64>;
    let distance = network.distance();
    let scores: [(&str, Score); 9] = [
        (&distance, |scores| Some(scores.distance)),
        ("inception_score", |scores| scores.inception_score.map(|score| score.0)),
        ("inception_score_deviation", |scores| scores.inception_score.map(|score| score.1)),
        ("kernel_distance", |scores| scores.kernel_distance.map(|score| score.0)),
        ("kernel_distance_deviation", |scores| scores.kernel_distance.and_then(|score| score.1)),
        ("precision", |scores| scores.precision_and_recall.map(|score| score.0)),
        ("recall", |scores| scores.precision_and_recall.map(|score| score.1)),
        ("class_agreement", |scores| scores.class_agreement),
        ("prompt_adherence", |scores| scores.prompt_adherence),
    ];
    let mut summary = Map::new();
    for (name, score) in scores {
        let values: Vec<f64> = runs.iter().filter_map(score).collect();
        if values.is_empty() {
            continue;
        }
        summary.insert(name.into(), json!(mean(&values)));
        if let Some(deviation) = deviation(&values) {
            summary.insert(format!("{name}_between_seeds"), json!(deviation));
        }
    }
    summary.into()
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}
