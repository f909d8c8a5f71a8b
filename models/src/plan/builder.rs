//! Maps, their lifetimes, and the layers that every block is made of.

use candle_core::Tensor;

use super::tape::{Normalised, Step, Tape};
use crate::kernels::{
    Apply, Buffer, Direct, Finish, Function, Image, Isa, Layout, Measure, Numbers, Operation, Part,
    Program, Settle, Taps, Values, Variant, Winograd, padded,
};
use crate::weights::Weights;

/// A map that some later step still reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Map(pub(crate) usize);

pub(crate) struct Entry {
    pub(crate) image: Image,
    /// Mean and deviations of its channels, once a norm has asked for them.
    pub(crate) statistics: Option<Buffer>,
    uses: usize,
    /// Where its gradient is, once there is one.
    pub(crate) gradient: Option<Image>,
}

impl Entry {
    /// A map that one step will read.
    pub(crate) fn new(image: Image) -> Self {
        Self { image, statistics: None, uses: 1, gradient: None }
    }
}

/// A vector of each sample that the time embedding is projected to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Projection {
    pub(crate) buffer: Buffer,
    /// Where in the buffer it begins.
    pub(crate) start: usize,
    /// The map that it is, where the network is trained.
    pub(crate) map: Option<Map>,
}

/// What is added to a convolution's sums.
#[derive(Debug, Clone, Copy)]
pub(crate) struct End {
    /// At every pixel.
    pub(crate) offset: Option<Projection>,
    pub(crate) residual: Option<Map>,
    /// What all of it is multiplied with then.
    pub(crate) factor: f32,
}

impl Default for End {
    fn default() -> Self {
        Self { offset: None, residual: None, factor: 1.0 }
    }
}

/// The linear maps of the time embedding, one for each residual block, as one.
struct Projections {
    /// For the program's whole run.
    buffer: Buffer,
    weight: Vec<f32>,
    bias: Vec<f32>,
    total: usize,
}

/// A program in the making, of a network that `C` describes.
pub(crate) struct Builder<'a, C> {
    pub(crate) config: &'a C,
    pub(crate) isa: Isa,
    /// What the maps between layers hold.
    numbers: Numbers,
    pub(crate) layout: Layout,
    pub(crate) operations: Vec<Box<dyn Operation>>,
    pub(crate) maps: Vec<Entry>,
    projections: Projections,
    /// How the gradients follow, where the network is trained.
    pub(crate) tape: Option<Tape>,
}

impl<'a, C> Builder<'a, C> {
    /// For a network whose weights stay as they are; its time embedding is projected to so many numbers in
    /// all ([`Builder::project`]).
    pub(crate) fn new(config: &'a C, isa: Isa, numbers: Numbers, projected: usize) -> Self {
        let mut layout = Layout::default();
        let buffer = layout.take(projected);
        let (weight, bias) = (Vec::new(), Vec::new());
        let projections = Projections { buffer, weight, bias, total: projected };
        Self { projections, layout, numbers, ..Self::empty(config, isa, None) }
    }

    /// For a network that is trained, in f32.
    pub(crate) fn trained(config: &'a C, isa: Isa) -> Self {
        Self::empty(config, isa, Some(Tape::default()))
    }

    fn empty(config: &'a C, isa: Isa, tape: Option<Tape>) -> Self {
        let buffer = Buffer { offset: 0, len: 0 };
        let projections = Projections { buffer, weight: Vec::new(), bias: Vec::new(), total: 0 };
        let (layout, operations, maps) = (Layout::default(), Vec::new(), Vec::new());
        Self { config, isa, numbers: Numbers::F32, layout, operations, maps, projections, tape }
    }

    /// Steps so far.
    pub(crate) fn len(&self) -> usize {
        self.operations.len()
    }

    /// Adds a step.
    pub(crate) fn push(&mut self, operation: impl Operation + 'static) {
        self.operations.push(Box::new(operation));
    }

    /// Memory that a few steps use between them.
    pub(crate) fn take(&mut self, len: usize) -> Buffer {
        self.layout.take(len)
    }

    /// Gives such memory back.
    pub(crate) fn give(&mut self, buffer: Buffer) {
        self.layout.give(buffer);
    }

    /// A new map of one segment, with one use.
    pub(crate) fn map(&mut self, height: usize, width: usize, channels: usize) -> Map {
        self.joined(self.numbers, height, width, [channels, 0])
    }

    /// As [`Builder::map`], of f32 whatever the maps between layers hold.
    pub(crate) fn map_of_f32(&mut self, height: usize, width: usize, channels: usize) -> Map {
        self.joined(Numbers::F32, height, width, [channels, 0])
    }

    fn joined(
        &mut self,
        numbers: Numbers,
        height: usize,
        width: usize,
        segments: [usize; 2],
    ) -> Map {
        let len = height * width * numbers.words(padded(segments[0]) + padded(segments[1]));
        let image = Image { buffer: self.layout.take(len), numbers, height, width, segments };
        self.enter(Entry::new(image))
    }

    /// Adds a map to the list.
    pub(crate) fn enter(&mut self, entry: Entry) -> Map {
        self.maps.push(entry);
        Map(self.maps.len() - 1)
    }

    /// Where the map is and what it looks like.
    pub(crate) fn image(&self, map: Map) -> Image {
        self.maps[map.0].image
    }

    /// One more use.
    pub(crate) fn retain(&mut self, map: Map) -> Map {
        self.maps[map.0].uses += 1;
        map
    }

    /// One use less; after the last one the map's memory is used for others, unless the network is
    /// trained: then gradients still need it.
    pub(crate) fn release(&mut self, map: Map) {
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

    fn statistics(&mut self, map: Map) -> Buffer {
        let entry = &mut self.maps[map.0];
        if let Some(statistics) = entry.statistics {
            return statistics;
        }
        let input = entry.image;
        let output = self.layout.take(Measure::len(&input));
        entry.statistics = Some(output);
        self.push(Measure { input, output });
        output
    }

    /// Group norm over the channels of all `sources`, then `function`.
    pub(crate) fn normalise(
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
                modulation: modulation.and_then(|projection| projection.map),
            }));
        }
        let modulation = modulation.map(|projection| (projection.buffer, projection.start));
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

    /// A 3×3 convolution with bias from one map to another of its size.
    pub(crate) fn same(
        &mut self,
        weights: &Weights,
        source: Map,
        target: Map,
    ) -> crate::Result<()> {
        let taps = Taps { side: 3, stride: 1, padding: 1, doubled: false };
        self.convolve(weights, source, target, taps, End::default())
    }

    /// A 3×3 convolution with bias into `target`; `end` is what else goes into the sums.
    pub(crate) fn convolve(
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

    /// A linear map of each pixel: the products with all `parts`, each a weight
    /// `[output channels, input channels]`, a bias, and a factor for both, one after another.
    pub(crate) fn pointwise(
        &mut self,
        sources: &[Map],
        target: Map,
        parts: &[(Tensor, Tensor, f64)],
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

    fn finish_of(&self, bias: &[f32], end: End) -> Finish {
        self.finish_with(Finish::new(bias, self.isa.panel()), end)
    }

    /// A finish with all that `end` says.
    pub(crate) fn finish_with(&self, finish: Finish, end: End) -> Finish {
        Finish {
            offset: end.offset.map(|projection| (projection.buffer, projection.start)),
            residual: end.residual.map(|map| self.image(map)),
            factor: end.factor,
            ..finish
        }
    }

    /// The numbers of a weight, or where they will be, where the network is trained.
    fn values(&mut self, tensor: Tensor) -> crate::Result<Values> {
        Ok(match &mut self.tape {
            None => Values::Own(values(&tensor)?),
            Some(tape) => Values::Parameter(tape.register(tensor)),
        })
    }

    /// The projection of the time embedding, of `input` numbers, to `width`.
    pub(crate) fn project(
        &mut self,
        weights: &Weights,
        input: usize,
        width: usize,
    ) -> crate::Result<Projection> {
        let weight = weights.get("weight", &[width, input])?;
        let bias = weights.get("bias", &[width])?;
        if let Some(time) = self.tape.as_ref().and_then(|tape| tape.time) {
            let map = self.map(1, 1, width);
            self.pointwise(&[time], map, &[(weight, bias, 1.0)], End::default())?;
            let buffer = self.image(map).buffer;
            return Ok(Projection { buffer, start: 0, map: Some(map) });
        }
        let start = self.projections.bias.len();
        let end = start + padded(width);
        self.projections.weight.extend(values(&weight)?);
        self.projections.weight.resize(end * input, 0.0);
        self.projections.bias.extend(values(&bias)?);
        self.projections.bias.resize(end, 0.0);
        Ok(Projection { buffer: self.projections.buffer, start, map: None })
    }

    /// Puts the product of all projections at place `at` of the list.
    pub(crate) fn insert_projections(&mut self, at: usize, time: Image) {
        let Projections { buffer, weight, bias, total } = &self.projections;
        assert_eq!(bias.len(), *total, "every projection is in its place");
        if *total > 0 {
            let (numbers, segments) = (Numbers::F32, [*total, 0]);
            let output = Image { buffer: *buffer, numbers, height: 1, width: 1, segments };
            let end = Finish::new(bias, self.isa.panel());
            let direct = Direct::new(self.isa, &[time], output, Taps::POINT, weight, end);
            self.operations.insert(at, Box::new(direct));
        }
    }

    /// The program of a network that is trained, its weights and where each one's gradient begins, and
    /// the floats of all gradients.
    pub(crate) fn finish_training(
        self,
        parts: Vec<Part>,
    ) -> (Program, Vec<(Tensor, usize)>, usize) {
        let tape = self.tape.unwrap_or_default();
        let lens = tape.parameters.iter().map(|(tensor, _)| tensor.elem_count()).collect();
        let layouts = [&self.layout, &tape.placed];
        let program = Program::in_parts(self.isa, self.operations, layouts, parts, lens);
        (program, tape.parameters, tape.total)
    }

    /// The program.
    pub(crate) fn finish(self, inputs: Vec<usize>, output: usize) -> Program {
        Program::new(self.isa, self.operations, &self.layout, inputs, output)
    }
}

/// Which algorithm pays for a 3×3 convolution, from its shape alone: the same for any batch, so that
/// the batch cannot show in the result.
pub(crate) fn variant(source: &Image, target: &Image, taps: Taps) -> Option<Variant> {
    let fits = taps.side == 3 && taps.stride == 1 && taps.padding == 1;
    let side = target.height.min(target.width);
    if !fits || source.channels() < 16 || target.channels() < 16 || side < 8 {
        return None;
    }
    // Small maps have few tiles, and the larger variant many weights, which must come from a far cache
    // for each of them: measured, F2 is then twice as fast for one image and a quarter slower for eight.
    let large = source.channels() * target.channels() > 1 << 13;
    Some(if side < 16 && large { Variant::F2 } else { Variant::F4 })
}

/// All numbers of a tensor, row by row.
fn values(tensor: &Tensor) -> crate::Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_vec1::<f32>()?)
}
