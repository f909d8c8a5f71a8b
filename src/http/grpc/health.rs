//! gRPC's health checking protocol.

use axum::{
    extract::{Request, State},
    http::StatusCode,
    response::Response,
};

use super::{
    super::{
        App,
        error::{Problem, quoted},
        wire::HealthStatus,
    },
    call::{reply, small},
    wire::health::{HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus},
};

/// The services that are offered, and the server as a whole.
const SERVICES: [&str; 3] = ["", "inference.GRPCInferenceService", "grpc.health.v1.Health"];

/// Whether the server takes requests.
pub(super) async fn check(State(app): State<App>, request: Request) -> Result<Response, Problem> {
    let HealthCheckRequest { service } = small(&app, request).await?;
    if !SERVICES.contains(&service.as_str()) {
        let message = format!(
            "`service` is {}: there is no such service; leave it empty to ask for the server",
            quoted(&service)
        );
        return Err(Problem::new(StatusCode::NOT_FOUND, "service_not_found", message));
    }
    let status = match app.status() {
        HealthStatus::Ok => ServingStatus::Serving,
        _ => ServingStatus::NotServing,
    };
    Ok(reply(&HealthCheckResponse { status: status.into() }))
}
