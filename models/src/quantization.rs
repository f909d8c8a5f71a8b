//! Products of 8 bits (W8A8): the codes of a network's weights, and the grids of what they are multiplied with.
//!
//! Weights are signed, with a scale for each output channel; activations are unsigned, with a scale and a zero point for
//! each layer and bucket of timesteps (Jacob et al. 2018; Shang et al. 2023 and Li et al. 2023 of diffusion models, whose
//! activations change with the time). The first and the last layer, vectors such as the time embedding, norms and
//! attention's own products stay in f32.

mod calibration;
mod file;
mod histogram;

use std::collections::BTreeMap;

use candle_core::DType;

use crate::graph::{Graph, Kind, Map, Op, Product, Size};
use crate::kernels::{MOST_PRODUCTS, Taps};
use crate::{Error, Result};

pub use calibration::{Calibration, Observed};
pub use histogram::Histogram;

/// What asks for products of 8 bits where an element type is named; on the CPU alone. candle has no signed one.
pub const INT8: DType = DType::U8;

/// The name of what a network computes in.
pub fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        INT8 => "int8",
        other => other.as_str(),
    }
}

/// Its file, beside the weights of a network.
pub const FILE: &str = "quantization.safetensors";

/// How a network's products are done with codes of 8 bits.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Quantization {
    /// The time at which each bucket but the first begins, ascending.
    pub starts: Vec<f32>,
    /// Layers by the names of their weights.
    pub layers: BTreeMap<String, Layer>,
}

/// A weight of a layer, and the grids of what it is multiplied with.
#[derive(Debug, Clone, PartialEq)]
pub struct Layer {
    /// The shape of the weight: `[output channels, …]`.
    pub shape: Vec<usize>,
    /// Its codes, from −127 to 127.
    pub codes: Vec<i8>,
    /// What the codes of each output channel are multiplied with.
    pub scales: Vec<f32>,
    /// Of each map that the layer takes, one after another in the input channels, the grid in each bucket.
    pub inputs: Vec<Vec<Grid>>,
}

/// The numbers `(q − zero)·scale` for `q` from 0 to 255.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Grid {
    /// From one number to the next, above 0.
    pub scale: f32,
    /// The code of 0.
    pub zero: u8,
}

impl Grid {
    /// The least and the largest number.
    pub fn range(self) -> [f32; 2] {
        [0, 255].map(|code| (code - i32::from(self.zero)) as f32 * self.scale)
    }

    /// Between which numbers none is further from its code than half the scale.
    pub fn covered(self) -> [f32; 2] {
        let ([least, most], half) = (self.range(), self.scale / 2.0);
        [least - half, most + half]
    }
}

impl Layer {
    /// The weight that the codes stand for, f32 and row by row. Their numbers are few, so the codes can be had back from
    /// them.
    pub fn weight(&self) -> Vec<f32> {
        let row = self.codes.len() / self.scales.len().max(1);
        let rows = self.codes.chunks_exact(row.max(1)).zip(&self.scales);
        rows.flat_map(|(codes, scale)| codes.iter().map(move |&code| f32::from(code) * scale))
            .collect()
    }
}

impl Quantization {
    /// The layer of a weight whose numbers must be those of its codes.
    pub(crate) fn layer(&self, name: &str, weight: &[f32]) -> Result<&Layer> {
        match self.layers.get(name) {
            Some(layer) if layer.weight() == weight => Ok(layer),
            _ => Err(Error::Weights(format!(
                "`{name}` is not what its codes in {FILE} say: it was changed since; quantise the model again"
            ))),
        }
    }

    /// The same without codes and their scales.
    pub(crate) fn grids(&self) -> Self {
        let grids = |layer: &Layer| Layer {
            shape: layer.shape.clone(),
            codes: Vec::new(),
            scales: Vec::new(),
            inputs: layer.inputs.clone(),
        };
        let layers = self.layers.iter().map(|(name, layer)| (name.clone(), grids(layer)));
        Self { starts: self.starts.clone(), layers: layers.collect() }
    }

    /// Refuses what does not fit the network: other layers than it has, or layers of other shapes.
    pub(crate) fn check(&self, graph: &Graph) -> Result<()> {
        let refuse = |name: &str, problem: &str| {
            Err(Error::Weights(format!("{FILE}: `{name}` {problem}; quantise the model again")))
        };
        let mut expected = BTreeMap::new();
        for (sources, products) in graph.ops.iter().filter_map(|op| products(graph, op)) {
            let of = |product: &Product| self.layers.get(&graph.weight(product.weight).name);
            for product in products {
                let spec = graph.weight(product.weight);
                if let (Some(first), Some(other)) = (of(&products[0]), of(product))
                    && first.inputs != other.inputs
                {
                    let problem = "has other grids than the weights beside it";
                    return refuse(&spec.name, problem);
                }
                expected.insert(spec.name.as_str(), (&spec.shape, sources.len()));
            }
        }
        for (name, (shape, sources)) in &expected {
            match self.layers.get(*name) {
                None => return refuse(name, "is missing"),
                Some(layer) if layer.shape != **shape => {
                    return refuse(name, &format!("is {:?}, not {shape:?}", layer.shape));
                }
                Some(layer) if layer.inputs.len() != *sources => {
                    return refuse(name, &format!("takes {sources} maps"));
                }
                Some(_) => {}
            }
        }
        match self.layers.keys().find(|name| !expected.contains_key(name.as_str())) {
            Some(name) => refuse(name, "is no layer of this network that is quantised"),
            None => Ok(()),
        }
    }
}

/// Channels and pixels of a side from which a 3×3 convolution of f32 needs so few products that one of 8 bits, which does
/// all, is slower; measured on Zen 5.
const FEW_CHANNELS: usize = 64;
const LARGE_SIDE: usize = 16;

/// Maps and products of an operation that is done with codes of 8 bits, if it is one: a convolution or linear map from
/// features to features, unless that would be slower.
pub(crate) fn products<'a>(graph: &Graph, op: &'a Op) -> Option<(&'a [Map], &'a [Product])> {
    let (sources, products, to, taps) = match op {
        Op::Convolve { source, product, taps, to, .. } => {
            (std::slice::from_ref(source), std::slice::from_ref(product), *to, taps.count())
        }
        Op::Linear { sources, products, to, .. } => (&sources[..], &products[..], *to, 1),
        _ => return None,
    };
    let given = |map: Map| {
        let of = |op: &&Op| op.to() == Some(map);
        let given = |op: &Op| matches!(op, Op::Sample { .. } | Op::Prompt { .. });
        graph.ops.iter().find(of).is_some_and(given)
    };
    let features = |map: Map| graph.maps[map.0].kind == Kind::Features;
    let channels: usize = sources.iter().map(|&map| graph.size(map).channels).sum();
    let size = graph.size(to);
    let slower = taps == Taps::SAME.count()
        && size == Size { channels: size.channels, ..graph.size(sources[0]) }
        && channels < FEW_CHANNELS
        && size.height.min(size.width) >= LARGE_SIDE;
    let own = |product: &Product| graph.weight(product.weight).readers == 1;
    let quantised = features(to)
        && sources.iter().all(|&map| features(map) && !given(map))
        && products.iter().all(own)
        && channels * taps <= MOST_PRODUCTS
        && !slower;
    quantised.then_some((sources, products))
}
