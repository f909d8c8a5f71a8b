//! What the layers of a network are given while it is evaluated.

use std::sync::{Arc, Mutex, PoisonError};

use super::{Histogram, products};
use crate::graph::{Graph, Op};
use crate::kernels::{Image, Watch};

/// The inputs of all layers that can be quantised, as evaluations show them.
#[derive(Debug)]
pub struct Calibration {
    starts: Vec<f32>,
    layers: Mutex<Vec<Arc<Seen>>>,
}

/// What one layer was given.
#[derive(Debug)]
struct Seen {
    weights: Vec<(String, Option<String>)>,
    /// By map.
    inputs: Vec<Mutex<Input>>,
}

#[derive(Debug, Clone)]
struct Input {
    /// By bucket.
    histograms: Vec<Histogram>,
    /// By channel.
    sums: Vec<f64>,
    pixels: u64,
}

/// What the inputs of one layer were like.
#[derive(Debug, Clone)]
pub struct Observed {
    /// The names of its weights, and of the biases that they have.
    pub weights: Vec<(String, Option<String>)>,
    /// Of each map that it takes, the numbers in each bucket.
    pub histograms: Vec<Vec<Histogram>>,
    /// The mean of each input channel, those of all maps one after another.
    pub means: Vec<f64>,
}

impl Calibration {
    /// With buckets that begin at times `starts`, ascending, and one before them.
    pub fn new(starts: Vec<f32>) -> Arc<Self> {
        Arc::new(Self { starts, layers: Mutex::default() })
    }

    /// What has been seen so far, layer by layer in the network's order.
    pub fn observed(&self) -> Vec<Observed> {
        let layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        let observed = |seen: &Arc<Seen>| {
            let inputs: Vec<Input> = seen
                .inputs
                .iter()
                .map(|input| input.lock().unwrap_or_else(PoisonError::into_inner).clone())
                .collect();
            let mean = |input: &Input| {
                let pixels = input.pixels.max(1) as f64;
                input.sums.iter().map(move |sum| sum / pixels).collect::<Vec<_>>()
            };
            Observed {
                weights: seen.weights.clone(),
                means: inputs.iter().flat_map(mean).collect(),
                histograms: inputs.into_iter().map(|input| input.histograms).collect(),
            }
        };
        layers.iter().map(observed).collect()
    }

    /// Watches the maps that an operation reads; nothing where it is not quantised.
    pub(crate) fn watch(
        self: &Arc<Self>,
        graph: &Graph,
        op: &Op,
        images: &[Image],
    ) -> Vec<Arc<Watch>> {
        let Some((_, products)) = products(graph, op) else { return Vec::new() };
        let name = |id| graph.weight(id).name.clone();
        let weights = products.iter().map(|it| (name(it.weight), it.bias.map(name))).collect();
        let input = |image: &Image| {
            let histograms = vec![Histogram::default(); self.starts.len() + 1];
            Mutex::new(Input { histograms, sums: vec![0.0; image.channels()], pixels: 0 })
        };
        let seen = Arc::new(Seen { weights, inputs: images.iter().map(input).collect() });
        self.layers.lock().unwrap_or_else(PoisonError::into_inner).push(seen.clone());
        let watch = |(number, &image): (usize, &Image)| -> Arc<Watch> {
            let (seen, calibration) = (seen.clone(), self.clone());
            Arc::new(move |time: f32, map: &[f32]| {
                let bucket = calibration.starts.iter().filter(|start| time >= **start).count();
                let mut input = seen.inputs[number].lock().unwrap_or_else(PoisonError::into_inner);
                let Input { histograms, sums, pixels } = &mut *input;
                for pixel in map.chunks_exact(image.stride()) {
                    for (c, sum) in sums.iter_mut().enumerate() {
                        let x = pixel[image.place(c)];
                        // Whoever evaluates the network is told of what is not finite by its answer.
                        if x.is_finite() {
                            histograms[bucket].add(x);
                            *sum += f64::from(x);
                        }
                    }
                    *pixels += 1;
                }
            })
        };
        images.iter().enumerate().map(watch).collect()
    }
}
