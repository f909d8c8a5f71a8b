//! Whether the server is well, and its metrics.

use axum::{
    Json,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};

use super::{
    App,
    error::Problem,
    wire::{Health, HealthStatus},
};
use crate::registry::State as ModelState;

impl App {
    /// Whether the process can still serve: no device is lost, which only a restart cures.
    pub(super) fn is_live(&self) -> bool {
        !self.engine.has_lost_a_device()
    }

    /// Whether the server takes requests: models loaded and warm, no shutdown under way, no device lost.
    pub(super) fn status(&self) -> HealthStatus {
        if self.stopping.is_cancelled() {
            HealthStatus::Draining
        } else if !self.is_live() {
            HealthStatus::DeviceLost
        } else if self.experiments.trouble().is_some_and(|trouble| trouble.damaged) {
            HealthStatus::ExperimentsLost
        } else if self.registry.ready() {
            HealthStatus::Ok
        } else {
            HealthStatus::Loading
        }
    }
}

/// Whether the server takes requests.
#[utoipa::path(get, path = "/health", tag = "operations", responses(
    (status = 200, description = "It does", body = Health),
    (status = 503, description = "Models are being loaded, the server is shutting down, a device answers nothing any more until the server is started anew, or the database of experiments is damaged", body = Health),
))]
pub(super) async fn health(State(app): State<App>) -> Response {
    let status = app.status();
    let models = app.registry.list();
    let ready = |(_, state): &&(String, ModelState)| matches!(state, ModelState::Ready(_));
    let code = match status {
        HealthStatus::Ok => StatusCode::OK,
        HealthStatus::Loading
        | HealthStatus::Draining
        | HealthStatus::DeviceLost
        | HealthStatus::ExperimentsLost => StatusCode::SERVICE_UNAVAILABLE,
    };
    let body = Health {
        status,
        models_ready: models.iter().filter(ready).count(),
        models_total: models.len(),
        experiments: app.experiments.trouble().map(|trouble| trouble.problem),
    };
    (code, Json(body)).into_response()
}

/// Metrics in Prometheus' text format.
#[utoipa::path(get, path = "/metrics", tag = "operations", responses(
    (status = 200, description = "The metrics", body = String, content_type = "text/plain"),
))]
pub(super) async fn metrics(State(app): State<App>) -> Result<Response, Problem> {
    app.metrics.backlog.set(app.engine.predicted_drain().as_secs_f64());
    let text = app.metrics.encode().map_err(Problem::internal)?;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response())
}
