//! `/sdapi/v1`: the API of A1111's Stable Diffusion web UI, for the clients that people have. What can be had here is mapped to a
//! request for images like any other; what cannot is refused by its name.

use std::sync::Arc;

use axum::{
    Extension, Json,
    extract::{Request, State},
    http::StatusCode,
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::{Map, Value, json};
use understudy_models::sampler::Kind;

use super::{
    App,
    accept::Wanted,
    body::{self, JsonRequest},
    caller::Caller,
    error::{Problem, quoted},
    images::ready,
    observe::Received,
    picture::{self, Edit},
    route::{self, Admitted},
    shadow,
    wire::{
        GenerationRequest, LoraUse, PromptSyntax, WebuiError, WebuiLora, WebuiModel, WebuiOptions,
        WebuiProgress, WebuiReply, WebuiRequest, WebuiSampler, WebuiState,
    },
};
use crate::registry::State as ModelState;

/// Samplers by the names that its clients know, and others of the same.
const SAMPLERS: [(Kind, &str, &[&str]); 9] = [
    (Kind::DpmSolverPlusPlus, "DPM++ 2M", &["dpm++", "k_dpmpp_2m"]),
    (Kind::Euler, "Euler", &["k_euler"]),
    (Kind::EulerAncestral, "Euler a", &["euler-ancestral", "k_euler_a", "k_euler_ancestral"]),
    (Kind::Heun, "Heun", &["k_heun"]),
    (Kind::Ddim, "DDIM", &[]),
    (Kind::Pndm, "PLMS", &["pndm"]),
    (Kind::Ddpm, "DDPM", &[]),
    (Kind::Lcm, "LCM", &[]),
    (Kind::Tcd, "TCD", &[]),
];

/// Fields that change nothing here, whatever they say.
const IGNORED: [&str; 19] = [
    "do_not_save_samples",
    "do_not_save_grid",
    "override_settings_restore_afterwards",
    "subseed",
    "s_tmin",
    "s_tmax",
    "refiner_switch_at",
    "disable_extra_networks",
    "force_task_id",
    "script_args",
    "image_cfg_scale",
    "mask_blur",
    "mask_blur_x",
    "mask_blur_y",
    "mask_round",
    "inpainting_fill",
    "inpaint_full_res",
    "inpaint_full_res_padding",
    "inpainting_mask_invert",
];

/// Whether a value changes nothing.
type Neutral = fn(&Value) -> bool;

/// Fields that would change what is drawn, and what they must say so that they do not. Any may also be null.
const NEUTRAL: [(&str, Neutral); 19] = [
    ("enable_hr", |it| *it == Value::Bool(false)),
    ("restore_faces", |it| *it == Value::Bool(false)),
    ("tiling", |it| *it == Value::Bool(false)),
    ("save_images", |it| *it == Value::Bool(false)),
    ("include_init_images", |it| *it == Value::Bool(false)),
    ("styles", is_empty),
    ("subseed_strength", |it| *it == 0.0 || *it == 0),
    ("seed_resize_from_h", |it| it.as_f64().is_some_and(|it| it <= 0.0)),
    ("seed_resize_from_w", |it| it.as_f64().is_some_and(|it| it <= 0.0)),
    ("s_churn", |it| it.as_f64() == Some(0.0)),
    ("s_noise", |it| it.as_f64() == Some(1.0)),
    ("s_min_uncond", |it| it.as_f64() == Some(0.0)),
    ("resize_mode", |it| it.as_f64() == Some(0.0)),
    ("initial_noise_multiplier", |it| it.as_f64() == Some(1.0)),
    ("script_name", is_empty),
    ("alwayson_scripts", is_empty),
    ("refiner_checkpoint", is_empty),
    ("infotext", is_empty),
    ("comments", is_empty),
];

/// Fields that name a picture which is not looked at.
const PICTURES: [&str; 3] = ["mask", "latent_mask", "firstpass_image"];

/// What A1111 draws anew where nobody says.
const DENOISING_STRENGTH: f64 = 0.75;

fn is_empty(value: &Value) -> bool {
    match value {
        Value::String(text) => text.is_empty(),
        Value::Array(all) => all.is_empty(),
        Value::Object(all) => all.is_empty(),
        _ => false,
    }
}

/// Makes images of a text.
#[utoipa::path(post, path = "/sdapi/v1/txt2img", tag = "A1111's API",
    request_body(content = WebuiRequest, example = json!({"seed": 7, "steps": 10})),
    responses(
        (status = 200, description = "The images", body = WebuiReply),
        (status = 404, description = "No such model", body = WebuiError),
        (status = 429, description = "The queue is full", body = WebuiError),
        (status = 503, description = "Not ready, or shutting down", body = WebuiError),
))]
pub(super) async fn txt2img(
    Caller(app): Caller,
    Extension(received): Extension<Received>,
    request: Request,
) -> Result<Json<WebuiReply>, Problem> {
    let fields: Fields = body::json(&app, request).await?;
    let (mut asked, parameters) = fields.read()?;
    if asked.init_images.take().is_some_and(|images| !images.is_empty()) {
        let message = "`init_images` is of POST /sdapi/v1/img2img: send it there, or leave it out";
        return Err(Problem::conflict("init_images", message));
    }
    // Of the second pass of `enable_hr`, which is refused.
    asked.denoising_strength = None;
    answer(app, asked, parameters, None, received).await
}

/// Makes images of another.
#[utoipa::path(post, path = "/sdapi/v1/img2img", tag = "A1111's API",
    request_body(content = WebuiRequest, example = json!({
        "seed": 7, "steps": 10, "denoising_strength": 0.6,
        "init_images": ["iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAASUlEQVR42mNggANWLn4RSTllBgYuETkNIxs3BgZ+OV0b76hMBgYRDZuAlIoeBgZJI++U2mnrGRjkbKIqpm25xMCg7JbZs/7SVwBB5w9RPaVdKgAAAABJRU5ErkJggg=="],
    })),
    responses(
        (status = 200, description = "The images", body = WebuiReply),
        (status = 404, description = "No such model", body = WebuiError),
        (status = 429, description = "The queue is full", body = WebuiError),
        (status = 503, description = "Not ready, or shutting down", body = WebuiError),
))]
pub(super) async fn img2img(
    Caller(app): Caller,
    Extension(received): Extension<Received>,
    request: Request,
) -> Result<Json<WebuiReply>, Problem> {
    let fields: Fields = body::json(&app, request).await?;
    let (mut asked, parameters) = fields.read()?;
    let images = asked.init_images.take().unwrap_or_default();
    let [image] = <[String; 1]>::try_from(images).map_err(|images| {
        let message = format!("`init_images` has {} images: send one", images.len());
        Problem::new(StatusCode::BAD_REQUEST, "invalid_value", message).at("init_images")
    })?;
    let budget = Arc::clone(&app.bodies);
    let read = move || {
        let text = image.split_once(";base64,").map_or(image.as_str(), |(_, data)| data);
        let bytes = BASE64_STANDARD.decode(text.trim()).map_err(|error| {
            let message = format!("`init_images[0]` is no base64 ({error}): send the bytes of a PNG, JPEG or WebP file in base64");
            Problem::new(StatusCode::BAD_REQUEST, "invalid_value", message).at("init_images")
        })?;
        picture::decoded("init_images", &bytes, &budget)
    };
    let picture = tokio::task::spawn_blocking(read).await.map_err(Problem::internal)??;
    let strength = asked.denoising_strength.unwrap_or(DENOISING_STRENGTH);
    let edit = Edit { picture: picture.into(), mask: None, strength };
    answer(app, asked, parameters, Some(edit), received).await
}

async fn answer(
    app: App,
    asked: WebuiRequest,
    parameters: Value,
    edit: Option<Edit>,
    Received(received): Received,
) -> Result<Json<WebuiReply>, Problem> {
    let _in_flight = app.in_flight.token();
    let send = asked.send_images.unwrap_or(true);
    let batch = asked.batch_size.unwrap_or(1);
    let strength = edit.as_ref().map(|edit| edit.strength);
    let wire = asked.into_generation(edit)?;
    let admitted = route::admit(&app, &wire, Wanted::Json, None, received).await;
    let Admitted::Single(single) = admitted.map_err(renamed)? else {
        let message = "a draft and its final are two images: name a model, or use POST /v1/images/generations";
        return Err(Problem::conflict("override_settings", message));
    };
    let mut served = single.finish().await?;
    let data = served.finished.data().await?;
    ready(&app, &mut served, received);
    let plan = &served.finished.plan;
    let texts: Vec<String> = (0..data.len()).map(|index| plan.parameters(index)).collect();
    let seeds: Vec<u64> = data.iter().map(|image| image.seed).collect();
    let [_, height, width] = plan.request.model.image;
    let [prompt, negative] =
        [&wire.prompt, &wire.negative_prompt].map(|it| it.clone().unwrap_or_default());
    let recipe = plan.recipe();
    let info = json!({
        "prompt": prompt, "all_prompts": vec![&prompt; data.len()],
        "negative_prompt": negative, "all_negative_prompts": vec![&negative; data.len()],
        "seed": seeds.first(), "all_seeds": seeds,
        "subseed": -1, "all_subseeds": vec![-1; data.len()], "subseed_strength": 0,
        "width": width, "height": height, "sampler_name": name_of(recipe.sampler),
        "cfg_scale": plan.request.guidance_scale, "steps": recipe.steps, "batch_size": batch,
        "restore_faces": false, "face_restoration_model": null,
        "sd_model_name": plan.request.model.id, "sd_model_hash": null, "sd_vae_name": null, "sd_vae_hash": null,
        "seed_resize_from_w": -1, "seed_resize_from_h": -1, "denoising_strength": strength,
        "extra_generation_params": {}, "index_of_first_image": 0, "infotexts": texts, "styles": [],
        "clip_skip": 1, "is_using_inpainting_conditioning": false,
        "version": concat!("understudy ", env!("CARGO_PKG_VERSION")),
    });
    shadow::repeat(&app, served);
    let images = match send {
        true => data.into_iter().map(|image| image.b64_json).collect(),
        false => Vec::new(),
    };
    Ok(Json(WebuiReply { images, parameters, info: info.to_string() }))
}

/// A complaint about a field of a request for images, under the name that it has here.
fn renamed(mut problem: Problem) -> Problem {
    const NAMES: [(&str, &str); 8] = [
        ("num_inference_steps", "steps"),
        ("guidance_scale", "cfg_scale"),
        ("scheduler", "sampler_name"),
        ("strength", "denoising_strength"),
        ("size", "width"),
        ("lora", "prompt"),
        ("model", "override_settings"),
        ("n", "batch_size"),
    ];
    let known = NAMES.iter().find(|(there, _)| problem.param.as_deref() == Some(there));
    if let Some((there, here)) = known {
        problem.message = problem.message.replace(&format!("`{there}`"), &format!("`{here}`"));
        problem.param = Some((*here).to_owned());
    }
    problem
}

/// All that a client sends.
#[derive(Debug, serde::Deserialize)]
#[serde(transparent)]
struct Fields(Map<String, Value>);

impl JsonRequest for Fields {
    fn takes(_: &str) -> &'static str {
        "an object"
    }
}

impl Fields {
    /// What of it is honoured, and what the reply repeats.
    fn read(self) -> Result<(WebuiRequest, Value), Problem> {
        let mut honoured = Map::new();
        for (name, value) in &self.0 {
            let neutral = NEUTRAL.iter().find(|(known, _)| known == name);
            let ignored = IGNORED.contains(&name.as_str())
                || name.starts_with("hr_")
                || name.starts_with("firstphase_");
            if ignored
                || (value.is_null() && (neutral.is_some() || PICTURES.contains(&name.as_str())))
            {
                continue;
            }
            if PICTURES.contains(&name.as_str()) {
                let message = format!("`{name}` is not supported: leave it out");
                return Err(Problem::conflict(name, message));
            }
            match neutral {
                Some((_, is_neutral)) if is_neutral(value) => {}
                Some(_) => {
                    let remedy = "this server cannot do that; leave it out";
                    return Err(Problem::value(name, quoted(&value.to_string()), remedy));
                }
                None => drop(honoured.insert(name.clone(), value.clone())),
            }
        }
        let request: WebuiRequest = body::parse(Value::Object(honoured).to_string().as_bytes())?;
        request.check_ranges()?;
        // As A1111, which sends pictures back only where it is asked to.
        let mut told = self.0;
        told.remove("init_images");
        Ok((request, Value::Object(told)))
    }
}

impl WebuiRequest {
    /// Refuses values out of range also where the request has no use for them, or only for what they come to together; the others are
    /// checked with the request for images.
    fn check_ranges(&self) -> Result<(), Problem> {
        for (name, value) in [("eta", self.eta), ("denoising_strength", self.denoising_strength)] {
            if let Some(value) = value.filter(|value| !(0.0..=1.0).contains(value)) {
                return Err(Problem::value(name, value, "it must be from 0 to 1"));
            }
        }
        for (name, count) in [("batch_size", self.batch_size), ("n_iter", self.n_iter)] {
            if let Some(count) = count.filter(|count| *count < 1) {
                return Err(Problem::value(name, count, "it must be at least 1"));
            }
        }
        Ok(())
    }

    fn into_generation(self, edit: Option<Edit>) -> Result<GenerationRequest, Problem> {
        let model = self.model()?;
        let sampler = match self.sampler_name.as_ref().or(self.sampler_index.as_ref()) {
            Some(name) => Some(sampler(name)?),
            None => None,
        };
        let automatic = |name: &String| {
            ["automatic", "", "use same scheduler"].contains(&&*name.to_lowercase())
        };
        if let Some(other) = self.scheduler.as_ref().filter(|name| !automatic(name)) {
            let remedy = "only Automatic is possible: noise levels are those of the model's scheduler_config.json";
            return Err(Problem::value("scheduler", quoted(other), remedy));
        }
        let size = match (self.width, self.height) {
            (Some(width), Some(height)) => Some(format!("{width}x{height}")),
            (None, None) => None,
            _ => {
                let message = "`width` and `height` belong together: send both, or neither for the model's own";
                return Err(Problem::conflict("width", message));
            }
        };
        let (prompt, lora) = loras(self.prompt.unwrap_or_default())?;
        let negative = self.negative_prompt.unwrap_or_default();
        let eta = match sampler {
            Some(Kind::Ddim | Kind::Tcd) => self.eta,
            Some(Kind::EulerAncestral) if self.eta.is_some_and(|eta| eta != 1.0) => {
                let remedy = "Euler a adds all of its noise; send 1, or leave it out";
                return Err(Problem::value("eta", self.eta.unwrap_or_default(), remedy));
            }
            // The others add none.
            _ => None,
        };
        let n = self.batch_size.unwrap_or(1).checked_mul(self.n_iter.unwrap_or(1));
        Ok(GenerationRequest {
            model,
            prompt: Some(prompt),
            negative_prompt: Some(negative),
            prompt_syntax: Some(PromptSyntax::Weighted),
            seed: self.seed.filter(|seed| *seed != -1),
            num_inference_steps: self.steps,
            guidance_scale: self.cfg_scale,
            scheduler: sampler.map(|kind| kind.name().to_owned()),
            size,
            n: n.or(Some(i64::MAX)),
            eta,
            lora: (!lora.is_empty()).then_some(lora),
            edit,
            ..GenerationRequest::default()
        })
    }

    /// The model that `override_settings` names; the default one where it names none.
    fn model(&self) -> Result<Option<String>, Problem> {
        let mut model = None;
        for (name, value) in self.override_settings.iter().flatten() {
            match (name.as_str(), value) {
                ("sd_model_checkpoint", Value::String(id)) => model = Some(id.clone()),
                (_, Value::Null) => {}
                ("CLIP_stop_at_last_layers", one) if *one == 1 => {}
                _ => {
                    let field = format!("override_settings.{name}");
                    let remedy = "only sd_model_checkpoint, a model's id, can be set";
                    return Err(Problem::value(&field, quoted(&value.to_string()), remedy));
                }
            }
        }
        Ok(model)
    }
}

fn sampler(name: &str) -> Result<Kind, Problem> {
    let same = |other: &str| other.eq_ignore_ascii_case(name.trim());
    let found =
        SAMPLERS.iter().find(|(_, own, others)| same(own) || others.iter().any(|it| same(it)));
    found.map(|(kind, ..)| *kind).ok_or_else(|| {
        let known: Vec<&str> = SAMPLERS.iter().map(|(_, name, _)| *name).collect();
        Problem::value("sampler_name", quoted(name), format!("use one of {}", known.join(", ")))
    })
}

fn name_of(kind: Kind) -> &'static str {
    SAMPLERS.iter().find(|(known, ..)| *known == kind).map_or(kind.name(), |(_, name, _)| name)
}

/// A prompt without its `<lora:NAME:SCALE>`, and these.
fn loras(prompt: String) -> Result<(String, Vec<LoraUse>), Problem> {
    let (mut text, mut found) = (String::new(), Vec::new());
    let mut rest = prompt.as_str();
    while let Some((before, tag)) = rest.split_once("<lora:") {
        let malformed = || {
            let remedy = "write <lora:NAME:SCALE>";
            Problem::value("prompt", quoted(&format!("<lora:{tag}")), remedy)
        };
        let (inside, after) = tag.split_once('>').ok_or_else(malformed)?;
        let (name, scale) = match inside.split_once(':') {
            Some((name, scale)) => (name, Some(scale.trim().parse().map_err(|_| malformed())?)),
            None => (inside, None),
        };
        found.push(LoraUse { name: name.trim().to_owned(), scale });
        text.push_str(before);
        rest = after;
    }
    text.push_str(rest);
    Ok((text.trim().to_owned(), found))
}

/// The models that are ready.
#[utoipa::path(get, path = "/sdapi/v1/sd-models", tag = "A1111's API", responses(
    (status = 200, description = "The models that are ready, the default one first", body = Vec<WebuiModel>),
))]
pub(super) async fn models(State(app): State<App>) -> Json<Vec<WebuiModel>> {
    let ready = app.registry.list().into_iter();
    let ready = ready.filter(|(_, state)| matches!(state, ModelState::Ready(_)));
    let entry = |(id, _): (String, ModelState)| WebuiModel {
        title: id.clone(),
        model_name: id.clone(),
        hash: None,
        sha256: None,
        filename: id,
        config: None,
    };
    Json(ready.map(entry).collect())
}

/// The samplers.
#[utoipa::path(get, path = "/sdapi/v1/samplers", tag = "A1111's API", responses(
    (status = 200, description = "The samplers", body = Vec<WebuiSampler>),
))]
pub(super) async fn samplers() -> Json<Vec<WebuiSampler>> {
    let entry = |(_, name, aliases): &(Kind, &'static str, &'static [&'static str])| WebuiSampler {
        name,
        aliases: aliases.to_vec(),
        options: Map::new(),
    };
    Json(SAMPLERS.iter().map(entry).collect())
}

/// The LoRAs that prompts may name.
#[utoipa::path(get, path = "/sdapi/v1/loras", tag = "A1111's API", operation_id = "webui_loras", responses(
    (status = 200, description = "The LoRAs", body = Vec<WebuiLora>),
))]
pub(super) async fn lora_list(State(app): State<App>) -> Json<Vec<WebuiLora>> {
    let entry =
        |name: &String| WebuiLora { name: name.clone(), alias: name.clone(), path: String::new() };
    Json(app.settings.loras.keys().map(entry).collect())
}

/// Whether the server works.
#[utoipa::path(get, path = "/sdapi/v1/progress", tag = "A1111's API", responses(
    (status = 200, description = "How many requests are under way", body = WebuiProgress),
))]
pub(super) async fn progress(State(app): State<App>) -> Json<WebuiProgress> {
    let job_count = app.in_flight.len();
    Json(WebuiProgress {
        progress: if job_count == 0 { 0.0 } else { 0.5 },
        eta_relative: 0.0,
        state: WebuiState {
            skipped: false,
            interrupted: false,
            job: "",
            job_count,
            job_no: 0,
            sampling_step: 0,
            sampling_steps: 0,
        },
        current_image: None,
        textinfo: None,
    })
}

/// The settings.
#[utoipa::path(get, path = "/sdapi/v1/options", tag = "A1111's API", responses(
    (status = 200, description = "The settings", body = WebuiOptions),
))]
pub(super) async fn options(State(app): State<App>) -> Json<WebuiOptions> {
    Json(WebuiOptions { sd_model_checkpoint: app.registry.default_id().map(str::to_owned) })
}

/// Sets nothing: clients send the settings that they read.
#[utoipa::path(post, path = "/sdapi/v1/options", tag = "A1111's API",
    request_body(content = WebuiOptions, example = json!({})),
    responses(
        (status = 200, description = "They are as they were"),
))]
pub(super) async fn set_options(
    State(app): State<App>,
    request: Request,
) -> Result<Json<Value>, Problem> {
    let asked: WebuiOptions = body::json(&app, request).await?;
    match asked.sd_model_checkpoint {
        Some(id) if app.registry.default_id() != Some(&id) => {
            let remedy = "the server has many clients, so none sets its model; name it in a request's override_settings.sd_model_checkpoint, or start the server with --default-model";
            Err(Problem::value("sd_model_checkpoint", quoted(&id), remedy))
        }
        _ => Ok(Json(Value::Null)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loras_leave_the_prompt() {
        let (text, found) = loras("a cat <lora:ink:0.5>, <lora:line>".into()).expect("well formed");
        assert_eq!(text, "a cat ,");
        let uses: Vec<_> = found.iter().map(|it| (it.name.as_str(), it.scale)).collect();
        assert_eq!(uses, [("ink", Some(0.5)), ("line", None)]);
        assert!(loras("<lora:ink:x>".into()).is_err() && loras("<lora:ink".into()).is_err());
    }
}
