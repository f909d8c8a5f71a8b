//! `understudy openapi`: the document behind `openapi/openapi.json`.

/// Prints the OpenAPI document.
pub(super) fn run() -> Result<(), String> {
    super::print(crate::http::openapi_json().trim_end())
}
