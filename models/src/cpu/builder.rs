//! Maps, their lifetimes, and what is known of them while a network is compiled for the CPU.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::Mode;
use super::packed::Packed;
use super::tape::Tape;
use crate::graph::{Epilogue, Graph, Kind, Map, MapInfo, Op, Product, Size};
use crate::kernels::{
    Buffer, ElementType, Finish, GroupNormStatistics, Image, Isa, Layout, Operation, Part, Program,
    Quantize, Taps, Variant, padded,
};
use crate::weights::Weights;

/// Floats that the parts of a vector may be read further than they go.
const WIDEST: usize = 16;

/// What is known of a map.
#[derive(Default)]
pub(super) struct Entry {
    /// Where it is, once something writes it.
    pub(super) image: Option<Image>,
    /// Mean and deviations of its channels, once a norm has asked for them.
    pub(super) statistics: Option<Buffer>,
    /// How many operations are still to read it.
    pub(super) uses: usize,
    /// Whether its memory became another map's, which was summed onto it.
    pub(super) moved: bool,
    /// Where it is among the projections of a vector that are done together, if it is one of those.
    pub(super) projected: Option<(Buffer, usize)>,
    /// Whether its memory has codes instead of numbers.
    pub(super) encoded: bool,
    /// Where its gradient is, once there is one.
    pub(super) gradient: Option<Image>,
}

/// A program in the making.
pub(super) struct Builder<'a> {
    pub(super) graph: &'a Graph,
    pub(super) isa: Isa,
    /// What maps of features hold.
    element: ElementType,
    pub(super) layout: Layout,
    pub(super) operations: Vec<Box<dyn Operation>>,
    pub(super) maps: Vec<Entry>,
    /// The weights that layers share with those of other sizes.
    pub(super) packed: Arc<Packed>,
    /// What else is done with the inputs of products.
    pub(super) mode: Mode,
    /// How the gradients follow, where the network is trained.
    pub(super) tape: Option<Tape>,
    /// Where the number of a prompt's tokens is, where some attention asks for it.
    pub(super) tokens: Option<Buffer>,
}

impl<'a> Builder<'a> {
    /// For a network whose weights stay as they are.
    pub(super) fn new(
        graph: &'a Graph,
        (isa, element): (Isa, ElementType),
        mode: Mode,
        packed: Arc<Packed>,
    ) -> Self {
        Self { element, mode, packed, tape: None, ..Self::trained(graph, isa) }
    }

    /// For a network that is trained, in f32.
    pub(super) fn trained(graph: &'a Graph, isa: Isa) -> Self {
        let entry = |uses| Entry { uses, ..Entry::default() };
        Self {
            graph,
            isa,
            element: ElementType::F32,
            layout: Layout::default(),
            operations: Vec::new(),
            maps: graph.uses().into_iter().map(entry).collect(),
            packed: Arc::default(),
            mode: Mode::Plain,
            tape: Some(Tape::default()),
            tokens: None,
        }
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

    /// Memory for a map of one segment.
    pub(super) fn map(&mut self, map: Map) -> Image {
        let MapInfo { size, kind } = self.graph.maps[map.0];
        let element = match kind {
            Kind::Vector | Kind::Answer => ElementType::F32,
            // Two channels in a word must be of one head.
            Kind::Features if self.has_odd_heads(map) => ElementType::F32,
            Kind::Features => self.element,
        };
        self.place(map, element, [size.channels, 0])
    }

    /// Memory for a map of f32, whatever others hold.
    pub(super) fn map_of_f32(&mut self, map: Map) -> Image {
        let channels = self.graph.size(map).channels;
        self.place(map, ElementType::F32, [channels, 0])
    }

    /// Memory for a map of two segments, or one.
    pub(super) fn joined(&mut self, map: Map, segments: [usize; 2]) -> Image {
        self.place(map, self.element, segments)
    }

    /// Memory for the codes of a map of two segments, or one.
    pub(super) fn encoded(&mut self, map: Map, segments: [usize; 2]) -> Image {
        let Size { height, width, .. } = self.graph.size(map);
        let element = ElementType::F32;
        let numbers = Image { buffer: Buffer::default(), element, height, width, segments };
        let image = Image { buffer: self.layout.take(Quantize::len(&numbers)), ..numbers };
        let entry = &mut self.maps[map.0];
        (entry.image, entry.encoded) = (Some(image), true);
        image
    }

    fn place(&mut self, map: Map, element: ElementType, segments: [usize; 2]) -> Image {
        let Size { height, width, .. } = self.graph.size(map);
        let channels = padded(segments[0]) + padded(segments[1]);
        let more = if self.is_read_in_parts(map) { WIDEST } else { 0 };
        let buffer = self.layout.take(height * width * element.words(channels) + more);
        let image = Image { buffer, element, height, width, segments };
        self.maps[map.0].image = Some(image);
        image
    }

    /// Memory for sums: that of the residual, where nothing else reads it, or new memory.
    pub(super) fn sums(&mut self, map: Map, sources: &[Map], epilogue: Epilogue) -> Image {
        if let Some(residual) = epilogue.residual
            && self.is_last_use(residual)
            && !sources.contains(&residual)
            && self.graph.maps[map.0].kind == self.graph.maps[residual.0].kind
            && !self.has_odd_heads(map)
            && !self.is_read_in_parts(map)
        {
            let image = self.image(residual);
            self.maps[residual.0].moved = true;
            self.maps[map.0].image = Some(image);
            return image;
        }
        self.map(map)
    }

    /// Whether nothing needs the map after the operation that is being added: no other, and no gradient.
    fn is_last_use(&self, map: Map) -> bool {
        let uses = match self.tape {
            None => self.maps[map.0].uses,
            Some(_) => self.graph.uses()[map.0],
        };
        uses == 1
    }

    /// Whether operations read parts of the map, which need not begin at whole vectors.
    fn is_read_in_parts(&self, map: Map) -> bool {
        self.graph.ops.iter().any(|op| match op {
            Op::Modulate { vector, .. } | Op::Gate { vector, .. } => *vector == map,
            _ => false,
        })
    }

    /// Whether an attention reads the map in heads of an odd number of channels.
    fn has_odd_heads(&self, map: Map) -> bool {
        self.graph.ops.iter().any(|op| match op {
            Op::Attend { queries, keys, values, heads, .. } => {
                [queries, keys, values].iter().any(|slice| slice.map == map)
                    && !(queries.width / heads).is_multiple_of(2)
            }
            _ => false,
        })
    }

    /// Where the map is and what it looks like.
    pub(super) fn image(&self, map: Map) -> Image {
        self.maps[map.0].image.expect("a map is written before it is read")
    }

    pub(super) fn images(&self, maps: &[Map]) -> Vec<Image> {
        maps.iter().map(|&map| self.image(map)).collect()
    }

    /// After the last use the map's memory is used for others, unless the network is trained: then gradients still
    /// need it.
    pub(super) fn release(&mut self, map: Map) {
        if self.tape.is_some() {
            return;
        }
        let entry = &mut self.maps[map.0];
        entry.uses -= 1;
        if entry.uses == 0 {
            // A projection has none of its own.
            let own = entry.image.filter(|_| !entry.moved).map(|image| image.buffer);
            for buffer in own.into_iter().chain(entry.statistics.take()) {
                self.layout.give(buffer);
            }
        }
    }

    /// Mean and deviations of a map's channels.
    pub(super) fn statistics(&mut self, map: Map) -> Buffer {
        if let Some(statistics) = self.maps[map.0].statistics {
            return statistics;
        }
        let input = self.image(map);
        let output = self.layout.take(GroupNormStatistics::len(&input));
        self.maps[map.0].statistics = Some(output);
        self.push(GroupNormStatistics { input, output });
        output
    }

    /// Where a projection is, and where in that memory it begins.
    pub(super) fn projected(&self, map: Map) -> (Buffer, usize) {
        self.maps[map.0].projected.unwrap_or_else(|| (self.image(map).buffer, 0))
    }

    /// A finish with all that `epilogue` says.
    pub(super) fn finish_with(&self, finish: Finish, epilogue: Epilogue) -> Finish {
        Finish {
            offset: epilogue.offset.map(|map| self.projected(map)),
            residual: epilogue.residual.map(|map| self.image(map)),
            factor: epilogue.factor,
            ..finish
        }
    }

    /// The program of a network that is trained, its weights and where each one's gradient begins, and
    /// the floats of all gradients.
    pub(super) fn finish_training(
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
    pub(super) fn finish(self, inputs: Vec<usize>, output: usize) -> Program {
        Program::new(self.isa, self.operations, &self.layout, inputs, output)
    }
}

/// Weight and bias of a product; zeros where it has no bias.
pub(super) fn tensors(
    graph: &Graph,
    product: &Product,
    weights: &Weights,
) -> crate::Result<[Tensor; 2]> {
    let weight = weights.get(graph.weight(product.weight))?;
    let bias = match product.bias {
        Some(bias) => weights.get(graph.weight(bias))?,
        None => Tensor::zeros(weight.dim(0)?, DType::F32, &Device::Cpu)?,
    };
    Ok([weight, bias])
}

/// Which transforms pay for a 3×3 convolution, from its shape alone: the same for any batch, so that
/// the batch cannot show in the result.
pub(super) fn variant(source: &Image, target: &Image, taps: Taps) -> Option<Variant> {
    let side = target.height.min(target.width);
    if !keeps_size(taps) || source.channels() < 16 || target.channels() < 16 || side < 8 {
        return None;
    }
    // Small maps have few tiles, and the larger variant many weights, which must come from a far cache
    // for each of them: measured, F2 is then twice as fast for one image and a quarter slower for eight.
    let large = source.channels() * target.channels() > 1 << 13;
    // Those of F4 are 75 MB and more, which come from memory for each evaluation. Measured of 1280 to 1280
    // channels: at 16 × 16 pixels F2 is as fast as F4 for one image, and a third slower for four, with less than half the
    // weights.
    match (huge(source, target), side) {
        (true, ..16) => None,
        (true, 16) => Some(Variant::F2),
        (false, ..16) if large => Some(Variant::F2),
        _ => Some(Variant::F4),
    }
}

/// Whether weights that are kept as they are had better be transformed as they are used. Measured of 1280 to 1280 channels at
/// 8 × 8 pixels, one image and four: 3.5 and 9.7 ms, where all products take 4.2 and 16.6, and F2 3.1 and 8.2 with almost
/// twice as many bytes of weights, which it must read from memory; at 4 × 4, 2.2 ms and 1.7 for one.
pub(super) fn transforms_taps(source: &Image, target: &Image, taps: Taps) -> bool {
    let side = target.height.min(target.width);
    let fits = keeps_size(taps) && source.element == ElementType::F32 && target.channels() >= 32;
    fits && huge(source, target) && side >= 8
}

/// Whether a convolution is of 3×3 and leaves the size of a map.
fn keeps_size(taps: Taps) -> bool {
    taps.side == 3 && taps.stride == 1 && taps.padding == 1
}

/// Whether a convolution has so many weights that they come from memory for each evaluation.
fn huge(source: &Image, target: &Image) -> bool {
    source.channels() * target.channels() > 1 << 19
}

/// All numbers of a tensor, row by row.
pub(super) fn values(tensor: &Tensor) -> crate::Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_vec1::<f32>()?)
}
