//! How the gradients of a network follow from each other: noted while its layers are added, gone through backwards for
//! the steps of the gradients.
//!
//! A gradient takes memory from the first layer that adds to it until the layer that made the map has used it. The maps
//! of a network that is trained stay where they are until its gradients are taken.

use std::ops::Range;

use candle_core::{Result, bail};

use super::builder::Builder;
use super::convolution::{Part, convolve};
use super::kernels::{Ending, Normed};
use super::parameters::Parameter;
use super::product::{Extent, Matrices, Order, multiply};
use super::program::Place;
use crate::assembly::{End, Map, Projection};
use crate::kernels::Function;

/// One layer.
pub(super) enum Layer {
    Linear(Linear),
    Normalise(Normalised),
    Attend { qkv: Map, target: Map, heads: usize, scale: f32 },
    Halve { source: Map, target: Map },
    Enlarge { source: Map, target: Map, times: usize },
}

/// A convolution or linear map.
pub(super) struct Linear {
    pub(super) sources: Vec<Map>,
    pub(super) target: Map,
    /// Of a convolution, padding and stride.
    pub(super) taps: Option<[usize; 2]>,
    pub(super) weight: Parameter,
    pub(super) bias: Parameter,
    pub(super) end: End,
}

/// A norm and what goes with it.
pub(super) struct Normalised {
    pub(super) sources: Vec<Map>,
    pub(super) target: Map,
    pub(super) weight: Parameter,
    pub(super) bias: Parameter,
    pub(super) groups: usize,
    pub(super) eps: f64,
    pub(super) modulation: Option<Projection>,
    pub(super) function: Function,
}

/// The steps of a network that is trained.
pub(super) struct Parts {
    pub(super) forward: Range<usize>,
    /// Gradients of weights and of what the network is told.
    pub(super) backward: Range<usize>,
    /// That of its input.
    pub(super) input: Range<usize>,
}

impl<C> Builder<'_, C> {
    /// Notes a layer, where the network is trained.
    pub(super) fn record(&mut self, layer: impl FnOnce() -> Layer) {
        if self.trained.is_some() {
            self.tape.push(layer());
        }
    }

    /// Adds the steps of all gradients, after those of the evaluation; `ends` are the network's input, what it is told,
    /// and its answer; `factor` is what its input is multiplied with first.
    pub(super) fn backward(&mut self, [x, told, answer]: [Map; 3], factor: f32) -> Parts {
        let forward = self.len();
        let (gradient, _) = self.gradient(answer);
        self.push(move |machine, run| {
            let of_answer = &run.back()?.of_answer;
            let apart = of_answer.elem_count() / of_answer.dim(0)?;
            machine.import(of_answer, [0, apart], (1.0, 0.0), &run.at(gradient)?)
        });
        let mut first = None;
        while let Some(layer) = self.tape.pop() {
            match layer {
                Layer::Linear(linear) => {
                    let Some(own) = self.weight_gradients(&linear) else { continue };
                    if linear.sources == [x] {
                        first = Some((linear, own));
                        continue;
                    }
                    self.source_gradients(&linear, own);
                    match linear.end.residual {
                        // What was there before was a layer's, too, whose turn comes.
                        Some(residual) if residual == linear.target => {}
                        Some(residual) => {
                            self.pass_on(linear.target, residual, own);
                            self.forget(linear.target);
                        }
                        None => self.forget(linear.target),
                    }
                }
                Layer::Normalise(norm) => self.norm_gradient(norm),
                Layer::Attend { qkv, target, heads, scale } => {
                    if let Some(own) = self.maps[target.0].gradient {
                        let (x, (to, _)) = (self.place(qkv), self.gradient(qkv));
                        self.push(move |machine, run| {
                            let (x, own, to) = (run.at(x)?, run.at(own)?, run.at(to)?);
                            machine.attend_gradient(&x, &own, (heads, scale), &to)
                        });
                    }
                    self.forget(target);
                }
                Layer::Halve { source, target } => {
                    if let Some(own) = self.maps[target.0].gradient {
                        let (to, add) = self.gradient(source);
                        self.push(move |machine, run| {
                            machine.halve_gradient(&run.at(own)?, (&run.at(to)?, add))
                        });
                    }
                    self.forget(target);
                }
                Layer::Enlarge { source, target, times } => {
                    if let Some(own) = self.maps[target.0].gradient {
                        let (to, add) = self.gradient(source);
                        self.push(move |machine, run| {
                            machine.enlarge_gradient(&run.at(own)?, times, (&run.at(to)?, add))
                        });
                    }
                    self.forget(target);
                }
            }
        }
        self.projection_gradients();
        let (of_told, _) = self.gradient(told);
        self.push(move |machine, run| {
            let of_told = machine.export(&run.at(of_told)?, None, None)?;
            run.back_mut()?.of_told = Some(of_told);
            Ok(())
        });
        let backward = self.len();

        if let Some((first, own)) = first {
            self.source_gradients(&first, own);
        }
        let (of_x, _) = self.gradient(x);
        self.push(move |machine, run| {
            let of_x = machine.export(&run.at(of_x)?, None, None)?;
            run.back_mut()?.of_x = Some((of_x * f64::from(factor))?);
            Ok(())
        });
        Parts { forward: 0..forward, backward: forward..backward, input: backward..self.len() }
    }

    /// Where the gradient of a map is, and whether something is there already.
    fn gradient(&mut self, map: Map) -> (Place, bool) {
        if let Some(gradient) = self.maps[map.0].gradient {
            return (gradient, true);
        }
        let gradient = self.take(self.place(map).size);
        self.maps[map.0].gradient = Some(gradient);
        (gradient, false)
    }

    /// The map and its gradient are not needed any more.
    fn forget(&mut self, map: Map) {
        let entry = &mut self.maps[map.0];
        self.memory.give(entry.place.buffer);
        if let Some(gradient) = entry.gradient.take() {
            self.memory.give(gradient.buffer);
        }
    }

    /// What was added has the gradient of the sum.
    fn pass_on(&mut self, target: Map, residual: Map, own: Place) {
        match self.maps[residual.0].gradient {
            None => self.maps[residual.0].gradient = self.maps[target.0].gradient.take(),
            Some(to) => self.push(move |machine, run| {
                let (to, own) = (run.at(to)?, run.at(own)?);
                let end = Ending { residual: Some(own), ..Ending::NONE };
                machine.finish(&to, &end, Function::Identity, &to)
            }),
        }
    }

    /// Gradients of weight, bias and offset; gives where that of the target is.
    fn weight_gradients(&mut self, linear: &Linear) -> Option<Place> {
        let own = self.maps[linear.target.0].gradient?;
        let End { offset, factor, .. } = linear.end;
        let (weight, bias) = (linear.weight.clone(), linear.bias.clone());
        let sources: Vec<Place> = linear.sources.iter().map(|&map| self.place(map)).collect();
        let (taps, total) = (linear.taps, self.projections.total);
        self.widest = self.widest.max(own.size.channels);
        self.push(move |machine, run| {
            let of_y = run.at(own)?;
            if factor != 1.0 {
                let end = Ending { factor, ..Ending::NONE };
                machine.finish(&of_y, &end, Function::Identity, &of_y)?;
            }
            let back = run.back()?;
            let (sums, layout) = match offset {
                Some(Projection(start)) => (&back.of_projected, [start, total]),
                None => (&back.sums, [0, own.size.channels]),
            };
            machine.sums(&of_y, sums, layout)?;
            machine.totals(sums, layout, run.batch, &run.of(&bias)?)?;
            let of_weight = run.of(&weight)?;
            if let Some(taps) = taps {
                let x = run.at(sources[0])?;
                let shape = (own.size.channels, 3, 3, sources[0].size.channels);
                let given = machine.empty(shape, machine.dtype)?;
                convolve(Part::OfWeight, [&x, &given, &of_y], taps, &mut run.scratch)?;
                return machine.weights_back(&given, &of_weight);
            }
            let (rows, outputs) = (of_y.elem_count() / own.size.channels, own.size.channels);
            let inputs = of_weight.elem_count() / outputs;
            let mut start = 0;
            for source in &sources {
                let columns = source.size.channels;
                let extent = Extent { count: 1, rows: outputs, columns, depth: rows };
                let x = run.at(*source)?;
                let into = Matrices { start, ..Matrices::whole(&of_weight, inputs) };
                let of_y = (Matrices::whole(&of_y, outputs), Order::Transposed);
                let x = (Matrices::whole(&x, columns), Order::Plain);
                multiply(&machine.cuda, extent, of_y, x, into, (1.0, false))?;
                start += columns;
            }
            Ok(())
        });
        Some(own)
    }

    /// Gradients of all sources, from `own`, that of the target.
    fn source_gradients(&mut self, linear: &Linear, own: Place) {
        let weight = linear.weight.clone();
        let targets: Vec<_> = linear.sources.iter().map(|&map| self.gradient(map)).collect();
        if let Some(taps) = linear.taps {
            let (to, add) = targets[0];
            self.push(move |machine, run| {
                let (of_y, to, weight) = (run.at(own)?, run.at(to)?, run.value(&weight)?);
                let given =
                    if add { machine.empty(to.shape(), machine.dtype)? } else { to.clone() };
                convolve(Part::OfInput, [&given, &weight, &of_y], taps, &mut run.scratch)?;
                if !add {
                    return Ok(());
                }
                let end = Ending { residual: Some(given), ..Ending::NONE };
                machine.finish(&to, &end, Function::Identity, &to)
            });
            return;
        }
        self.push(move |machine, run| {
            let (of_y, weight) = (run.at(own)?, run.value(&weight)?);
            let (outputs, inputs) = weight.dims2()?;
            let (rows, mut start) = (of_y.elem_count() / outputs, 0);
            for &(to, add) in &targets {
                let columns = to.size.channels;
                let extent = Extent { count: 1, rows, columns, depth: outputs };
                let (to, of_y) = (run.at(to)?, (Matrices::whole(&of_y, outputs), Order::Plain));
                let part = Matrices { start, ..Matrices::whole(&weight, inputs) };
                let into = Matrices::whole(&to, columns);
                multiply(&machine.cuda, extent, of_y, (part, Order::Plain), into, (1.0, add))?;
                start += columns;
            }
            Ok(())
        });
    }

    fn norm_gradient(&mut self, norm: Normalised) {
        let Normalised { sources, target, weight, bias, groups, eps, modulation, function } = norm;
        if let Some(own) = self.maps[target.0].gradient {
            let places: Vec<_> = sources
                .into_iter()
                .map(|source| (self.place(source), self.gradient(source)))
                .collect();
            let channels = own.size.channels;
            self.widest = self.widest.max(2 * channels);
            self.push(move |machine, run| {
                let tensors: Result<Vec<_>> = places
                    .iter()
                    .map(|&(x, (to, add))| Ok((run.at(x)?, run.at(to)?, add)))
                    .collect();
                let tensors = tensors?;
                let (weight_now, bias_now) = (run.value(&weight)?, run.value(&bias)?);
                let normed = Normed {
                    x: &tensors[0].0,
                    more: tensors.get(1).map(|(x, ..)| x),
                    weight: &weight_now,
                    bias: &bias_now,
                    groups,
                    eps,
                    modulation: run.told(modulation)?,
                    function,
                };
                let mut to = tensors.iter().map(|(_, to, add)| (to, *add));
                let Some(of_x) = to.next() else { bail!("a norm of nothing") };
                let back = run.back()?;
                let shares = back.sums.narrow(0, 0, run.batch * 2 * channels)?;
                machine.norm_gradient(&normed, &run.at(own)?, of_x, to.next(), &shares)?;
                let of_modulation = run.of_told(modulation)?;
                let of = [&run.of(&weight)?, &run.of(&bias)?];
                machine.norm_shares(&normed, &shares, of_modulation, of)
            });
        }
        self.forget(target);
    }

    /// Of all linear maps of the time embedding together, and of that.
    fn projection_gradients(&mut self) {
        let Some([weight, bias]) = self.projections.joined.clone() else { return };
        let Some((map, _)) = self.projections.time else { return };
        let (time, (to, add)) = (self.place(map), self.gradient(map));
        self.push(move |machine, run| {
            let (batch, back) = (run.batch, run.back()?);
            let (weight_now, of_projected) = (run.value(&weight)?, &back.of_projected);
            let (outputs, inputs) = weight_now.dims2()?;
            machine.totals(of_projected, [0, outputs], batch, &run.of(&bias)?)?;
            let of_y = of_projected.to_dtype(machine.dtype)?;
            let (x, of_weight, to) = (run.at(time)?, run.of(&weight)?, run.at(to)?);
            let extent = Extent { count: 1, rows: outputs, columns: inputs, depth: batch };
            let turned = (Matrices::whole(&of_y, outputs), Order::Transposed);
            let source = (Matrices::whole(&x, inputs), Order::Plain);
            let into = Matrices::whole(&of_weight, inputs);
            multiply(&machine.cuda, extent, turned, source, into, (1.0, false))?;
            let extent = Extent { count: 1, rows: batch, columns: inputs, depth: outputs };
            let of_y = (Matrices::whole(&of_y, outputs), Order::Plain);
            let part = (Matrices::whole(&weight_now, inputs), Order::Plain);
            multiply(&machine.cuda, extent, of_y, part, Matrices::whole(&to, inputs), (1.0, add))
        });
    }
}
