//! The one conversion from a client's request for images to the engine's, which is valid from then on.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::http::StatusCode;
use image::{
    DynamicImage, GrayImage, RgbImage,
    imageops::{self, FilterType},
};
use understudy_models::{
    Conditioning, Error,
    checkpoint::Lora,
    noise,
    sampler::{self, Kind},
};

use super::{
    Settings,
    accept::Wanted,
    encode::Encoding,
    error::{Problem, quoted},
    parameters::Recipe,
    picture::Edit,
    wire::{ClassLabel, GeneratedImage, GenerationRequest, LoraUse, OutputFormat, PromptSyntax},
};
use crate::{
    engine::{Beginning, Failure, GenerateRequest, Image, Mask, SampleSpec, Start, Tokens},
    registry::{Form, Model, Syntax},
};

/// Most class names that a message lists.
const SHOWN_CLASSES: usize = 20;

/// How a reply is wrapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    /// One JSON object with all images.
    Json,
    /// The one image itself.
    Image,
    /// Server-sent events.
    Events,
}

/// A valid request, and what its reply needs to know of it.
#[derive(Debug, Clone)]
pub(super) struct ParsedRequest {
    pub(super) request: GenerateRequest,
    pub(super) shape: Shape,
    pub(super) encoding: Encoding,
    recipe: Arc<Recipe>,
}

impl ParsedRequest {
    /// Reads a request to `model`; `received` is when its deadline began to run.
    pub(super) async fn new(
        settings: &Settings,
        model: Arc<Model>,
        wire: &GenerationRequest,
        wanted: Wanted,
        received: Instant,
    ) -> Result<Self, Problem> {
        makes_images(&model)?;
        let size = match &wire.edit {
            Some(edit) if wire.size.as_deref().is_none_or(|size| size == "auto") => {
                sides_of(settings, &model, edit)?
            }
            _ => sides(settings, &model, wire.size.as_deref())?,
        };
        let shape = shape(wire, wanted)?;
        let encoding = encoding(wire, wanted)?;
        let n = count(wire, settings)?;
        if shape == Shape::Image && n > 1 {
            let message = format!(
                "`n` is {n} with an image type in Accept: one body holds one image; ask for n = 1, or accept application/json"
            );
            return Err(Problem::conflict("n", message));
        }
        let loras = loras(settings, wire)?;
        let guidance_scale = guidance(&model, wire)?;
        let prompts = prompts(&model, wire, guidance_scale)?;
        let form = model.form_for(size, &prompts);
        let recipe = recipe(&model, wire)?;
        let (trajectory, begun) = course(&model, &recipe, wire)?;
        let start = match (&wire.edit, begun) {
            (Some(edit), Some(begun)) => {
                let scale = model.image[1] / model.geometry.height;
                Start::Image(beginning(edit, model.image[0], form.size, scale, begun).await?)
            }
            _ => Start::Noise,
        };
        let request = GenerateRequest {
            samples: samples(&model, wire, n)?,
            trajectory,
            prompts,
            start,
            guidance_scale,
            partial_images: partial_images(wire, shape)?,
            deadline: deadline(wire, received)?,
            model,
        };
        // What is refused is refused before anything is compiled for it.
        let request = in_form(request, form, loras).await?;
        Ok(Self { request, shape, encoding, recipe: recipe.into() })
    }

    /// Reads the two requests of a pair that runs together, so both count against the queue; otherwise as
    /// [`ParsedRequest::alike`].
    pub(super) async fn pair(
        settings: &Settings,
        models: [Arc<Model>; 2],
        wires: [GenerationRequest; 2],
        wanted: Wanted,
        received: Instant,
    ) -> Result<[Self; 2], Problem> {
        let settings = Settings {
            max_images: settings.max_images.min(settings.max_rows / 2),
            ..settings.clone()
        };
        if settings.max_images == 0 {
            let message = "the queue has no room for a pair of images; start the server with --max-queue 2 or more";
            return Err(Problem::new(StatusCode::BAD_REQUEST, "queue_too_small", message));
        }
        Self::alike(&settings, models, wires, wanted, received).await
    }

    /// Reads requests for the same images of a teacher and its student: the same seeds, and the same
    /// classes where both models have them.
    pub(super) async fn alike(
        settings: &Settings,
        models: [Arc<Model>; 2],
        mut wires: [GenerationRequest; 2],
        wanted: Wanted,
        received: Instant,
    ) -> Result<[Self; 2], Problem> {
        if wires[0].seed.is_none() {
            let drawn = Some(draw_seed()? as i64);
            wires.iter_mut().for_each(|wire| wire.seed = drawn);
        }
        let [teacher, student] = models;
        let teacher = Self::new(settings, teacher, &wires[0], wanted, received).await?;
        let mut student = Self::new(settings, student, &wires[1], wanted, received).await?;
        // Where the request names a class each has found it among its own.
        if !wires[0].names_class()
            && let Conditioning::Classes(count) = student.request.model.geometry.conditioning
        {
            let samples = student.request.samples.iter_mut().zip(&teacher.request.samples);
            for (sample, teachers) in samples {
                let drawn = teachers.class_label.filter(|class| (*class as usize) < count);
                sample.class_label = drawn.or(sample.class_label);
            }
        }
        Ok([teacher, student])
    }

    /// The same request in so many steps.
    pub(super) fn in_steps(&self, wire: &GenerationRequest, steps: usize) -> Result<Self, Problem> {
        let wire = GenerationRequest { num_inference_steps: Some(steps as i64), ..wire.clone() };
        let recipe = recipe(&self.request.model, &wire)?;
        let (trajectory, begun) = course(&self.request.model, &recipe, &wire)?;
        let start = match (self.request.start.clone(), begun) {
            (Start::Image(before), Some((begin, after))) => {
                let mask = before.mask.map(|mask| Arc::new(Mask { after, ..(*mask).clone() }));
                Start::Image(Beginning { begin, mask, ..before })
            }
            (start, _) => start,
        };
        let request = GenerateRequest { trajectory, start, ..self.request.clone() };
        Ok(Self { request, recipe: recipe.into(), ..self.clone() })
    }

    /// What the engine's request does not tell any more.
    pub(super) fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// `WIDTHxHEIGHT`.
    pub(super) fn size(&self) -> String {
        size(&self.request.model)
    }

    /// What an image was made with, as text that goes into it.
    pub(super) fn parameters(&self, index: usize) -> String {
        self.recipe.text(&self.request, index)
    }

    /// What a reply says of an image beside its pixels.
    pub(super) fn describe(&self, index: usize, b64_json: String) -> GeneratedImage {
        let SampleSpec { seed, class_label } = self.request.samples[index];
        let names = &self.request.model.card.class_names;
        let class_name = class_label.and_then(|class| names.get(class as usize)).cloned();
        GeneratedImage { b64_json, index, seed, class_label, class_name }
    }
}

/// `WIDTHxHEIGHT` of the images a model makes.
pub(super) fn size(model: &Model) -> String {
    let [_, height, width] = model.image;
    format!("{width}x{height}")
}

/// 400 unless its network makes images by itself.
pub(super) fn makes_images(model: &Model) -> Result<(), Problem> {
    let Some(reason) = &model.refusal else { return Ok(()) };
    let remedy = format!("{reason}; evaluate it with POST /v2/models/{}/infer", model.id);
    Err(Problem::value("model", quoted(&model.id), remedy))
}

/// Height and width of what is asked for; nothing for the model's own.
fn sides(
    settings: &Settings,
    model: &Model,
    asked: Option<&str>,
) -> Result<Option<[usize; 2]>, Problem> {
    let made = size(model);
    let Some(asked) = asked.filter(|asked| *asked != "auto" && *asked != made) else {
        return Ok(None);
    };
    let Some(multiple) = model.size_multiple else {
        let remedy = format!("{} makes {made} only; send that, or `auto`", model.id);
        return Err(Problem::value("size", quoted(asked), remedy));
    };
    let sides = asked.split_once('x').and_then(|(width, height)| {
        let side = |text: &str| text.parse().ok().filter(|side: &usize| *side > 0);
        Some([side(height)?, side(width)?])
    });
    let most = settings.max_pixels;
    let fits = |[height, width]: &[usize; 2]| {
        height.is_multiple_of(multiple)
            && width.is_multiple_of(multiple)
            && height.checked_mul(*width).is_some_and(|pixels| pixels <= most)
    };
    let Some(sides) = sides.filter(fits) else {
        let remedy = format!(
            "{} makes WIDTHxHEIGHT with sides that are multiples of {multiple}, and at most {most} pixels (--max-pixels); \
             send such a size, or `auto` for {made}",
            model.id
        );
        return Err(Problem::value("size", quoted(asked), remedy));
    };
    Ok(Some(sides))
}

/// Height and width that come nearest to a picture's own, without enlarging it, as diffusers has them; nothing for a model of one
/// size.
fn sides_of(
    settings: &Settings,
    model: &Model,
    edit: &Edit,
) -> Result<Option<[usize; 2]>, Problem> {
    let Some(multiple) = model.size_multiple else { return Ok(None) };
    let (width, height) = edit.picture.pixels.dimensions();
    let fitted = |side: u32| (side as usize / multiple).max(1) * multiple;
    let sides = [fitted(height), fitted(width)];
    let most = settings.max_pixels;
    if sides[0] * sides[1] > most {
        let remedy = format!(
            "images have at most {most} pixels (--max-pixels); send a smaller one, or the `size` that it is to be scaled to"
        );
        return Err(Problem::value("image", format!("{width}x{height}"), remedy));
    }
    Ok(Some(sides))
}

/// What a request begins with, as a model makes images, of so many channels and of such a size; `scale` is how many times larger they
/// are than its latents.
async fn beginning(
    edit: &Edit,
    channels: usize,
    size: [usize; 2],
    scale: usize,
    (begin, after): Begun,
) -> Result<Beginning, Problem> {
    let edit = edit.clone();
    let scaled = move || {
        let [height, width] = size;
        let mask = edit.mask.as_deref().map(|mask| {
            Mask::new(&drawn(mask, size, scale), [height / scale, width / scale], after)
        });
        Beginning::new(&picture(&edit.picture.pixels, channels, size), begin, mask.transpose()?)
    };
    let scaled = tokio::task::spawn_blocking(scaled).await.map_err(Problem::internal)?;
    scaled.map_err(Problem::internal)
}

/// A picture of so many channels and such a size, scaled as Pillow's users do (Lanczos).
fn picture(picture: &RgbImage, channels: usize, [height, width]: [usize; 2]) -> Image {
    let sides = (width as u32, height as u32);
    let scaled = match picture.dimensions() == sides {
        true => picture.clone(),
        false => imageops::resize(picture, sides.0, sides.1, FilterType::Lanczos3),
    };
    let scaled = DynamicImage::ImageRgb8(scaled);
    let pixels = match channels {
        1 => scaled.into_luma8().into_raw(),
        _ => scaled.into_rgb8().into_raw(),
    };
    Image { width, height, channels, pixels }
}

/// Whether each place of a latent is drawn anew: the mask is scaled as the picture is, and looked at in the first pixel of each, as
/// diffusers does.
fn drawn(mask: &GrayImage, [height, width]: [usize; 2], scale: usize) -> Vec<bool> {
    let sides = (width as u32, height as u32);
    let scaled = match mask.dimensions() == sides {
        true => mask.clone(),
        false => imageops::resize(mask, sides.0, sides.1, FilterType::Lanczos3),
    };
    let (rows, columns) = (height / scale, width / scale);
    let places =
        (0..rows * columns).map(|place| (place % columns * scale, place / columns * scale));
    places.map(|(x, y)| scaled.get_pixel(x as u32, y as u32).0[0] >= 128).collect()
}

/// Most LoRAs of a request.
const MOST_LORAS: usize = 8;

/// The LoRAs that a request names.
fn loras(settings: &Settings, wire: &GenerationRequest) -> Result<Vec<(String, Lora)>, Problem> {
    let asked = wire.lora.as_deref().unwrap_or_default();
    if asked.len() > MOST_LORAS {
        return Err(Problem::value("lora", format!("{} long", asked.len()), "name at most 8"));
    }
    let mut found: Vec<(String, Lora)> = Vec::new();
    for LoraUse { name, scale } in asked {
        let Some(lora) = settings.loras.get(name) else {
            let known: Vec<&str> = settings.loras.keys().map(String::as_str).collect();
            let remedy = match known.is_empty() {
                true => "this server was given none; start it with --lora NAME=FILE".to_owned(),
                false => format!("this server has {}", known.join(", ")),
            };
            return Err(Problem::value("lora", quoted(name), remedy));
        };
        if found.iter().any(|(other, _)| other == name) {
            return Err(Problem::value("lora", quoted(name), "name it once, with the whole scale"));
        }
        let lora = lora.scaled(scale.unwrap_or(1.0));
        let lora = lora.map_err(|error| Problem::value("lora", quoted(name), error))?;
        found.push((name.clone(), lora));
    }
    // In any order they are the same model.
    found.sort_by(|(a, _), (b, _)| a.cmp(b));
    Ok(found)
}

/// The request to its model in a form and with LoRAs, which is made first if it has to be, while there is time.
async fn in_form(
    request: GenerateRequest,
    form: Form,
    loras: Vec<(String, Lora)>,
) -> Result<GenerateRequest, Problem> {
    let own = request.model.form();
    let changes = !loras.is_empty();
    let begins_with_image = matches!(request.start, Start::Image(..));
    let model = async {
        let model = request.model.with_loras(loras).await?.in_form(form).await?;
        if begins_with_image {
            model.take_images().await?;
        }
        model.take_prompts(&request.prompts).await?;
        Ok::<_, Arc<Error>>(model)
    };
    let late = || Failure::Deadline { done: 0, total: request.trajectory.len() };
    let model = match request.deadline {
        Some(at) => tokio::time::timeout_at(at.into(), model).await.map_err(|_| late())?,
        None => model.await,
    };
    let model = model.map_err(|error| {
        let [height, width] = form.size;
        let parts = form.parts;
        match *error {
            // What does not fit this model; where its file lies is the operator's.
            Error::Format { ref problem, .. } if changes => {
                let message = format!("`lora`: {problem}");
                Problem::new(StatusCode::BAD_REQUEST, "invalid_value", message).at("lora")
            }
            Error::Value { .. } if changes && form == own => Problem::value("lora", "given", error),
            Error::Value { .. } if form.size != own.size => {
                Problem::value("size", format!("{width}x{height}"), error)
            }
            Error::Value { .. } => {
                Problem::value("prompt", format!("{parts} times as long as is read at once"), error)
            }
            _ => Problem::internal(error),
        }
    });
    Ok(GenerateRequest { model: model?, ..request })
}

fn count(wire: &GenerationRequest, settings: &Settings) -> Result<u64, Problem> {
    let limits = 1..=settings.max_images as u64;
    let n = whole(wire.n, "n", limits).map_err(|mut problem| {
        let origin = " (the smaller of --max-images-per-request and --max-queue); send several requests for more";
        problem.message.push_str(origin);
        problem
    });
    Ok(n?.unwrap_or(1))
}

fn shape(wire: &GenerationRequest, wanted: Wanted) -> Result<Shape, Problem> {
    if let Some(format) = wire.response_format.as_deref().filter(|format| *format != "b64_json") {
        let remedy = "only \"b64_json\" is possible, because the server keeps no images that a URL could name; accept image/png for the bare image";
        return Err(Problem::value("response_format", quoted(format), remedy));
    }
    match (wire.stream.unwrap_or(false), wanted) {
        (true, Wanted::Image(_)) => {
            let message = "`stream` is true with an image type in Accept: events are no image; accept text/event-stream, or leave out `stream`";
            Err(Problem::conflict("stream", message))
        }
        (true, Wanted::Json) => Ok(Shape::Events),
        (false, Wanted::Image(_)) => Ok(Shape::Image),
        (false, Wanted::Json) => Ok(Shape::Json),
    }
}

fn encoding(wire: &GenerationRequest, wanted: Wanted) -> Result<Encoding, Problem> {
    let format = match wanted {
        Wanted::Image(Some(format)) => format,
        Wanted::Image(None) | Wanted::Json => wire.output_format.unwrap_or_default(),
    };
    let quality = whole(wire.output_compression, "output_compression", 0..=100)?;
    if let (Some(quality), OutputFormat::Png) = (quality, format) {
        let message = format!(
            "`output_compression` is {quality} for png, which is lossless: leave it out, or ask for jpeg or webp"
        );
        return Err(Problem::conflict("output_compression", message));
    }
    Ok(Encoding { format, quality: quality.map(|quality| quality as u8) })
}

fn samples(model: &Model, wire: &GenerationRequest, n: u64) -> Result<Vec<SampleSpec>, Problem> {
    let class = class(model, wire)?;
    let first = match whole(wire.seed, "seed", 0..=noise::SEEDS - 1)? {
        Some(seed) => seed,
        None => draw_seed()?,
    };
    let sample = |i| {
        let seed = (first + i) % noise::SEEDS;
        let class_label = match (model.geometry.conditioning, class) {
            (Conditioning::Classes(_), Some(class)) => Some(class),
            (Conditioning::Classes(count), None) => {
                Some(drawn_class(seed, count, model.card.null_class))
            }
            _ => None,
        };
        SampleSpec { seed, class_label }
    };
    Ok((0..n).map(sample).collect())
}

fn draw_seed() -> Result<u64, Problem> {
    Ok(getrandom::u64().map_err(Problem::internal)? % noise::SEEDS)
}

/// The class of an image whose request names none: any but the one that means "none".
fn drawn_class(seed: u64, count: usize, null_class: Option<u32>) -> u32 {
    match null_class {
        Some(null) if (null as usize) < count && count > 1 => {
            let class = noise::class_label(seed, count - 1) as u32;
            class + u32::from(class >= null)
        }
        _ => noise::class_label(seed, count) as u32,
    }
}

fn class(model: &Model, wire: &GenerationRequest) -> Result<Option<u32>, Problem> {
    let prompt = wire.prompt.as_deref().filter(|prompt| !prompt.is_empty());
    // A prompt that is read names no class.
    let prompt = prompt.filter(|_| model.text().is_none());
    let (field, label) = match (prompt, &wire.class_label) {
        (Some(_), Some(_)) => {
            let message = "`prompt` and `class_label` both name a class: send one of them";
            return Err(Problem::conflict("class_label", message));
        }
        (None, None) => return Ok(None),
        (Some(prompt), None) => ("prompt", ClassLabel::Name(prompt.to_owned())),
        (None, Some(label)) => ("class_label", label.clone()),
    };
    let shown = match &label {
        ClassLabel::Number(number) => number.to_string(),
        ClassLabel::Name(name) => quoted(name),
    };
    let Conditioning::Classes(count) = model.geometry.conditioning else {
        let kind = if model.text().is_some() { "draws after text" } else { "is unconditional" };
        let remedy = format!("{} {kind} and takes no class; leave `{field}` out", model.id);
        return Err(Problem::value(field, shown, remedy));
    };
    let names = &model.card.class_names;
    let known = match &label {
        ClassLabel::Number(number) => u32::try_from(*number).ok(),
        ClassLabel::Name(name) => model.card.class(name),
    };
    known.filter(|class| (*class as usize) < count).map(Some).ok_or_else(|| {
        let names = match names.len() {
            0 => String::new(),
            1..=SHOWN_CLASSES => format!(", named {}", names.join(", ")),
            _ => format!("; GET /v1/models/{} names them", model.id),
        };
        let remedy = format!("{} has the classes 0 to {}{names}", model.id, count - 1);
        Problem::value(field, shown, remedy)
    })
}

fn recipe(model: &Model, wire: &GenerationRequest) -> Result<Recipe, Problem> {
    let limit = model.schedule.train_timesteps();
    let steps = whole(wire.num_inference_steps, "num_inference_steps", 1..=limit as u64)?;
    let sampler = match &wire.scheduler {
        Some(name) => name.parse::<Kind>()?,
        None => model.default_scheduler(),
    };
    let [prompt, negative_prompt] = [&wire.prompt, &wire.negative_prompt]
        .map(|text| text.clone().filter(|text| !text.is_empty() && model.text().is_some()));
    Ok(Recipe {
        prompt,
        negative_prompt,
        sampler,
        steps: steps.map_or_else(|| model.default_steps(), |steps| steps as usize),
        eta: wire.eta.unwrap_or(sampler.default_eta()),
        loras: wire
            .lora
            .iter()
            .flatten()
            .map(|lora| (lora.name.clone(), lora.scale.unwrap_or(1.0)))
            .collect(),
    })
}

/// How much image and noise there is where a walk from an image begins, and after each of its evaluations.
type Begun = (sampler::Mixture, Arc<[sampler::Mixture]>);

/// The steps, and, where they begin with an image, how much of it there is on the way.
fn course(
    model: &Model,
    recipe: &Recipe,
    wire: &GenerationRequest,
) -> Result<(sampler::Trajectory, Option<Begun>), Problem> {
    let Recipe { sampler, steps, eta, .. } = *recipe;
    Ok(match &wire.edit {
        Some(edit) => {
            let strength = edit.strength;
            let learned = model.geometry.learned_variance();
            let course =
                sampler::from_image(&model.schedule, sampler, steps, strength, eta, learned)?;
            (course.trajectory, Some((course.begin, course.after)))
        }
        None => (model.trajectory(sampler, steps, eta)?, None),
    })
}

fn guidance(model: &Model, wire: &GenerationRequest) -> Result<f64, Problem> {
    let scale = wire.guidance_scale.unwrap_or_else(|| model.default_guidance());
    model.card.check_scale(&model.id, scale)?;
    if scale != 1.0 && !model.guides() {
        let remedy = format!(
            "{} has no null class to be guided away from; send 1 or leave it out",
            model.id
        );
        return Err(Problem::value("guidance_scale", scale, remedy));
    }
    Ok(scale)
}

fn prompts(
    model: &Model,
    wire: &GenerationRequest,
    guidance_scale: f64,
) -> Result<Vec<Tokens>, Problem> {
    let [prompt, negative] = [&wire.prompt, &wire.negative_prompt]
        .map(|text| text.as_deref().filter(|text| !text.is_empty()));
    if let Some(negative) = negative {
        if model.text().is_none() {
            let remedy = format!("{} reads no text; leave `negative_prompt` out", model.id);
            return Err(Problem::value("negative_prompt", quoted(negative), remedy));
        }
        if guidance_scale == 1.0 {
            let message = "`negative_prompt` has no effect where `guidance_scale` is 1: send a larger one, or leave it out";
            return Err(Problem::conflict("negative_prompt", message));
        }
    }
    let [prompt, negative] = [prompt, negative].map(Option::unwrap_or_default);
    let syntax = match wire.prompt_syntax {
        Some(PromptSyntax::Weighted) => Syntax::Weighted,
        Some(PromptSyntax::Plain) | None => Syntax::Plain,
    };
    Ok(model.prompts(prompt, negative, guidance_scale, syntax)?)
}

fn partial_images(wire: &GenerationRequest, shape: Shape) -> Result<usize, Problem> {
    let count = whole(wire.partial_images, "partial_images", 0..=3)?.unwrap_or(0);
    if count > 0 && shape != Shape::Events {
        let message = format!(
            "`partial_images` is {count} without `stream`: previews are events; send `stream`: true, or leave it out"
        );
        return Err(Problem::conflict("partial_images", message));
    }
    Ok(count as usize)
}

fn deadline(wire: &GenerationRequest, received: Instant) -> Result<Option<Instant>, Problem> {
    let after = whole(wire.deadline_ms, "deadline_ms", 1..=i64::MAX as u64)?;
    // A deadline beyond what the clock can tell is none.
    Ok(after.and_then(|after| received.checked_add(Duration::from_millis(after))))
}

/// A whole number within its limits.
fn whole(
    value: Option<i64>,
    field: &str,
    limits: std::ops::RangeInclusive<u64>,
) -> Result<Option<u64>, Problem> {
    let Some(value) = value else { return Ok(None) };
    match u64::try_from(value).ok().filter(|value| limits.contains(value)) {
        Some(value) => Ok(Some(value)),
        None if *limits.end() == i64::MAX as u64 => {
            let remedy = format!("it must be at least {}", limits.start());
            Err(Problem::value(field, value, remedy))
        }
        None => {
            let remedy = format!("it must be {} to {}", limits.start(), limits.end());
            Err(Problem::value(field, value, remedy))
        }
    }
}

#[cfg(test)]
mod tests;
