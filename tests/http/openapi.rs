//! The committed OpenAPI document is the server's.

use serde_json::Value;

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
