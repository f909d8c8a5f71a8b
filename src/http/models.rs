//! `/v1/models`, and how a request's `model` becomes a model.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State, rejection::PathRejection},
};
use understudy_models::Conditioning;

use super::{
    App,
    error::{Problem, quoted},
    generate::size,
    wire::{
        self, ErrorReply, LoadProgress, LoadStage, ModelCard, ModelDefaults, ModelEntry, ModelList,
    },
};
use crate::{
    engine::WARM_UP_SECONDS,
    metrics::UNKNOWN_MODEL,
    registry::{Loading, Model, State as ModelState, Text},
};

impl App {
    /// The model that a request names, or the default one; it must be ready.
    pub(super) fn model(&self, id: Option<&str>) -> Result<Arc<Model>, Problem> {
        if self.draining.is_cancelled() {
            return Err(Problem::draining());
        }
        let id = match id {
            Some(id) => id,
            None => self.registry.default_id().ok_or_else(|| {
                Problem::not_ready(
                    "the models are still being loaded; ask again when GET /health answers 200",
                )
            })?,
        };
        if matches!(id, "auto" | "draft") || id.starts_with("experiment:") {
            let remedy = "this name is no model's, and stands for one in POST /v1/images/generations only; name a model, GET /v1/models lists them";
            return Err(Problem::value("model", quoted(id), remedy));
        }
        match self.registry.get(id) {
            Some(ModelState::Ready(model)) => Ok(model),
            Some(state) => Err(Problem::not_ready(format!(
                "`model` is {}, which is not ready: {}",
                quoted(id),
                reason(id, &state)
            ))),
            None => {
                self.metrics.rejected.with_label_values(&[UNKNOWN_MODEL, "unknown_model"]).inc();
                Err(Problem::unknown_model(id))
            }
        }
    }
}

/// Why a model does not serve.
pub(super) fn reason(id: &str, state: &ModelState) -> String {
    match state {
        ModelState::Ready(_) => "it serves".into(),
        ModelState::Loading(_) => "it is being loaded; ask again shortly".into(),
        ModelState::Unloaded => {
            format!("it is not loaded; POST /v2/repository/models/{id}/load loads it")
        }
        ModelState::Failed(reason) => reason.clone(),
    }
}

/// The models, the default one first.
#[utoipa::path(get, path = "/v1/models", tag = "models", responses(
    (status = 200, description = "All models, the default one first", body = ModelList),
))]
pub(super) async fn list(State(app): State<App>) -> Json<ModelList> {
    let data = app.registry.list().into_iter().map(|(id, state)| entry(id, &state)).collect();
    Json(ModelList { object: "list", data })
}

/// One model and its card.
#[utoipa::path(get, path = "/v1/models/{id}", tag = "models",
    params(("id" = String, Path, description = "The model's id", example = "fashion-mnist-teacher")),
    responses(
        (status = 200, description = "The model", body = ModelEntry),
        (status = 404, description = "No such model", body = ErrorReply),
))]
pub(super) async fn show(
    State(app): State<App>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<ModelEntry>, Problem> {
    // A path that is not UTF-8 names no model either.
    let id = id.map_or_else(|_| String::from("\u{fffd}"), |Path(id)| id);
    let state = app.registry.get(&id).ok_or_else(|| Problem::unknown_model(&id))?;
    Ok(Json(entry(id, &state)))
}

fn entry(id: String, state: &ModelState) -> ModelEntry {
    let model = match state {
        ModelState::Ready(model) => Some(model),
        _ => None,
    };
    let reason = reason(&id, state);
    ModelEntry {
        id,
        object: "model",
        created: model.map_or(0, |model| model.created),
        owned_by: "understudy",
        ready: model.is_some(),
        card: match model {
            Some(model) => wire::ModelState::Ready(Box::new(card(model))),
            None => wire::ModelState::NotReady { reason, loading: loading(state) },
        },
    }
}

fn loading(state: &ModelState) -> Option<LoadProgress> {
    let ModelState::Loading(progress) = state else { return None };
    let (stage, budget_seconds) = match progress.stage {
        Loading::Waiting => (LoadStage::Waiting, None),
        Loading::Downloading => (LoadStage::Downloading, None),
        Loading::Reading => (LoadStage::Reading, None),
        Loading::Measuring => (LoadStage::Measuring, Some(WARM_UP_SECONDS)),
    };
    let milliseconds = progress.since.elapsed().as_millis();
    Some(LoadProgress { stage, seconds: milliseconds as f64 / 1e3, budget_seconds })
}

fn card(model: &Model) -> ModelCard {
    let card = &model.card;
    ModelCard {
        role: card.role.name(),
        teacher: card.teacher.clone(),
        class_names: card.class_names.clone(),
        num_classes: match model.geometry.conditioning {
            Conditioning::Classes(count) => Some(count),
            _ => None,
        },
        null_class: card.null_class,
        max_prompt_tokens: model.text().map(Text::max_tokens),
        example_prompts: card.example_prompts.clone(),
        defaults: ModelDefaults {
            num_inference_steps: model.default_steps(),
            scheduler: model.default_scheduler().to_string(),
            guidance_scale: model.default_guidance(),
        },
        guidance_range: card.guidance_range,
        evaluations: card.evaluations.clone(),
        num_train_timesteps: model.schedule.train_timesteps(),
        size: size(model),
        size_multiple: model.size_multiple,
        channels: model.image[0],
        parameters: model.parameters,
        dtype: model.dtype,
        recipe: card.recipe.clone(),
        scores: card.scores.clone(),
    }
}
