//! Models: listed, loaded, unloaded.

use futures_util::FutureExt;
use serde_json::{Value, json};

use crate::server::{CLASSES, PLAIN, Server, write_model};

#[tokio::test(flavor = "multi_thread")]
async fn the_list_begins_with_the_default_model() {
    let server = Server::start().await;
    let list = server.get("/v1/models").await.json();
    assert_eq!(list["object"], "list");
    let ids: Vec<_> = list["data"].as_array().unwrap().iter().map(|entry| &entry["id"]).collect();
    assert_eq!(json!(ids), json!([CLASSES, PLAIN]));
    let model = server.get("/v1/models/classes").await.json();
    assert_eq!(model, list["data"][0]);
    assert_eq!(model["object"], "model");
    assert_eq!((&model["role"], &model["ready"]), (&json!("teacher"), &json!(true)));
    assert_eq!(model["num_classes"], 4);
    assert_eq!(
        model["defaults"],
        json!({"num_inference_steps": 2, "scheduler": "ddim", "guidance_scale": 1.0})
    );
    for id in ["nope", "..", "%2e%2e", "%ff", "auto"] {
        assert_eq!(server.get(&format!("/v1/models/{id}")).await.status, 404, "{id}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn models_come_and_go_while_the_server_runs() {
    let server = Server::start().await;
    let load = |id: &str| format!("/v2/repository/models/{id}/load");
    let unload = |id: &str| format!("/v2/repository/models/{id}/unload");

    assert_eq!(server.post(&unload(CLASSES), "").await.status, 200);
    let reply = server.generate(json!({"model": CLASSES})).await;
    assert_eq!((reply.status.as_u16(), &reply.json()["error"]["code"]), (503, &json!("not_ready")));
    let entry = server.get("/v1/models/classes").await.json();
    assert_eq!(entry["ready"], false);
    assert!(entry["reason"].as_str().unwrap().contains("/v2/repository/models/classes/load"));
    assert_eq!(server.get("/v2/models/classes/ready").await.status, 503);
    assert_eq!(server.get("/v2/models/classes").await.status, 503);
    let ready = server.post("/v2/repository/index", "{\"ready\": true}").await.json();
    assert_eq!(ready.as_array().unwrap().len(), 1);

    assert_eq!(server.post(&load(CLASSES), "").await.json()["state"], "READY");
    assert_eq!(server.generate(json!({"model": CLASSES})).await.status, 200);

    // A folder that was not there when the server started, one that is broken, and one that is not there.
    write_model(server.models.path(), "late", 1, None, json!({}));
    assert_eq!(server.post(&load("late"), "{}").await.status, 200);
    assert_eq!(server.generate(json!({"model": "late"})).await.status, 200);
    write_model(server.models.path(), "broken", 1, None, json!({}));
    let weights = server.models.path().join("broken/unet/diffusion_pytorch_model.safetensors");
    std::fs::write(weights, b"short").unwrap();
    let refused = server.post(&load("broken"), "").await;
    assert_eq!(refused.status, 400, "{}", refused.text());
    assert!(refused.text().contains("safetensors"), "{}", refused.text());
    for id in ["nope", "%2e%2e", "..%2fclasses"] {
        assert_eq!(server.post(&load(id), "").await.status, 404, "{id}");
        assert_eq!(server.post(&unload(id), "").await.status, 404, "{id}");
    }
    assert_eq!(server.post("/v2/repository/index", "").await.json().as_array().unwrap().len(), 4);
}

/// On one thread, nothing goes on between two requests that are not waited for.
#[tokio::test(flavor = "current_thread")]
async fn a_load_that_is_abandoned_keeps_its_mark_until_it_is_done() {
    let server = Server::start().await;
    let [load, unload] =
        ["load", "unload"].map(|what| format!("/v2/repository/models/{PLAIN}/{what}"));
    let abandoned = server.post(&load, "").now_or_never();
    assert!(abandoned.is_none(), "it is under way");
    for _ in 0..60 {
        let busy = server.post(&load, "").now_or_never().unwrap();
        assert_eq!(busy.status, 409, "{}", busy.text());
    }
    let unload = server.post(&unload, "").now_or_never().unwrap();
    assert_eq!(unload.status, 409, "{}", unload.text());
    // What served before goes on, and the load comes to its end.
    assert_eq!(
        server.generate(json!({"model": PLAIN, "num_inference_steps": 1})).await.status,
        200
    );
    let mut again = server.post(&load, "").await;
    while again.status == 409 {
        tokio::task::yield_now().await;
        again = server.post(&load, "").await;
    }
    assert_eq!(again.json()["state"], "READY", "{}", again.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn how_far_a_load_is_is_told_while_it_lasts() {
    let server = Server::start().await;
    let entry = format!("/v1/models/{PLAIN}");
    assert_eq!(server.get(&entry).await.json().get("loading"), None, "it serves");
    assert_eq!(server.post(&format!("/v2/repository/models/{PLAIN}/unload"), "").await.status, 200);
    assert_eq!(server.get(&entry).await.json().get("loading"), None, "nobody loads it");

    let path = format!("/v2/repository/models/{PLAIN}/load");
    let load = server.post(&path, "");
    let watch = async {
        let mut seen: Vec<Value> = Vec::new();
        loop {
            let entry = server.get(&entry).await.json();
            if entry["ready"] == true {
                return seen;
            }
            seen.extend(entry.get("loading").cloned());
        }
    };
    let (loaded, seen) = tokio::join!(load, watch);
    assert_eq!(loaded.status, 200, "{}", loaded.text());
    let stages = ["waiting", "reading", "measuring"];
    let place = |loading: &Value| stages.iter().position(|stage| loading["stage"] == *stage);
    assert!(seen.iter().all(|loading| place(loading).is_some()), "{seen:?}");
    assert!(seen.is_sorted_by_key(place), "{seen:?}");
    let measuring: Vec<_> = seen.iter().filter(|loading| place(loading) == Some(2)).collect();
    let last = measuring.last().expect("a measurement takes longer than a look at it");
    assert_eq!(last["budget_seconds"], 4.0);
    let seconds = |loading: &Value| loading["seconds"].as_f64().unwrap();
    assert!(measuring.is_sorted_by(|one, next| seconds(one) <= seconds(next)), "{measuring:?}");
    assert!(seconds(last) > 0.0);
}
