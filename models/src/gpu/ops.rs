//! Operations as steps on a GPU.

use std::sync::atomic::Ordering;

use candle_core::{DType, Result, Tensor};

use super::builder::{Builder, Projection};
use super::context::Context;
use super::convolution::{Part, convolve};
use super::kernels::{Finish, Norm, Waves};
use super::parameters::{Form, Parameter};
use super::program::Place;
use super::tape::Saved;
use super::{CONDITION, FEATURES, SAMPLE, TIME};
use crate::features::frequencies;
use crate::graph::{
    Backend, Epilogue, Graph, Grid, Map, Op, Product, Scalar, Sees, Size, Slice, Wave, WeightId,
    positions,
};
use crate::kernels::{Function, Taps};
use crate::weights::Weights;

impl Backend for Builder<'_> {
    fn add(&mut self, graph: &Graph, op: &Op, weights: &Weights) -> crate::Result<()> {
        match op {
            &Op::Sample { factor, shift, to } => {
                let Size { height, width, channels } = graph.size(to);
                self.import(SAMPLE, [0, height * width * channels], (factor, shift), to);
            }
            // In a network that is trained they are features, which candle has made.
            &Op::Sinusoid { to, .. } | &Op::Row { to, .. } | &Op::Condition { to }
                if self.trained.is_some() =>
            {
                let features = graph.features();
                let layout = [features.start(to), features.total];
                self.import(FEATURES, layout, (1.0, 0.0), to);
            }
            &Op::Sinusoid { of, wave, to } => self.waves(graph, of, wave, to, weights)?,
            &Op::Row { of, table, to } => {
                let (table, y) = (weights.get(graph.weight(table))?, self.map(to));
                self.push(move |context, run| {
                    context.rows_of(&table, run.inputs[input(of)], &run.at(y)?)
                });
            }
            &Op::Condition { to } => {
                self.import(CONDITION, [0, graph.size(to).channels], (1.0, 0.0), to);
            }
            &Op::Positions { grid, to } => self.positions(graph, grid, to)?,
            Op::Learned { .. }
            | Op::Geglu { .. }
            | Op::Prompt { .. }
            | Op::Embed { .. }
            | Op::TextTime { .. }
            | Op::Nearest { .. }
            | Op::Crop { .. }
            | Op::Join { .. }
            | Op::Take { .. }
            | Op::RmsNorm { .. }
            | Op::Sum { .. } => {
                unreachable!("a network with these is not compiled here");
            }
            Op::Project { source, product, to } => self.project(*source, product, *to, weights)?,
            Op::Linear { sources, products, epilogue, to } => {
                self.linear(sources, products, *epilogue, *to, weights)?;
            }
            Op::Convolve { source, product, taps, epilogue, to } => {
                self.convolve(*source, product, *taps, *epilogue, *to, weights)?;
            }
            Op::GroupNorm { .. } => self.group_norm(op, weights)?,
            Op::Attend { queries, keys, values, heads, sees, to } => {
                assert_eq!(*sees, Sees::All, "another attention is not compiled here");
                self.attend([queries, keys, values], *heads, *to);
            }
            &Op::Downsample { source, to } => {
                let (x, y) = (self.read(source), self.map(to));
                self.push(move |context, run| context.halve(&run.at(x)?, &run.at(y)?));
            }
            &Op::Upsample { source, to } => {
                let (x, y) = (self.read(source), self.map(to));
                self.push(move |context, run| context.enlarge(&run.at(x)?, 2, &run.at(y)?));
            }
            &Op::Modulate { source, eps, vector, scale, shift, to, .. } => {
                let (x, vector) = (self.read(source), self.read(vector));
                let y = self.map(to);
                self.push(move |context, run| {
                    let (x, vector) = (run.at(x)?, run.at(vector)?);
                    context.modulate(&x, eps, &vector, [scale, shift], &run.at(y)?)
                });
            }
            &Op::Gate { source, residual, vector, gate, to } => {
                let (bias, x) = (self.bias(source), self.place(source));
                let (residual, vector) = (self.read(residual), self.read(vector));
                let y = self.map(to);
                self.push(move |context, run| {
                    let (residual, vector) = (run.at(residual)?, run.at(vector)?);
                    let gate = (&vector, gate);
                    context.gate(&run.at(x)?, bias.as_ref(), &residual, gate, &run.at(y)?)
                });
            }
            &Op::Activate { source, function, to } => self.activate(source, function, to),
            &Op::Answer { source, divided, .. } => {
                let (bias, source) = (self.bias(source), self.place(source));
                self.push(move |context, run| {
                    let time = run.inputs[TIME];
                    let divisor = divided.then(|| time.to_dtype(DType::F32)).transpose()?;
                    let x = run.at(source)?;
                    run.answer = Some(context.export(&x, bias.as_ref(), divisor.as_ref())?);
                    Ok(())
                });
            }
        }
        Ok(())
    }

    fn release(&mut self, map: Map) {
        Builder::release(self, map);
    }
}

/// The input that has a number of each sample.
fn input(of: Scalar) -> usize {
    match of {
        Scalar::Time => TIME,
        Scalar::Condition => CONDITION,
        Scalar::Guidance | Scalar::Number(_) => {
            unreachable!("a network with it is not compiled here")
        }
    }
}

impl Builder<'_> {
    /// Numbers of an input, `layout` being where a sample's begin and how many there are of each.
    fn import(&mut self, input: usize, layout: [usize; 2], affine: (f32, f32), to: Map) {
        let target = self.map(to);
        self.push(move |context, run| {
            let x = run.inputs[input].to_dtype(context.dtype)?.contiguous()?;
            context.import(&x, layout, affine, &run.at(target)?)
        });
    }

    /// Sines and cosines of an input, a number of each sample.
    fn waves(
        &mut self,
        graph: &Graph,
        of: Scalar,
        wave: Wave,
        to: Map,
        weights: &Weights,
    ) -> crate::Result<()> {
        let half = graph.size(to).channels / 2;
        let waves = match wave {
            Wave::Positional { shift, cosines_first } => Waves {
                frequencies: frequencies(half, shift, weights.device())?,
                cosines_first,
                logarithm: false,
            },
            Wave::Fourier { weight } => Waves {
                frequencies: weights.get_as(graph.weight(weight), DType::F32)?,
                cosines_first: false,
                logarithm: true,
            },
        };
        let y = self.map(to);
        self.push(move |context, run| {
            let numbers = run.inputs[input(of)].to_dtype(DType::F32)?;
            context.waves(&numbers, &waves, &run.at(y)?)
        });
        Ok(())
    }

    fn positions(&mut self, graph: &Graph, grid: Grid, to: Map) -> crate::Result<()> {
        let size = graph.size(to);
        let Context { device, dtype, .. } = &self.context;
        let shape = (size.height * size.width, size.channels);
        let pixels = Tensor::from_vec(positions(size, grid), shape, device)?;
        let constant = pixels.t()?.to_dtype(*dtype)?.contiguous()?;
        let y = self.map(to);
        self.push(move |context, run| context.import(&constant, [0, 0], (1.0, 0.0), &run.at(y)?));
        Ok(())
    }

    fn project(
        &mut self,
        source: Map,
        product: &Product,
        to: Map,
        weights: &Weights,
    ) -> crate::Result<()> {
        if self.projections.time.is_none() {
            self.settle(source);
            self.projections.time = Some((source, self.len()));
        }
        let weight = self.weight(product.weight, weights)?;
        let width = weight.dim(0)?;
        let bias = self.bias_of(product, width, weights)?;
        let all = &mut self.projections;
        all.weights.push(weight);
        all.biases.push(bias);
        self.maps[to.0].projection = Some(Projection(all.total));
        all.total += width;
        Ok(())
    }

    fn group_norm(&mut self, op: &Op, weights: &Weights) -> crate::Result<()> {
        let Op::GroupNorm { sources, weight, bias, groups, eps, modulation, function, to } = op
        else {
            unreachable!("whoever calls it has looked");
        };
        let (first, second) = (sources[0], sources.get(1).copied());
        let [weight, bias] = [weight, bias].map(|&id| self.vector(id, weights));
        let (weight, bias) = (weight?, bias?);
        let (groups, eps, function) = (*groups, *eps, *function);
        let modulation = modulation.and_then(|map| self.maps[map.0].projection);
        let more = second.map(|second| self.read(second));
        let x = self.place(first);
        let (pending, keep) = self.take_pending(first);
        let residual = pending.as_ref().and_then(|pending| pending.residual);
        let target = self.map(*to);
        self.save(*to, || Saved::GroupNorm { weight: weight.clone(), bias: bias.clone() });
        self.push(move |context, run| {
            let (weight, bias) = (run.value(&weight)?, run.value(&bias)?);
            let norm = Norm {
                weight: &weight,
                bias: &bias,
                groups,
                eps,
                before: pending
                    .as_ref()
                    .map_or(Ok(Finish::NONE), |pending| run.finish_of(pending))?,
                keep: keep.load(Ordering::Relaxed),
                modulation: run.per_sample(modulation)?,
                function,
            };
            let more = more.map(|place| run.at(place)).transpose()?;
            context.group_norm(&run.at(x)?, more.as_ref(), norm, &run.at(target)?)
        });
        self.added(residual);
        Ok(())
    }

    fn convolve(
        &mut self,
        source: Map,
        product: &Product,
        taps: Taps,
        epilogue: Epilogue,
        to: Map,
        weights: &Weights,
    ) -> crate::Result<()> {
        let (from, channels) = (self.graph.size(source), self.graph.size(to).channels);
        let weight = self.weight(product.weight, weights)?;
        let bias = self.bias_of(product, channels, weights)?;
        let (weight, bias) = match &mut self.trained {
            None => {
                let filter = weight.permute((0, 2, 3, 1))?.contiguous()?;
                (Parameter::Own(filter), Parameter::Own(bias))
            }
            Some(trained) => {
                let shape = (channels, taps.side, taps.side, from.channels);
                let weight = trained.register([weight], shape, Form::Filter);
                (weight, trained.register([bias], channels, Form::Vector))
            }
        };
        let Taps { stride, padding, doubled, .. } = taps;
        let times = if doubled { 2 } else { 1 };
        // Without zeros above and left there are one row and column of them below and right.
        let [height, width] =
            [from.height, from.width].map(|side| times * side + usize::from(padding == 0));
        let seen = if [height, width] == [from.height, from.width] {
            self.settle(source);
            self.retain(source)
        } else {
            let x = self.read(source);
            let seen = self.another(Size { height, width, ..from });
            let y = self.place(seen);
            self.push(move |context, run| context.enlarge(&run.at(x)?, times, &run.at(y)?));
            seen
        };
        let (x, y) = (self.place(seen), self.defer(to, bias.clone(), epilogue)?);
        self.save(to, || Saved::Convolve { weight: weight.clone(), bias, seen, times });
        self.push(move |_, run| {
            let (x, weight, y) = (run.at(x)?, run.value(&weight)?, run.at(y)?);
            convolve(Part::Answer, [&x, &weight, &y], [padding, stride], &mut run.scratch)
        });
        self.release(seen);
        Ok(())
    }

    fn linear(
        &mut self,
        sources: &[Map],
        products: &[Product],
        epilogue: Epilogue,
        to: Map,
        weights: &Weights,
    ) -> crate::Result<()> {
        let [weight, bias] = self.joined(products, weights)?;
        if self.trained.is_some() {
            // A trained weight is read as it is, so an attention multiplies its scores instead of the queries.
            self.maps[to.0].scale = products[0].factor as f32;
        }
        let places: Vec<Place> = sources.iter().map(|&source| self.read(source)).collect();
        let y = self.defer(to, bias.clone(), epilogue)?;
        self.save(to, || Saved::Linear { weight: weight.clone(), bias });
        self.push(move |context, run| {
            let maps: Result<Vec<Tensor>> = places.iter().map(|&place| run.at(place)).collect();
            context.linear(&maps?, &run.value(&weight)?, &run.at(y)?)
        });
        Ok(())
    }

    fn attend(&mut self, [queries, keys, values]: [&Slice; 3], heads: usize, to: Map) {
        let parts = [queries, keys, values].map(|slice| (slice.map, slice.start));
        let [second, third] = [1, 2].map(|part| (queries.map, part * queries.width));
        assert_eq!(parts, [(queries.map, 0), second, third], "an attention of one map");
        let (map, scale) = (queries.map, self.maps[queries.map.0].scale);
        let fused = self.context.attends(queries.width / heads);
        let bias = if fused {
            self.bias(map)
        } else {
            self.settle(map);
            None
        };
        let (x, y) = (self.place(map), self.map(to));
        self.push(move |context, run| {
            let (x, y) = (run.at(x)?, run.at(y)?);
            match fused {
                true => context.attend(&x, bias.as_ref(), (heads, scale), &y),
                false => context.attend_with_scores(&x, (heads, scale), &y),
            }
        });
    }

    fn activate(&mut self, source: Map, function: Function, to: Map) {
        if self.trained.is_some() {
            // Its gradient will read the map.
            self.settle(source);
        }
        let (pending, x) = (self.pending(source), self.place(source));
        let y = self.map(to);
        self.push(move |context, run| {
            let end =
                pending.as_ref().map_or(Ok(Finish::NONE), |pending| run.finish_of(pending))?;
            context.finish(&run.at(x)?, &end, function, &run.at(y)?)
        });
    }

    /// A weight as the network has it: of its type, or, where it is trained, f32.
    fn weight(&self, id: WeightId, weights: &Weights) -> crate::Result<Tensor> {
        let spec = self.graph.weight(id);
        if self.trained.is_some() { weights.get_as(spec, DType::F32) } else { weights.get(spec) }
    }

    /// f32 `[width]`; zeros where a product has no bias.
    fn bias_of(&self, product: &Product, width: usize, weights: &Weights) -> crate::Result<Tensor> {
        match product.bias {
            Some(bias) => weights.get_as(self.graph.weight(bias), DType::F32),
            None => Ok(Tensor::zeros(width, DType::F32, &self.context.device)?),
        }
    }

    /// A vector of f32.
    fn vector(&mut self, id: WeightId, weights: &Weights) -> crate::Result<Parameter> {
        let vector = weights.get_as(self.graph.weight(id), DType::F32)?;
        let length = vector.elem_count();
        Ok(match &mut self.trained {
            None => Parameter::Own(vector),
            Some(trained) => trained.register([vector], length, Form::Vector),
        })
    }

    /// Weights and biases of several products as one; those that are trained are not multiplied.
    fn joined(&mut self, products: &[Product], weights: &Weights) -> crate::Result<[Parameter; 2]> {
        let (mut all, mut biases) = (Vec::new(), Vec::new());
        for product in products {
            let weight = self.weight(product.weight, weights)?;
            let bias = self.bias_of(product, weight.dim(0)?, weights)?;
            if self.trained.is_some() {
                all.push(weight);
                biases.push(bias);
            } else {
                all.push((weight.flatten_from(1)? * product.factor)?);
                biases.push((bias * product.factor)?);
            }
        }
        let Some(trained) = &mut self.trained else {
            let joined = [Tensor::cat(&all, 0)?, Tensor::cat(&biases, 0)?];
            return Ok(joined.map(Parameter::Own));
        };
        let outputs = biases.iter().map(Tensor::elem_count).sum();
        let inputs = all.iter().map(Tensor::elem_count).sum::<usize>() / outputs;
        Ok([
            trained.register(all, (outputs, inputs), Form::Matrix),
            trained.register(biases, outputs, Form::Vector),
        ])
    }
}
