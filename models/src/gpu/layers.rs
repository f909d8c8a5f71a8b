//! Layers as steps on a GPU.

use candle_core::{DType, Result, Tensor};

use super::builder::{Builder, Debt, Entry, Owed};
use super::convolution::{Lie, convolve};
use super::kernels::{Ending, Norm};
use super::machine::Machine;
use super::program::Run;
use crate::assembly::{Affine, Assembly, End, Map, Projection, Size, TOLD, X};
use crate::kernels::{Function, Taps};
use crate::weights::Weights;

impl<'a, C> Assembly<'a, C> for Builder<'a, C> {
    fn config(&self) -> &'a C {
        self.config
    }

    fn size(&self, map: Map) -> Size {
        self.maps[map.0].size
    }

    fn map(&mut self, height: usize, width: usize, channels: usize) -> Map {
        let size = Size { height, width, channels };
        self.maps.push(Entry { size, uses: 1, owed: Debt::None });
        Map(self.maps.len() - 1)
    }

    fn answer(&mut self, height: usize, width: usize, channels: usize) -> Map {
        self.map(height, width, channels)
    }

    fn retain(&mut self, map: Map) -> Map {
        self.maps[map.0].uses += 1;
        map
    }

    fn release(&mut self, map: Map) {
        let entry = &mut self.maps[map.0];
        entry.uses -= 1;
        if entry.uses == 0 {
            self.push(move |_, run| {
                run.forget(map);
                Ok(())
            });
        }
    }

    fn import(&mut self, input: usize, size: Size, factor: f32, shift: f32) -> Map {
        let Size { height, width, channels } = size;
        let map = self.map(height, width, channels);
        let dtype = self.machine.dtype;
        self.push(move |_, run| {
            let mut x = run.inputs[input].to_dtype(dtype)?;
            if (factor, shift) != (1.0, 0.0) {
                x = x.affine(f64::from(factor), f64::from(shift))?;
            }
            let x = x.reshape(((), channels, height, width))?.permute((0, 2, 3, 1))?;
            run.set(map, x.contiguous()?);
            Ok(())
        });
        map
    }

    fn export(&mut self, answer: Map, divisor: Option<usize>) {
        self.settle(answer);
        self.push(move |machine, run| {
            let mut y = run.map(answer)?.permute((0, 3, 1, 2))?.contiguous()?;
            if let Some(divisor) = divisor {
                let divisor = run.inputs[divisor].to_dtype(DType::F32)?.reshape(((), 1, 1, 1))?;
                y = y.to_dtype(DType::F32)?.broadcast_div(&divisor)?.to_dtype(machine.dtype)?;
            }
            run.answer = Some(y);
            Ok(())
        });
        self.release(answer);
    }

    fn time(&mut self, width: usize) -> Map {
        let size = Size { height: 1, width: 1, channels: width };
        let time = self.import(TOLD, size, 1.0, 0.0);
        self.projections.time = Some((time, self.len()));
        time
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
        let weight = weights.get_as("weight", &[channels], DType::F32)?;
        let bias = weights.get_as("bias", &[channels], DType::F32)?;
        let owed = match second {
            None => self.take(first),
            Some(second) => {
                self.settle(first);
                self.settle(second);
                None
            }
        };
        let target = self.map(height, width, channels);
        self.push(move |machine, run| {
            let more = second.map(|map| run.map(map)).transpose()?;
            let norm = Norm {
                weight: &weight,
                bias: &bias,
                groups,
                eps,
                owed: owed.as_ref().map(|owed| &owed.bias),
                offset: run.told(owed.as_ref().and_then(|owed| owed.offset))?,
                modulation: run.told(modulation)?,
                function,
            };
            let y = machine.group_norm(run.map(first)?, more, norm)?;
            run.set(target, y);
            Ok(())
        });
        Ok(target)
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
        let weight = weight.permute((0, 2, 3, 1))?.contiguous()?;
        let bias = weights.get_as("bias", &[to.channels], DType::F32)?;
        self.settle(source);
        let after = self.end(target, bias, end)?;
        let Taps { stride, padding, doubled, .. } = taps;
        let times = if doubled { 2 } else { 1 };
        // Without zeros above and left there are one row and one column of them below and right.
        let seen = [from.height, from.width].map(|side| times * side + usize::from(padding == 0));
        self.push(move |machine, run| {
            let mut x = run.map(source)?.clone();
            if seen != [from.height, from.width] {
                x = machine.enlarge(&x, times, seen)?;
            }
            let y = convolve(&x, &weight, padding, stride, Lie::Pixels)?;
            conclude(machine, run, target, y, after.as_ref())
        });
        Ok(())
    }

    fn pointwise(
        &mut self,
        sources: &[Map],
        target: Map,
        parts: &[Affine],
        end: End,
    ) -> crate::Result<()> {
        let (mut weights, mut biases) = (Vec::new(), Vec::new());
        for (weight, bias, factor) in parts {
            weights.push((weight.flatten_from(1)? * *factor)?);
            let bias = bias.to_device(&self.machine.device)?.to_dtype(DType::F32)?;
            biases.push((bias * *factor)?);
        }
        let (weight, bias) = (Tensor::cat(&weights, 0)?, Tensor::cat(&biases, 0)?);
        for &source in sources {
            self.settle(source);
        }
        let after = self.end(target, bias, end)?;
        let sources = sources.to_vec();
        self.push(move |machine, run| {
            let maps: Result<Vec<&Tensor>> = sources.iter().map(|&map| run.map(map)).collect();
            let y = machine.linear(&maps?, &weight, machine.dtype)?;
            conclude(machine, run, target, y, after.as_ref())
        });
        Ok(())
    }

    fn attend(&mut self, source: Map, parts: &[Affine; 3], heads: usize) -> crate::Result<Map> {
        let Size { height, width, channels } = self.size(source);
        let qkv = self.map(height, width, 3 * channels);
        self.pointwise(&[source], qkv, parts, End::default())?;
        let bias = if self.machine.attends(channels / heads) {
            self.take_bias(qkv)
        } else {
            self.settle(qkv);
            None
        };
        let gathered = self.map(height, width, channels);
        self.push(move |machine, run| {
            let qkv = run.map(qkv)?;
            let values = match &bias {
                Some(bias) => machine.attend(qkv, bias, heads)?,
                None => machine.attend_with_scores(qkv, heads)?,
            };
            run.set(gathered, values);
            Ok(())
        });
        self.release(qkv);
        Ok(gathered)
    }

    fn halve(&mut self, map: Map) -> Map {
        self.settle(map);
        let Size { height, width, channels } = self.size(map);
        let half = self.map(height / 2, width / 2, channels);
        self.push(move |machine, run| {
            run.set(half, machine.halve(run.map(map)?)?);
            Ok(())
        });
        self.release(map);
        half
    }

    fn double(&mut self, map: Map) -> Map {
        self.settle(map);
        let Size { height, width, channels } = self.size(map);
        let seen = [2 * height, 2 * width];
        let double = self.map(seen[0], seen[1], channels);
        self.push(move |machine, run| {
            run.set(double, machine.enlarge(run.map(map)?, 2, seen)?);
            Ok(())
        });
        double
    }

    fn told(&mut self, channels: usize) -> Map {
        self.map(1, 1, channels)
    }

    fn modulate(&mut self, source: Map, eps: f64, told: Map, parts: [usize; 2]) -> Map {
        let Size { height, width, channels } = self.size(source);
        let target = self.map(height, width, channels);
        self.settle(source);
        self.settle(told);
        self.push(move |machine, run| {
            run.set(target, machine.modulate(run.map(source)?, eps, run.map(told)?, parts)?);
            Ok(())
        });
        target
    }

    fn gate(&mut self, source: Map, residual: Map, told: Map, gate: usize) -> Map {
        let Size { height, width, channels } = self.size(source);
        let target = self.map(height, width, channels);
        let bias = self.take_bias(source);
        self.settle(residual);
        self.settle(told);
        self.push(move |machine, run| {
            let (x, residual, told) = (run.map(source)?, run.map(residual)?, run.map(told)?);
            run.set(target, machine.gate(x, bias.as_ref(), residual, told, gate)?);
            Ok(())
        });
        target
    }

    fn activate(&mut self, source: Map, function: Function) -> Map {
        let Size { height, width, channels } = self.size(source);
        let target = self.map(height, width, channels);
        let bias = self.take_bias(source);
        self.push(move |machine, run| {
            run.set(target, machine.activate(run.map(source)?, bias.as_ref(), function)?);
            Ok(())
        });
        target
    }

    fn constant(&mut self, values: &[f32], like: Map) -> crate::Result<Map> {
        let Size { height, width, channels } = self.size(like);
        let shape = (1, height, width, channels);
        let Machine { device, dtype, .. } = &self.machine;
        let constant = Tensor::from_slice(values, shape, device)?.to_dtype(*dtype)?;
        let target = self.map(height, width, channels);
        self.push(move |_, run| {
            let batch = run.inputs[X].dim(0)?;
            let all = constant.broadcast_as((batch, height, width, channels))?.contiguous()?;
            run.set(target, all);
            Ok(())
        });
        Ok(target)
    }

    fn pixel(&mut self, source: Map, from: usize) -> Map {
        self.settle(source);
        let channels = self.size(source).channels;
        let target = self.map(1, 1, channels);
        self.push(move |_, run| {
            let pixels = run.map(source)?.flatten(1, 2)?;
            let pixel = pixels.narrow(1, from, 1)?.unsqueeze(1)?.contiguous()?;
            run.set(target, pixel);
            Ok(())
        });
        target
    }
}

/// What follows the sums of a layer.
struct After {
    residual: Option<Map>,
    owed: Owed,
    factor: f32,
}

impl<C> Builder<'_, C> {
    /// What is to follow the sums of `target` at once; the rest it is owed.
    fn end(&mut self, target: Map, mut bias: Tensor, end: End) -> Result<Option<After>> {
        let End { offset, residual, factor } = end;
        if let Some(owed) = residual.and_then(|residual| self.take_bias(residual)) {
            bias = (bias + owed)?;
        }
        let owed = Owed { bias, offset };
        if residual.is_none() && factor == 1.0 {
            self.maps[target.0].owed = Debt::Owed(owed);
            return Ok(None);
        }
        // The residual may be what was there before.
        self.maps[target.0].owed = Debt::None;
        Ok(Some(After { residual, owed, factor }))
    }
}

/// Ends a layer, whose sums are `y`.
fn conclude(
    machine: &Machine,
    run: &mut Run,
    target: Map,
    y: Tensor,
    after: Option<&After>,
) -> Result<()> {
    if let Some(After { residual, owed: Owed { bias, offset }, factor }) = after {
        let residual = residual.map(|map| run.map(map)).transpose()?;
        let (bias, offset, factor) = (Some(bias), run.told(*offset)?, *factor);
        machine.finish(&y, Ending { residual, bias, offset, factor })?;
    }
    run.set(target, y);
    Ok(())
}
