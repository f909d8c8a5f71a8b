//! Bodies of the Open Inference Protocol v2. As the protocol says, unknown members are ignored.

use std::fmt;

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{SeqAccess, Visitor},
};
use utoipa::ToSchema;

use crate::http::body::JsonRequest;

/// An error, in the protocol's shape.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct InferenceError {
    /// Names the field, its value, the limit and the remedy.
    pub(in crate::http) error: String,
}

/// The server, and which extensions of the protocol it speaks.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct ServerMetadata {
    pub(in crate::http) name: &'static str,
    pub(in crate::http) version: &'static str,
    pub(in crate::http) extensions: Vec<&'static str>,
}

/// The process answers.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct Live {
    pub(in crate::http) live: bool,
}

/// Whether all models are warm and no shutdown is under way.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct ServerReady {
    pub(in crate::http) ready: bool,
}

/// Whether a model serves.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct ModelReady {
    pub(in crate::http) name: String,
    pub(in crate::http) ready: bool,
}

/// A network's inputs and outputs.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct ModelMetadata {
    pub(in crate::http) name: String,
    pub(in crate::http) versions: Vec<&'static str>,
    pub(in crate::http) platform: &'static str,
    pub(in crate::http) inputs: Vec<ArrayMetadata>,
    pub(in crate::http) outputs: Vec<ArrayMetadata>,
}

/// An input's or output's name, type and shape; −1 stands for any number of rows.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(in crate::http) struct ArrayMetadata {
    pub(in crate::http) name: &'static str,
    pub(in crate::http) datatype: &'static str,
    pub(in crate::http) shape: Vec<i64>,
}

/// One raw evaluation of a network.
#[derive(Debug, Deserialize, ToSchema)]
pub(in crate::http) struct InferenceRequest {
    /// Comes back in the reply.
    pub(in crate::http) id: Option<String>,
    /// How the reply is written.
    pub(in crate::http) parameters: Option<RequestParameters>,
    /// As `GET /v2/models/{model}` lists them: `sample`, `timestep`, and what else the network needs of `class_labels`,
    /// `encoder_hidden_states`, `text_embeds`, `time_ids` and `guidance_scale`.
    pub(in crate::http) inputs: Vec<InferInput>,
    /// Which outputs, and how; all of them when absent.
    pub(in crate::http) outputs: Option<Vec<RequestedOutput>>,
}

impl JsonRequest for InferenceRequest {
    fn takes(field: &str) -> &'static str {
        match field {
            "inputs" => "a list of objects with `name`, `datatype`, `shape` and `data`",
            "outputs" => "a list of objects with `name`",
            "parameters" => "an object",
            _ => "a string",
        }
    }
}

/// How the reply is written.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(in crate::http) struct RequestParameters {
    /// Outputs in binary unless they say otherwise.
    pub(in crate::http) binary_data_output: Option<bool>,
}

/// One input.
#[derive(Debug, Deserialize, ToSchema)]
pub(in crate::http) struct InferInput {
    /// One of those that `GET /v2/models/{model}` lists, such as `sample`.
    pub(in crate::http) name: String,
    /// `FP32` or `INT64`.
    pub(in crate::http) datatype: String,
    /// Rows first.
    #[schema(value_type = Vec<u64>)]
    pub(in crate::http) shape: Vec<i64>,
    /// The elements in row-major order, nested or flat; absent with `binary_data_size`.
    #[schema(value_type = Option<Vec<serde_json::Value>>)]
    pub(in crate::http) data: Option<Elements>,
    /// Where the elements are.
    pub(in crate::http) parameters: Option<InputParameters>,
}

/// Where an input's elements are.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(in crate::http) struct InputParameters {
    /// Bytes of this input after the JSON, little-endian.
    pub(in crate::http) binary_data_size: Option<u64>,
}

/// An output that is asked for.
#[derive(Debug, Deserialize, ToSchema)]
pub(in crate::http) struct RequestedOutput {
    /// `noise_pred`.
    pub(in crate::http) name: String,
    /// How it is written.
    pub(in crate::http) parameters: Option<OutputParameters>,
}

/// How an output is written.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(in crate::http) struct OutputParameters {
    /// In binary after the JSON.
    pub(in crate::http) binary_data: Option<bool>,
}

/// The answer.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct InferenceReply {
    pub(in crate::http) model_name: String,
    pub(in crate::http) model_version: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::http) id: Option<String>,
    pub(in crate::http) outputs: Vec<InferOutput>,
}

/// One output.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct InferOutput {
    pub(in crate::http) name: &'static str,
    pub(in crate::http) datatype: &'static str,
    pub(in crate::http) shape: Vec<usize>,
    /// Row-major and flat; absent in binary.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::http) data: Option<Vec<f32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::http) parameters: Option<BinarySize>,
}

/// How many bytes after the JSON an output has.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct BinarySize {
    pub(in crate::http) binary_data_size: usize,
}

/// A model of the repository.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct RepositoryEntry {
    pub(in crate::http) name: String,
    pub(in crate::http) version: &'static str,
    /// `READY`, `LOADING` or `UNAVAILABLE`.
    pub(in crate::http) state: &'static str,
    /// Why it is not ready.
    pub(in crate::http) reason: String,
}

/// Which models to list.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(in crate::http) struct RepositoryIndexRequest {
    /// Only those that serve.
    pub(in crate::http) ready: Option<bool>,
}

impl JsonRequest for RepositoryIndexRequest {
    fn takes(_: &str) -> &'static str {
        "true or false"
    }
}

/// Numbers from arbitrarily nested lists, flattened and rounded while they are read: a tree of JSON values would
/// take many times the memory.
#[derive(Debug, Clone, Default, PartialEq)]
pub(in crate::http) struct Elements {
    /// In the order of the text.
    pub(in crate::http) values: Vec<f32>,
    /// The first that is not whole.
    pub(in crate::http) broken: Option<f64>,
}

impl Elements {
    fn push(&mut self, number: f64) {
        if number.fract() != 0.0 {
            self.broken.get_or_insert(number);
        }
        self.values.push(number as f32);
    }
}

impl<'de> Deserialize<'de> for Elements {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut elements = Self::default();
        Flatten(&mut elements).deserialize_into(deserializer)?;
        Ok(elements)
    }
}

struct Flatten<'a>(&'a mut Elements);

impl Flatten<'_> {
    fn deserialize_into<'de, D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> serde::de::DeserializeSeed<'de> for Flatten<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        self.deserialize_into(deserializer)
    }
}

impl<'de> Visitor<'de> for Flatten<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a number or a list of numbers")
    }

    fn visit_f64<E>(self, number: f64) -> Result<(), E> {
        self.0.push(number);
        Ok(())
    }

    fn visit_i64<E>(self, number: i64) -> Result<(), E> {
        self.0.push(number as f64);
        Ok(())
    }

    fn visit_u64<E>(self, number: u64) -> Result<(), E> {
        self.0.push(number as f64);
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while list.next_element_seed(Flatten(self.0))?.is_some() {}
        Ok(())
    }
}
