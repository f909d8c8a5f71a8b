//! Maps, their lifetimes, and what is known of them while a network is compiled for the CPU.

use candle_core::Tensor;

use super::tape::Tape;
use crate::assembly::{End, Map, Projection};
use crate::kernels::{
    Buffer, Direct, Finish, Image, Isa, Layout, Measure, Numbers, Operation, Part, Program, Taps,
    Values, Variant, padded,
};

pub(crate) struct Entry {
    pub(crate) image: Image,
    /// Mean and deviations of its channels, once a norm has asked for them.
    pub(crate) statistics: Option<Buffer>,
    pub(super) uses: usize,
    /// Where its gradient is, once there is one.
    pub(crate) gradient: Option<Image>,
}

impl Entry {
    /// A map that one step will read.
    pub(crate) fn new(image: Image) -> Self {
        Self { image, statistics: None, uses: 1, gradient: None }
    }
}

/// Where a projection of the time embedding is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Projected {
    pub(crate) buffer: Buffer,
    /// Where in the buffer it begins.
    pub(crate) start: usize,
    /// The map that it is, where the network is trained.
    pub(crate) map: Option<Map>,
}

/// The linear maps of the time embedding, one for each residual block; as one where the weights stay as they are.
#[derive(Default)]
pub(super) struct Projections {
    pub(super) weight: Vec<f32>,
    pub(super) bias: Vec<f32>,
    pub(super) made: Vec<Projected>,
    /// For all of them together, for the program's whole run.
    pub(super) buffer: Buffer,
    /// The time embedding, and where in the list of operations it is known.
    pub(super) time: Option<(Map, usize)>,
}

/// A program in the making, of a network that `C` describes.
pub(crate) struct Builder<'a, C> {
    pub(crate) config: &'a C,
    pub(crate) isa: Isa,
    /// What the maps between layers hold.
    pub(super) numbers: Numbers,
    pub(crate) layout: Layout,
    pub(crate) operations: Vec<Box<dyn Operation>>,
    pub(crate) maps: Vec<Entry>,
    pub(super) projections: Projections,
    /// How the gradients follow, where the network is trained.
    pub(crate) tape: Option<Tape>,
}

impl<'a, C> Builder<'a, C> {
    /// For a network whose weights stay as they are; its time embedding is projected to so many numbers in
    /// all.
    pub(crate) fn new(config: &'a C, isa: Isa, numbers: Numbers, projected: usize) -> Self {
        let mut builder = Self { numbers, ..Self::empty(config, isa, None) };
        builder.projections.buffer = builder.layout.take(projected);
        builder
    }

    /// For a network that is trained, in f32.
    pub(crate) fn trained(config: &'a C, isa: Isa) -> Self {
        Self::empty(config, isa, Some(Tape::default()))
    }

    fn empty(config: &'a C, isa: Isa, tape: Option<Tape>) -> Self {
        Self {
            config,
            isa,
            numbers: Numbers::F32,
            layout: Layout::default(),
            operations: Vec::new(),
            maps: Vec::new(),
            projections: Projections::default(),
            tape,
        }
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

    /// A new map of f32, whatever the maps between layers hold, with one use.
    pub(super) fn map_of_f32(&mut self, height: usize, width: usize, channels: usize) -> Map {
        self.joined(Numbers::F32, height, width, [channels, 0])
    }

    /// A new map of one or two segments.
    pub(super) fn joined(
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

    pub(super) fn statistics(&mut self, map: Map) -> Buffer {
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

    pub(super) fn finish_of(&self, bias: &[f32], end: End) -> Finish {
        self.finish_with(Finish::new(bias, self.isa.panel()), end)
    }

    /// A finish with all that `end` says.
    pub(crate) fn finish_with(&self, finish: Finish, end: End) -> Finish {
        Finish {
            offset: end.offset.map(|projection| {
                let Projected { buffer, start, .. } = self.projected(projection);
                (buffer, start)
            }),
            residual: end.residual.map(|map| self.image(map)),
            factor: end.factor,
            ..finish
        }
    }

    /// The numbers of a weight, or where they will be, where the network is trained.
    pub(super) fn values(&mut self, tensor: Tensor) -> crate::Result<Values> {
        Ok(match &mut self.tape {
            None => Values::Own(values(&tensor)?),
            Some(tape) => Values::Parameter(tape.register(tensor)),
        })
    }

    /// Where a projection of the time embedding is.
    pub(super) fn projected(&self, projection: Projection) -> Projected {
        self.projections.made[projection.0]
    }

    /// Puts the product of all projections where the time embedding is known: only now are their weights together.
    fn insert_projections(&mut self) {
        let Projections { buffer, weight, bias, time, .. } = &self.projections;
        assert!(bias.len() <= buffer.len, "every projection is in its place");
        if let Some((time, at)) = *time
            && !bias.is_empty()
        {
            let (numbers, segments) = (Numbers::F32, [bias.len(), 0]);
            let output = Image { buffer: *buffer, numbers, height: 1, width: 1, segments };
            let (input, end) = (self.image(time), Finish::new(bias, self.isa.panel()));
            let direct = Direct::new(self.isa, &[input], output, Taps::POINT, weight, end);
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
    pub(crate) fn finish(mut self, inputs: Vec<usize>, output: usize) -> Program {
        self.insert_projections();
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
pub(super) fn values(tensor: &Tensor) -> crate::Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_vec1::<f32>()?)
}
