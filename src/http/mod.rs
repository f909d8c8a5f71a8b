//! HTTP: what is where, and what every request goes through.

mod accept;
mod access;
mod app;
mod auth;
mod body;
mod caller;
mod compare;
mod comparison;
mod complaint;
mod connections;
mod docs;
mod edits;
mod encode;
mod error;
mod exchange;
mod experiments;
mod generate;
mod grpc;
mod health;
mod images;
mod infer_input;
mod inference;
mod models;
mod observe;
mod operation;
mod page;
mod pair;
mod parameters;
mod picture;
mod protocol;
mod repetition;
mod repository;
mod request_span;
mod rollout;
mod route;
mod run;
mod run_span;
mod serve;
mod shadow;
mod single;
mod socket;
mod stream;
mod timings;
mod votes;
mod webui;
mod wire;

use std::sync::Arc;

use axum::{Router, middleware};
use tower::util::option_layer;
use tower_http::catch_panic::CatchPanicLayer;
use utoipa_axum::{router::OpenApiRouter, routes};

pub use access::{Host, Origin};
pub use app::{App, Settings};
pub use connections::most_connections;
pub use docs::openapi_json;
pub use serve::{Shutdown, serve};

/// Every route, with its documentation.
fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::with_openapi(docs::base())
        .routes(routes!(images::generate))
        .routes(routes!(edits::edit))
        .routes(routes!(compare::compare))
        .routes(routes!(experiments::list, experiments::create))
        .routes(routes!(experiments::show, experiments::change, experiments::delete))
        .routes(routes!(votes::pair))
        .routes(routes!(votes::vote))
        .routes(routes!(models::list))
        .routes(routes!(models::show))
        .routes(routes!(inference::server))
        .routes(routes!(inference::live))
        .routes(routes!(inference::ready))
        .routes(routes!(inference::metadata))
        .routes(routes!(inference::model_ready))
        .routes(routes!(inference::infer))
        .routes(routes!(repository::index))
        .routes(routes!(repository::load))
        .routes(routes!(repository::unload))
        .routes(routes!(webui::txt2img))
        .routes(routes!(webui::img2img))
        .routes(routes!(webui::models))
        .routes(routes!(webui::samplers))
        .routes(routes!(webui::lora_list))
        .routes(routes!(webui::progress))
        .routes(routes!(webui::options, webui::set_options))
        .routes(routes!(health::health))
        .routes(routes!(health::metrics))
        .routes(routes!(docs::specification))
        .routes(routes!(page::index))
}

/// The whole application. Layers run from the last to the first.
pub fn router(app: App) -> Router {
    let (router, _) = routes().split_for_parts();
    let metrics = Arc::clone(&app.metrics);
    let policy = Arc::new(access::Policy::new(&app.settings));
    router
        .merge(docs::swagger_ui())
        .merge(page::parts())
        .merge(inference::versions())
        .merge(grpc::routes())
        .fallback(error::not_found)
        .method_not_allowed_fallback(error::method_not_allowed)
        .layer(middleware::from_fn_with_state(app.clone(), observe::timeout))
        .layer(middleware::from_fn(operation::check_media_type))
        .layer(middleware::from_fn_with_state(app.clone(), auth::check))
        .layer(CatchPanicLayer::custom(move |panic| observe::panicked(&metrics, panic)))
        .layer(option_layer(policy.cors()))
        .layer(middleware::from_fn(connections::check_room))
        .layer(middleware::from_fn_with_state(policy, access::check))
        .layer(middleware::from_fn(error::render))
        .layer(middleware::from_fn_with_state(app.clone(), observe::observe))
        .with_state(app)
}
