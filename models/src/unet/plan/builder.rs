//! Maps, their lifetimes, and the layers that every block is made of.

use candle_core::Tensor;

use crate::kernels::{
    Apply, Buffer, Direct, Finish, Function, Image, Isa, Layout, Measure, Numbers, Operation,
    Program, Settle, Taps, Variant, Winograd, padded,
};
use crate::unet::weights::Weights;
use crate::unet::{UNet2DConfig, UNet2DModel};

/// A map that some later step still reads.
#[derive(Debug, Clone, Copy)]
pub(super) struct Map(usize);

struct Entry {
    image: Image,
    /// Mean and deviations of its channels, once a norm has asked for them.
    statistics: Option<Buffer>,
    uses: usize,
}

/// The linear maps of the time embedding, one for each residual block, as one.
struct Projections {
    /// For the program's whole run.
    buffer: Buffer,
    weight: Vec<f32>,
    bias: Vec<f32>,
    total: usize,
}

/// A program in the making.
pub(super) struct Builder<'a> {
    pub(super) config: &'a UNet2DConfig,
    pub(super) isa: Isa,
    /// What the maps between layers hold.
    numbers: Numbers,
    layout: Layout,
    operations: Vec<Box<dyn Operation>>,
    maps: Vec<Entry>,
    projections: Projections,
}

impl<'a> Builder<'a> {
    pub(super) fn new(config: &'a UNet2DConfig, isa: Isa, numbers: Numbers) -> crate::Result<Self> {
        let mut layout = Layout::default();
        let total = UNet2DModel::weight_shapes(config)?
            .iter()
            .filter(|(name, _)| name.ends_with("time_emb_proj.bias"))
            .map(|(_, shape)| padded(shape[0]))
            .sum();
        let buffer = layout.take(total);
        let (weight, bias) = (Vec::new(), Vec::new());
        let projections = Projections { buffer, weight, bias, total };
        let (operations, maps) = (Vec::new(), Vec::new());
        Ok(Self { config, isa, numbers, layout, operations, maps, projections })
    }

    /// Steps so far.
    pub(super) fn len(&self) -> usize {
        self.operations.len()
    }

    /// Adds a step.
    pub(super) fn push(&mut self, operation: impl Operation + 'static) {
        self.operations.push(Box::new(operation));
    }

    /// Memory that a few steps use between them.
    pub(super) fn take(&mut self, len: usize) -> Buffer {
        self.layout.take(len)
    }

    /// Gives such memory back.
    pub(super) fn give(&mut self, buffer: Buffer) {
        self.layout.give(buffer);
    }

    /// A new map of one segment, with one use.
    pub(super) fn map(&mut self, height: usize, width: usize, channels: usize) -> Map {
        self.joined(self.numbers, height, width, [channels, 0])
    }

    /// As [`Builder::map`], of f32 whatever the maps between layers hold.
    pub(super) fn map_of_f32(&mut self, height: usize, width: usize, channels: usize) -> Map {
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
        self.maps.push(Entry { image, statistics: None, uses: 1 });
        Map(self.maps.len() - 1)
    }

    /// Where the map is and what it looks like.
    pub(super) fn image(&self, map: Map) -> Image {
        self.maps[map.0].image
    }

    /// One more use.
    pub(super) fn retain(&mut self, map: Map) -> Map {
        self.maps[map.0].uses += 1;
        map
    }

    /// One use less; after the last one the map's memory is used for others.
    pub(super) fn release(&mut self, map: Map) {
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
    pub(super) fn normalise(
        &mut self,
        weights: &Weights,
        sources: &[Map],
        groups: usize,
        modulation: Option<usize>,
        function: Function,
    ) -> crate::Result<Map> {
        let images: Vec<Image> = sources.iter().map(|&source| self.image(source)).collect();
        let statistics: Vec<Buffer> = sources.iter().map(|&map| self.statistics(map)).collect();
        let segments = [images[0].channels(), images.get(1).map_or(0, Image::channels)];
        let channels = segments[0] + segments[1];
        let weight = values(&weights.get("weight", &[channels])?)?;
        let bias = values(&weights.get("bias", &[channels])?)?;
        let map = self.joined(self.numbers, images[0].height, images[0].width, segments);
        let target = self.image(map);
        let output = self.take(2 * target.stride());
        let modulation = modulation.map(|start| (self.projections.buffer, start));
        let eps = self.config.norm_eps;
        let pairs = images.iter().copied().zip(statistics).collect();
        let settle =
            Settle { sources: pairs, target, groups, eps, weight, bias, modulation, output };
        self.push(settle);
        self.push(Apply::new(&images, target, output, function));
        self.give(output);
        Ok(map)
    }

    /// A 3×3 convolution with bias from one map to another of its size.
    pub(super) fn same(
        &mut self,
        weights: &Weights,
        source: Map,
        target: Map,
    ) -> crate::Result<()> {
        let taps = Taps { side: 3, stride: 1, padding: 1, doubled: false };
        self.convolve(weights, source, target, taps, |_| {})
    }

    /// A 3×3 convolution with bias into `target`; `finish` adds what else goes into the sums.
    pub(super) fn convolve(
        &mut self,
        weights: &Weights,
        source: Map,
        target: Map,
        taps: Taps,
        finish: impl FnOnce(&mut Finish),
    ) -> crate::Result<()> {
        let (source, target) = (self.image(source), self.image(target));
        let (from, to) = (source.channels(), target.channels());
        let weight = values(&weights.get("weight", &[to, from, 3, 3])?)?;
        let bias = values(&weights.get("bias", &[to])?)?;
        let mut end = Finish::new(&bias, self.isa.panel());
        finish(&mut end);
        match variant(&source, &target, taps) {
            Some(variant) => {
                let doubled = taps.doubled;
                self.push(Winograd::new(self.isa, variant, source, target, doubled, &weight, end));
            }
            None => self.push(Direct::new(self.isa, &[source], target, taps, &weight, end)),
        }
        Ok(())
    }

    /// A linear map of each pixel, `weight` being `[output channels, input channels]`.
    pub(super) fn pointwise(
        &mut self,
        sources: &[Map],
        target: Map,
        weight: &[f32],
        bias: &[f32],
        finish: impl FnOnce(&mut Finish),
    ) {
        let sources: Vec<Image> = sources.iter().map(|&source| self.image(source)).collect();
        let mut end = Finish::new(bias, self.isa.panel());
        finish(&mut end);
        let target = self.image(target);
        self.push(Direct::new(self.isa, &sources, target, Taps::POINT, weight, end));
    }

    /// The time embedding's projection to `width` numbers: where in [`Builder::projected`] they begin.
    pub(super) fn project(&mut self, weights: &Weights, width: usize) -> crate::Result<usize> {
        let input = self.config.time_width();
        let start = self.projections.bias.len();
        let end = start + padded(width);
        self.projections.weight.extend(values(&weights.get("weight", &[width, input])?)?);
        self.projections.weight.resize(end * input, 0.0);
        self.projections.bias.extend(values(&weights.get("bias", &[width])?)?);
        self.projections.bias.resize(end, 0.0);
        Ok(start)
    }

    /// Where all projections of a sample are.
    pub(super) fn projected(&self) -> Buffer {
        self.projections.buffer
    }

    /// Puts the product of all projections at place `at` of the list.
    pub(super) fn insert_projections(&mut self, at: usize, time: Image) {
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

    /// The program.
    pub(super) fn finish(self, inputs: Vec<usize>, output: usize) -> Program {
        Program::new(self.isa, self.operations, &self.layout, inputs, output)
    }
}

/// Which algorithm pays for a 3×3 convolution, from its shape alone: the same for any batch, so that
/// the batch cannot show in the result.
fn variant(source: &Image, target: &Image, taps: Taps) -> Option<Variant> {
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
pub(super) fn values(tensor: &Tensor) -> crate::Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_vec1::<f32>()?)
}
