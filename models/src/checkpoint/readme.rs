//! The `README.md` of a model folder: a model card as the Hugging Face Hub reads it.

use std::fmt::Write as _;

use super::card::{Card, Role};
use crate::{Conditioning, NetworkConfig, schedule::ScheduleConfig};

/// The file's name.
pub(super) const README: &str = "README.md";

/// Evaluations of the example where the card does not say.
const STEPS: usize = 50;

/// The text: the Hub's YAML, what the model is, and Python that samples it in diffusers. The example writes out the
/// sampling loop, which every network over pixels fits; diffusers' own pipelines are for unconditional ones, and for those
/// that draw after text.
pub(super) fn text(network: &NetworkConfig, schedule: &ScheduleConfig, card: &Card) -> String {
    let task = match network.geometry().prompt {
        Some(_) => "text-to-image",
        None => "unconditional-image-generation",
    };
    let mut text =
        format!("---\nlibrary_name: diffusers\npipeline_tag: {task}\ntags:\n- diffusion\n");
    if card.role == Role::Student {
        text += "- distillation\n- dkdm\n";
    }
    // Only the Hub's own ids name a model there.
    if let Some((owner, name)) = card.teacher.as_ref().and_then(|it| it.split_once("--")) {
        let _ = writeln!(text, "base_model: {owner}/{name}");
    }
    text += "---\n\n";
    let _ = writeln!(text, "# {}\n", title(card));
    let _ = writeln!(text, "{}\n", about(network, card));
    let _ = writeln!(
        text,
        "## Use\n\nIn diffusers, from this folder:\n\n```python\n{}```\n",
        example(network, schedule, card)
    );
    let beside = if card.role == Role::Student { ", beside its teacher" } else { "" };
    let _ = writeln!(
        text,
        "Or serve it over HTTP{beside}: `understudy serve --models` and the folder that this one is in."
    );
    if !card.scores.is_empty() {
        text += "\n## Scores\n\n| | |\n| --- | --- |\n";
        for (name, value) in &card.scores {
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            let _ = writeln!(text, "| {name} | {value} |");
        }
    }
    text += "\n`understudy.json` holds the recipe.\n";
    text
}

fn title(card: &Card) -> String {
    match (card.role, &card.teacher) {
        (Role::Student, Some(teacher)) => format!("A student of {teacher}"),
        (Role::Student, None) => "A student".into(),
        (Role::Baseline, Some(teacher)) => format!("A baseline for students of {teacher}"),
        (Role::Baseline, None) => "A baseline".into(),
        (Role::Teacher, _) => "A diffusion model".into(),
    }
}

fn about(network: &NetworkConfig, card: &Card) -> String {
    let geometry = network.geometry();
    if let Some(prompt) = geometry.prompt {
        let how = match geometry.guidance {
            true => {
                " It takes the guidance scale as an input, so that an image needs one row of an evaluation instead of two."
            }
            false => "",
        };
        return format!(
            "A {} that draws latents of {}×{} after prompts of up to {} tokens.{}{how}",
            network.class_name(),
            geometry.width,
            geometry.height,
            prompt.tokens,
            made(card)
        );
    }
    let colour = match geometry.in_channels {
        1 => "gray".into(),
        3 => "RGB".into(),
        channels => format!("{channels}-channel"),
    };
    let images = format!("{colour} images of {}×{} pixels", geometry.width, geometry.height);
    let classes = match geometry.conditioning {
        Conditioning::Classes(classes) => format!(", of {classes} classes"),
        _ => String::new(),
    };
    let how = made(card);
    let few = card.evaluations.first().map_or_else(String::new, |steps| {
        let plural = if *steps == 1 { "" } else { "s" };
        format!(" It is made for images in {steps} evaluation{plural} of DDIM; more or fewer are possible.")
    });
    format!("A {} that makes {images}{classes}.{how}{few}", network.class_name())
}

fn made(card: &Card) -> &'static str {
    match card.role {
        Role::Student => {
            " It was distilled without training data (DKDM, arXiv:2409.03550) by Understudy."
        }
        Role::Baseline => " It was trained by Understudy, to compare with.",
        Role::Teacher => "",
    }
}

/// Python that draws images after a prompt, by the pipeline that the folder is.
fn text_example(card: &Card) -> String {
    let prompt = card.example_prompts.first().map_or("a red apple", String::as_str);
    let steps = card.defaults.num_inference_steps.unwrap_or(STEPS);
    let scale = card.defaults.guidance_scale.unwrap_or(1.0);
    format!(
        "import torch\nfrom diffusers import DiffusionPipeline\n\n# What is around the network may be stored in another type.\npipeline = DiffusionPipeline.from_pretrained(\".\", torch_dtype=torch.float32)\nimages = pipeline({prompt:?}, num_inference_steps={steps}, guidance_scale={scale:?}).images\nimages[0].save(\"image.png\")\n"
    )
}

fn example(network: &NetworkConfig, schedule: &ScheduleConfig, card: &Card) -> String {
    let geometry = network.geometry();
    if geometry.prompt.is_some() {
        return text_example(card);
    }
    let (class, component) = (network.class_name(), network.component());
    let steps = card.defaults.num_inference_steps.unwrap_or(STEPS).min(schedule.train_timesteps());
    let channels = geometry.in_channels;
    let (setup, arguments) = match geometry.conditioning {
        Conditioning::Classes(classes) => {
            (format!("labels = torch.arange({})\n", classes.min(10)), ", class_labels=labels")
        }
        _ => ("labels = torch.arange(4)  # only their number counts\n".into(), ""),
    };
    // A transformer takes a timestep a row.
    let time = if component == "transformer" { "t.expand(len(labels))" } else { "t" };
    let prediction = match geometry.learned_variance() {
        true => format!(".sample[:, :{channels}]  # the rest is the variance"),
        false => ".sample".into(),
    };
    format!(
        "import torch\nfrom diffusers import {class}, DDIMScheduler\nfrom diffusers.utils import make_image_grid, numpy_to_pil\n\nmodel = {class}.from_pretrained(\".\", subfolder=\"{component}\").eval()\nscheduler = DDIMScheduler.from_pretrained(\".\", subfolder=\"scheduler\")\nscheduler.set_timesteps({steps})\n{setup}x = torch.randn(len(labels), {channels}, {}, {})\nwith torch.no_grad():\n    for t in scheduler.timesteps:\n        answer = model(x, {time}{arguments}){prediction}\n        x = scheduler.step(answer, t, x).prev_sample\nimages = numpy_to_pil(((x.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).numpy())\nmake_image_grid(images, rows=1, cols=len(images)).save(\"images.png\")\n",
        geometry.height, geometry.width
    )
}
