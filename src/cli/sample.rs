//! `understudy sample`: images, and a grid of them, from the command line.

use std::{
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::{DType, Device};
use understudy_distill::picture;
use understudy_models::{
    Conditioning, Geometry,
    checkpoint::{card::Card, check_target, read},
    noise,
    sampler::Kind,
};

use super::{
    compute::{Compute, ModelArg},
    print,
    progress::Progress,
};
use crate::{
    engine::{Engine, Event, GenerateRequest, Image, SampleSpec, Start, Tokens},
    metrics::Metrics,
    registry::{Model, Syntax},
};

/// Generate images, and a grid of them.
#[derive(Debug, clap::Args)]
pub(super) struct SampleArgs {
    #[command(flatten)]
    model: ModelArg,
    /// How many images.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    n: u32,
    /// Seed of the first image; image i uses seed + i.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(..noise::SEEDS))]
    seed: u64,
    /// Where to: a folder (every image and the grid), or a .png (the grid alone).
    #[arg(long)]
    out: PathBuf,
    /// Class of all images, by name or number; without it classes take turns.
    #[arg(long, alias = "class-label", value_name = "NAME-OR-NUMBER")]
    class: Option<String>,
    /// What a text-to-image model is to draw.
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// What guidance leads a text-to-image model away from; default: the empty prompt.
    #[arg(long, value_name = "TEXT")]
    negative_prompt: Option<String>,
    /// Read weights in prompts: `(words:1.3)`, `(words)` and `[words]` count more or less.
    #[arg(long)]
    weighted_prompt: bool,
    /// Classifier-free guidance; 1 is none [default: the model card's, else 1].
    #[arg(long, value_name = "SCALE")]
    guidance_scale: Option<f64>,
    /// Pixels of the images, of models that make several sizes; default: the model's own.
    #[arg(long, value_name = "WIDTHxHEIGHT", value_parser = size)]
    size: Option<[usize; 2]>,
    /// Start at the F32 tensor `latents` `[N, C, H, W]` of a safetensors file, standard normal, instead of at the seeds'
    /// noise; N is --n.
    #[arg(long, value_name = "FILE")]
    latents: Option<PathBuf>,
    /// Network steps; default: the model card's.
    #[arg(long)]
    steps: Option<usize>,
    /// The sampler; default: the model card's.
    #[arg(long, value_parser = super::one_of(Kind::ALL, Kind::name))]
    scheduler: Option<Kind>,
    /// Fresh noise per step of ddim (default: 0) and tcd (default: 0.3), 0 to 1.
    #[arg(long)]
    eta: Option<f64>,
    /// Images per network evaluation.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1024))]
    batch: u32,
    #[command(flatten)]
    pub(super) compute: Compute,
}

/// Bytes of the largest file of latents that is read.
const LATENTS_LIMIT: u64 = 1 << 30;
/// Previews per image that only show progress.
const TICKS: usize = 3;

/// Runs the command.
///
/// # Errors
/// A sentence naming what to mend.
pub(super) fn run(args: &SampleArgs) -> Result<(), String> {
    if let Some(suffix) = other_picture(&args.out) {
        return Err(format!(
            "--out {}: pictures are written as PNG, not as {suffix}; name a .png, or a folder",
            args.out.display()
        ));
    }
    if is_picture(&args.out) {
        check_target(&args.out).map_err(|error| format!("--out {error}"))?;
    } else if args.out.exists() && !args.out.is_dir() {
        return Err(format!("--out {}: is no folder; name another, or a .png", args.out.display()));
    }
    let model = args.model.load(&args.compute, args.batch as usize)?;
    let kind = args.scheduler.unwrap_or_else(|| model.default_scheduler());
    let steps = args.steps.unwrap_or_else(|| model.default_steps());
    let guidance_scale = args.guidance_scale.unwrap_or_else(|| model.default_guidance());
    let prompts = prompts(args, &model, guidance_scale)?;
    let model = match model.form_for(args.size, &prompts) {
        form if form == model.form() => model,
        form => {
            let flag = if args.size.is_some() { "--size" } else { "--prompt" };
            Arc::new(model.compiled(form).map_err(|error| format!("{flag}: {error}"))?)
        }
    };
    let start = latents(args, &model)?;
    let geometry = &model.geometry;
    let eta = args.eta.unwrap_or_else(|| kind.default_eta());
    let trajectory = model.trajectory(kind, steps, eta).map_err(|error| error.to_string())?;
    let classes = match geometry.conditioning {
        Conditioning::Classes(classes) => Some(classes as u32),
        // A network that is conditioned on numbers alone draws no images, and was refused when it was opened.
        Conditioning::None
        | Conditioning::Timestep
        | Conditioning::Embedding(_)
        | Conditioning::TextTime { .. } => None,
    };
    let class = match &args.class {
        Some(text) => Some(class(text, &model.card, classes)?),
        None => None,
    };
    let samples = (0..args.n).map(|i| SampleSpec {
        seed: (args.seed + u64::from(i)) % noise::SEEDS,
        class_label: classes.map(|classes| class.unwrap_or(i % classes)),
    });
    let samples: Vec<SampleSpec> = samples.collect();
    let seeds: Vec<u64> = samples.iter().map(|sample| sample.seed).collect();

    let metrics = Metrics::new().map_err(|error| error.to_string())?;
    let engine = Engine::start(NonZeroUsize::MIN, samples.len(), metrics)
        .map_err(|error| error.to_string())?;
    let submission = engine.generate(GenerateRequest {
        model,
        samples,
        trajectory,
        prompts,
        start,
        guidance_scale,
        partial_images: TICKS,
        deadline: None,
    });
    let images = collect(submission.map_err(|rejected| rejected.to_string())?, seeds.len())?;
    write(&args.out, &images, &seeds)?;
    print(format!("{}: {} images", args.out.display(), images.len()))
}

/// Height and width.
fn size(text: &str) -> Result<[usize; 2], String> {
    let side = |text: &str| text.parse().ok().filter(|side| (1..=1 << 16).contains(side));
    let sides =
        text.split_once('x').and_then(|(width, height)| Some([side(height)?, side(width)?]));
    sides.ok_or_else(|| "write WIDTHxHEIGHT, as in 512x384".into())
}

/// The prompts of a request's rows.
fn prompts(args: &SampleArgs, model: &Model, scale: f64) -> Result<Vec<Tokens>, String> {
    let checked = model.card.check_scale(&model.id, scale);
    checked.map_err(|error| format!("--guidance-scale: {error}"))?;
    if scale != 1.0 && !model.guides() {
        return Err(format!(
            "--guidance-scale {scale}: the model has no null class and reads no text; leave it out"
        ));
    }
    let texts = [("--prompt", &args.prompt), ("--negative-prompt", &args.negative_prompt)];
    if let (None, Some((flag, _))) = (model.text(), texts.iter().find(|(_, text)| text.is_some())) {
        return Err(format!("{flag}: the model reads no text; leave it out"));
    }
    if model.text().is_none() && args.weighted_prompt {
        return Err("--weighted-prompt: the model reads no text; leave it out".into());
    }
    if args.negative_prompt.is_some() && scale == 1.0 {
        return Err(
            "--negative-prompt: has no effect without guidance; add --guidance-scale".into()
        );
    }
    let [prompt, negative] = texts.map(|(_, text)| text.as_deref().unwrap_or_default());
    let syntax = if args.weighted_prompt { Syntax::Weighted } else { Syntax::Plain };
    model.prompts(prompt, negative, scale, syntax).map_err(|error| error.to_string())
}

/// Where images begin, where that is told.
fn latents(args: &SampleArgs, model: &Model) -> Result<Start, String> {
    let Some(path) = &args.latents else { return Ok(Start::Noise) };
    let refuse = |problem: String| format!("--latents {}: {problem}", path.display());
    let bytes = read::whole(path, LATENTS_LIMIT).map_err(|error| format!("--latents {error}"))?;
    let device = args.compute.device()?;
    let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu);
    let mut tensors = tensors.map_err(|error| refuse(error.to_string()))?;
    let latents =
        tensors.remove("latents").ok_or_else(|| refuse("holds no tensor `latents`".into()))?;
    let Geometry { in_channels, height, width, .. } = model.geometry;
    let shape = [args.n as usize, in_channels, height, width];
    if latents.dtype() != DType::F32 || latents.dims() != shape {
        let (dtype, dims) = (latents.dtype().as_str(), latents.dims());
        return Err(refuse(format!("`latents` is {dtype} {dims:?}, not f32 {shape:?}")));
    }
    let rows = (0..shape[0]).map(|i| latents.narrow(0, i, 1)?.to_device(&device));
    let rows = rows.collect::<candle_core::Result<_>>();
    rows.map(Start::Latents).map_err(|error| refuse(error.to_string()))
}

/// Waits for all images, in order, and tells meanwhile how far they are.
fn collect(mut submission: crate::engine::Submission, n: usize) -> Result<Vec<Image>, String> {
    let mut progress = Progress::new("Sampling", 0, n);
    let mut images: Vec<Option<Image>> = vec![None; n];
    let mut ticks = 0;
    while let Some(event) = submission.blocking_next() {
        ticks += 1;
        progress.at(ticks / (TICKS + 1), "");
        match event {
            Event::Completed { index, image, .. } => images[index] = Some(image),
            Event::Failed { index, failure } => return Err(format!("image {index}: {failure}")),
            Event::Partial { .. } | Event::Inferred { .. } => {}
        }
    }
    images.into_iter().collect::<Option<_>>().ok_or_else(|| "the device thread ended early".into())
}

/// The class that `--class` means.
fn class(text: &str, card: &Card, classes: Option<u32>) -> Result<u32, String> {
    let Some(classes) = classes else {
        return Err("--class: the model has no classes; leave it out".into());
    };
    card.class(text).filter(|&class| class < classes).ok_or_else(|| {
        let names = match card.class_names.is_empty() {
            true => String::new(),
            false => format!(": {}", card.class_names.join(", ")),
        };
        format!("--class {text}: the model has classes 0 to {}{names}", classes - 1)
    })
}

/// The suffix of a picture that is no PNG, which would be taken for a folder's name.
fn other_picture(out: &Path) -> Option<String> {
    let suffix = out.extension()?.to_str()?.to_ascii_lowercase();
    let known =
        ["jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "avif", "jxl", "heic", "ppm", "pgm"];
    known.contains(&suffix.as_str()).then_some(suffix)
}

fn is_picture(out: &Path) -> bool {
    out.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("png"))
}

fn write(out: &Path, images: &[Image], seeds: &[u64]) -> Result<(), String> {
    // As square as it gets.
    let columns = (images.len() as f64).sqrt().ceil() as usize;
    let grid = picture::grid(images, columns).ok_or("no images")?;
    let write =
        |path: &Path, image| picture::write(path, image).map_err(|error| format!("--out: {error}"));
    if is_picture(out) {
        return write(out, &grid);
    }
    std::fs::create_dir_all(out).map_err(|error| format!("--out {}: {error}", out.display()))?;
    for (image, seed) in images.iter().zip(seeds) {
        write(&out.join(format!("{seed}.png")), image)?;
    }
    write(&out.join("grid.png"), &grid)
}
