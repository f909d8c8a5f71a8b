//! The gradients of operations as steps on a GPU; [`crate::graph::backward`] has their order.
//!
//! The maps of a network that is trained stay where they are until its gradients are taken.

use std::ops::Range;

use candle_core::{DType, Result, Tensor, bail};

use super::builder::{Builder, Projection};
use super::convolution::{Part, convolve};
use super::kernels::{Finish, Normed};
use super::parameters::Parameter;
use super::product::{Extent, Matrices, Order, multiply};
use super::program::Place;
use crate::graph::backward::{Differentiate, backward};
use crate::graph::{Epilogue, Graph, Map, Op};
use crate::kernels::Function;

/// What an operation leaves for its gradient.
#[derive(Clone)]
pub(super) enum Saved {
    Linear {
        weight: Parameter,
        bias: Parameter,
    },
    Convolve {
        weight: Parameter,
        bias: Parameter,
        /// What the convolution sees: its source, or that enlarged so many times.
        seen: Map,
        times: usize,
    },
    GroupNorm {
        weight: Parameter,
        bias: Parameter,
    },
}

/// The steps of a network that is trained.
pub(super) struct Parts {
    pub(super) forward: Range<usize>,
    /// Gradients of weights and features.
    pub(super) backward: Range<usize>,
    /// That of the noisy sample.
    pub(super) input: Range<usize>,
}

impl Builder<'_> {
    /// Notes what the operation that writes a map leaves, where the network is trained.
    pub(super) fn save(&mut self, to: Map, saved: impl FnOnce() -> Saved) {
        if self.trained.is_some() {
            self.saved.push((to, saved()));
        }
    }

    fn saved(&self, to: Map) -> Saved {
        let saved = self.saved.iter().rev().find(|(map, _)| *map == to);
        saved.map(|(_, saved)| saved.clone()).expect("the operation left what its gradient needs")
    }

    /// Adds the steps of all gradients, after those of the evaluation.
    pub(super) fn differentiate(&mut self) -> Parts {
        let graph = self.graph;
        let forward = self.len();
        if let Some(Op::Answer { source, .. }) = graph.ops.last() {
            let (gradient, _) = self.gradient(*source);
            self.push(move |context, run| {
                let of_answer = &run.back()?.of_answer;
                let apart = of_answer.elem_count() / of_answer.dim(0)?;
                context.import(of_answer, [0, apart], (1.0, 0.0), &run.at(gradient)?)
            });
        }
        let first = backward(graph, self);
        self.feature_gradients();
        let backward = self.len();

        if let Some(first) = first {
            self.source_gradients(graph, first);
        }
        let (sample, factor) = graph.sample();
        let (of_x, _) = self.gradient(sample);
        self.push(move |context, run| {
            let of_x = context.export(&run.at(of_x)?, None, None)?;
            run.back_mut()?.of_x = Some((of_x * f64::from(factor))?);
            Ok(())
        });
        Parts { forward: 0..forward, backward: forward..backward, input: backward..self.len() }
    }

    /// Those of all features side by side, zeros where one has none.
    fn feature_gradients(&mut self) {
        let starts = self.graph.features().starts;
        let of_each: Vec<_> = starts
            .into_iter()
            .map(|(map, _)| (self.maps[map.0].gradient, self.graph.size(map).channels))
            .collect();
        self.push(move |context, run| {
            let of_one = |&(gradient, width): &(Option<Place>, usize)| match gradient {
                Some(place) => context.export(&run.at(place)?, None, None)?.flatten_from(1),
                None => Tensor::zeros((run.batch, width), context.dtype, &context.device),
            };
            let all: Result<Vec<Tensor>> = of_each.iter().map(of_one).collect();
            run.back_mut()?.of_features = Some(Tensor::cat(&all?, 1)?);
            Ok(())
        });
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

    /// The gradient of what an operation wrote, which has one.
    fn own(&self, to: Map) -> Place {
        self.maps[to.0].gradient.expect("only an operation whose result has a gradient comes here")
    }

    /// Of weight, bias and offset of a linear map or, with its padding and stride, a convolution.
    fn linear_weights(
        &mut self,
        sources: &[Map],
        [weight, bias]: [Parameter; 2],
        taps: Option<[usize; 2]>,
        epilogue: Epilogue,
        to: Map,
    ) {
        let own = self.own(to);
        let Epilogue { offset, factor, .. } = epilogue;
        let offset = offset.and_then(|map| self.maps[map.0].projection);
        let sources: Vec<Place> = sources.iter().map(|&map| self.place(map)).collect();
        let total = self.projections.total;
        self.widest = self.widest.max(own.size.channels);
        self.push(move |context, run| {
            let of_y = run.at(own)?;
            if factor != 1.0 {
                let end = Finish { factor, ..Finish::NONE };
                context.finish(&of_y, &end, Function::Identity, &of_y)?;
            }
            let back = run.back()?;
            let (sums, layout) = match offset {
                Some(Projection(start)) => (&back.of_projected, [start, total]),
                None => (&back.sums, [0, own.size.channels]),
            };
            context.sums(&of_y, sums, layout)?;
            context.totals(sums, layout, run.batch, &run.of(&bias)?)?;
            let of_weight = run.of(&weight)?;
            if let Some(taps) = taps {
                let x = run.at(sources[0])?;
                let shape = (own.size.channels, 3, 3, sources[0].size.channels);
                let given = context.empty(shape, context.dtype)?;
                convolve(Part::OfWeight, [&x, &given, &of_y], taps, &mut run.scratch)?;
                return context.weights_back(&given, &of_weight);
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
                multiply(&context.cuda, extent, of_y, x, into, (1.0, false))?;
                start += columns;
            }
            Ok(())
        });
    }

    /// Of all sources of a linear map.
    fn linear_sources(&mut self, sources: &[Map], weight: Parameter, to: Map) {
        let own = self.own(to);
        let targets: Vec<_> = sources.iter().map(|&map| self.gradient(map)).collect();
        self.push(move |context, run| {
            let (of_y, weight) = (run.at(own)?, run.value(&weight)?);
            let (outputs, inputs) = weight.dims2()?;
            let (rows, mut start) = (of_y.elem_count() / outputs, 0);
            for &(to, add) in &targets {
                let columns = to.size.channels;
                let extent = Extent { count: 1, rows, columns, depth: outputs };
                let (to, of_y) = (run.at(to)?, (Matrices::whole(&of_y, outputs), Order::Plain));
                let part = Matrices { start, ..Matrices::whole(&weight, inputs) };
                let into = Matrices::whole(&to, columns);
                multiply(&context.cuda, extent, of_y, (part, Order::Plain), into, (1.0, add))?;
                start += columns;
            }
            Ok(())
        });
    }

    /// Of a convolution's source, by way of what it sees of it.
    fn convolution_source(&mut self, source: Map, taps: [usize; 2], to: Map) {
        let own = self.own(to);
        let Saved::Convolve { weight, seen, times, .. } = self.saved(to) else { return };
        let (of_seen, add) = self.gradient(seen);
        self.push(move |context, run| {
            let (of_y, to, weight) = (run.at(own)?, run.at(of_seen)?, run.value(&weight)?);
            let given = if add { context.empty(to.shape(), context.dtype)? } else { to.clone() };
            convolve(Part::OfInput, [&given, &weight, &of_y], taps, &mut run.scratch)?;
            if !add {
                return Ok(());
            }
            let end = Finish { residual: Some(given), ..Finish::NONE };
            context.finish(&to, &end, Function::Identity, &to)
        });
        if seen != source {
            let (to, add) = self.gradient(source);
            self.push(move |context, run| {
                context.enlarge_gradient(&run.at(of_seen)?, times, (&run.at(to)?, add))
            });
            self.forget(seen);
        }
    }

    /// Of all that a norm read, its weights among them.
    fn norm(&mut self, op: &Op) {
        let Op::GroupNorm { sources, groups, eps, modulation, function, to, .. } = op else {
            return;
        };
        let (groups, eps, function) = (*groups, *eps, *function);
        let Saved::GroupNorm { weight, bias } = self.saved(*to) else { return };
        let own = self.own(*to);
        let modulation = modulation.and_then(|map| self.maps[map.0].projection);
        let places: Vec<_> =
            sources.iter().map(|&source| (self.place(source), self.gradient(source))).collect();
        let channels = own.size.channels;
        self.widest = self.widest.max(2 * channels);
        self.push(move |context, run| {
            let tensors: Result<Vec<_>> =
                places.iter().map(|&(x, (to, add))| Ok((run.at(x)?, run.at(to)?, add))).collect();
            let tensors = tensors?;
            let (weight_now, bias_now) = (run.value(&weight)?, run.value(&bias)?);
            let normed = Normed {
                x: &tensors[0].0,
                more: tensors.get(1).map(|(x, ..)| x),
                weight: &weight_now,
                bias: &bias_now,
                groups,
                eps,
                modulation: run.per_sample(modulation)?,
                function,
            };
            let mut to = tensors.iter().map(|(_, to, add)| (to, *add));
            let Some(of_x) = to.next() else { bail!("a norm of nothing") };
            let back = run.back()?;
            let shares = back.sums.narrow(0, 0, run.batch * 2 * channels)?;
            context.norm_gradient(&normed, &run.at(own)?, of_x, to.next(), &shares)?;
            let of_modulation = run.gradient_per_sample(modulation)?;
            let of = [&run.of(&weight)?, &run.of(&bias)?];
            context.norm_shares(&normed, &shares, of_modulation, of)
        });
    }

    /// Of all linear maps of the time embedding together, and of that.
    fn projection_gradients(&mut self) {
        let Some([weight, bias]) = self.projections.joined.clone() else { return };
        let Some((map, _)) = self.projections.time else { return };
        let (time, (to, add)) = (self.place(map), self.gradient(map));
        self.push(move |context, run| {
            let (batch, back) = (run.batch, run.back()?);
            let (weight_now, of_projected) = (run.value(&weight)?, &back.of_projected);
            let (outputs, inputs) = weight_now.dims2()?;
            context.totals(of_projected, [0, outputs], batch, &run.of(&bias)?)?;
            let of_y = of_projected.to_dtype(context.dtype)?;
            let (x, of_weight, to) = (run.at(time)?, run.of(&weight)?, run.at(to)?);
            let extent = Extent { count: 1, rows: outputs, columns: inputs, depth: batch };
            let turned = (Matrices::whole(&of_y, outputs), Order::Transposed);
            let source = (Matrices::whole(&x, inputs), Order::Plain);
            let into = Matrices::whole(&of_weight, inputs);
            multiply(&context.cuda, extent, turned, source, into, (1.0, false))?;
            let extent = Extent { count: 1, rows: batch, columns: inputs, depth: outputs };
            let of_y = (Matrices::whole(&of_y, outputs), Order::Plain);
            let part = (Matrices::whole(&weight_now, inputs), Order::Plain);
            multiply(&context.cuda, extent, of_y, part, Matrices::whole(&to, inputs), (1.0, add))
        });
    }

    /// `function'(x)` times the gradient of `function(x)`, by candle's operations.
    fn activation(&mut self, source: Map, function: Function, to: Map) {
        let (own, x) = (self.own(to), self.place(source));
        let (of_x, add) = self.gradient(source);
        self.push(move |context, run| {
            let (own, to) = (run.at(own)?, run.at(of_x)?);
            let slope = slope(function, &run.at(x)?.to_dtype(DType::F32)?)?;
            let given = (own.to_dtype(DType::F32)? * slope)?.to_dtype(context.dtype)?;
            let residual = add.then(|| to.clone());
            let end = Finish { residual, ..Finish::NONE };
            context.finish(&given, &end, Function::Identity, &to)
        });
    }
}

/// The derivative of a function, of f32.
fn slope(function: Function, x: &Tensor) -> Result<Tensor> {
    let logistic = |x: &Tensor| (x.neg()?.exp()? + 1.0)?.recip();
    match function {
        Function::Identity => x.ones_like(),
        Function::Relu => x.gt(0f32)?.to_dtype(DType::F32),
        Function::Silu => {
            let y = logistic(x)?;
            &y * (x * (1.0 - &y)?)?.affine(1.0, 1.0)?
        }
        Function::Gelu => {
            let density = ((x.sqr()? * -0.5)?.exp()? / (2.0 * std::f64::consts::PI).sqrt())?;
            let below = ((x * std::f64::consts::FRAC_1_SQRT_2)?.erf()?.affine(0.5, 0.5))?;
            below + (x * density)?
        }
        Function::Mish => {
            let softplus = (x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?)?;
            let t = softplus.tanh()?;
            &t + (x * t.sqr()?.affine(-1.0, 1.0)? * logistic(x)?)?
        }
        other => bail!("there is no derivative of {other:?} on a GPU"),
    }
}

impl Differentiate for Builder<'_> {
    fn has_gradient(&self, map: Map) -> bool {
        // All projections' gradients are taken with that of the first.
        let entry = &self.maps[map.0];
        entry.gradient.is_some() || entry.projection == Some(Projection(0))
    }

    fn weight_gradients(&mut self, _: &Graph, op: &Op) {
        match op {
            Op::Linear { sources, epilogue, to, .. } => {
                let Saved::Linear { weight, bias } = self.saved(*to) else { return };
                self.linear_weights(sources, [weight, bias], None, *epilogue, *to);
            }
            Op::Convolve { taps, epilogue, to, .. } => {
                let Saved::Convolve { weight, bias, seen, .. } = self.saved(*to) else { return };
                let taps = Some([taps.padding, taps.stride]);
                self.linear_weights(&[seen], [weight, bias], taps, *epilogue, *to);
            }
            // Others' come with those of their sources, or they have no weights.
            _ => {}
        }
    }

    fn source_gradients(&mut self, _: &Graph, op: &Op) {
        match *op {
            Op::Project { .. } => self.projection_gradients(),
            Op::Linear { ref sources, to, .. } => {
                let Saved::Linear { weight, .. } = self.saved(to) else { return };
                self.linear_sources(sources, weight, to);
            }
            Op::Convolve { source, taps, to, .. } => {
                self.convolution_source(source, [taps.padding, taps.stride], to);
            }
            Op::GroupNorm { .. } => self.norm(op),
            Op::Attend { queries, heads, to, .. } => {
                let (own, x) = (self.own(to), self.place(queries.map));
                let (of_x, _) = self.gradient(queries.map);
                let scale = self.maps[queries.map.0].scale;
                self.push(move |context, run| {
                    let (x, own, to) = (run.at(x)?, run.at(own)?, run.at(of_x)?);
                    context.attend_gradient(&x, &own, (heads, scale), &to)
                });
            }
            Op::Downsample { source, to } => {
                let own = self.own(to);
                let (to, add) = self.gradient(source);
                self.push(move |context, run| {
                    context.halve_gradient(&run.at(own)?, (&run.at(to)?, add))
                });
            }
            Op::Upsample { source, to } => {
                let own = self.own(to);
                let (to, add) = self.gradient(source);
                self.push(move |context, run| {
                    context.enlarge_gradient(&run.at(own)?, 2, (&run.at(to)?, add))
                });
            }
            Op::Activate { source, function, to } => self.activation(source, function, to),
            // A network with these is not trained here ([`super::trains`]); the others have no source.
            Op::Modulate { .. }
            | Op::Gate { .. }
            | Op::Geglu { .. }
            | Op::Sum { .. }
            | Op::Join { .. }
            | Op::Take { .. }
            | Op::RmsNorm { .. }
            | Op::Crop { .. }
            | Op::Learned { .. }
            | Op::Sample { .. }
            | Op::Sinusoid { .. }
            | Op::Row { .. }
            | Op::Condition { .. }
            | Op::TextTime { .. }
            | Op::Prompt { .. }
            | Op::Embed { .. }
            | Op::Nearest { .. }
            | Op::Positions { .. }
            | Op::Answer { .. } => {}
        }
    }

    fn pass_on(&mut self, sum: Map, residual: Map) {
        match self.maps[residual.0].gradient {
            None => self.maps[residual.0].gradient = self.maps[sum.0].gradient.take(),
            Some(to) => {
                let own = self.own(sum);
                self.push(move |context, run| {
                    let (to, own) = (run.at(to)?, run.at(own)?);
                    let end = Finish { residual: Some(own), ..Finish::NONE };
                    context.finish(&to, &end, Function::Identity, &to)
                });
            }
        }
    }

    fn forget(&mut self, map: Map) {
        let entry = &mut self.maps[map.0];
        // A projection has no memory of its own.
        for place in entry.place.into_iter().chain(entry.gradient.take()) {
            self.memory.give(place.buffer);
        }
    }
}
