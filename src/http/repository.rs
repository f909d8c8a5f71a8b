//! The inference protocol's model repository: what is there; load, reload and unload without a restart.

use axum::{
    Json,
    extract::{Path, Request, State, rejection::PathRejection},
    http::StatusCode,
};

use super::{
    App, body,
    error::{Problem, quoted},
    inference::VERSION,
    models::reason,
    wire::{InferenceError, RepositoryEntry, RepositoryIndexRequest},
};
use crate::registry::{LoadError, State as ModelState};

/// The models of the models folder, and whether they serve.
#[utoipa::path(post, path = "/v2/repository/index", tag = "repository",
    operation_id = "repository_index",
    request_body(content = Option<RepositoryIndexRequest>, description = "May be left out", example = json!({"ready": true})),
    responses(
        (status = 200, description = "The models", body = Vec<RepositoryEntry>),
))]
pub(super) async fn index(
    State(app): State<App>,
    request: Request,
) -> Result<Json<Vec<RepositoryEntry>>, Problem> {
    let body = body::read(&app, request, app.settings.max_body_bytes).await?;
    let wire = body.use_up(|bytes| match bytes.trim_ascii() {
        b"" | b"null" => Ok(RepositoryIndexRequest::default()),
        body => body::parse(body),
    });
    let wire = wire.await?;
    Ok(Json(entries(&app, wire.ready.unwrap_or(false))))
}

/// The models, or only those that serve.
pub(super) fn entries(app: &App, only_ready: bool) -> Vec<RepositoryEntry> {
    let all = app.registry.list().into_iter();
    let listed = all.filter(|(_, state)| !only_ready || matches!(state, ModelState::Ready(_)));
    listed.map(|(id, state)| entry(id, &state)).collect()
}

/// Loads a model, or loads it again; answers when it is warm. Requests in flight finish on the weights
/// they started with.
#[utoipa::path(post, path = "/v2/repository/models/{model}/load", tag = "repository",
    security((), ("admin_key" = [])),
    params(("model" = String, Path, description = "The model's id", example = "fashion-mnist-teacher")),
    responses(
        (status = 200, description = "It serves", body = RepositoryEntry),
        (status = 400, description = "It cannot be loaded; what served before goes on", body = InferenceError),
        (status = 404, description = "No such model", body = InferenceError),
        (status = 409, description = "It is being loaded already", body = InferenceError),
        (status = 503, description = "The server is shutting down", body = InferenceError),
))]
pub(super) async fn load(
    State(app): State<App>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<RepositoryEntry>, Problem> {
    let id = id.map_err(|_| Problem::unknown_model("\u{fffd}"))?.0;
    load_model(&app, &id).await?;
    current(&app, id)
}

pub(super) async fn load_model(app: &App, id: &str) -> Result<(), Problem> {
    if app.draining.is_cancelled() {
        return Err(Problem::draining());
    }
    tokio::select! {
        loaded = app.registry.load(id) => loaded.map_err(|error| refused(id, error)),
        // It would be loaded for nobody.
        () = app.draining.cancelled() => Err(Problem::draining()),
    }
}

/// Unloads a model; requests in flight finish.
#[utoipa::path(post, path = "/v2/repository/models/{model}/unload", tag = "repository",
    security((), ("admin_key" = [])),
    params(("model" = String, Path, description = "The model's id", example = "fashion-mnist-teacher")),
    responses(
        (status = 200, description = "It serves no more", body = RepositoryEntry),
        (status = 404, description = "No such model", body = InferenceError),
        (status = 409, description = "It is being loaded", body = InferenceError),
))]
pub(super) async fn unload(
    State(app): State<App>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<RepositoryEntry>, Problem> {
    let id = id.map_err(|_| Problem::unknown_model("\u{fffd}"))?.0;
    unload_model(&app, &id)?;
    current(&app, id)
}

pub(super) fn unload_model(app: &App, id: &str) -> Result<(), Problem> {
    app.registry.unload(id).map_err(|error| refused(id, error))
}

fn refused(id: &str, error: LoadError) -> Problem {
    match error {
        LoadError::Unknown(_) => {
            let message = format!(
                "{}: no folder of that name with a model_index.json is in the models folder; POST /v2/repository/index lists what is",
                quoted(id)
            );
            Problem::new(StatusCode::NOT_FOUND, "model_not_found", message)
        }
        LoadError::Refused(problem) => {
            Problem::new(StatusCode::BAD_REQUEST, "model_refused", format!("{id}: {problem}"))
        }
        LoadError::Busy(_) => Problem::new(StatusCode::CONFLICT, "model_busy", error.to_string()),
    }
}

fn current(app: &App, id: String) -> Result<Json<RepositoryEntry>, Problem> {
    let state = app.registry.get(&id).ok_or_else(|| Problem::unknown_model(&id))?;
    Ok(Json(entry(id, &state)))
}

fn entry(name: String, state: &ModelState) -> RepositoryEntry {
    let (state, reason) = match state {
        ModelState::Ready(_) => ("READY", String::new()),
        ModelState::Loading(_) => ("LOADING", reason(&name, state)),
        ModelState::Unloaded => ("UNAVAILABLE", "unloaded".into()),
        ModelState::Failed(_) => ("UNAVAILABLE", reason(&name, state)),
    };
    RepositoryEntry { name, version: VERSION, state, reason }
}
