//! The gradients of operations as kernels for the CPU; [`crate::graph::backward`] has their order.

use candle_core::Tensor;

use super::builder::{Builder, tensors, variant};
use super::ops::one;
use crate::graph::backward::Differentiate;
use crate::graph::{Epilogue, Graph, Map, Op, Product, Sees};
use crate::kernels::{
    ActivateGradient, AttendGradient, Buffer, Channels, Combine, Constants, Direct, DirectGradient,
    Fill, Filter, Finish, Form, Function, GateGradient, GegluGradient, Image, Layout,
    LearnedGradient, ModulateGradient, NormGradient, NormSource, Pack, PackBias, Row, Scale,
    SumGradient, Sums, Taps, Values, Vector, Way, Winograd, WinogradGradient, places,
};
use crate::weights::Weights;

/// What is noted of a network that is trained.
#[derive(Default)]
pub(super) struct Tape {
    /// All weights that the operations read, and where each one's gradient begins.
    pub(super) parameters: Vec<(Tensor, usize)>,
    /// Floats of all gradients together.
    pub(super) total: usize,
    /// The memory for packed weights: each layer's are made just before it runs.
    pub(super) placed: Layout,
    /// What the operation that wrote a map left for its gradient.
    saved: Vec<(Map, Saved)>,
}

/// What an operation leaves for its gradient.
#[derive(Clone)]
pub(super) enum Saved {
    Linear {
        filter: Filter,
        biases: Vec<Row>,
    },
    GroupNorm {
        /// Factors and terms of each channel.
        map: Buffer,
        /// Means and deviations of each group.
        moments: Buffer,
        /// Numbers of weight and bias.
        parameters: [usize; 2],
    },
    Modulate {
        moments: Buffer,
    },
    Learned {
        /// Where among all gradients those of the weights begin.
        gradient: usize,
    },
}

impl Tape {
    /// Notes a weight, and gives its number.
    pub(super) fn register(&mut self, tensor: Tensor) -> usize {
        let len = tensor.elem_count();
        self.parameters.push((tensor, self.total));
        self.total += len;
        self.parameters.len() - 1
    }

    /// The number of a weight that was registered.
    pub(super) fn number(&self, values: &Values) -> usize {
        match values {
            Values::Parameter(number) => *number,
            Values::Own(_) => unreachable!("a network that is trained has no weights of its own"),
        }
    }

    /// The numbers of parameter `number` from `start` on.
    fn row(&self, number: usize, start: usize, factor: f64) -> Row {
        let gradient = self.parameters[number].1 + start;
        Row { parameter: number, start, gradient, factor: factor as f32 }
    }
}

impl Builder<'_> {
    /// Notes what the operation that writes a map leaves, where the network is trained.
    pub(super) fn save(&mut self, to: Map, saved: Saved) {
        if let Some(tape) = &mut self.tape {
            tape.saved.push((to, saved));
        }
    }

    fn saved(&mut self, to: Map) -> Saved {
        let saved = self.tape().saved.iter().rev().find(|(map, _)| *map == to);
        saved.map(|(_, saved)| saved.clone()).expect("the operation left what its gradient needs")
    }

    fn tape(&mut self) -> &mut Tape {
        self.tape.as_mut().expect("only a network that is trained comes here")
    }

    /// A convolution or linear map whose weights are packed when it runs; the memory of `to` is there.
    pub(super) fn trained_convolution(
        &mut self,
        sources: &[Map],
        to: Map,
        taps: Taps,
        products: &[Product],
        epilogue: Epilogue,
        weights: &Weights,
    ) -> crate::Result<()> {
        let (images, target) = (self.images(sources), self.image(to));
        let channels: usize = images.iter().map(Image::channels).sum();
        let count = taps.side * taps.side;
        let (mut rows, mut biases) = (Vec::new(), Vec::new());
        for product in products {
            let [weight, bias] = tensors(self.graph, product, weights)?;
            let outputs = bias.elem_count();
            let tape = self.tape();
            let (weight, bias) = (tape.register(weight), tape.register(bias));
            for o in 0..outputs {
                rows.push(tape.row(weight, o * channels * count, product.factor));
                biases.push(tape.row(bias, o, product.factor));
            }
        }
        let filter = Filter { rows, taps: count };

        let form = form(&images, &target, taps);
        let inputs = places(&images, 0, form == Form::Direct);
        let outputs = (0..target.channels()).map(Some).collect();
        let packed = self.pack(filter.clone(), form, false, inputs, outputs);
        let len = target.channels().next_multiple_of(self.isa.panel());
        let bias = self.tape().placed.take(len);
        self.push(PackBias { rows: biases.clone(), output: bias });
        let finish = self.finish_with(Finish::with(Constants::Placed(bias)), epilogue);
        let constants = Constants::Placed(packed);
        match form {
            Form::Winograd(variant) => {
                let (isa, doubled, source) = (self.isa, taps.doubled, images[0]);
                self.push(Winograd::with(isa, variant, source, target, doubled, constants, finish));
            }
            Form::Direct => {
                self.push(Direct::with(self.isa, &images, target, taps, constants, finish));
            }
        }
        self.tape().placed.give(packed);
        self.tape().placed.give(bias);
        self.save(to, Saved::Linear { filter, biases });
        Ok(())
    }

    /// Packs weights, until the memory is given back.
    fn pack(
        &mut self,
        filter: Filter,
        form: Form,
        turned: bool,
        inputs: Vec<Option<usize>>,
        outputs: Vec<Option<usize>>,
    ) -> Buffer {
        let len = Pack::len(form, self.isa, inputs.len(), outputs.len(), filter.taps);
        let output = self.tape().placed.take(len);
        self.push(Pack { filter, form, turned, inputs, outputs, output });
        output
    }

    /// Where the gradient of a map is, and whether something is there already.
    pub(super) fn gradient(&mut self, map: Map) -> (Image, bool) {
        if let Some(gradient) = self.maps[map.0].gradient {
            return (gradient, true);
        }
        let image = self.image(map);
        // A convolution makes it as one segment, in which the padding between two is a channel too.
        let channels = if image.segments[1] == 0 { image.segments[0] } else { image.stride() };
        let buffer = self.layout.take(image.pixels() * image.stride());
        let gradient = Image { buffer, segments: [channels, 0], ..image };
        self.maps[map.0].gradient = Some(gradient);
        (gradient, false)
    }

    /// The gradients of a part of a vector, all of which begin as zeros.
    fn gradient_part(&mut self, vector: Map, index: usize, like: Map) -> Vector {
        let (gradient, begun) = self.gradient(vector);
        if !begun {
            self.push(Fill::new(&vec![0.0; gradient.channels()], gradient));
        }
        Vector { buffer: gradient.buffer, start: index * self.image(like).channels() }
    }

    /// The gradient of what an operation wrote, which has one.
    fn own(&self, to: Map) -> Image {
        self.maps[to.0].gradient.expect("only an operation whose result has a gradient comes here")
    }

    /// Of weights, biases and offset of a convolution or linear map.
    fn linear_weights(&mut self, sources: &[Map], taps: Taps, epilogue: Epilogue, to: Map) {
        let own = self.own(to);
        let Saved::Linear { filter, biases } = self.saved(to) else { return };
        if epilogue.factor != 1.0 {
            self.push(Scale { map: own, factor: epilogue.factor });
        }
        let output = match epilogue.offset {
            Some(map) => self.gradient(map).0.buffer,
            None => self.take(own.stride()),
        };
        self.push(Sums { input: own, biases, output });
        if epilogue.offset.is_none() {
            self.give(output);
        }
        let images = self.images(sources);
        match form(&images, &self.image(to), taps) {
            Form::Winograd(variant) => {
                self.push(WinogradGradient::new(variant, images[0], own, taps.doubled, filter));
            }
            Form::Direct => {
                let mut first = 0;
                for image in images {
                    self.push(DirectGradient::new(image, own, taps, filter.clone(), first));
                    first += image.channels();
                }
            }
        }
    }

    /// Of all sources of a convolution or linear map.
    fn linear_sources(&mut self, sources: &[Map], taps: Taps, to: Map) {
        let own = self.own(to);
        let Saved::Linear { filter, .. } = self.saved(to) else { return };
        let plain = Taps { doubled: false, ..taps };
        let mut first = 0;
        for &source in sources {
            let image = self.image(source);
            let (gradient, add) = self.gradient(source);
            let target = if taps.doubled {
                let (height, width) = (2 * image.height, 2 * image.width);
                let buffer = self.layout.take(height * width * gradient.stride());
                Image { buffer, height, width, ..gradient }
            } else {
                gradient
            };
            let form = form(&[own], &target, plain);
            let inputs = places(&[own], 0, form == Form::Direct);
            let outputs = places(&[image], first, true);
            let zeros = vec![0.0; outputs.len()];
            let packed = self.pack(filter.clone(), form, true, inputs, outputs);
            let finish = Finish {
                residual: (add && !taps.doubled).then_some(target),
                ..Finish::new(&zeros, self.isa.panel())
            };
            let constants = Constants::Placed(packed);
            let isa = self.isa;
            match form {
                Form::Winograd(variant) => {
                    self.push(Winograd::with(isa, variant, own, target, false, constants, finish));
                }
                Form::Direct => {
                    let direct = Direct::with(isa, &[own], target, plain, constants, finish);
                    self.push(direct.reversed());
                }
            }
            self.tape().placed.give(packed);
            if taps.doubled {
                self.push(Combine { input: target, output: gradient, way: Way::Doubled, add });
                self.give(target.buffer);
            }
            first += image.channels();
        }
    }

    /// Of all that a norm read, its weights among them: they come from the same sums.
    fn norm(
        &mut self,
        sources: &[Map],
        groups: usize,
        modulation: Option<Map>,
        function: Function,
        to: Map,
    ) {
        let (own, image) = (self.own(to), self.image(to));
        let Saved::GroupNorm { map, moments, parameters } = self.saved(to) else { return };
        let pairs = sources
            .iter()
            .map(|&source| {
                let (value, (gradient, add)) = (self.image(source), self.gradient(source));
                NormSource { value, gradient, add }
            })
            .collect();
        let modulation = modulation.map(|map| {
            let values = self.image(map).buffer;
            (values, self.gradient(map).0.buffer)
        });
        let shares = self.take(2 * image.channels());
        let [weight, bias] = parameters.map(|number| self.tape().row(number, 0, 1.0));
        self.push(NormGradient {
            sources: pairs,
            target: Image { buffer: own.buffer, ..image },
            function,
            groups,
            map,
            moments,
            weight,
            bias,
            modulation,
            shares,
            real: NormGradient::mask(&image),
        });
        self.give(shares);
    }

    fn modulate(
        &mut self,
        source: Map,
        vector: Map,
        ([scale, shift], plus_one): ([usize; 2], bool),
        to: Map,
    ) {
        let (value, own) = (self.image(source), self.own(to));
        let Saved::Modulate { moments } = self.saved(to) else { return };
        let of_parts = [scale, shift].map(|index| self.gradient_part(vector, index, source));
        let scale = (self.part(vector, scale, source), one(plus_one));
        let gradient = self.gradient(source);
        self.push(ModulateGradient::new(value, own, gradient, moments, scale, of_parts));
    }

    fn gate(&mut self, source: Map, vector: Map, gate: usize, to: Map) {
        let (value, own) = (self.image(source), self.own(to));
        let (gradient, begun) = self.gradient(source);
        assert!(!begun, "what is gated goes nowhere else");
        let of_gate = self.gradient_part(vector, gate, source);
        let gate = self.part(vector, gate, source);
        self.push(GateGradient::new(value, own, gradient, gate, of_gate));
    }

    fn resize(&mut self, source: Map, to: Map, way: Way) {
        let input = self.own(to);
        let (output, add) = self.gradient(source);
        self.push(Combine { input, output, way, add });
    }
}

impl Differentiate for Builder<'_> {
    fn has_gradient(&self, map: Map) -> bool {
        self.maps[map.0].gradient.is_some()
    }

    fn weight_gradients(&mut self, _: &Graph, op: &Op) {
        match op {
            &Op::Project { source, to, .. } => {
                self.linear_weights(&[source], Taps::POINT, Epilogue::default(), to);
            }
            Op::Linear { sources, epilogue, to, .. } => {
                self.linear_weights(sources, Taps::POINT, *epilogue, *to);
            }
            &Op::Convolve { source, taps, epilogue, to, .. } => {
                self.linear_weights(&[source], taps, epilogue, to);
            }
            &Op::Learned { to, .. } => {
                let input = self.own(to);
                let Saved::Learned { gradient } = self.saved(to) else { return };
                self.push(LearnedGradient { input, gradient });
            }
            // A norm's come with those of its sources; others have no weights.
            _ => {}
        }
    }

    fn source_gradients(&mut self, _: &Graph, op: &Op) {
        match *op {
            Op::Project { source, to, .. } => self.linear_sources(&[source], Taps::POINT, to),
            Op::Linear { ref sources, to, .. } => self.linear_sources(sources, Taps::POINT, to),
            Op::Convolve { source, taps, to, .. } => self.linear_sources(&[source], taps, to),
            Op::GroupNorm { ref sources, groups, modulation, function, to, .. } => {
                self.norm(sources, groups, modulation, function, to);
            }
            Op::Attend { queries, keys, values, heads, sees, to } => {
                let (output, slices) = (self.own(to), [queries, keys, values]);
                let parts = slices.map(|slice| self.channels(slice));
                let gradients = slices.map(|slice| {
                    let (image, _) = self.gradient(slice.map);
                    Channels { image, start: slice.start, width: slice.width }
                });
                let (isa, how) = (self.isa, (heads, sees == Sees::Earlier));
                let count = self.counted(sees);
                let gradient = AttendGradient::new(isa, parts, gradients, output, how);
                self.push(gradient.counted(count));
            }
            Op::Downsample { source, to } => self.resize(source, to, Way::Halved),
            Op::Upsample { source, to } => self.resize(source, to, Way::Doubled),
            Op::Modulate { source, vector, scale, shift, plus_one, to, .. } => {
                self.modulate(source, vector, ([scale, shift], plus_one), to);
            }
            Op::Gate { source, vector, gate, to, .. } => self.gate(source, vector, gate, to),
            Op::Sum { ref parts, to, .. } => {
                let (own, mut start) = (self.own(to).buffer, 0);
                for &part in parts {
                    let (output, add) = self.gradient(part);
                    let input = Vector { buffer: own, start };
                    self.push(SumGradient { input, output, add });
                    start += output.channels();
                }
            }
            Op::Geglu { source, to } => {
                let (output, value) = (self.own(to), self.image(source));
                let (gradient, begun) = self.gradient(source);
                assert!(!begun, "what is gated goes nowhere else");
                self.push(GegluGradient::new(value, output, gradient));
            }
            Op::Activate { source, function, to } => {
                let (output, value) = (self.own(to), self.image(source));
                let (gradient, add) = self.gradient(source);
                self.push(ActivateGradient { value, output, gradient, add, function });
            }
            // A network with these is not trained here ([`Graph::has_gradients`]); the others have no source.
            Op::Join { .. }
            | Op::Take { .. }
            | Op::RmsNorm { .. }
            | Op::Sample { .. }
            | Op::Sinusoid { .. }
            | Op::Row { .. }
            | Op::Condition { .. }
            | Op::TextTime { .. }
            | Op::Prompt { .. }
            | Op::Embed { .. }
            | Op::Nearest { .. }
            | Op::Positions { .. }
            | Op::Crop { .. }
            | Op::Learned { .. }
            | Op::Answer { .. } => {}
        }
    }

    fn pass_on(&mut self, sum: Map, residual: Map) {
        match self.maps[residual.0].gradient {
            None => self.maps[residual.0].gradient = self.maps[sum.0].gradient.take(),
            Some(output) => {
                let input = self.own(sum);
                self.push(Combine { input, output, way: Way::Same, add: true });
            }
        }
    }

    fn forget(&mut self, map: Map) {
        let saved = &mut self.tape().saved;
        let place = saved.iter().rposition(|(one, _)| *one == map);
        match place.map(|place| saved.swap_remove(place).1) {
            Some(Saved::GroupNorm { map, moments, .. }) => {
                self.give(map);
                self.give(moments);
            }
            Some(Saved::Modulate { moments }) => self.give(moments),
            Some(Saved::Linear { .. } | Saved::Learned { .. }) | None => {}
        }
        let entry = &mut self.maps[map.0];
        let own = entry.image.filter(|_| !entry.moved).map(|image| image.buffer);
        let gradient = entry.gradient.take().map(|gradient| gradient.buffer);
        for buffer in own.into_iter().chain(entry.statistics.take()).chain(gradient) {
            self.layout.give(buffer);
        }
    }
}

/// Which operation pays for a convolution.
fn form(sources: &[Image], target: &Image, taps: Taps) -> Form {
    match sources {
        [source] => variant(source, target, taps).map_or(Form::Direct, Form::Winograd),
        _ => Form::Direct,
    }
}
