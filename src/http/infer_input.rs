//! From the inference protocol's arrays to the engine's request: every name, type, shape, size and
//! value is checked here, and nothing after it.

use std::{collections::BTreeMap, sync::Arc};

use axum::body::Bytes;
use understudy_models::Conditioning;

use super::{
    error::{Problem, quoted, shown},
    wire::{ArrayMetadata, Elements, InferInput},
};
use crate::{engine::InferRequest, registry::Model};

const CLASS_LABELS: &str = "class_labels";
/// What a text encoder pools, and the sizes beside it.
const TEXT_EMBEDS: &str = "text_embeds";
const TIME_IDS: &str = "time_ids";
/// The hidden states of a text encoder.
const HIDDEN_STATES: &str = "encoder_hidden_states";

/// A network's one output.
pub(super) const OUTPUT: &str = "noise_pred";

/// How far a network that is told so leads away from the empty prompt.
const GUIDANCE_SCALE: &str = "guidance_scale";

/// The inputs of a network.
pub(super) fn inputs(model: &Model) -> Vec<ArrayMetadata> {
    let geometry = &model.geometry;
    let sample =
        vec![-1, geometry.in_channels as i64, geometry.height as i64, geometry.width as i64];
    let mut inputs = vec![
        ArrayMetadata { name: "sample", datatype: "FP32", shape: sample },
        ArrayMetadata { name: "timestep", datatype: "INT64", shape: vec![-1] },
    ];
    let vector = |width: usize| vec![-1, width as i64];
    let conditions = match geometry.conditioning {
        Conditioning::None => vec![],
        Conditioning::Classes(_) => vec![(CLASS_LABELS, "INT64", vec![-1])],
        Conditioning::Timestep => vec![(CLASS_LABELS, "FP32", vec![-1])],
        Conditioning::Embedding(width) => vec![(CLASS_LABELS, "FP32", vector(width))],
        Conditioning::TextTime { text, numbers: 0 } => vec![(TEXT_EMBEDS, "FP32", vector(text))],
        Conditioning::TextTime { text, numbers } => {
            vec![(TEXT_EMBEDS, "FP32", vector(text)), (TIME_IDS, "FP32", vector(numbers))]
        }
    };
    let conditions = conditions.into_iter().map(|(name, datatype, shape)| ArrayMetadata {
        name,
        datatype,
        shape,
    });
    inputs.extend(conditions);
    inputs.extend(geometry.prompt.map(|prompt| ArrayMetadata {
        name: HIDDEN_STATES,
        datatype: "FP32",
        shape: vec![-1, prompt.tokens as i64, prompt.width as i64],
    }));
    inputs.extend(geometry.guidance.then(|| ArrayMetadata {
        name: GUIDANCE_SCALE,
        datatype: "FP32",
        shape: vec![-1],
    }));
    inputs
}

/// The outputs of a network.
pub(super) fn outputs(model: &Model) -> Vec<ArrayMetadata> {
    let geometry = &model.geometry;
    let shape =
        vec![-1, geometry.out_channels as i64, geometry.height as i64, geometry.width as i64];
    vec![ArrayMetadata { name: OUTPUT, datatype: "FP32", shape }]
}

/// An input, in whatever form the protocol brought it.
pub(super) struct Input {
    pub(super) name: String,
    pub(super) datatype: String,
    pub(super) shape: Vec<i64>,
    pub(super) contents: Contents,
}

/// An input's elements, row-major.
pub(super) enum Contents {
    Numbers(Elements),
    /// Little-endian, of the input's type.
    Binary(Bytes),
}

/// The inputs of a request in JSON; `binary` is what follows it.
pub(super) fn of_json(given: Vec<InferInput>, mut binary: Bytes) -> Result<Vec<Input>, Problem> {
    let inputs = given.into_iter().map(|InferInput { name, datatype, shape, data, parameters }| {
        let size = parameters.and_then(|parameters| parameters.binary_data_size);
        let contents = match (data, size) {
            (Some(data), None) => Contents::Numbers(data),
            (None, Some(size)) => Contents::Binary(split(&name, size, &mut binary)?),
            (Some(_), Some(_)) => {
                let message = format!("`{name}` has both `data` and `binary_data_size`: send one");
                return Err(Problem::conflict(&name, message));
            }
            (None, None) => {
                let message =
                    format!("`{name}` has neither `data` nor `binary_data_size`: send one");
                return Err(Problem::conflict(&name, message));
            }
        };
        Ok(Input { name, datatype, shape, contents })
    });
    let inputs = inputs.collect::<Result<_, _>>()?;
    if !binary.is_empty() {
        let remedy =
            "no input's `binary_data_size` accounts for them; make the sizes and the body agree";
        let count = format!("{} bytes too long", binary.len());
        return Err(Problem::value("body", count, remedy));
    }
    Ok(inputs)
}

/// The next so many bytes.
fn split(name: &str, size: u64, binary: &mut Bytes) -> Result<Bytes, Problem> {
    if size > binary.len() as u64 {
        let remedy = format!(
            "only {} bytes are left of the body; check Inference-Header-Content-Length and the sizes",
            binary.len()
        );
        return Err(Problem::value(&format!("{name}.binary_data_size"), size, remedy));
    }
    Ok(binary.split_to(size as usize))
}

/// Reads a network's inputs.
pub(super) fn request(
    model: &Arc<Model>,
    given: Vec<Input>,
    max_rows: usize,
) -> Result<InferRequest, Problem> {
    let expected = inputs(model);
    let names: Vec<&str> = expected.iter().map(|input| input.name).collect();
    let names = names.join(", ");
    let mut rows = None;
    let mut values = BTreeMap::new();
    for input in given {
        let Some(expected) = expected.iter().find(|expected| expected.name == input.name) else {
            let remedy = format!("{} takes {names}", model.id);
            return Err(Problem::value("inputs", quoted(&input.name), remedy));
        };
        check_shape(&input, expected, &mut rows, max_rows)?;
        let elements = elements(input, expected)?;
        if values.insert(expected.name, elements).is_some() {
            let remedy = "it is there twice; send it once";
            return Err(Problem::value("inputs", quoted(expected.name), remedy));
        }
    }
    // As for images, it need not be told.
    let guidance_scales = values.remove(GUIDANCE_SCALE).unwrap_or_else(|| {
        let scale = if model.geometry.guidance { model.default_guidance() } else { 1.0 };
        vec![scale as f32; rows.unwrap_or(0) as usize]
    });
    let mut take = |name: &str| {
        values.remove(name).ok_or_else(|| {
            let remedy = format!("{} takes {names}; `{name}` is missing", model.id);
            Problem::value("inputs", "incomplete", remedy)
        })
    };
    let sample = take("sample")?;
    let timesteps = take("timestep")?;
    let mut told = |name: &str| {
        let takes = expected.iter().any(|input| input.name == name);
        takes.then(|| take(name)).transpose()
    };
    let condition = match model.geometry.conditioning {
        Conditioning::TextTime { numbers: 0, .. } => told(TEXT_EMBEDS)?,
        Conditioning::TextTime { text, numbers } => {
            let (texts, sizes) = (told(TEXT_EMBEDS)?, told(TIME_IDS)?);
            Some(side_by_side(
                &texts.unwrap_or_default(),
                text,
                &sizes.unwrap_or_default(),
                numbers,
            ))
        }
        _ => told(CLASS_LABELS)?,
    };
    let prompts = told(HIDDEN_STATES)?.unwrap_or_default();
    if let (Conditioning::Classes(count), Some(classes)) = (model.geometry.conditioning, &condition)
    {
        let outside = classes.iter().find(|class| !(0.0..count as f32).contains(*class));
        if let Some(class) = outside {
            let remedy = format!("{} has the classes 0 to {}", model.id, count - 1);
            return Err(Problem::value("class_labels", class, remedy));
        }
    }
    let model = Arc::clone(model);
    let deadline = None;
    Ok(InferRequest { model, sample, timesteps, prompts, guidance_scales, condition, deadline })
}

/// Rows of two arrays, one after the other in each row.
fn side_by_side(first: &[f32], width: usize, second: &[f32], other: usize) -> Vec<f32> {
    let rows = first.chunks(width).zip(second.chunks(other));
    rows.flat_map(|(first, second)| first.iter().chain(second)).copied().collect()
}

/// The shape must be the expected one, with the same number of rows for all inputs.
fn check_shape(
    input: &Input,
    expected: &ArrayMetadata,
    rows: &mut Option<i64>,
    max_rows: usize,
) -> Result<(), Problem> {
    let name = format!("{}.shape", input.name);
    let fits = input.shape.len() == expected.shape.len()
        && input.shape.iter().zip(&expected.shape).skip(1).all(|(given, wanted)| given == wanted);
    let given = shown(format!("{:?}", input.shape));
    if !fits {
        let remedy = format!("it must be {:?}, with the number of rows for -1", expected.shape);
        return Err(Problem::value(&name, given, remedy));
    }
    let count = input.shape[0];
    if !(1..=max_rows as i64).contains(&count) {
        let remedy = format!("the first number, the rows, must be 1 to {max_rows} (--max-queue)");
        return Err(Problem::value(&name, given, remedy));
    }
    match *rows.get_or_insert(count) {
        rows if rows == count => Ok(()),
        rows => {
            let remedy = format!("the inputs before it have {rows} rows; give all as many");
            Err(Problem::value(&name, given, remedy))
        }
    }
}

/// An input's elements as f32.
fn elements(input: Input, expected: &ArrayMetadata) -> Result<Vec<f32>, Problem> {
    let allowed: &[&str] = match expected.name {
        "timestep" => &["INT64", "FP32"],
        _ => std::slice::from_ref(&expected.datatype),
    };
    if !allowed.contains(&input.datatype.as_str()) {
        let remedy = format!("it must be {}", allowed.join(" or "));
        return Err(Problem::value(
            &format!("{}.datatype", input.name),
            quoted(&input.datatype),
            remedy,
        ));
    }
    let whole = input.datatype == "INT64";
    // The shape has been compared with the network's, so this cannot overflow.
    let count = input.shape.iter().product::<i64>() as usize;
    match input.contents {
        Contents::Numbers(numbers) => from_numbers(&input.name, numbers, count, whole),
        Contents::Binary(bytes) => from_binary(&input.name, &bytes, count, whole),
    }
}

fn from_numbers(
    name: &str,
    Elements { values, broken }: Elements,
    count: usize,
    whole: bool,
) -> Result<Vec<f32>, Problem> {
    if values.len() != count {
        let remedy = format!("its shape asks for {count}");
        return Err(Problem::value(
            &format!("{name}.data"),
            format!("{} elements", values.len()),
            remedy,
        ));
    }
    if let Some(broken) = broken.filter(|_| whole) {
        return Err(Problem::value(name, broken, "INT64 takes whole numbers; send those, or FP32"));
    }
    finite(name, values)
}

fn from_binary(name: &str, bytes: &[u8], count: usize, whole: bool) -> Result<Vec<f32>, Problem> {
    let width = if whole { 8 } else { 4 };
    let needed = count * width;
    if bytes.len() != needed {
        let remedy = format!("its shape asks for {needed}, {width} per element");
        return Err(Problem::value(name, format!("{} bytes of binary", bytes.len()), remedy));
    }
    let values = if whole {
        let (numbers, _) = bytes.as_chunks::<8>();
        numbers.iter().map(|bytes| i64::from_le_bytes(*bytes) as f32).collect()
    } else {
        let (numbers, _) = bytes.as_chunks::<4>();
        numbers.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    };
    finite(name, values)
}

fn finite(name: &str, values: Vec<f32>) -> Result<Vec<f32>, Problem> {
    match values.iter().find(|value| !value.is_finite()) {
        Some(value) => Err(Problem::value(name, value, "it takes finite 32-bit numbers")),
        None => Ok(values),
    }
}
