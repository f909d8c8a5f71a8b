//! A model whose images are measured, and how these are made.

use std::path::Path;

use understudy_distill::{
    generate::{Captions, Classes, Sampling},
    prompts::Prompts,
};
use understudy_models::{
    checkpoint::{ModelFolder, Pipeline},
    sampler,
};

use super::{compute::Compute, measure::MeasureArgs};

/// A model on its device, and its sampler.
pub(super) struct Sampled {
    pub(super) model: Pipeline,
    pub(super) sampling: Sampling,
    /// Channels, height and width of its images.
    pub(super) shape: [usize; 3],
}

/// Prompts that are read where nobody says how many images are made; more would be drawn after once at most.
const MOST_PROMPTS: usize = 10_000;

impl Sampled {
    /// Reads the model in `folder`. Text-to-image models are guided by `scale`, else as the model card says.
    ///
    /// # Errors
    /// A sentence naming the flag or the file, and the remedy.
    pub(super) fn open(
        folder: &Path,
        args: &MeasureArgs,
        compute: &Compute,
        scale: Option<f64>,
    ) -> Result<Self, String> {
        let explain = |error| format!("{}: {error}", folder.display());
        let device = compute.device()?;
        let dtype = compute.dtype(&device)?;
        let description = ModelFolder::open_for_images(folder).map_err(explain)?;
        let shape = description.image_shape();
        let model = description.load(dtype, &device).map_err(explain)?;
        let captions = captions(&model, folder, args, scale)?;
        let geometry = model.network.geometry();
        let (steps, learned) = (args.steps(&model.card), geometry.learned_variance());
        let eta = args.scheduler.default_eta();
        let trajectory = sampler::trajectory(&model.schedule, args.scheduler, steps, eta, learned)
            .map_err(|error| format!("--steps, --scheduler: {error}"))?;
        let classes =
            Classes::all(geometry.conditioning, model.card.null_class).map_err(explain)?;
        let (first_seed, batch) = (args.seed, args.batch as usize);
        let sampling = Sampling { trajectory, classes, captions, first_seed, batch };
        Ok(Self { model, sampling, shape })
    }
}

/// What a text-to-image model draws after.
fn captions(
    model: &Pipeline,
    folder: &Path,
    args: &MeasureArgs,
    scale: Option<f64>,
) -> Result<Option<Captions>, String> {
    let name = folder.display();
    let geometry = model.network.geometry();
    let (Some(shape), Some(reader)) = (geometry.prompt, &model.reader) else {
        let given = [
            ("--prompts", !args.prompts.is_empty()),
            ("--guidance-scale", args.guidance_scale.is_some()),
        ];
        return match given.into_iter().find(|(_, given)| *given) {
            Some((flag, _)) => Err(format!("{flag}: {name} draws after no text; leave it out")),
            None => Ok(None),
        };
    };
    if args.prompts.is_empty() {
        return Err(format!(
            "--prompts: {name} draws after text; give a file with one prompt a line, or a template such as \
             --prompts \"{{red|blue}} {{apple|house}}\""
        ));
    }
    let scale = scale.or(model.card.defaults.guidance_scale).unwrap_or(1.0);
    if !scale.is_finite() {
        return Err(format!("--guidance-scale {scale}: write a finite number"));
    }
    if let Some([least, most]) = model.card.guidance_range
        && !(least..=most).contains(&scale)
    {
        return Err(format!(
            "--guidance-scale {scale}: {name} has learned scales from {least} to {most}; name one of these"
        ));
    }
    let prompts = Prompts::read(&args.prompts).map_err(|error| error.to_string())?;
    let images = args.n.map_or(MOST_PROMPTS, |n| n as usize);
    let captions = Captions::new(reader, &prompts.thinned(images), shape, scale);
    captions.map(Some).map_err(|error| error.to_string())
}
