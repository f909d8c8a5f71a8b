//! A network's architecture, of whichever family: the one place that knows them all.

mod size;

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use crate::channels::Channels;
use crate::dit::{DiTConfig, DiTTransformer2DModel};
use crate::initial::{self, Distribution};
use crate::unet::{UNet2DConfig, UNet2DModel};
use crate::weight::{Weight, here};
use crate::{Denoiser, Error, Geometry, Result};

/// The checked configuration of a network, as a diffusers `config.json` tells it.
#[derive(Debug, Clone, PartialEq)]
pub enum NetworkConfig {
    /// diffusers' `UNet2DModel`.
    UNet(UNet2DConfig),
    /// diffusers' `DiTTransformer2DModel`.
    DiT(DiTConfig),
}

impl From<UNet2DConfig> for NetworkConfig {
    fn from(config: UNet2DConfig) -> Self {
        Self::UNet(config)
    }
}

impl From<DiTConfig> for NetworkConfig {
    fn from(config: DiTConfig) -> Self {
        Self::DiT(config)
    }
}

impl NetworkConfig {
    /// Reads and checks a `config.json`, whose `_class_name` says which family it is of; `file` is what
    /// error messages call it.
    ///
    /// # Errors
    /// [`Error::Value`] naming file, field, value and remedy.
    pub fn from_json(value: &Value, file: &str) -> Result<Self> {
        match value.get("_class_name").and_then(Value::as_str) {
            // Left out by people who write one by hand; the family's own check speaks of other values.
            None | Some("UNet2DModel") => UNet2DConfig::from_json(value, file).map(Self::UNet),
            Some("DiTTransformer2DModel") => DiTConfig::from_json(value, file).map(Self::DiT),
            Some(other) => Err(Error::value(
                format!("{file}: _class_name"),
                format!("{other:?}"),
                "only UNet2DModel and DiTTransformer2DModel are supported",
            )),
        }
    }

    /// The same configuration as diffusers writes it, every field present.
    pub fn to_json(&self) -> Value {
        match self {
            Self::UNet(config) => config.to_json(),
            Self::DiT(config) => config.to_json(),
        }
    }

    /// The component and the diffusers class of every family, as `model_index.json` names them.
    pub const FAMILIES: [(&str, &str); 2] =
        [("unet", "UNet2DModel"), ("transformer", "DiTTransformer2DModel")];

    /// The diffusers class.
    pub fn class_name(&self) -> &'static str {
        match self {
            Self::UNet(_) => "UNet2DModel",
            Self::DiT(_) => "DiTTransformer2DModel",
        }
    }

    /// The folder of a diffusers model that holds it, which is also its name in `model_index.json`.
    pub fn component(&self) -> &'static str {
        match self {
            Self::UNet(_) => "unet",
            Self::DiT(_) => "transformer",
        }
    }

    /// The diffusers pipeline that samples from it.
    pub fn pipeline(&self) -> &'static str {
        match self {
            Self::UNet(_) => "DDPMPipeline",
            Self::DiT(_) => "DiTPipeline",
        }
    }

    /// The shapes the network takes and gives.
    pub fn geometry(&self) -> Geometry {
        match self {
            Self::UNet(config) => config.geometry(),
            Self::DiT(config) => config.geometry(),
        }
    }

    /// The class that means "none" in every network of its kind; nothing where only a model card can tell.
    pub fn null_class(&self) -> Option<u32> {
        match self {
            Self::UNet(_) => None,
            Self::DiT(config) => config.null_class(),
        }
    }

    /// What its `config.json` must say to be told so many classes, or none.
    pub fn setting_for_classes(&self, classes: Option<usize>) -> String {
        match (self, classes) {
            (Self::UNet(_), Some(classes)) => format!("num_class_embeds to {classes}"),
            (Self::UNet(_), None) => "num_class_embeds to null".into(),
            // Its tables have a row more than that.
            (Self::DiT(_), classes) => {
                let other_rows = classes.map_or(0, |classes| classes.saturating_sub(1));
                format!("num_embeds_ada_norm to {other_rows}")
            }
        }
    }

    /// The share of activations that training should drop, which no network here does: training
    /// refuses what is not 0; answering needs none of it.
    pub fn dropout(&self) -> f64 {
        match self {
            Self::UNet(config) => config.dropout(),
            Self::DiT(config) => config.dropout(),
        }
    }

    /// Names and shapes of all weights, without a tensor.
    ///
    /// # Errors
    /// [`Error::Weights`] when the architecture asks for one twice.
    pub fn weight_shapes(&self) -> Result<BTreeMap<String, Vec<usize>>> {
        match self {
            Self::UNet(config) => UNet2DModel::weight_shapes(config),
            Self::DiT(config) => DiTTransformer2DModel::weight_shapes(config),
        }
    }

    /// The weights of a file under today's names, checked to be exactly those of this network.
    ///
    /// # Errors
    /// [`Error::Weights`] naming what is missing, what does not belong, and what has another shape.
    pub fn fit(&self, weights: HashMap<String, Tensor>) -> Result<HashMap<String, Tensor>> {
        let weights = match self {
            Self::UNet(config) => UNet2DModel::fit(config, here(weights)),
            Self::DiT(config) => DiTTransformer2DModel::fit(config, here(weights)),
        }?;
        weights.into_iter().map(|(name, weight)| Ok((name, weight.take()?))).collect()
    }

    /// Which channels stand or fall together; nothing for a network that has no narrower twin.
    pub fn channels(&self) -> Option<Channels> {
        match self {
            Self::UNet(config) => config.channels(),
            // A token's channels are told apart by the sines of its place, which a narrower network has others of.
            Self::DiT(_) => None,
        }
    }

    /// The same layers with their widths times `factor`, rounded to what norms and attentions can divide;
    /// nothing where that is the same network, none, or one of other layers (levels that become equally
    /// wide need no shortcut between them).
    pub fn scaled(&self, factor: f64) -> Option<Self> {
        let scaled = match self {
            Self::UNet(config) => config.scaled(factor).map(Self::UNet),
            Self::DiT(config) => config.scaled(factor).map(Self::DiT),
        };
        let layers = |network: &Self| network.channels().map(|channels| channels.weights);
        scaled.filter(|scaled| scaled != self && layers(scaled) == layers(self))
    }

    /// Builds the network from its weights, in `dtype` on `device`. Where a weight is a
    /// [`candle_core::Var`] the network has gradients and sees later changes of it.
    ///
    /// On a GPU one without gradients has its evaluations launched as CUDA graphs. The device must not track
    /// events then (`CudaDevice::disable_event_tracking`), which those of other operations would be, outside of
    /// the graph; where it does, the log says that evaluations are not captured.
    ///
    /// # Errors
    /// [`Error::Weights`] naming what is missing, what does not belong, and what has another shape;
    /// [`Error::Value`] naming the field that asks for more memory than there is.
    pub fn load(
        &self,
        weights: HashMap<String, Tensor>,
        dtype: DType,
        device: &Device,
    ) -> Result<Box<dyn Denoiser>> {
        self.load_weights(here(weights), dtype, device)
    }

    /// As [`NetworkConfig::load`], of weights that may be read only when their layer is built.
    pub(crate) fn load_weights(
        &self,
        weights: HashMap<String, Weight>,
        dtype: DType,
        device: &Device,
    ) -> Result<Box<dyn Denoiser>> {
        let trained = weights.values().any(Weight::trained);
        let build = || -> Result<Box<dyn Denoiser>> {
            Ok(match self {
                Self::UNet(config) => {
                    Box::new(UNet2DModel::load_weights(config, weights, dtype, device)?)
                }
                Self::DiT(config) => {
                    Box::new(DiTTransformer2DModel::load(config, weights, dtype, device)?)
                }
            })
        };
        // One that is trained may be built anew every step, of weights that are there.
        let network = if trained {
            build()?
        } else {
            self.check_weights(device)?;
            self.built(build)?
        };
        #[cfg(feature = "cuda")]
        if let (Device::Cuda(device), false) = (device, trained) {
            return Ok(Box::new(crate::captured::Captured::new(network, device)));
        }
        Ok(network)
    }

    /// Random weights, f32 on the CPU, drawn as those of a new network are by PyTorch and diffusers, or by
    /// the paper where diffusers has nothing of its own; the same seed gives the same weights.
    ///
    /// # Errors
    /// As [`NetworkConfig::weight_shapes`]; [`Error::Value`] naming the field that asks for more memory than there
    /// is.
    pub fn initial_weights(&self, seed: u64) -> Result<BTreeMap<String, Tensor>> {
        self.check_weights(&Device::Cpu)?;
        initial::weights(&self.weight_shapes()?, |name| self.unusual(name), seed)
    }

    /// How `name` is drawn where that is not what its shape says.
    fn unusual(&self, name: &str) -> Option<Distribution> {
        match self {
            Self::UNet(config) => config.unusual(name),
            Self::DiT(config) => config.unusual(name),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn small(more: Value) -> NetworkConfig {
        let mut config = json!({
            "_class_name": "UNet2DModel", "sample_size": 8, "in_channels": 1, "out_channels": 1,
            "block_out_channels": [16, 32], "norm_num_groups": 4, "layers_per_block": 1,
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        });
        for (name, value) in more.as_object().unwrap() {
            config[name] = value.clone();
        }
        NetworkConfig::from_json(&config, "config.json").unwrap()
    }

    fn extremes(weights: &BTreeMap<String, Tensor>, name: &str) -> (f32, f32) {
        let values: Vec<f32> = weights[name].flatten_all().unwrap().to_vec1().unwrap();
        let fold = |pick: fn(f32, f32) -> f32| values.iter().copied().reduce(pick).unwrap();
        (fold(f32::min), fold(f32::max))
    }

    #[test]
    fn new_weights_have_pytorchs_bounds() {
        let weights = small(json!({"num_class_embeds": 10})).initial_weights(1).unwrap();
        for (name, fan_in) in [("down_blocks.0.resnets.0.conv1", 16 * 9), ("conv_in", 9)] {
            let bound = 1.0 / (fan_in as f32).sqrt();
            for part in ["weight", "bias"] {
                let (low, high) = extremes(&weights, &format!("{name}.{part}"));
                assert!(-bound <= low && low < -0.5 * bound, "{name}.{part}: {low}");
                assert!(0.5 * bound < high && high < bound, "{name}.{part}: {high}");
            }
        }
        assert_eq!(extremes(&weights, "conv_norm_out.weight"), (1.0, 1.0));
        assert_eq!(extremes(&weights, "conv_norm_out.bias"), (0.0, 0.0));
        // A table of 640 normal numbers reaches further than any product's bound.
        assert!(extremes(&weights, "class_embedding.weight").1 > 2.0);
    }

    #[test]
    fn new_weights_follow_the_seed_and_make_a_network() {
        let config = small(json!({}));
        let first = |seed| -> Vec<f32> {
            let weights = config.initial_weights(seed).unwrap();
            weights["conv_in.weight"].flatten_all().unwrap().to_vec1().unwrap()
        };
        assert_eq!(first(1), first(1));
        assert_ne!(first(1), first(2));
        let weights = config.initial_weights(1).unwrap().into_iter().collect();
        let network = config.load(weights, DType::F32, &Device::Cpu).unwrap();
        let x = Tensor::zeros((2, 1, 8, 8), DType::F32, &Device::Cpu).unwrap();
        let t = Tensor::new(&[0f32, 999.0], &Device::Cpu).unwrap();
        assert_eq!(network.forward(&x, &t, None).unwrap().dims(), [2, 1, 8, 8]);
    }

    #[test]
    fn a_scaled_network_has_the_same_layers() {
        let wide = json!({"block_out_channels": [32, 64], "attention_head_dim": 16});
        let half = small(wide.clone()).scaled(0.5).unwrap().to_json();
        assert_eq!(half["block_out_channels"], json!([16, 32]));
        assert_eq!(half["attention_head_dim"], 8);
        // Both levels would have 4 channels, and no shortcut between them.
        assert!(small(wide).scaled(0.05).is_none());
    }

    #[test]
    fn another_family_is_refused_by_name() {
        let error = NetworkConfig::from_json(&json!({"_class_name": "VQModel"}), "config.json");
        assert!(error.unwrap_err().to_string().contains("VQModel"));
    }
}
