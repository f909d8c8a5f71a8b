//! The inference protocol's model repository over gRPC.

use axum::{
    extract::{Request, State},
    response::Response,
};

use super::{
    super::{
        App,
        error::{Problem, quoted},
        repository::{entries, load_model, unload_model},
    },
    call::{reply, small},
    wire::open_inference::{
        RepositoryIndexRequest, RepositoryIndexResponse, RepositoryModelLoadRequest,
        RepositoryModelLoadResponse, RepositoryModelUnloadRequest, RepositoryModelUnloadResponse,
        repository_index_response::ModelIndex,
    },
};

/// The models of the models folder, and whether they serve.
pub(super) async fn index(State(app): State<App>, request: Request) -> Result<Response, Problem> {
    let RepositoryIndexRequest { repository_name, ready } = small(&app, request).await?;
    if !repository_name.is_empty() {
        let remedy = "there is one repository, without a name; leave it empty";
        return Err(Problem::value("repository_name", quoted(&repository_name), remedy));
    }
    let models = entries(&app, ready).into_iter().map(|entry| ModelIndex {
        name: entry.name,
        version: entry.version.into(),
        state: entry.state.into(),
        reason: entry.reason,
    });
    Ok(reply(&RepositoryIndexResponse { models: models.collect() }))
}

/// Loads a model, or loads it again; answers when it is warm.
pub(super) async fn load(State(app): State<App>, request: Request) -> Result<Response, Problem> {
    let RepositoryModelLoadRequest { repository_name, model_name, parameters } =
        small(&app, request).await?;
    if let Some(name) = parameters.keys().next() {
        let remedy = "a model is loaded as its folder has it; leave the parameters out";
        return Err(Problem::value("parameters", quoted(name), remedy));
    }
    let model_name = named(repository_name, model_name)?;
    load_model(&app, &model_name).await?;
    Ok(reply(&RepositoryModelLoadResponse { model_name, is_loaded: true }))
}

/// Unloads a model; requests in flight finish. No model has others that are unloaded with it, so parameters change nothing.
pub(super) async fn unload(State(app): State<App>, request: Request) -> Result<Response, Problem> {
    let RepositoryModelUnloadRequest { repository_name, model_name, parameters: _ } =
        small(&app, request).await?;
    let model_name = named(repository_name, model_name)?;
    unload_model(&app, &model_name)?;
    Ok(reply(&RepositoryModelUnloadResponse { model_name, is_unloaded: true }))
}

/// The model that is meant: Triton's clients name it in the second field, KServe's in the first.
fn named(repository_name: String, model_name: String) -> Result<String, Problem> {
    match (repository_name.is_empty(), model_name.is_empty()) {
        (_, true) => Ok(repository_name),
        (true, false) => Ok(model_name),
        (false, false) => {
            let remedy = "there is one repository, without a name; leave it empty";
            Err(Problem::value("repository_name", quoted(&repository_name), remedy))
        }
    }
}
