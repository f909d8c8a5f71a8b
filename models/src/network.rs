//! A network's architecture, of whichever family: the one place that knows them all.

mod size;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use crate::channels::Channels;
use crate::compiled::{Network, Sizes};
use crate::cpu::Mode;
use crate::dit::DiTConfig;
use crate::graph::Graph;
use crate::initial::{self, Distribution};
use crate::pixart::PixArtConfig;
use crate::quantization::{Calibration, Quantization};
use crate::sd3::SD3Config;
use crate::unet::{FewerBlocks, UNet2DConditionConfig, UNet2DConfig};
use crate::weight::{Weight, here};
use crate::{Denoiser, Error, Geometry, Result, weights};

/// What the configuration of an architecture tells; all else is read off its graph.
pub(crate) trait Architecture {
    /// The same configuration as diffusers writes it, every field present.
    fn to_json(&self) -> Value;

    /// The shapes the network takes and gives.
    fn geometry(&self) -> Geometry;

    /// What the network does.
    fn graph(&self) -> Graph;

    /// The fields that decide how much its weights, and how much its maps take.
    fn size_fields(&self) -> [&'static str; 2];

    /// See [`NetworkConfig::null_class`].
    fn null_class(&self) -> Option<u32> {
        None
    }

    /// See [`NetworkConfig::setting_for_classes`].
    fn setting_for_classes(&self, classes: Option<usize>) -> String;

    /// See [`NetworkConfig::dropout`].
    fn dropout(&self) -> f64;

    /// See [`NetworkConfig::scaled`].
    fn scaled(&self, factor: f64) -> Option<NetworkConfig>;

    /// See [`NetworkConfig::smaller`].
    fn smaller(&self) -> Vec<Vec<NetworkConfig>> {
        Vec::new()
    }

    /// See [`NetworkConfig::fewer_blocks`].
    fn fewer_blocks(&self, _how: FewerBlocks) -> Option<Result<NetworkConfig>> {
        None
    }

    /// See [`NetworkConfig::larger_name`].
    fn larger_name(&self, _student: &NetworkConfig, _name: &str) -> Option<String> {
        None
    }

    /// See [`NetworkConfig::with_guidance`].
    fn with_guidance(&self, _takes: bool) -> Option<NetworkConfig> {
        None
    }

    /// How `name` is drawn where that is not what its shape says.
    fn unusual(&self, name: &str) -> Option<Distribution>;

    /// Gives weights under the names of the past today's names.
    fn rename(&self, _weights: &mut HashMap<String, Weight>) {}
}

/// One line for each architecture: the diffusers class, the configuration, the component of a diffusers model that holds
/// it, and the pipeline that samples from it.
macro_rules! architectures {
    ($($name:ident = $class:literal: $config:ty, in $component:literal of $pipeline:literal;)*) => {
        /// The checked configuration of a network, as a diffusers `config.json` tells it.
        #[derive(Debug, Clone, PartialEq)]
        pub enum NetworkConfig {
            $(
                #[doc = concat!("diffusers' `", $class, "`.")]
                $name(Box<$config>),
            )*
        }

        $(
            impl From<$config> for NetworkConfig {
                fn from(config: $config) -> Self {
                    Self::$name(Box::new(config))
                }
            }
        )*

        impl NetworkConfig {
            /// The component and the diffusers class of every architecture, as `model_index.json` names them.
            pub const FAMILIES: [(&str, &str); [$($class),*].len()] = [$(($component, $class)),*];

            /// Reads and checks a `config.json`, whose `_class_name` says which architecture it is of (a UNet2DModel where
            /// it does not, as in files written by hand); `file` is what error messages call it.
            ///
            /// # Errors
            /// [`Error::Value`] naming file, field, value and remedy.
            pub fn from_json(value: &Value, file: &str) -> Result<Self> {
                let class = value.get("_class_name").and_then(Value::as_str);
                let former = by_norm_type(value, class);
                let value = former.as_ref().unwrap_or(value);
                let class = value.get("_class_name").and_then(Value::as_str);
                match class.unwrap_or("UNet2DModel") {
                    $($class => <$config>::from_json(value, file).map(Self::from),)*
                    other => Err(Error::value(
                        format!("{file}: _class_name"),
                        format!("{other:?}"),
                        format!("only {} are supported", [$($class),*].join(" and ")),
                    )),
                }
            }

            fn architecture(&self) -> &dyn Architecture {
                match self {
                    $(Self::$name(config) => &**config,)*
                }
            }

            /// The diffusers class.
            pub fn class_name(&self) -> &'static str {
                match self {
                    $(Self::$name(_) => $class,)*
                }
            }

            /// The folder of a diffusers model that holds it, which is also its name in `model_index.json`.
            pub fn component(&self) -> &'static str {
                match self {
                    $(Self::$name(_) => $component,)*
                }
            }

            /// The diffusers pipeline that samples from it.
            pub fn pipeline(&self) -> &'static str {
                match self {
                    $(Self::$name(_) => $pipeline,)*
                }
            }
        }
    };
}

architectures! {
    UNet = "UNet2DModel": UNet2DConfig, in "unet" of "DDPMPipeline";
    UNetCondition = "UNet2DConditionModel": UNet2DConditionConfig, in "unet" of "StableDiffusionPipeline";
    DiT = "DiTTransformer2DModel": DiTConfig, in "transformer" of "DiTPipeline";
    PixArt = "PixArtTransformer2DModel": PixArtConfig, in "transformer" of "PixArtAlphaPipeline";
    SD3 = "SD3Transformer2DModel": SD3Config, in "transformer" of "StableDiffusion3Pipeline";
}

/// A configuration from before diffusers had classes for DiT and PixArt: a `Transformer2DModel` is one by its `norm_type`.
fn by_norm_type(value: &Value, class: Option<&str>) -> Option<Value> {
    let today = match (class?, value["norm_type"].as_str()?) {
        ("Transformer2DModel", "ada_norm_zero") => "DiTTransformer2DModel",
        ("Transformer2DModel", "ada_norm_single") => "PixArtTransformer2DModel",
        _ => return None,
    };
    let mut value = value.clone();
    value["_class_name"] = today.into();
    Some(value)
}

impl NetworkConfig {
    /// The same configuration as diffusers writes it, every field present.
    pub fn to_json(&self) -> Value {
        self.architecture().to_json()
    }

    /// The shapes the network takes and gives.
    pub fn geometry(&self) -> Geometry {
        self.architecture().geometry()
    }

    /// The field that tells how many numbers each token of a prompt has.
    pub(crate) fn prompt_field(&self) -> &'static str {
        match self {
            Self::PixArt(_) => "caption_channels",
            Self::SD3(_) => "joint_attention_dim",
            _ => "cross_attention_dim",
        }
    }

    /// The same network over samples of another height and width, for prompts of so many tokens, where it takes any;
    /// nothing for a network of one size.
    ///
    /// # Errors
    /// [`Error::Value`] for a size that the network cannot have, or that no memory holds.
    pub fn at(&self, size: [usize; 2], tokens: usize) -> Option<Result<Self>> {
        match self {
            Self::UNetCondition(config) => Some(config.at(size, tokens).map(Self::from)),
            Self::PixArt(config) => Some(config.at(size, tokens).map(Self::from)),
            Self::SD3(config) => Some(config.at(size, tokens).map(Self::from)),
            Self::UNet(_) | Self::DiT(_) => None,
        }
    }

    /// The same network for an autoencoder that makes so many pixels of one of a latent's, a side: some are told how large
    /// images are.
    ///
    /// # Errors
    /// [`Error::Value`] for no pixels.
    pub fn with_factor(&self, factor: usize) -> Result<Self> {
        match self {
            Self::PixArt(config) => config.with_factor(factor).map(Self::from),
            Self::UNet(_) | Self::UNetCondition(_) | Self::DiT(_) | Self::SD3(_) => {
                Ok(self.clone())
            }
        }
    }

    /// The class that means "none" in every network of its kind; nothing where only a model card can tell.
    pub fn null_class(&self) -> Option<u32> {
        self.architecture().null_class()
    }

    /// What its `config.json` must say to have so many classes, or none.
    pub fn setting_for_classes(&self, classes: Option<usize>) -> String {
        self.architecture().setting_for_classes(classes)
    }

    /// The share of activations that training should drop, which no network here does: training
    /// refuses what is not 0; answering needs none of it.
    pub fn dropout(&self) -> f64 {
        self.architecture().dropout()
    }

    /// Names and shapes of all weights, without a tensor.
    pub fn weight_shapes(&self) -> BTreeMap<String, Vec<usize>> {
        self.architecture().graph().shapes()
    }

    /// The weights of a file under today's names, checked to be exactly those of this network.
    ///
    /// # Errors
    /// [`Error::Weights`] naming what is missing, what does not belong, and what has another shape.
    pub fn fit(&self, weights: HashMap<String, Tensor>) -> Result<HashMap<String, Tensor>> {
        let weights = self.fitted(here(weights), &self.weight_shapes())?;
        weights.into_iter().map(|(name, weight)| Ok((name, weight.take()?))).collect()
    }

    fn fitted(
        &self,
        mut weights: HashMap<String, Weight>,
        shapes: &BTreeMap<String, Vec<usize>>,
    ) -> Result<HashMap<String, Weight>> {
        self.architecture().rename(&mut weights);
        weights::fit(shapes, weights)
    }

    /// Which channels stand or fall together; nothing for a network that has no narrower twin.
    pub fn channels(&self) -> Option<Channels> {
        self.architecture().graph().channels()
    }

    /// The same layers with their widths times `factor`, rounded to what norms and attentions can divide;
    /// nothing where that is the same network, none, or one of other layers (levels that become equally
    /// wide need no shortcut between them).
    pub fn scaled(&self, factor: f64) -> Option<Self> {
        let scaled = self.architecture().scaled(factor);
        let layers = |network: &Self| network.channels().map(|channels| channels.weights);
        scaled.filter(|scaled| scaled != self && layers(scaled) == layers(self))
    }

    /// Networks like this one with one thing less each, in directions, such as a level's width: from a little less to the
    /// least. None for a kind of network that is not made smaller so.
    pub fn smaller(&self) -> Vec<Vec<Self>> {
        self.architecture().smaller()
    }

    /// What it does.
    pub(crate) fn graph(&self) -> Graph {
        self.architecture().graph()
    }

    /// The same network without some of its blocks; nothing where no such network is known.
    ///
    /// # Errors
    /// [`Error::Value`] naming the field that does not fit.
    pub fn fewer_blocks(&self, how: FewerBlocks) -> Option<Result<Self>> {
        self.architecture().fewer_blocks(how)
    }

    /// Where the weight `name` of a network that has fewer blocks stands in this one, whose weights it may begin with;
    /// nothing for networks whose blocks are not each other's.
    pub fn larger_name(&self, student: &Self, name: &str) -> Option<String> {
        self.architecture().larger_name(student, name)
    }

    /// The same network with or without an input for a guidance scale (`time_cond_proj_dim`, 256 wide as those of latent
    /// consistency models are); nothing where no such network is known.
    pub fn with_guidance(&self, takes: bool) -> Option<Self> {
        match self.geometry().guidance == takes {
            true => Some(self.clone()),
            false => self.architecture().with_guidance(takes),
        }
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
        self.load_in_mode(weights, dtype, device, Mode::Plain)
    }

    /// Builds the network, on the CPU, with products of 8 bits; maps between operations are f32, and what comes in and
    /// goes out.
    ///
    /// # Errors
    /// As [`NetworkConfig::load`]; [`Error::Weights`] for a quantisation of another network, or of other weights;
    /// [`Error::Value`] where the processor does not multiply 8 bits.
    pub fn load_quantized(
        &self,
        weights: HashMap<String, Tensor>,
        quantization: Quantization,
    ) -> Result<Box<dyn Denoiser>> {
        self.load_codes(here(weights), quantization)
    }

    pub(crate) fn load_codes(
        &self,
        weights: HashMap<String, Weight>,
        quantization: Quantization,
    ) -> Result<Box<dyn Denoiser>> {
        quantization.check(&self.architecture().graph())?;
        let mode = Mode::Quantized(Arc::new(quantization));
        self.load_in_mode(weights, DType::F32, &Device::Cpu, mode)
    }

    /// Builds the network, in f32 on the CPU, so that every evaluation shows a calibration what its layers are given.
    ///
    /// # Errors
    /// As [`NetworkConfig::load`].
    pub fn load_observed(
        &self,
        weights: HashMap<String, Tensor>,
        calibration: &Arc<Calibration>,
    ) -> Result<Box<dyn Denoiser>> {
        let mode = Mode::Observed(calibration.clone());
        self.load_in_mode(here(weights), DType::F32, &Device::Cpu, mode)
    }

    fn load_in_mode(
        &self,
        weights: HashMap<String, Weight>,
        dtype: DType,
        device: &Device,
        mode: Mode,
    ) -> Result<Box<dyn Denoiser>> {
        let trained = weights.values().any(Weight::trained);
        let graph = self.architecture().graph();
        let weights = self.fitted(weights, &graph.shapes())?;
        if !trained {
            let weight = match &mode {
                Mode::Quantized(_) => 1,
                _ => dtype.size_in_bytes(),
            };
            self.check_memory(&graph, device, weight)?;
        }
        let geometry = self.geometry();
        let build = || -> Result<Box<dyn Denoiser>> {
            let network = Network::new(graph, geometry, weights, (dtype, device), mode)?;
            Ok(Box::new(network.of_sizes(self.sizes(device))))
        };
        // One that is trained may be built anew every step, of weights that are there.
        let network = if trained { build()? } else { self.built(build)? };
        #[cfg(feature = "cuda")]
        if let (Device::Cuda(device), false, None) = (device, trained, self.geometry().prompt) {
            return Ok(Box::new(crate::cuda_graphs::CudaGraphs::new(network, device)));
        }
        Ok(network)
    }

    /// What the network is at other sizes, once there is memory for a map of it.
    fn sizes(&self, device: &Device) -> Arc<Sizes> {
        let (config, device) = (self.clone(), device.clone());
        Arc::new(move |size, tokens| {
            let resized = config.at(size, tokens)?.and_then(|config| {
                let graph = config.architecture().graph();
                config.check_memory(&graph, &device, 0)?;
                Ok((graph, config.geometry()))
            });
            Some(resized)
        })
    }

    /// Random weights, f32 on the CPU, drawn as those of a new network are by PyTorch and diffusers, or by
    /// the paper where diffusers has nothing of its own; the same seed gives the same weights.
    ///
    /// # Errors
    /// [`Error::Value`] naming the field that asks for more memory than there is.
    pub fn initial_weights(&self, seed: u64) -> Result<BTreeMap<String, Tensor>> {
        let graph = self.architecture().graph();
        self.check_memory(&graph, &Device::Cpu, DType::F32.size_in_bytes())?;
        initial::weights(&graph.shapes(), |name| self.architecture().unusual(name), seed)
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
