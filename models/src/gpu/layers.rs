//! Layers as steps on a GPU.

use std::sync::atomic::Ordering;

use candle_core::{DType, Result, Tensor};

use super::builder::{Builder, Debt, Entry};
use super::convolution::{Part, convolve};
use super::kernels::{Ending, Norm, Waves};
use super::machine::Machine;
use super::parameters::{Form, Parameter};
use super::program::Place;
use super::tape::{Layer, Linear, Normalised};
use crate::assembly::{Affine, Assembly, End, Map, Projection, Size};
use crate::kernels::{Function, Taps};
use crate::weights::Weights;

impl<'a, C> Assembly<'a, C> for Builder<'a, C> {
    fn config(&self) -> &'a C {
        self.config
    }

    fn size(&self, map: Map) -> Size {
        self.place(map).size
    }

    fn map(&mut self, height: usize, width: usize, channels: usize) -> Map {
        let place = self.take(Size { height, width, channels });
        self.maps.push(Entry::new(place));
        Map(self.maps.len() - 1)
    }

    fn answer(&mut self, height: usize, width: usize, channels: usize) -> Map {
        self.map(height, width, channels)
    }

    fn retain(&mut self, map: Map) -> Map {
        self.maps[map.0].uses += 1;
        map
    }

    /// After the last use the map's memory is used for others, unless the network is trained: then gradients still need
    /// it.
    fn release(&mut self, map: Map) {
        if self.trained.is_some() {
            return;
        }
        let entry = &mut self.maps[map.0];
        entry.uses -= 1;
        if entry.uses == 0 {
            self.memory.give(entry.place.buffer);
            // Nobody reads it, so nobody adds it.
            if let Debt::Owed(owed) = std::mem::replace(&mut entry.debt, Debt::None) {
                self.added(owed.residual);
            }
        }
    }

    fn import(&mut self, input: usize, size: Size, factor: f32, shift: f32) -> Map {
        let Size { height, width, channels } = size;
        let map = self.map(height, width, channels);
        let target = self.place(map);
        self.push(move |machine, run| {
            let x = run.inputs[input].to_dtype(machine.dtype)?.contiguous()?;
            let apart = height * width * channels;
            machine.import(&x, [0, apart], (factor, shift), &run.at(target)?)
        });
        map
    }

    fn export(&mut self, answer: Map, divisor: Option<usize>) {
        let (bias, source) = (self.bias(answer), self.place(answer));
        self.push(move |machine, run| {
            let divisor =
                divisor.map(|input| run.inputs[input].to_dtype(DType::F32)).transpose()?;
            let x = run.at(source)?;
            run.answer = Some(machine.export(&x, bias.as_ref(), divisor.as_ref())?);
            Ok(())
        });
        self.release(answer);
    }

    fn time(&mut self, time: Map) {
        self.settle(time);
        self.projections.time = Some((time, self.len()));
    }

    fn project(
        &mut self,
        weights: &Weights,
        input: usize,
        width: usize,
    ) -> crate::Result<Projection> {
        let all = &mut self.projections;
        all.weights.push(weights.get("weight", &[width, input])?);
        all.biases.push(weights.get_as("bias", &[width], DType::F32)?);
        let start = all.total;
        all.total += width;
        Ok(Projection(start))
    }

    fn normalise(
        &mut self,
        weights: &Weights,
        sources: &[Map],
        (groups, eps): (usize, f64),
        modulation: Option<Projection>,
        function: Function,
    ) -> crate::Result<Map> {
        let (first, second) = (sources[0], sources.get(1).copied());
        let Size { height, width, channels: own } = self.size(first);
        let channels = own + second.map_or(0, |second| self.size(second).channels);
        let [weight, bias] = ["weight", "bias"].map(|name| self.vector(weights, name, channels));
        let (weight, bias) = (weight?, bias?);
        let more = second.map(|second| self.read(second));
        let x = self.place(first);
        let (owed, keep) = self.take_owed(first);
        let residual = owed.as_ref().and_then(|owed| owed.residual);
        let map = self.map(height, width, channels);
        let target = self.place(map);
        self.record(|| {
            let (weight, bias) = (weight.clone(), bias.clone());
            let (sources, target) = (sources.to_vec(), map);
            let of =
                Normalised { sources, target, weight, bias, groups, eps, modulation, function };
            Layer::Normalise(of)
        });
        self.push(move |machine, run| {
            let (weight, bias) = (run.value(&weight)?, run.value(&bias)?);
            let norm = Norm {
                weight: &weight,
                bias: &bias,
                groups,
                eps,
                before: owed.as_ref().map_or(Ok(Ending::NONE), |owed| run.ending(owed))?,
                keep: keep.load(Ordering::Relaxed),
                modulation: run.told(modulation)?,
                function,
            };
            let more = more.map(|place| run.at(place)).transpose()?;
            machine.group_norm(&run.at(x)?, more.as_ref(), norm, &run.at(target)?)
        });
        self.added(residual);
        Ok(map)
    }

    fn convolve(
        &mut self,
        weights: &Weights,
        source: Map,
        target: Map,
        taps: Taps,
        end: End,
    ) -> crate::Result<()> {
        let (from, to) = (self.size(source), self.size(target));
        let weight = weights.get("weight", &[to.channels, from.channels, 3, 3])?;
        let weight = match &mut self.trained {
            None => Parameter::Own(weight.permute((0, 2, 3, 1))?.contiguous()?),
            Some(trained) => {
                trained.register([weight], (to.channels, 3, 3, from.channels), Form::Filter)
            }
        };
        let bias = self.vector(weights, "bias", to.channels)?;
        let Taps { stride, padding, doubled, .. } = taps;
        let times = if doubled { 2 } else { 1 };
        // Without zeros above and left there are one row and one column of them below and right.
        let [height, width] =
            [from.height, from.width].map(|side| times * side + usize::from(padding == 0));
        let seen = match [height, width] == [from.height, from.width] {
            true => {
                self.settle(source);
                self.retain(source)
            }
            false => self.enlarge(source, times, [height, width]),
        };
        let (x, y) = (self.place(seen), self.owe(target, bias.clone(), end)?);
        self.record(|| {
            let (sources, taps, weight) = (vec![seen], Some([padding, stride]), weight.clone());
            Layer::Linear(Linear { sources, target, taps, weight, bias, end })
        });
        self.push(move |_, run| {
            let (x, weight, y) = (run.at(x)?, run.value(&weight)?, run.at(y)?);
            convolve(Part::Answer, [&x, &weight, &y], [padding, stride], &mut run.scratch)
        });
        self.release(seen);
        Ok(())
    }

    fn pointwise(
        &mut self,
        sources: &[Map],
        target: Map,
        parts: &[Affine],
        end: End,
    ) -> crate::Result<()> {
        let [weight, bias] = self.affine(parts)?;
        let places: Vec<Place> = sources.iter().map(|&source| self.read(source)).collect();
        let y = self.owe(target, bias.clone(), end)?;
        self.record(|| {
            let (sources, weight) = (sources.to_vec(), weight.clone());
            Layer::Linear(Linear { sources, target, taps: None, weight, bias, end })
        });
        self.push(move |machine, run| {
            let maps: Result<Vec<Tensor>> = places.iter().map(|&place| run.at(place)).collect();
            machine.linear(&maps?, &run.value(&weight)?, &run.at(y)?)
        });
        Ok(())
    }

    fn attend(&mut self, source: Map, parts: &[Affine; 3], heads: usize) -> crate::Result<Map> {
        let Size { height, width, channels } = self.size(source);
        let qkv = self.map(height, width, 3 * channels);
        // Weights that are trained are not multiplied with anything, so scores are.
        let [(query, bias, factor), key, value] = parts.clone();
        let (within, scale) =
            if self.trained.is_some() { (1.0, factor as f32) } else { (factor, 1.0) };
        self.pointwise(&[source], qkv, &[(query, bias, within), key, value], End::default())?;
        let bias = if self.machine.attends(channels / heads) {
            self.bias(qkv)
        } else {
            self.settle(qkv);
            None
        };
        let gathered = self.map(height, width, channels);
        let (x, y) = (self.place(qkv), self.place(gathered));
        let fused = self.machine.attends(channels / heads);
        self.record(|| Layer::Attend { qkv, target: gathered, heads, scale });
        self.push(move |machine, run| {
            let (x, y) = (run.at(x)?, run.at(y)?);
            match fused {
                true => machine.attend(&x, bias.as_ref(), (heads, scale), &y),
                false => machine.attend_with_scores(&x, (heads, scale), &y),
            }
        });
        self.release(qkv);
        Ok(gathered)
    }

    fn halve(&mut self, map: Map) -> Map {
        let Size { height, width, channels } = self.size(map);
        let half = self.map(height / 2, width / 2, channels);
        let (x, y) = (self.read(map), self.place(half));
        self.record(|| Layer::Halve { source: map, target: half });
        self.push(move |machine, run| machine.halve(&run.at(x)?, &run.at(y)?));
        self.release(map);
        half
    }

    fn double(&mut self, map: Map) -> Map {
        let Size { height, width, .. } = self.size(map);
        self.enlarge(map, 2, [2 * height, 2 * width])
    }

    fn told(&mut self, channels: usize) -> Map {
        self.map(1, 1, channels)
    }

    fn modulate(&mut self, source: Map, eps: f64, told: Map, parts: [usize; 2]) -> Map {
        let Size { height, width, channels } = self.size(source);
        let (x, told) = (self.read(source), self.read(told));
        let map = self.map(height, width, channels);
        let y = self.place(map);
        self.push(move |machine, run| {
            machine.modulate(&run.at(x)?, eps, &run.at(told)?, parts, &run.at(y)?)
        });
        map
    }

    fn gate(&mut self, source: Map, residual: Map, told: Map, gate: usize) -> Map {
        let Size { height, width, channels } = self.size(source);
        let (bias, x) = (self.bias(source), self.place(source));
        let (residual, told) = (self.read(residual), self.read(told));
        let map = self.map(height, width, channels);
        let y = self.place(map);
        self.push(move |machine, run| {
            let (residual, told) = (run.at(residual)?, run.at(told)?);
            machine.gate(&run.at(x)?, bias.as_ref(), &residual, (&told, gate), &run.at(y)?)
        });
        map
    }

    fn activate(&mut self, source: Map, function: Function) -> Map {
        let Size { height, width, channels } = self.size(source);
        let (owed, x) = (self.owed(source), self.place(source));
        let map = self.map(height, width, channels);
        let y = self.place(map);
        self.push(move |machine, run| {
            let end = owed.as_ref().map_or(Ok(Ending::NONE), |owed| run.ending(owed))?;
            machine.finish(&run.at(x)?, &end, function, &run.at(y)?)
        });
        map
    }

    fn constant(&mut self, values: &[f32], like: Map) -> crate::Result<Map> {
        let Size { height, width, channels } = self.size(like);
        let Machine { device, dtype, .. } = &self.machine;
        let pixels = Tensor::from_slice(values, (height * width, channels), device)?;
        let constant = pixels.t()?.to_dtype(*dtype)?.contiguous()?;
        let map = self.map(height, width, channels);
        let y = self.place(map);
        self.push(move |machine, run| machine.import(&constant, [0, 0], (1.0, 0.0), &run.at(y)?));
        Ok(map)
    }

    fn pixel(&mut self, source: Map, from: usize) -> Map {
        let Size { height, width, channels } = self.size(source);
        let x = self.read(source);
        let map = self.map(1, 1, channels);
        let y = self.place(map);
        self.push(move |machine, run| {
            let apart = height * width * channels;
            machine.import(&run.at(x)?, [from * channels, apart], (1.0, 0.0), &run.at(y)?)
        });
        map
    }
}

impl<C> Builder<'_, C> {
    /// Sines and cosines of an input, a number of each sample, to a map of one pixel.
    pub(crate) fn waves(&mut self, input: usize, waves: Waves, width: usize) -> Map {
        let map = self.map(1, 1, width);
        let y = self.place(map);
        self.push(move |machine, run| {
            let numbers = run.inputs[input].to_dtype(DType::F32)?;
            machine.waves(&numbers, &waves, &run.at(y)?)
        });
        map
    }

    /// Each sample's row of a table `[rows, channels]`, which an input tells, u32 or f32; a map of one pixel.
    pub(crate) fn row(&mut self, input: usize, table: Tensor) -> crate::Result<Map> {
        let map = self.map(1, 1, table.dim(1)?);
        let y = self.place(map);
        self.push(move |machine, run| machine.rows_of(&table, run.inputs[input], &run.at(y)?));
        Ok(map)
    }

    /// A vector of f32.
    fn vector(&mut self, weights: &Weights, name: &str, length: usize) -> crate::Result<Parameter> {
        let vector = weights.get_as(name, &[length], DType::F32)?;
        Ok(match &mut self.trained {
            None => Parameter::Own(vector),
            Some(trained) => trained.register([vector], length, Form::Vector),
        })
    }

    /// Weight and bias of linear maps one after another; those that are trained have no factor.
    fn affine(&mut self, parts: &[Affine]) -> crate::Result<[Parameter; 2]> {
        let (mut weights, mut biases) = (Vec::new(), Vec::new());
        for (weight, bias, factor) in parts {
            let bias = bias.to_device(&self.machine.device)?.to_dtype(DType::F32)?;
            if self.trained.is_some() {
                if *factor != 1.0 {
                    let problem =
                        format!("weights that are trained are not multiplied with {factor}");
                    return Err(candle_core::Error::msg(problem).into());
                }
                weights.push(weight.clone());
                biases.push(bias);
            } else {
                weights.push((weight.flatten_from(1)? * *factor)?);
                biases.push((bias * *factor)?);
            }
        }
        let Some(trained) = &mut self.trained else {
            let joined = [Tensor::cat(&weights, 0)?, Tensor::cat(&biases, 0)?];
            return Ok(joined.map(Parameter::Own));
        };
        let outputs = biases.iter().map(Tensor::elem_count).sum();
        let inputs = weights.iter().map(Tensor::elem_count).sum::<usize>() / outputs;
        Ok([
            trained.register(weights, (outputs, inputs), Form::Matrix),
            trained.register(biases, outputs, Form::Vector),
        ])
    }

    /// Each pixel as `times` by `times`, and zeros to the right and below, up to the height and width `seen`.
    fn enlarge(&mut self, source: Map, times: usize, [height, width]: [usize; 2]) -> Map {
        let x = self.read(source);
        let map = self.map(height, width, x.size.channels);
        let y = self.place(map);
        self.record(|| Layer::Enlarge { source, target: map, times });
        self.push(move |machine, run| machine.enlarge(&run.at(x)?, times, &run.at(y)?));
        map
    }
}
