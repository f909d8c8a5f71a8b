//! `understudy bench`: what one batched network evaluation costs, and one batch of whole images.

use std::{
    num::NonZeroUsize,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::{Map, json};
use understudy_models::{Conditioning, memory, sampler};

use super::{
    compute::{Compute, ModelArg, device_name},
    print, profile, table,
};
use crate::{
    engine::{Engine, Event, GenerateRequest, SampleSpec, Start, probe},
    metrics::Metrics,
    registry::Model,
};

/// Time one batched network evaluation, and one batch of whole images.
#[derive(Debug, clap::Args)]
pub(super) struct BenchArgs {
    #[command(flatten)]
    model: ModelArg,
    /// Rows of the evaluation.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    batch: u16,
    /// Network steps of the whole images.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..))]
    steps: u16,
    /// Seconds for which the evaluation is repeated, at least three times.
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    seconds: u16,
    /// Also time every layer: GFLOP, bytes, and how near they come to what the machine reaches.
    #[arg(long)]
    profile: bool,
    /// One JSON object on standard output, everything else on standard error.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    pub(super) compute: Compute,
}

const WARM_UPS: usize = 2;
const LEAST_EVALUATIONS: usize = 3;
const MOST_EVALUATIONS: usize = 100;

/// Runs the command.
///
/// # Errors
/// A sentence naming what to mend.
pub(super) fn run(args: &BenchArgs) -> Result<(), String> {
    let batch = usize::from(args.batch);
    let model = args.model.load(&args.compute, batch)?;
    let trajectory = trajectory(&model, usize::from(args.steps))?;
    let (evaluation_seconds, minor_faults) =
        evaluations(&model, batch, Duration::from_secs(args.seconds.into()))?;
    let image_seconds = image_seconds(&model, batch, trajectory)?;
    let footprint = model.on(0).network().footprint();
    let mut report = json!({
        "model": model.id,
        "parameters": model.parameters,
        "ms_per_image_evaluation": evaluation_seconds * 1e3 / batch as f64,
        "minor_faults_per_evaluation": minor_faults,
        "images_per_second": batch as f64 / image_seconds,
        "batch": batch,
        "steps": args.steps,
        "device": device_name(&args.compute.device()?),
        "dtype": model.dtype,
        "threads": rayon::current_num_threads(),
        "max_rss_bytes": memory::peak(),
        // Where a network is not compiled into kernels there is no plan to tell.
        "weight_bytes": footprint.map(|footprint| footprint.weight_bytes),
        "live_activation_bytes":
            footprint.map(|footprint| footprint.live_bytes_per_sample * batch),
        "workspace_bytes": footprint.map(|footprint| footprint.workspace_bytes),
    });
    if args.profile {
        let profile = profile::measure(&model, batch)?;
        eprintln!("{}", profile.table());
        report["profile"] = profile.json();
    }
    match (args.json, report.as_object()) {
        (false, Some(report)) => {
            let people: Map<_, _> =
                report.clone().into_iter().filter(|(name, _)| name != "profile").collect();
            print(table::fields(&people).join("\n"))
        }
        _ => print(report),
    }
}

/// Seconds of the median of many evaluations after warm-up, and how many pages on average each of them
/// made the system map, where it tells.
fn evaluations(
    model: &Model,
    batch: usize,
    measure: Duration,
) -> Result<(f64, Option<f64>), String> {
    let timestep = (model.schedule.train_timesteps() - 1) as f32;
    let evaluate = || -> Result<f64, String> {
        let began = Instant::now();
        probe(model.on(0).network(), batch, timestep).map_err(|error| error.to_string())?;
        Ok(began.elapsed().as_secs_f64())
    };
    for _ in 0..WARM_UPS {
        evaluate()?;
    }
    let (began, faults_before) = (Instant::now(), minor_faults());
    let mut seconds = Vec::with_capacity(MOST_EVALUATIONS);
    while seconds.len() < LEAST_EVALUATIONS
        || (began.elapsed() < measure && seconds.len() < MOST_EVALUATIONS)
    {
        seconds.push(evaluate()?);
    }
    let faults = minor_faults().zip(faults_before).map(|(after, before)| after - before);
    let faults = faults.map(|faults| faults as f64 / seconds.len() as f64);
    seconds.sort_by(f64::total_cmp);
    Ok((seconds[seconds.len() / 2], faults))
}

/// Page faults of this process so far that needed no disk.
fn minor_faults() -> Option<u64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The second field, the program's name in brackets, may hold anything.
    let fields = stat.rsplit_once(") ")?.1;
    fields.split(' ').nth(7)?.parse().ok()
}

/// Deterministic DDIM; of a network that is trained by flow matching its own sampler.
fn trajectory(model: &Model, steps: usize) -> Result<sampler::Trajectory, String> {
    let flows = model.default_scheduler() == sampler::Kind::FlowEuler;
    let kind = if flows { sampler::Kind::FlowEuler } else { sampler::Kind::Ddim };
    model.trajectory(kind, steps, 0.0).map_err(|error| error.to_string())
}

/// One batch of images through the engine.
fn image_seconds(
    model: &Arc<Model>,
    batch: usize,
    trajectory: sampler::Trajectory,
) -> Result<f64, String> {
    let class_label = matches!(model.geometry.conditioning, Conditioning::Classes(_)).then_some(0);
    let metrics = Metrics::new().map_err(|error| error.to_string())?;
    let engine =
        Engine::start(NonZeroUsize::MIN, batch, metrics).map_err(|error| error.to_string())?;
    let began = Instant::now();
    let request = GenerateRequest {
        model: Arc::clone(model),
        samples: (0..batch as u64).map(|seed| SampleSpec { seed, class_label }).collect(),
        trajectory,
        prompts: model.text().map(|text| text.empty()).into_iter().collect(),
        start: Start::Noise,
        guidance_scale: 1.0,
        partial_images: 0,
        deadline: None,
    };
    let mut submission = engine.generate(request).map_err(|rejected| rejected.to_string())?;
    while let Some(event) = submission.blocking_next() {
        if let Event::Failed { failure, .. } = event {
            return Err(failure.to_string());
        }
    }
    Ok(began.elapsed().as_secs_f64())
}
