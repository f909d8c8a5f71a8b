//! The committed OpenAPI document is the server's.

use axum::{body::Body, http::Request};
use serde_json::Value;

use crate::edits::{BOUNDARY, form, picture};
use crate::server::Server;

#[tokio::test(flavor = "multi_thread")]
async fn the_committed_document_is_the_one_that_is_served() {
    let server = Server::start().await;
    let committed = include_str!("../../openapi/openapi.json");
    let served = server.get("/openapi.json").await;
    assert!(
        served.text() == committed,
        "openapi/openapi.json is out of date: cargo run -- openapi > openapi/openapi.json"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn operations_have_names_of_their_own() {
    let document: Value = serde_json::from_str(understudy::http::openapi_json()).unwrap();
    let paths = document["paths"].as_object().unwrap();
    let operations = paths.values().flat_map(|path| path.as_object().unwrap().values());
    let mut names: Vec<_> =
        operations.map(|operation| operation["operationId"].as_str().unwrap()).collect();
    names.sort_unstable();
    let count = names.len();
    names.dedup();
    assert_eq!(names.len(), count);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_documentation_page_needs_nothing_from_elsewhere() {
    let server = Server::start().await;
    let page = server.get("/docs/").await;
    assert_eq!(page.status, 200);
    assert!(
        !page.text().contains("http://") && !page.text().contains("https://"),
        "{}",
        page.text()
    );
    for file in ["swagger-ui.css", "swagger-ui-bundle.js", "swagger-initializer.js"] {
        assert_eq!(server.get(&format!("/docs/{file}")).await.status, 200, "{file}");
    }
}

/// What Swagger UI fills in is what a server takes: every operation, in an order in which each can succeed, with the
/// examples of its path and body.
#[tokio::test(flavor = "multi_thread")]
async fn every_operation_takes_its_own_examples() {
    const OPERATIONS: [(&str, u16); 33] = [
        ("start_page", 200),
        ("health", 200),
        ("metrics", 200),
        ("specification", 200),
        ("generate", 200),
        ("edit", 200),
        ("txt2img", 200),
        ("img2img", 200),
        ("models", 200),
        ("samplers", 200),
        ("webui_loras", 200),
        ("progress", 200),
        ("options", 200),
        ("set_options", 200),
        ("compare", 200),
        ("create_experiment", 201),
        ("list_experiments", 200),
        ("show_experiment", 200),
        ("change_experiment", 200),
        ("make_pair", 200),
        ("vote", 201),
        ("delete_experiment", 204),
        ("list", 200),
        ("show", 200),
        ("server", 200),
        ("live", 200),
        ("ready", 200),
        ("metadata", 200),
        ("infer", 200),
        ("model_ready", 200),
        ("repository_index", 200),
        ("load", 200),
        ("unload", 200),
    ];
    let document: Value = serde_json::from_str(understudy::http::openapi_json()).unwrap();
    let server = Server::bundled().await;
    let mut operations = std::collections::BTreeMap::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            let name = operation["operationId"].as_str().unwrap();
            operations.insert(name, (method.to_uppercase(), path.as_str(), operation));
        }
    }
    let mut pair_id = Value::Null;
    for (name, status) in OPERATIONS {
        let (method, path, operation) = operations.remove(name).unwrap();
        let mut path = path.to_owned();
        for parameter in operation["parameters"].as_array().unwrap_or(&Vec::new()) {
            if parameter["in"] == "path" {
                let place = format!("{{{}}}", parameter["name"].as_str().unwrap());
                path = path.replace(&place, parameter["example"].as_str().unwrap());
            }
        }
        let mut request = Request::builder().method(&*method).uri(&path);
        let mut body = Body::empty();
        if operation.get("requestBody").is_some() {
            let content = operation["requestBody"]["content"].as_object().unwrap();
            let (kind, described) = content.iter().next().unwrap();
            let mut example = described["example"].clone();
            assert!(example.is_object(), "{name} has no example");
            // The one value that a server makes up.
            if let Some(made_up) = example.get_mut("pair_id") {
                *made_up = pair_id.take();
            }
            // Nothing but the path names a model, and nothing a class, so other servers take them as well.
            for field in ["model", "models", "prompt", "class_label"] {
                assert!(!example.to_string().contains(&format!("\"{field}\"")), "{name}: {field}");
            }
            if kind == "multipart/form-data" {
                let fields = example.as_object().unwrap().iter();
                let fields: Vec<_> =
                    fields.map(|(name, value)| (name, value.to_string())).collect();
                let fields: Vec<_> =
                    fields.iter().map(|(name, it)| (name.as_str(), &**it)).collect();
                let kind = format!("multipart/form-data; boundary={BOUNDARY}");
                request = request.header("content-type", kind);
                body = Body::from(form(&fields, &[("image", &picture(32, 32, 1))]));
            } else {
                request = request.header("content-type", "application/json");
                body = Body::from(example.to_string());
            }
        }
        let reply = server.send(request.body(body).unwrap()).await;
        assert_eq!(reply.status, status, "{name}: {}", reply.text());
        if name == "make_pair" {
            pair_id = reply.json()["pair_id"].clone();
        }
    }
    assert!(operations.is_empty(), "not sent: {:?}", operations.keys());
}
