//! The Open Inference Protocol, in both encodings.

use axum::{body::Body, http::Request};
use serde_json::{Value, json};

use crate::server::{CLASSES, PLAIN, Server};

const ELEMENTS: usize = 64;

fn body(rows: usize) -> Value {
    let sample: Vec<f32> = (0..rows * ELEMENTS).map(|i| i as f32 / 64.0 - 1.0).collect();
    json!({
        "id": "7",
        "unknown": "ignored",
        "inputs": [
            {"name": "sample", "datatype": "FP32", "shape": [rows, 1, 8, 8], "data": sample},
            {"name": "timestep", "datatype": "INT64", "shape": [rows], "data": vec![500; rows]},
            {"name": "class_labels", "datatype": "INT64", "shape": [rows], "data": vec![1; rows]},
        ],
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn the_one_version_of_a_model_is_the_model() {
    let server = Server::start().await;
    let ask = async |path: &str| server.post(path, body(2).to_string()).await;
    let plain = ask(&format!("/v2/models/{CLASSES}/infer")).await;
    let versioned = ask(&format!("/v2/models/{CLASSES}/versions/1/infer")).await;
    assert!(plain.status == 200 && versioned.status == 200);
    assert_eq!(plain.json(), versioned.json());
    assert_eq!(ask(&format!("/v2/models/{CLASSES}/versions/2/infer")).await.status, 404);
}

async fn infer(server: &Server, body: &Value) -> crate::server::Reply {
    server.post(&format!("/v2/models/{CLASSES}/infer"), body.to_string()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn metadata_says_what_goes_in_and_out() {
    let server = Server::start().await;
    let metadata = server.get(&format!("/v2/models/{CLASSES}")).await.json();
    let shapes: Vec<_> =
        metadata["inputs"].as_array().unwrap().iter().map(|i| &i["shape"]).collect();
    assert_eq!(json!(shapes), json!([[-1, 1, 8, 8], [-1], [-1]]));
    assert_eq!(metadata["outputs"][0]["name"], "noise_pred");
    let plain = server.get(&format!("/v2/models/{PLAIN}")).await.json();
    assert_eq!(plain["inputs"].as_array().unwrap().len(), 2);
    assert_eq!(server.get("/v2/health/ready").await.json()["ready"], true);
    assert_eq!(server.get("/v2/health/live").await.json()["live"], true);
    // The protocol's paths with a version, of which there is one.
    let versioned = server.get(&format!("/v2/models/{CLASSES}/versions/1")).await.json();
    assert_eq!(versioned, metadata);
    let ready = server.get(&format!("/v2/models/{PLAIN}/versions/1/ready")).await;
    assert_eq!(ready.json()["ready"], true);
    let unknown = server.get(&format!("/v2/models/{PLAIN}/versions/2/ready")).await;
    assert_eq!(unknown.status, 404);
    assert!(unknown.json()["error"].as_str().unwrap().contains("it has one, 1"));
    assert_eq!(server.get(&format!("/v2/models/{PLAIN}/ready")).await.json()["ready"], true);
}

#[tokio::test(flavor = "multi_thread")]
async fn json_and_binary_agree() {
    let server = Server::start().await;
    let json_request = body(3);
    let reply = infer(&server, &json_request).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    let output = &reply.json()["outputs"][0];
    assert_eq!((&reply.json()["id"], &output["shape"]), (&json!("7"), &json!([3, 1, 8, 8])));
    let from_json: Vec<f32> = serde_json::from_value(output["data"].clone()).unwrap();
    assert_eq!(from_json.len(), 3 * ELEMENTS);

    // Nested data is the same data.
    let mut nested = json_request.clone();
    nested["inputs"][1]["data"] = json!([[500], [500], [500]]);
    assert_eq!(infer(&server, &nested).await.json()["outputs"][0]["data"], output["data"]);

    let mut head = json_request.clone();
    let mut binary = Vec::new();
    for input in head["inputs"].as_array_mut().unwrap() {
        let data = input.as_object_mut().unwrap().remove("data").unwrap();
        let before = binary.len();
        for number in data.as_array().unwrap() {
            match input["datatype"].as_str().unwrap() {
                "FP32" => binary.extend((number.as_f64().unwrap() as f32).to_le_bytes()),
                _ => binary.extend(number.as_i64().unwrap().to_le_bytes()),
            }
        }
        input["parameters"] = json!({"binary_data_size": binary.len() - before});
    }
    head["parameters"] = json!({"binary_data_output": true});
    let head = head.to_string().into_bytes();
    let send = |length: usize, bytes: Vec<u8>| {
        Request::post(format!("/v2/models/{CLASSES}/infer"))
            .header("inference-header-content-length", length)
            .body(Body::from(bytes))
            .unwrap()
    };
    let reply = server.send(send(head.len(), [head.clone(), binary.clone()].concat())).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    let split: usize = reply.header("inference-header-content-length").parse().unwrap();
    let (reply_head, reply_binary) = reply.body.split_at(split);
    let reply_head: Value = serde_json::from_slice(reply_head).unwrap();
    let size = &reply_head["outputs"][0]["parameters"]["binary_data_size"];
    assert_eq!(size, &json!(reply_binary.len()));
    let from_binary: Vec<f32> = reply_binary
        .chunks_exact(4)
        .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
        .collect();
    assert_eq!(from_binary, from_json);

    // Too little, too much, and a head that is longer than the body.
    let short = [head.clone(), binary[1..].to_vec()].concat();
    assert_eq!(server.send(send(head.len(), short)).await.status, 400);
    let long = [head.clone(), binary.clone(), vec![0]].concat();
    assert_eq!(server.send(send(head.len(), long)).await.status, 400);
    assert_eq!(server.send(send(head.len() + 1, head)).await.status, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_inputs_are_refused_by_name() {
    let server = Server::start().await;
    let cases: &[(&str, Value, &str)] = &[
        ("/inputs/0/name", json!("latent"), "latent"),
        ("/inputs/1/name", json!("sample"), "sample"),
        ("/inputs/0/shape", json!([1, 1, 8, 9]), "sample.shape"),
        ("/inputs/0/shape", json!([1, 64]), "sample.shape"),
        ("/inputs/0/shape", json!([i64::MAX, 1, 8, 8]), "1 to 8"),
        ("/inputs/0/shape", json!([0, 1, 8, 8]), "1 to 8"),
        ("/inputs/1/shape", json!([2]), "1 rows"),
        ("/inputs/0/datatype", json!("FP64"), "FP32"),
        ("/inputs/0/data", json!([1.0]), "64"),
        ("/inputs/0/data", json!("text"), "inputs[0].data"),
        ("/inputs/0/data/5", json!(1e300), "finite"),
        ("/inputs/1/data", json!([0.5]), "whole"),
        ("/inputs/2/data", json!([4]), "0 to 3"),
        ("/inputs/2/data", json!([-1]), "0 to 3"),
        ("/inputs", json!([]), "missing"),
        ("/inputs", json!(3), "inputs"),
        ("/inputs/0/parameters", json!({"binary_data_size": 256}), "both"),
        ("/outputs", json!([{"name": "other"}]), "noise_pred"),
    ];
    for (place, value, part) in cases {
        let mut request = body(1);
        request["inputs"][0]["parameters"] = Value::Null;
        request["outputs"] = Value::Null;
        *request.pointer_mut(place).unwrap() = value.clone();
        let reply = infer(&server, &request).await;
        assert_eq!(reply.status, 400, "{place} {value}: {}", reply.text());
        let message = reply.json()["error"].as_str().unwrap().to_owned();
        assert!(message.contains(part), "{place} {value}: {message:?} lacks {part:?}");
    }
    let too_many = infer(&server, &body(9)).await;
    assert_eq!(too_many.status, 400, "{}", too_many.text());
    assert_eq!(server.post("/v2/models/nope/infer", "{}").await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_not_finite_says_so() {
    let server = Server::start().await;
    let mut request = body(1);
    request["inputs"][0]["data"] = json!(vec![3e38; ELEMENTS]);
    let reply = infer(&server, &request).await;
    assert_eq!(reply.status, 400, "{}", reply.text());
    assert!(reply.text().contains("not finite"), "{}", reply.text());
    assert_eq!(infer(&server, &body(1)).await.status, 200);
}

/// What is large is parsed on another thread, with the same result.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_body_is_evaluated_like_a_small_one() {
    let server = Server::start().await;
    let sample: Vec<f64> = (0..64).map(|i| f64::from(i) / 64.0).collect();
    let body = json!({"inputs": [
        {"name": "sample", "datatype": "FP32", "shape": [1, 1, 8, 8], "data": sample},
        {"name": "timestep", "datatype": "INT64", "shape": [1], "data": [7]},
        {"name": "class_labels", "datatype": "INT64", "shape": [1], "data": [2]},
    ]});
    let path = "/v2/models/classes/infer";
    let small = server.post(path, body.to_string()).await;
    assert_eq!(small.status, 200, "{}", small.text());
    let large = server.post(path, format!("{}{body}", " ".repeat(1 << 20))).await;
    assert_eq!(large.text(), small.text());
    let broken =
        json!({"inputs": [{"name": "timestep", "datatype": "INT64", "shape": [1], "data": [0.5]}]});
    let refused = server.post(path, format!("{}{broken}", " ".repeat(1 << 20))).await;
    assert_eq!(refused.status, 400);
    assert!(
        refused.text().contains("0.5") && refused.text().contains("whole"),
        "{}",
        refused.text()
    );
}
