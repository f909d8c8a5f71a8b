//! gRPC, on the port of everything else: the Open Inference Protocol and gRPC's health checks. A method is a route, so
//! limits, keys, counts and the log are those of HTTP, and what went wrong becomes a status of gRPC where it becomes one
//! of HTTP (`error.rs`).

mod call;
mod health;
mod inference;
pub(super) mod methods;
mod repository;
pub(super) mod status;
pub(super) mod timeout;
mod weight;
mod wire;

use axum::{Router, routing::post};

use super::App;

/// Every method.
pub(super) fn routes() -> Router<App> {
    Router::new()
        .route(methods::SERVER_LIVE, post(inference::server_live))
        .route(methods::SERVER_READY, post(inference::server_ready))
        .route(methods::MODEL_READY, post(inference::model_ready))
        .route(methods::SERVER_METADATA, post(inference::metadata))
        .route(methods::MODEL_METADATA, post(inference::metadata_of_model))
        .route(methods::MODEL_INFER, post(inference::infer))
        .route(methods::INDEX, post(repository::index))
        .route(methods::LOAD, post(repository::load))
        .route(methods::UNLOAD, post(repository::unload))
        .route(methods::HEALTH, post(health::check))
}
