//! Products of 8 bits: the maps that a layer reads become codes, each is multiplied with its part of the weights, and
//! the products of a second map are added to those of the first.

use std::slice::from_ref;
use std::sync::Arc;

use super::builder::{Builder, tensors, values};
use super::{Mode, TIME};
use crate::graph::{Graph, Map, Op, Product};
use crate::kernels::{
    Aligned, Constants, Finish, Grid, Image, Observe, Quantize, Quantized, QuantizedWeights, Taps,
};
use crate::quantization::{Layer, Quantization, products};
use crate::weights::Weights;

impl Builder<'_> {
    /// Does with an operation what the mode asks for; whether nothing else is to be done for it.
    ///
    /// # Errors
    /// Those of weights that cannot be read, or are not what their codes say.
    pub(super) fn added_in_mode(
        &mut self,
        graph: &Graph,
        op: &Op,
        weights: &Weights,
    ) -> crate::Result<bool> {
        let Some((sources, _)) = products(graph, op) else { return Ok(false) };
        let images = self.images(sources);
        match self.mode.clone() {
            Mode::Plain => Ok(false),
            Mode::Observed(calibration) => {
                let watches = calibration.watch(graph, op, &images);
                for (input, watch) in images.into_iter().zip(watches) {
                    self.push(Observe { input, time: TIME, watch });
                }
                Ok(false)
            }
            Mode::Quantized(quantization) => {
                self.quantized(&quantization, op, weights)?;
                Ok(true)
            }
        }
    }

    /// The grid of a map that nothing reads but one layer of codes.
    pub(super) fn encodes(&self, map: Map) -> Option<Arc<Grid>> {
        let Mode::Quantized(quantization) = &self.mode else { return None };
        let mut readers = self.graph.ops.iter().filter(|op| op.reads().contains(&map));
        let (reader, None) = (readers.next()?, readers.next()) else { return None };
        let residual = match reader {
            Op::Convolve { epilogue, .. } | Op::Linear { epilogue, .. } => epilogue.residual,
            _ => None,
        };
        match products(self.graph, reader)? {
            (&[only], products) if only == map && residual != Some(map) => {
                grids(quantization, self.graph, &products[0]).pop()
            }
            _ => None,
        }
    }

    fn quantized(
        &mut self,
        quantization: &Quantization,
        op: &Op,
        weights: &Weights,
    ) -> crate::Result<()> {
        let (maps, products, taps, epilogue, to) = match op {
            Op::Convolve { source, product, taps, epilogue, to } => {
                (from_ref(source), from_ref(product), *taps, *epilogue, *to)
            }
            Op::Linear { sources, products, epilogue, to } => {
                (&sources[..], &products[..], Taps::POINT, *epilogue, *to)
            }
            _ => unreachable!("whoever calls it has looked"),
        };
        let target = self.sums(to, maps, epilogue);
        let (isa, sources) = (self.isa, self.images(maps));
        let name = |product: &Product| &self.graph.weight(product.weight).name;
        // Whoever read the file has seen that all weights of a layer have the same inputs.
        let grids = grids(quantization, self.graph, &products[0]);
        let packed = self.packed.list(to, || {
            let (mut rows, mut bias) = (Vec::new(), Vec::new());
            for product in products {
                let [weight, own_bias] = tensors(self.graph, product, weights)?;
                let codes = quantization.layer(name(product), &values(&weight)?)?;
                rows.push((codes, product.factor));
                let scaled = |x: f32| (f64::from(x) * product.factor) as f32;
                bias.extend(values(&own_bias)?.into_iter().map(scaled));
            }
            let mut packed = vec![Aligned::of(&bias, isa.panel())];
            let mut before = 0;
            for (source, grid) in sources.iter().zip(&grids) {
                let all: usize = sources.iter().map(Image::channels).sum();
                let [from, to, all] =
                    [before, before + source.channels(), all].map(|c| c * taps.count());
                let part = joined(&rows, from..to, all);
                let codes = QuantizedWeights { codes: &part.0, scales: &part.1 };
                packed.extend(Quantized::pack(isa, [source, &target], taps, &codes, grid));
                before += source.channels();
            }
            Ok(packed)
        })?;
        let parts = packed[1..].chunks_exact(2);
        let last = sources.len() - 1;
        for (i, ((source, grid), part)) in sources.iter().zip(&grids).zip(parts).enumerate() {
            let none = vec![0.0; packed[0].as_slice().len()];
            let mut finish = match i {
                0 => {
                    let finish = Finish::with(Constants::Own(packed[0].clone()));
                    self.finish_with(finish, epilogue)
                }
                _ => Finish { residual: Some(target), ..Finish::new(&none, isa.panel()) },
            };
            finish.factor = if i == last { epilogue.factor } else { 1.0 };
            let encoded = self.maps[maps[i].0].encoded;
            let codes = if encoded { source.buffer } else { self.take(Quantize::len(source)) };
            if !encoded {
                self.push(Quantize::new(*source, codes, grid.clone()));
            }
            let weights = [part[0].clone(), part[1].clone()];
            let from = (*source, codes);
            self.push(Quantized::new(isa, from, target, taps, weights, grid.clone(), finish));
            if !encoded {
                self.give(codes);
            }
        }
        Ok(())
    }
}

/// The grids of the maps that a layer takes.
fn grids(quantization: &Quantization, graph: &Graph, product: &Product) -> Vec<Arc<Grid>> {
    // Whoever read the file has seen that all layers are there.
    let layer = &quantization.layers[&graph.weight(product.weight).name];
    let starts: Arc<[f32]> = quantization.starts.clone().into();
    let grid = |buckets: &Vec<crate::quantization::Grid>| {
        let buckets = buckets.iter().map(|grid| (grid.scale, grid.zero)).collect();
        Arc::new(Grid { time: TIME, starts: starts.clone(), buckets })
    };
    layer.inputs.iter().map(grid).collect()
}

/// The codes and scales of all products, of some of the `all` numbers of each output channel.
fn joined(rows: &[(&Layer, f64)], part: std::ops::Range<usize>, all: usize) -> (Vec<i8>, Vec<f32>) {
    let codes = rows.iter().flat_map(|(layer, _)| layer.codes.chunks_exact(all));
    let scales = rows.iter().flat_map(|(layer, factor)| {
        layer.scales.iter().map(move |&scale| (f64::from(scale) * factor) as f32)
    });
    (codes.flat_map(|row| row[part.clone()].iter().copied()).collect(), scales.collect())
}
