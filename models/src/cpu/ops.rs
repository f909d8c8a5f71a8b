//! Operations as kernels for the CPU: what is done, and what of it its gradient will need.

use super::builder::{Builder, tensors, transforms_taps, values, variant};
use super::tape::Saved;
use super::{FEATURES, PROMPT, SAMPLE, TIME};
use crate::graph::{Backend, Epilogue, Graph, Map, Op, Product, Sees, Slice, positions};
use crate::kernels::{
    Activate, Aligned, Attend, Buffer, Channels, Constants, CopyPixels, CountTokens, Crop, Direct,
    Downsample, ElementType, Embed, Export, Fill, Finish, Gate, Geglu, GroupNormAffine,
    GroupNormApply, Image, Import, Learned, Modulate, Nearest, PackKeys, PackValues, RmsNorm, Sum,
    Taps, Upsample, Values, Vector, Winograd, padded,
};
use crate::weights::Weights;

impl Backend for Builder<'_> {
    fn add(&mut self, graph: &Graph, op: &Op, weights: &Weights) -> crate::Result<()> {
        if self.added_in_mode(graph, op, weights)? {
            return Ok(());
        }
        match op {
            &Op::Sample { factor, shift, to } => {
                let output = self.map_of_f32(to);
                self.push(Import { factor, shift, ..Import::whole(SAMPLE, output) });
            }
            &Op::Sinusoid { to, .. }
            | &Op::Row { to, .. }
            | &Op::Condition { to }
            | &Op::TextTime { to, .. } => {
                let output = self.map_of_f32(to);
                let features = graph.features();
                let (start, apart) = (features.start(to), features.total);
                self.push(Import { start, apart, ..Import::whole(FEATURES, output) });
            }
            &Op::Embed { table, places, to } => {
                let tables = self.packed.layer(to, || {
                    let read = |id| values(&weights.get(graph.weight(id))?);
                    Ok([Aligned::of(&read(table)?, 1), Aligned::of(&read(places)?, 1)])
                })?;
                let output = self.map_of_f32(to);
                self.push(Embed::new(SAMPLE, tables, output));
            }
            &Op::Prompt { to } => {
                let output = self.map(to);
                self.push(Import::whole(PROMPT, output));
                if graph.counts_tokens() {
                    let count = self.take(1);
                    self.push(CountTokens { input: output, output: count });
                    self.tokens = Some(count);
                }
            }
            &Op::Nearest { source, table, to } => {
                let (input, output) = (self.image(source), self.map_of_f32(to));
                let [table] = self.packed.layer(to, || {
                    let table = values(&weights.get(graph.weight(table))?)?;
                    Ok([Nearest::pack(&table, input.channels())])
                })?;
                self.push(Nearest::new(table, input, output));
            }
            &Op::Positions { grid, to } => {
                let output = self.map_of_f32(to);
                self.push(Fill::new(&positions(graph.size(to), grid), output));
            }
            &Op::Crop { table, side, to } => {
                let [table] = self.packed.layer(to, || {
                    Ok([Aligned::of(&values(&weights.get(graph.weight(table))?)?, 1)])
                })?;
                let output = self.map_of_f32(to);
                self.push(Crop::new(table, side, output));
            }
            Op::Learned { weights: ids, to } => {
                let output = self.map_of_f32(*to);
                let tensors = || -> crate::Result<Vec<_>> {
                    ids.iter().map(|&id| weights.get(graph.weight(id))).collect()
                };
                if let Some(tape) = &mut self.tape {
                    let tensors = tensors()?;
                    let parameters: Vec<usize> =
                        tensors.into_iter().map(|tensor| tape.register(tensor)).collect();
                    let gradient = tape.parameters[parameters[0]].1;
                    self.save(*to, Saved::Learned { gradient });
                    self.push(Learned { parameters, output });
                } else {
                    let [all] = self.packed.layer(*to, || {
                        let all: crate::Result<Vec<_>> = tensors()?.iter().map(values).collect();
                        Ok([Fill::pack(&all?.concat(), output)])
                    })?;
                    self.push(Fill::with(all, output));
                }
            }
            Op::Project { source, product, to } => {
                self.project(*source, product, *to, weights)?;
            }
            Op::Linear { sources, products, epilogue, to } => {
                self.linear(sources, products, *epilogue, *to, weights)?;
            }
            Op::Convolve { source, product, taps, epilogue, to } => {
                self.convolve(*source, product, *taps, *epilogue, *to, weights)?;
            }
            Op::GroupNorm { .. } => self.group_norm(op, weights)?,
            Op::Attend { .. } => self.attend(op),
            Op::Join { sources, to } => {
                let (inputs, output) = (self.images(sources), self.map(*to));
                let mut first = 0;
                for input in inputs {
                    let count = input.pixels();
                    self.push(CopyPixels::new(input, output, [0, first], count));
                    first += count;
                }
            }
            &Op::Take { source, first, to } => {
                let (input, output) = (self.image(source), self.map(to));
                self.push(CopyPixels::new(input, output, [first, 0], output.pixels()));
            }
            &Op::RmsNorm { source, weight, eps, factor, to } => {
                let [weight] = self.packed.layer(to, || {
                    let weight = values(&weights.get(graph.weight(weight))?)?;
                    let scaled: Vec<f32> = weight.into_iter().map(|x| x * factor).collect();
                    Ok([Aligned::of(&scaled, 1)])
                })?;
                let (input, output) = (self.image(source), self.map(to));
                self.push(RmsNorm::new(input, output, weight, eps));
            }
            &Op::Downsample { source, to } => {
                let (input, output) = (self.image(source), self.map(to));
                self.push(Downsample { input, output });
            }
            &Op::Upsample { source, to } => {
                let (input, output) = (self.image(source), self.map(to));
                self.push(Upsample { input, output });
            }
            &Op::Modulate { source, eps, vector, scale, shift, plus_one, to } => {
                let (image, target) = (self.image(source), self.map(to));
                let moments = self.tape.is_some().then(|| self.take(2 * image.pixels()));
                let parts = [scale, shift].map(|index| self.part(vector, index, source));
                let parts = (parts, one(plus_one));
                self.push(Modulate::new(image, target, eps, parts, moments));
                if let Some(moments) = moments {
                    self.save(to, Saved::Modulate { moments });
                }
            }
            &Op::Gate { source, residual, vector, gate, to } => {
                let (image, target) = (self.image(source), self.map(to));
                let part = self.part(vector, gate, source);
                self.push(Gate::new(image, self.image(residual), target, part));
            }
            &Op::Geglu { source, to } => {
                let (input, output) = (self.image(source), self.map(to));
                self.push(Geglu::new(input, output));
            }
            Op::Sum { source, parts, to } => {
                let (input, parts) = (self.image(*source), self.images(parts));
                let output = self.map(*to);
                self.push(Sum::new(input, parts, output));
            }
            &Op::Activate { source, function, to } => {
                let (input, output) = (self.image(source), self.map(to));
                self.push(Activate { input, output, function });
            }
            &Op::Answer { source, divided, factor, shift } => {
                let input = self.image(source);
                let divisor = divided.then_some(TIME);
                let (start, apart) = place_of(graph, source);
                self.push(Export { divisor, factor, shift, start, apart, ..Export::whole(input) });
            }
        }
        Ok(())
    }

    fn release(&mut self, map: Map) {
        Builder::release(self, map);
    }
}

/// Where among the numbers of all answers one begins, and how many those are.
fn place_of(graph: &Graph, answer: Map) -> (usize, usize) {
    let (mut start, mut all) = (0, 0);
    for (map, size) in graph.answers() {
        if map == answer {
            start = all;
        }
        all += size.height * size.width * size.channels;
    }
    (start, all)
}

/// What is added to a scale.
pub(super) fn one(plus_one: bool) -> f32 {
    if plus_one { 1.0 } else { 0.0 }
}

impl Builder<'_> {
    /// Part `index` of a vector, each as long as `like` has channels.
    pub(super) fn part(&self, vector: Map, index: usize, like: Map) -> Vector {
        let start = index * self.image(like).channels();
        Vector { buffer: self.image(vector).buffer, start }
    }

    /// Where the weights stay as they are, the first projection of a vector does all of them in one product.
    fn project(
        &mut self,
        source: Map,
        product: &Product,
        to: Map,
        weights: &Weights,
    ) -> crate::Result<()> {
        if self.tape.is_some() {
            return self.linear(&[source], &[*product], Epilogue::default(), to, weights);
        }
        if self.maps[to.0].projected.is_some() {
            return Ok(());
        }
        let graph = self.graph;
        let input = graph.size(source).channels;
        let all = graph.ops.iter().filter_map(|op| match op {
            Op::Project { source: from, product, to } if *from == source => Some((product, *to)),
            _ => None,
        });
        let width = |to| padded(graph.size(to).channels);
        let total = all.clone().map(|(_, to)| width(to)).sum();
        let buffer = self.take(total);
        let mut start = 0;
        for (_, to) in all.clone() {
            self.maps[to.0].projected = Some((buffer, start));
            start += width(to);
        }
        let (element, segments) = (ElementType::F32, [total, 0]);
        let output = Image { buffer, element, height: 1, width: 1, segments };
        let (isa, from) = (self.isa, self.image(source));
        let [weight, bias] = self.packed.layer(to, || {
            let (mut weight, mut bias) = (Vec::new(), Vec::new());
            for (product, to) in all {
                let [own_weight, own_bias] = tensors(graph, product, weights)?;
                let end = bias.len() + width(to);
                weight.extend(values(&own_weight)?);
                weight.resize(end * input, 0.0);
                bias.extend(values(&own_bias)?);
                bias.resize(end, 0.0);
            }
            let weight = Direct::pack(isa, &[from], output, Taps::POINT, &weight);
            Ok([weight, Aligned::of(&bias, isa.panel())])
        })?;
        let finish = Finish::with(Constants::Own(bias));
        let weight = Constants::Own(weight);
        self.push(Direct::with(isa, &[from], output, Taps::POINT, weight, finish));
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
        let target = self.sums(to, sources, epilogue);
        if self.tape.is_some() {
            return self.trained_convolution(sources, to, Taps::POINT, products, epilogue, weights);
        }
        let (isa, sources) = (self.isa, self.images(sources));
        let [weight, bias] = self.packed.layer(to, || {
            let (mut weight, mut bias) = (Vec::new(), Vec::new());
            for product in products {
                let [one, other] = tensors(self.graph, product, weights)?;
                let scaled = |x: f32| (f64::from(x) * product.factor) as f32;
                weight.extend(values(&one)?.into_iter().map(scaled));
                bias.extend(values(&other)?.into_iter().map(scaled));
            }
            let weight = Direct::pack(isa, &sources, target, Taps::POINT, &weight);
            Ok([weight, Aligned::of(&bias, isa.panel())])
        })?;
        let finish = self.finish_with(Finish::with(Constants::Own(bias)), epilogue);
        let weight = Constants::Own(weight);
        self.push(Direct::with(isa, &sources, target, Taps::POINT, weight, finish));
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
        let target = self.sums(to, &[source], epilogue);
        if self.tape.is_some() {
            return self.trained_convolution(&[source], to, taps, &[*product], epilogue, weights);
        }
        let (isa, from) = (self.isa, self.image(source));
        let variant = self.packed.variant(to, variant(&from, &target, taps));
        let [weight, bias] = self.packed.layer(to, || {
            let [weight, bias] = tensors(self.graph, product, weights)?;
            let (weight, bias) = (values(&weight)?, Aligned::of(&values(&bias)?, isa.panel()));
            let weight = match variant {
                Some(variant) => Winograd::pack(isa, variant, from, target, &weight),
                None => Direct::pack(isa, &[from], target, taps, &weight),
            };
            Ok([weight, bias])
        })?;
        let finish = self.finish_with(Finish::with(Constants::Own(bias)), epilogue);
        let weight = Constants::Own(weight);
        match variant {
            Some(variant) => {
                let doubled = taps.doubled;
                self.push(Winograd::with(isa, variant, from, target, doubled, weight, finish));
            }
            None if transforms_taps(&from, &target, taps) => {
                let doubled = taps.doubled;
                self.push(Winograd::of_taps(isa, from, target, doubled, weight, finish));
            }
            None => self.push(Direct::with(isa, &[from], target, taps, weight, finish)),
        }
        Ok(())
    }

    fn group_norm(&mut self, op: &Op, weights: &Weights) -> crate::Result<()> {
        let Op::GroupNorm { sources, weight, bias, groups, eps, modulation, function, to } = op
        else {
            unreachable!("whoever calls it has looked");
        };
        let graph = self.graph;
        let images = self.images(sources);
        let statistics: Vec<Buffer> = sources.iter().map(|&map| self.statistics(map)).collect();
        let segments = [images[0].channels(), images.get(1).map_or(0, Image::channels)];
        let read = |id| weights.get(graph.weight(id));
        let (weight, bias) = if let Some(tape) = &mut self.tape {
            let [weight, bias] = [read(*weight)?, read(*bias)?];
            (Values::Parameter(tape.register(weight)), Values::Parameter(tape.register(bias)))
        } else {
            let [weight, bias] = self.packed.layer(*to, || {
                let read = |id| Ok::<_, crate::Error>(Aligned::of(&values(&read(id)?)?, 1));
                Ok([read(*weight)?, read(*bias)?])
            })?;
            (Values::Own(weight), Values::Own(bias))
        };
        let grid = self.encodes(*to);
        let target = match grid {
            None => self.joined(*to, segments),
            Some(_) => self.encoded(*to, segments),
        };
        let output = self.take(2 * target.stride());
        let moments = self.tape.is_some().then(|| self.take(2 * groups));
        if let (Some(moments), Some(tape)) = (moments, &self.tape) {
            let parameters = [tape.number(&weight), tape.number(&bias)];
            self.save(*to, Saved::GroupNorm { map: output, moments, parameters });
        }
        let modulation = modulation.map(|map| self.projected(map));
        let pairs = images.iter().copied().zip(statistics).collect();
        let settle = GroupNormAffine {
            sources: pairs,
            target,
            groups: *groups,
            eps: *eps,
            weight,
            bias,
            modulation,
            output,
            moments,
        };
        self.push(settle);
        let apply = GroupNormApply::new(&images, target, output, *function);
        self.push(match grid {
            None => apply,
            Some(grid) => apply.quantized(grid),
        });
        if self.tape.is_none() {
            self.give(output);
        }
        Ok(())
    }

    fn attend(&mut self, op: &Op) {
        let &Op::Attend { queries, keys, values, heads, sees, to } = op else {
            unreachable!("whoever calls it has looked");
        };
        let [queries, keys, values] = [queries, keys, values].map(|slice| self.channels(slice));
        let (panel, rows) = (self.isa.panel(), self.isa.rows());
        let packed = self.take(PackKeys::len(&keys, panel));
        self.push(PackKeys { keys, heads, panel, output: packed });
        let pairs = (values.image.element == ElementType::Bf16).then(|| {
            let output = self.take(PackValues::len(&values));
            self.push(PackValues { values, output });
            output
        });
        let output = self.map(to);
        self.push(Attend {
            queries,
            keys: packed,
            values,
            pairs,
            heads,
            panel,
            rows,
            causal: sees == Sees::Earlier,
            count: self.counted(sees),
            output,
        });
        self.give(packed);
        if let Some(pairs) = pairs {
            self.give(pairs);
        }
    }

    /// Where the number of keys is that an attention sees.
    pub(super) fn counted(&self, sees: Sees) -> Option<Buffer> {
        self.tokens.filter(|_| sees == Sees::Prompt)
    }

    /// Where some channels of a map are.
    pub(super) fn channels(&self, slice: Slice) -> Channels {
        Channels { image: self.image(slice.map), start: slice.start, width: slice.width }
    }
}
