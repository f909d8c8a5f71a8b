//! The API's description: the OpenAPI document and Swagger UI.

use std::sync::LazyLock;

use axum::{
    Router,
    http::header,
    response::{IntoResponse, Response},
};
use utoipa::{
    Modify, OpenApi, PartialSchema,
    openapi::{
        ContentBuilder, Header, Ref, RefOr, ResponseBuilder, SecurityRequirement,
        security::{HttpAuthScheme, HttpBuilder, SecurityScheme},
    },
};
use utoipa_swagger_ui::{Config, SwaggerUi};

use super::{App, operation};

/// What the routes add themselves to.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Understudy",
        description = "Serves a diffusion model, and the faster student distilled from it, over HTTP."
    ),
    servers((url = "/")),
    tags(
        (name = "images", description = "Images, in OpenAI's shape"),
        (name = "experiments", description = "Traffic split between models, and blind votes on their images"),
        (name = "models", description = "What there is to serve"),
        (name = "inference", description = "Raw network evaluations: the Open Inference Protocol v2"),
        (name = "repository", description = "Loading and unloading while requests run"),
        (name = "operations", description = "Health, metrics, documentation"),
    ),
    modifiers(&Keys)
)]
struct Base;

/// Keys are optional: whether they are asked for is the operator's decision.
struct Keys;

impl Modify for Keys {
    fn modify(&self, openapi: &mut utoipa::openapi::OpenApi) {
        let bearer = || HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
        let components = openapi.components.get_or_insert_default();
        components.add_security_scheme("api_key", SecurityScheme::Http(bearer()));
        components.add_security_scheme(operation::ADMIN_KEY, SecurityScheme::Http(bearer()));
        openapi.security = Some(vec![
            SecurityRequirement::default(),
            SecurityRequirement::new("api_key", Vec::<String>::new()),
        ]);
    }
}

pub(super) fn base() -> utoipa::openapi::OpenApi {
    Base::openapi()
}

static DOCUMENT: LazyLock<String> = LazyLock::new(|| {
    let mut document = super::routes().into_openapi();
    add_common_responses(&mut document);
    let mut document = document.to_pretty_json().unwrap_or_default();
    document.push('\n');
    document
});

/// What any route may answer whatever it does, and what only those of the two APIs may.
fn add_common_responses(document: &mut utoipa::openapi::OpenApi) {
    const FORBIDDEN: (&str, &str) = (
        "403",
        "Not for this page (--cors-allow-origin), host (--allowed-host) or key (--admin-key)",
    );
    const OF_APIS: [(&str, &str); 3] = [
        ("401", "No valid key, where the server asks for one"),
        ("500", "The server's fault"),
        ("504", "Out of time"),
    ];
    const OF_CHANGES: [(&str, &str); 1] = [("415", "Declared as what it does not take")];
    const OF_BODIES: [(&str, &str); 4] = [
        ("400", "A value that cannot be honoured"),
        ("408", "The body stopped coming"),
        ("413", "The body is too large"),
        ("429", "No memory for the body until others have been read"),
    ];
    for (path, item) in &mut document.paths.paths {
        let webui = path.starts_with("/sdapi/");
        let error = Ref::from_schema_name(if path.starts_with("/v2") {
            "InferenceError"
        } else if webui {
            "WebuiError"
        } else {
            "ErrorReply"
        });
        let response = |description: &str| {
            let content = ContentBuilder::new().schema(Some(error.clone())).build();
            let response = ResponseBuilder::new().description(description);
            response.content("application/json", content).build()
        };
        let of_apis: &[_] = if path.starts_with("/v") || webui { &OF_APIS } else { &[] };
        let changes = [&mut item.post, &mut item.patch, &mut item.delete].into_iter().flatten();
        for operation in changes {
            let of_bodies: &[_] = if operation.request_body.is_some() { &OF_BODIES } else { &[] };
            for (code, description) in OF_CHANGES.iter().chain(of_bodies) {
                let responses = &mut operation.responses.responses;
                let described = responses.entry((*code).to_owned());
                described.or_insert_with(|| response(description).into());
            }
        }
        let operations = [&mut item.get, &mut item.post, &mut item.patch, &mut item.delete];
        for operation in operations.into_iter().flatten() {
            for (code, description) in std::iter::once(&FORBIDDEN).chain(of_apis) {
                let responses = &mut operation.responses.responses;
                responses.insert((*code).to_owned(), response(description).into());
            }
            if let Some(RefOr::T(busy)) = operation.responses.responses.get_mut("429") {
                let mut after = Header::new(u64::schema());
                after.description = Some("Seconds until there is room".to_owned());
                busy.headers.insert("retry-after".to_owned(), after.into());
            }
        }
    }
}

/// The OpenAPI document, the same as `openapi/openapi.json`.
pub fn openapi_json() -> &'static str {
    &DOCUMENT
}

/// The OpenAPI document of this server.
#[utoipa::path(get, path = "/openapi.json", tag = "operations", responses(
    (status = 200, description = "The document", content_type = "application/json", body = Object),
))]
pub(super) async fn specification() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], openapi_json()).into_response()
}

/// Swagger UI under `/docs`, from files in the binary.
pub(super) fn swagger_ui() -> Router<App> {
    // No validator: it would send the document's address to a public service.
    let config = Config::from("/openapi.json").validator_url("none").try_it_out_enabled(true);
    SwaggerUi::new("/docs").config(config).into()
}
