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

use super::{compute::Compute, folder_name, measure::MeasureArgs, prompting};

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
    let name = folder_name(folder);
    let geometry = model.network.geometry();
    let flags = [("--guidance-scale", args.guidance_scale.is_some())];
    prompting::check_flags(&name, geometry.prompt.is_some(), &args.prompts, &flags)?;
    let (Some(shape), Some(reader)) = (geometry.prompt, &model.reader) else { return Ok(None) };
    let scale = scale.or(model.card.defaults.guidance_scale).unwrap_or(1.0);
    model.card.check_scale(&name, scale).map_err(|error| format!("--guidance-scale: {error}"))?;
    let prompts = Prompts::read(&args.prompts).map_err(|error| error.to_string())?;
    let images = args.n.map_or(MOST_PROMPTS, |n| n as usize);
    let captions = Captions::new(reader, &prompts.thinned(images), shape, scale);
    captions.map(Some).map_err(|error| error.to_string())
}
