//! Layers as kernels for the CPU: what is done, and what of it its gradient will need.

use super::builder::{Builder, Entry, Projected, values, variant};
use super::tape::{Normalised, Step};
use super::tokens::{Gated, Modulated};
use crate::assembly::{Affine, Assembly, End, Map, Projection, Size};
use crate::kernels::{
    Activate, Apply, Attend, Buffer, Direct, Downsample, Export, Fill, Function, Gate, Image,
    Import, Modulate, Numbers, PackKeys, PackValues, Pixel, Settle, Taps, Upsample, Winograd,
    padded,
};
use crate::weights::Weights;

/// Floats that vectors may be read further than what they are for.
const WIDEST: usize = 16;

impl<'a, C> Assembly<'a, C> for Builder<'a, C> {
    fn config(&self) -> &'a C {
        self.config
    }

    fn size(&self, map: Map) -> Size {
        let image = self.image(map);
        Size { height: image.height, width: image.width, channels: image.channels() }
    }

    fn map(&mut self, height: usize, width: usize, channels: usize) -> Map {
        self.joined(self.numbers, height, width, [channels, 0])
    }

    fn answer(&mut self, height: usize, width: usize, channels: usize) -> Map {
        self.map_of_f32(height, width, channels)
    }

    fn retain(&mut self, map: Map) -> Map {
        self.maps[map.0].uses += 1;
        map
    }

    /// After the last use the map's memory is used for others, unless the network is trained: then gradients still
    /// need it.
    fn release(&mut self, map: Map) {
        if self.tape.is_some() {
            return;
        }
        let entry = &mut self.maps[map.0];
        entry.uses -= 1;
        if entry.uses == 0 {
            self.layout.give(entry.image.buffer);
            if let Some(statistics) = entry.statistics.take() {
                self.layout.give(statistics);
            }
        }
    }

    fn import(&mut self, input: usize, size: Size, factor: f32, shift: f32) -> Map {
        let map = self.map_of_f32(size.height, size.width, size.channels);
        let output = self.image(map);
        self.push(Import { input, output, factor, shift });
        map
    }

    fn export(&mut self, answer: Map, divisor: Option<usize>) {
        let input = self.image(answer);
        self.push(Export { input, divisor });
    }

    fn time(&mut self, time: Map) {
        self.projections.time = Some((time, self.len()));
    }

    fn project(
        &mut self,
        weights: &Weights,
        input: usize,
        width: usize,
    ) -> crate::Result<Projection> {
        let weight = weights.get("weight", &[width, input])?;
        let bias = weights.get("bias", &[width])?;
        let made = match self.projections.time {
            Some((time, _)) if self.tape.is_some() => {
                let map = self.map(1, 1, width);
                self.pointwise(&[time], map, &[(weight, bias, 1.0)], End::default())?;
                Projected { buffer: self.image(map).buffer, start: 0, map: Some(map) }
            }
            _ => {
                let all = &mut self.projections;
                let start = all.bias.len();
                let end = start + padded(width);
                all.weight.extend(values(&weight)?);
                all.weight.resize(end * input, 0.0);
                all.bias.extend(values(&bias)?);
                all.bias.resize(end, 0.0);
                Projected { buffer: all.buffer, start, map: None }
            }
        };
        self.projections.made.push(made);
        Ok(Projection(self.projections.made.len() - 1))
    }

    fn normalise(
        &mut self,
        weights: &Weights,
        sources: &[Map],
        (groups, eps): (usize, f64),
        modulation: Option<Projection>,
        function: Function,
    ) -> crate::Result<Map> {
        let images: Vec<Image> = sources.iter().map(|&source| self.image(source)).collect();
        let statistics: Vec<Buffer> = sources.iter().map(|&map| self.statistics(map)).collect();
        let segments = [images[0].channels(), images.get(1).map_or(0, Image::channels)];
        let channels = segments[0] + segments[1];
        let weight = self.values(weights.get("weight", &[channels])?)?;
        let bias = self.values(weights.get("bias", &[channels])?)?;
        let map = self.joined(self.numbers, images[0].height, images[0].width, segments);
        let target = self.image(map);
        let output = self.take(2 * target.stride());
        let modulated = modulation.map(|projection| self.projected(projection));
        let moments = self.tape.is_some().then(|| self.take(2 * groups));
        if let (Some(moments), Some(tape)) = (moments, &mut self.tape) {
            let parameters = [tape.number(&weight), tape.number(&bias)];
            let sources = sources.to_vec();
            tape.steps.push(Step::Normalise(Normalised {
                sources,
                target: map,
                groups,
                function,
                map: output,
                moments,
                parameters,
                modulation: modulated.and_then(|projected| projected.map),
            }));
        }
        let modulation = modulated.map(|projected| (projected.buffer, projected.start));
        let pairs = images.iter().copied().zip(statistics).collect();
        let settle = Settle {
            sources: pairs,
            target,
            groups,
            eps,
            weight,
            bias,
            modulation,
            output,
            moments,
        };
        self.push(settle);
        self.push(Apply::new(&images, target, output, function));
        if self.tape.is_none() {
            self.give(output);
        }
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
        let (from, to) = (self.image(source), self.image(target));
        let weight = weights.get("weight", &[to.channels(), from.channels(), 3, 3])?;
        let bias = weights.get("bias", &[to.channels()])?;
        if self.tape.is_some() {
            self.trained_convolution(&[source], target, taps, &[(weight, bias, 1.0)], end)?;
            return Ok(());
        }
        let finish = self.finish_of(&values(&bias)?, end);
        let weight = values(&weight)?;
        match variant(&from, &to, taps) {
            Some(variant) => {
                let doubled = taps.doubled;
                self.push(Winograd::new(self.isa, variant, from, to, doubled, &weight, finish));
            }
            None => self.push(Direct::new(self.isa, &[from], to, taps, &weight, finish)),
        }
        Ok(())
    }

    fn pointwise(
        &mut self,
        sources: &[Map],
        target: Map,
        parts: &[Affine],
        end: End,
    ) -> crate::Result<()> {
        if self.tape.is_some() {
            return self.trained_convolution(sources, target, Taps::POINT, parts, end);
        }
        let (mut weight, mut bias) = (Vec::new(), Vec::new());
        for (one, other, factor) in parts {
            let scaled = |x: f32| (f64::from(x) * factor) as f32;
            weight.extend(values(one)?.into_iter().map(scaled));
            bias.extend(values(other)?.into_iter().map(scaled));
        }
        let sources: Vec<Image> = sources.iter().map(|&source| self.image(source)).collect();
        let finish = self.finish_of(&bias, end);
        let target = self.image(target);
        self.push(Direct::new(self.isa, &sources, target, Taps::POINT, &weight, finish));
        Ok(())
    }

    fn attend(&mut self, source: Map, parts: &[Affine; 3], heads: usize) -> crate::Result<Map> {
        let Size { height, width, channels } = self.size(source);
        // Two channels in a word must be of one head.
        let qkv = match channels / heads % 2 {
            0 => self.map(height, width, 3 * channels),
            _ => self.map_of_f32(height, width, 3 * channels),
        };
        self.pointwise(&[source], qkv, parts, End::default())?;
        let (input, panel, rows) = (self.image(qkv), self.isa.panel(), self.isa.rows());
        let keys = self.take(PackKeys::len(&input, panel));
        self.push(PackKeys { input, heads, panel, output: keys });
        let pairs = (input.numbers == Numbers::Bf16).then(|| {
            let output = self.take(PackValues::len(&input));
            self.push(PackValues { input, output });
            output
        });
        let gathered = self.map(height, width, channels);
        let output = self.image(gathered);
        self.push(Attend { input, keys, values: pairs, heads, panel, rows, output });
        self.give(keys);
        self.record(Step::Attend { qkv, target: gathered, heads });
        if let Some(pairs) = pairs {
            self.give(pairs);
        }
        self.release(qkv);
        Ok(gathered)
    }

    fn halve(&mut self, map: Map) -> Map {
        let input = self.image(map);
        let half = self.map(input.height / 2, input.width / 2, input.channels());
        let output = self.image(half);
        self.push(Downsample { input, output });
        self.record(Step::Halve { source: map, target: half });
        self.release(map);
        half
    }

    fn double(&mut self, map: Map) -> Map {
        let input = self.image(map);
        let double = self.map(2 * input.height, 2 * input.width, input.channels());
        let output = self.image(double);
        self.push(Upsample { input, output });
        self.record(Step::Double { source: map, target: double });
        double
    }

    fn told(&mut self, channels: usize) -> Map {
        let buffer = self.layout.take(padded(channels) + WIDEST);
        let segments = [channels, 0];
        let image = Image { buffer, numbers: Numbers::F32, height: 1, width: 1, segments };
        self.enter(Entry::new(image))
    }

    fn modulate(&mut self, source: Map, eps: f64, told: Map, [scale, shift]: [usize; 2]) -> Map {
        let image = self.image(source);
        let target = self.map(image.height, image.width, image.channels());
        let moments = self.tape.is_some().then(|| self.take(2 * image.pixels()));
        let parts = [scale, shift].map(|index| self.part(told, index, source));
        self.push(Modulate::new(image, self.image(target), eps, parts, moments));
        if let Some(moments) = moments {
            self.record(Step::Modulate(Modulated { source, target, told, scale, shift, moments }));
        }
        target
    }

    fn gate(&mut self, source: Map, residual: Map, told: Map, gate: usize) -> Map {
        let image = self.image(source);
        let target = self.map(image.height, image.width, image.channels());
        let part = self.part(told, gate, source);
        self.push(Gate::new(image, self.image(residual), self.image(target), part));
        self.record(Step::Gate(Gated { source, residual, target, told, gate }));
        target
    }

    fn activate(&mut self, source: Map, function: Function) -> Map {
        let input = self.image(source);
        let target = self.map(input.height, input.width, input.channels());
        self.push(Activate { input, output: self.image(target), function });
        self.record(Step::Activate { source, target, function });
        target
    }

    fn constant(&mut self, values: &[f32], like: Map) -> crate::Result<Map> {
        let image = self.image(like);
        let target = self.map(image.height, image.width, image.channels());
        self.push(Fill::new(values, self.image(target)));
        Ok(target)
    }

    fn pixel(&mut self, source: Map, from: usize) -> Map {
        let input = self.image(source);
        let target = self.map(1, 1, input.channels());
        self.push(Pixel { input, from, output: self.image(target), to: 0 });
        self.record(Step::Pixel { source, target, from });
        target
    }
}
