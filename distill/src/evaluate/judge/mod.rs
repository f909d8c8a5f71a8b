//! A judge: a small classifier whose features stand in where Inception's weights are not to be had.
//!
//! Convolutions with ReLU, the mean over the last map (the features), a linear layer. A judge is a
//! folder that says itself what it is:
//!
//! ```text
//! config.json          the layers, the classes, its test accuracy, how it was made
//! model.safetensors    conv.I.{weight,bias} as in PyTorch, batch norms folded in; head.{weight,bias}
//! ```

mod norm;
mod train;

use std::{collections::HashMap, path::Path};

use candle_core::{Device, Tensor, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use understudy_models::{
    Error,
    checkpoint::{Draft, read},
    memory,
};

use crate::guard::check_weights;

use super::{
    layers::Convolution,
    network::{FeatureNetwork, Observed},
};
use crate::data::Images;
pub use train::{SIDE, Training, train};

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";

/// What a judge's `config.json` says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JudgeConfig {
    /// The judge's name; its distance is `FD-<name>`.
    pub name: String,
    /// 1 (gray) or 3 (RGB).
    pub channels: usize,
    /// Pixels, top to bottom.
    pub height: usize,
    /// Pixels, left to right.
    pub width: usize,
    /// The convolutions, in order.
    pub layers: Vec<Layer>,
    /// Number of classes.
    pub classes: usize,
    /// The share of test images it classifies correctly, 0 to 1, as it was measured on the finished file.
    pub test_accuracy: f64,
    /// How it was made.
    pub recipe: Map<String, Value>,
}

/// A convolution: square kernel of odd size, padded so that stride 1 keeps the map's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    /// Output channels.
    pub channels: usize,
    /// Rows and columns of the kernel.
    pub kernel: usize,
    /// Rows and columns from one output to the next.
    pub stride: usize,
}

/// Pixels of a side, and channels of a map, beyond which a mistyped number is likelier than a judge.
const SIDE_LIMIT: usize = 4096;
const CHANNEL_LIMIT: usize = 1 << 14;
const CLASS_LIMIT: usize = 1 << 20;
const LAYER_LIMIT: usize = 1 << 8;
const KERNEL_LIMIT: usize = 63;
/// Bytes of the largest file of weights.
const WEIGHT_BYTES: u64 = 4 << 30;
/// Images that are looked at together.
const BATCH: usize = 100;

impl JudgeConfig {
    /// Refuses what is no judge, or what no memory could hold, by field.
    ///
    /// # Errors
    /// [`Error::Value`] naming `file`, field, value and limit.
    pub fn check(&self, file: &str) -> understudy_models::Result<()> {
        let within = |field: &str, value: usize, limit: usize| match (1..=limit).contains(&value) {
            true => Ok(()),
            false => {
                let remedy = format!("must be a whole number from 1 to {limit}");
                Err(Error::value(format!("{file}: {field}"), value, remedy))
            }
        };
        if !matches!(self.channels, 1 | 3) {
            let remedy = "must be 1 (gray) or 3 (RGB)";
            return Err(Error::value(format!("{file}: channels"), self.channels, remedy));
        }
        within("height", self.height, SIDE_LIMIT)?;
        within("width", self.width, SIDE_LIMIT)?;
        within("classes", self.classes, CLASS_LIMIT)?;
        if self.layers.len() > LAYER_LIMIT {
            let remedy = format!("has layers for {LAYER_LIMIT} at most");
            return Err(Error::value(format!("{file}: layers"), self.layers.len(), remedy));
        }
        let (mut height, mut width, mut largest) = (self.height, self.width, self.channels);
        largest *= height * width;
        for (i, layer) in self.layers.iter().enumerate() {
            within(&format!("layers[{i}].channels"), layer.channels, CHANNEL_LIMIT)?;
            within(&format!("layers[{i}].kernel"), layer.kernel, KERNEL_LIMIT)?;
            within(&format!("layers[{i}].stride"), layer.stride, SIDE_LIMIT)?;
            if layer.kernel % 2 == 0 {
                let remedy = "must be odd";
                return Err(Error::value(
                    format!("{file}: layers[{i}].kernel"),
                    layer.kernel,
                    remedy,
                ));
            }
            (height, width) = (height.div_ceil(layer.stride), width.div_ceil(layer.stride));
            largest = largest.max(height * width * layer.channels);
        }
        let bytes = (largest as u64).saturating_mul((2 * BATCH * size_of::<f32>()) as u64);
        memory::check(format!("{file}: height"), self.height, [0, bytes], "use smaller images")
    }
}

/// The network.
pub struct Judge {
    config: JudgeConfig,
    convolutions: Vec<Convolution>,
    /// `[width, classes]`
    head: Tensor,
    head_bias: Tensor,
}

impl Judge {
    /// Reads a judge's folder.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Format`] naming the file.
    pub fn open(folder: &Path) -> understudy_models::Result<Self> {
        let path = folder.join(CONFIG);
        let config: JudgeConfig = read::json(&path)?;
        config.check(&path.display().to_string())?;
        let path = folder.join(WEIGHTS);
        let bytes = read::whole(&path, WEIGHT_BYTES)?;
        candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)
            .and_then(|tensors| Self::new(config, &tensors))
            .map_err(|error| Error::Format { path, problem: error.to_string() })
    }

    /// From weights named as in the file.
    ///
    /// # Errors
    /// A tensor that is not there, or of another shape.
    pub fn new(
        config: JudgeConfig,
        tensors: &HashMap<String, Tensor>,
    ) -> candle_core::Result<Self> {
        let find = |name: String, shape: &[usize]| match tensors.get(&name) {
            Some(tensor) if tensor.dims() == shape => Ok(tensor.clone()),
            Some(tensor) => bail!("`{name}` is {:?}, not {shape:?}", tensor.dims()),
            None => bail!("has no tensor `{name}`"),
        };
        let mut inputs = config.channels;
        let mut convolutions = Vec::new();
        for (i, layer) in config.layers.iter().enumerate() {
            let Layer { channels, kernel, stride } = *layer;
            if stride == 0 || kernel % 2 == 0 {
                bail!("layer {i} of the configuration: kernels are odd, strides at least 1");
            }
            let weight = find(format!("conv.{i}.weight"), &[channels, inputs, kernel, kernel])?;
            let bias = find(format!("conv.{i}.bias"), &[channels])?;
            let padding = (kernel / 2, kernel / 2);
            convolutions.push(Convolution::from_torch(&weight, Some(bias), stride, padding)?);
            inputs = channels;
        }
        let head = find("head.weight".into(), &[config.classes, inputs])?.t()?.contiguous()?;
        let head_bias = find("head.bias".into(), &[config.classes])?;
        Ok(Self { config, convolutions, head, head_bias })
    }

    /// What it says of itself.
    pub fn config(&self) -> &JudgeConfig {
        &self.config
    }
}

/// Writes a judge's folder, at the place that the draft was begun for.
///
/// # Errors
/// [`Error::Value`] for weights that are not finite, [`Error::Weights`] for some that could not be read back,
/// [`Error::Io`] naming the file.
pub fn write(
    draft: Draft,
    config: &JudgeConfig,
    tensors: &HashMap<String, Tensor>,
) -> understudy_models::Result<()> {
    check_weights("the judge's weight", tensors.iter(), None)?;
    Judge::new(config.clone(), tensors).map_err(|error| Error::Weights(error.to_string()))?;
    let malformed = |name: &str, problem: String| Error::Format { path: name.into(), problem };
    let weights = safetensors::serialize(tensors, None)
        .map_err(|error| malformed(WEIGHTS, error.to_string()))?;
    let text = serde_json::to_string_pretty(config)
        .map_err(|error| malformed(CONFIG, error.to_string()))?;
    draft.write(WEIGHTS, &weights)?;
    draft.write(CONFIG, format!("{text}\n").as_bytes())?;
    draft.finish()
}

/// Refuses labels that are no numbers of classes with images: a layer for 2³² classes would be made of one.
///
/// # Errors
/// A sentence.
pub fn check_classes(images: &Images) -> Result<(), String> {
    let (images, classes) = (images.len(), images.classes());
    if classes <= images {
        return Ok(());
    }
    Err(format!(
        "has {images} images and the label {}; classes are numbered from 0, each with images",
        classes - 1
    ))
}

impl FeatureNetwork for Judge {
    fn name(&self) -> &str {
        &self.config.name
    }

    fn width(&self) -> usize {
        self.config.layers.last().map_or(self.config.channels, |layer| layer.channels)
    }

    fn input(&self) -> Option<(usize, usize, usize)> {
        Some((self.config.channels, self.config.height, self.config.width))
    }

    fn classes(&self) -> Option<usize> {
        Some(self.config.classes)
    }

    fn batch(&self) -> usize {
        BATCH
    }

    fn observe(&self, images: &Tensor) -> candle_core::Result<Observed> {
        let mut x = images.permute((0, 2, 3, 1))?.contiguous()?;
        for convolution in &self.convolutions {
            x = convolution.forward(&x)?.relu()?;
        }
        let features = x.flatten(1, 2)?.mean(1)?;
        let logits = features.matmul(&self.head)?.broadcast_add(&self.head_bias)?;
        Ok(Observed { features, logits })
    }
}
