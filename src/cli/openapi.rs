//! `understudy openapi`: the document behind `openapi/openapi.json`.

use std::io::Write;

/// Prints the OpenAPI document.
pub(super) fn run() -> Result<(), String> {
    std::io::stdout()
        .write_all(crate::http::openapi_json().as_bytes())
        .map_err(|error| format!("the document could not be written: {error}"))
}
