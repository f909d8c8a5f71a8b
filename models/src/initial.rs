//! The random weights a network begins with, as PyTorch draws them.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};

use crate::graph::{Grid, Size, positions};
use crate::{Result, noise};

/// What a weight is drawn from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Distribution {
    /// Evenly from (−bound, bound).
    Uniform(f64),
    /// N(0, scale²).
    Normal(f64),
    /// No draw.
    Constant(f64),
    /// No draw: the sines and cosines of all places ([`positions`]).
    Places(Size, Grid),
}

/// Draws all of `shapes`. `unusual` tells of weights that are not what their shapes say, such as tables
/// of embeddings.
///
/// By shape, as `torch.nn` has it: products and convolutions `kaiming_uniform_(a=√5)`, which is uniform
/// within 1/√fan_in (He et al. 2015, eq. 10), and so their biases; norms 1 and 0.
pub(crate) fn weights(
    shapes: &BTreeMap<String, Vec<usize>>,
    unusual: impl Fn(&str) -> Option<Distribution>,
    seed: u64,
) -> Result<BTreeMap<String, Tensor>> {
    let mut drawn = BTreeMap::new();
    for (i, (name, shape)) in shapes.iter().enumerate() {
        let distribution = unusual(name).unwrap_or_else(|| usual(name, shapes));
        let mut values = vec![0.0; shape.iter().product()];
        draw(distribution, seed, i as u64 + 1, &mut values);
        drawn.insert(name.clone(), Tensor::from_vec(values, &shape[..], &Device::Cpu)?);
    }
    Ok(drawn)
}

fn usual(name: &str, shapes: &BTreeMap<String, Vec<usize>>) -> Distribution {
    let (layer, is_bias) = match name.strip_suffix(".bias") {
        Some(layer) => (layer, true),
        None => (name.strip_suffix(".weight").unwrap_or(name), false),
    };
    match shapes.get(&format!("{layer}.weight")) {
        Some(weight) if weight.len() > 1 => {
            let fan_in: usize = weight[1..].iter().product();
            Distribution::Uniform(1.0 / (fan_in as f64).sqrt())
        }
        _ => Distribution::Constant(if is_bias { 0.0 } else { 1.0 }),
    }
}

fn draw(distribution: Distribution, seed: u64, stream: u64, out: &mut [f32]) {
    match distribution {
        Distribution::Constant(value) => out.fill(value as f32),
        Distribution::Places(size, grid) => out.copy_from_slice(&positions(size, grid)),
        Distribution::Normal(scale) => {
            noise::normal(seed, stream, out);
            out.iter_mut().for_each(|out| *out *= scale as f32);
        }
        Distribution::Uniform(bound) => {
            noise::uniform(seed, stream, out);
            let bound = bound as f32;
            out.iter_mut().for_each(|out| *out = bound * (2.0 * *out - 1.0));
        }
    }
}
