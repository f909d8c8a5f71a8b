//! How the gradients of a network follow from each other: noted while its operations are added, gone
//! through backwards for those of the gradients.
//!
//! A gradient takes memory from the first layer that adds to it until the layer that made the map has
//! used it, and with it the map.

use candle_core::Tensor;

use super::builder::{Builder, variant};
use super::tokens::{Gated, Modulated};
use crate::assembly::{Affine, End, Map};
use crate::kernels::{
    AttendGradient, Buffer, Combine, Constants, Direct, DirectGradient, Filter, Finish, Form,
    Function, Image, Layout, NormGradient, NormSource, Pack, PackBias, Row, Scale, Sums, Taps,
    Values, Way, Winograd, WinogradGradient, places,
};

/// What is noted of a network that is trained.
#[derive(Default)]
pub(crate) struct Tape {
    pub(crate) steps: Vec<Step>,
    /// All weights that the operations read, and where each one's gradient begins.
    pub(crate) parameters: Vec<(Tensor, usize)>,
    /// Floats of all gradients together.
    pub(crate) total: usize,
    /// The memory for packed weights: each layer's are made just before it runs.
    pub(crate) placed: Layout,
}

/// One layer.
pub(crate) enum Step {
    Linear(Linear),
    Normalise(Normalised),
    Attend { qkv: Map, target: Map, heads: usize },
    Modulate(Modulated),
    Gate(Gated),
    Activate { source: Map, target: Map, function: Function },
    Pixel { source: Map, target: Map, from: usize },
    Halve { source: Map, target: Map },
    Double { source: Map, target: Map },
}

/// A convolution or linear map.
pub(crate) struct Linear {
    sources: Vec<Map>,
    target: Map,
    taps: Taps,
    filter: Filter,
    biases: Vec<Row>,
    end: End,
}

/// A norm and what goes with it.
pub(crate) struct Normalised {
    pub(crate) sources: Vec<Map>,
    pub(crate) target: Map,
    pub(crate) groups: usize,
    pub(crate) function: Function,
    /// Factors and terms of each channel.
    pub(crate) map: Buffer,
    /// Means and deviations of each group.
    pub(crate) moments: Buffer,
    /// Numbers of weight and bias.
    pub(crate) parameters: [usize; 2],
    pub(crate) modulation: Option<Map>,
}

impl Tape {
    /// Notes a weight, and gives its number.
    pub(crate) fn register(&mut self, tensor: Tensor) -> usize {
        let len = tensor.elem_count();
        self.parameters.push((tensor, self.total));
        self.total += len;
        self.parameters.len() - 1
    }

    /// The number of a weight that was registered.
    pub(crate) fn number(&self, values: &Values) -> usize {
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

impl<C> Builder<'_, C> {
    /// Notes a layer, where the network is trained.
    pub(crate) fn record(&mut self, step: Step) {
        if let Some(tape) = &mut self.tape {
            tape.steps.push(step);
        }
    }

    fn tape(&mut self) -> &mut Tape {
        self.tape.as_mut().expect("only a network that is trained comes here")
    }

    /// A convolution whose weights are packed when it runs; `parts` as in [`crate::assembly::Assembly::pointwise`].
    pub(crate) fn trained_convolution(
        &mut self,
        sources: &[Map],
        target: Map,
        taps: Taps,
        parts: &[Affine],
        end: End,
    ) -> crate::Result<()> {
        let images: Vec<Image> = sources.iter().map(|&source| self.image(source)).collect();
        let to = self.image(target);
        let channels: usize = images.iter().map(Image::channels).sum();
        let count = taps.side * taps.side;
        let (mut rows, mut biases) = (Vec::new(), Vec::new());
        let tape = self.tape();
        for (weight, bias, factor) in parts {
            let outputs = bias.elem_count();
            let (weight, bias) = (tape.register(weight.clone()), tape.register(bias.clone()));
            for o in 0..outputs {
                rows.push(tape.row(weight, o * channels * count, *factor));
                biases.push(tape.row(bias, o, *factor));
            }
        }
        let filter = Filter { rows, taps: count };

        let form = form(&images, &to, taps);
        let inputs = places(&images, 0, form == Form::Direct);
        let outputs = (0..to.channels()).map(Some).collect();
        let weights = self.pack(filter.clone(), form, false, inputs, outputs);
        let len = to.channels().next_multiple_of(self.isa.panel());
        let bias = self.tape().placed.take(len);
        self.push(PackBias { rows: biases.clone(), output: bias });
        let finish = self.finish_with(Finish::with(Constants::Placed(bias)), end);
        let constants = Constants::Placed(weights);
        match form {
            Form::Winograd(variant) => {
                let doubled = taps.doubled;
                let source = images[0];
                self.push(Winograd::with(
                    self.isa, variant, source, to, doubled, constants, finish,
                ));
            }
            Form::Direct => {
                self.push(Direct::with(self.isa, &images, to, taps, constants, finish));
            }
        }
        self.tape().placed.give(weights);
        self.tape().placed.give(bias);
        let sources = sources.to_vec();
        self.record(Step::Linear(Linear { sources, target, taps, filter, biases, end }));
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
    pub(crate) fn gradient(&mut self, map: Map) -> (Image, bool) {
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

    /// Adds the operations of all gradients but that of the network's input `x`, given that of its
    /// output; the first convolution is left for [`Builder::gradient_of_input`].
    pub(crate) fn backward(&mut self, x: Map) -> Option<Linear> {
        let mut first = None;
        while let Some(step) = self.tape().steps.pop() {
            match step {
                Step::Linear(linear) => {
                    let target = linear.target;
                    let Some(own) = self.weight_gradients(&linear) else { continue };
                    if linear.sources == [x] {
                        first = Some(linear);
                        continue;
                    }
                    self.source_gradients(&linear, own);
                    match linear.end.residual {
                        Some(residual) if residual == target => {}
                        Some(residual) => {
                            self.pass_on(target, residual, own);
                            self.forget(target);
                        }
                        None => self.forget(target),
                    }
                }
                Step::Normalise(norm) => self.norm_gradient(norm),
                Step::Attend { qkv, target, heads } => {
                    if let Some(output) = self.maps[target.0].gradient {
                        let (input, (gradient, _)) = (self.image(qkv), self.gradient(qkv));
                        let isa = self.isa;
                        self.push(AttendGradient::new(isa, input, output, gradient, heads));
                    }
                    self.forget(target);
                }
                Step::Modulate(modulated) => self.modulate_gradient(&modulated),
                Step::Gate(gated) => self.gate_gradient(&gated),
                Step::Activate { source, target, function } => {
                    self.activate_gradient(source, target, function);
                }
                Step::Pixel { source, target, from } => self.pixel_gradient(source, target, from),
                Step::Halve { source, target } => self.resize_gradient(source, target, Way::Halved),
                Step::Double { source, target } => {
                    self.resize_gradient(source, target, Way::Doubled);
                }
            }
        }
        first
    }

    /// Adds the operations of the gradient of the network's input.
    pub(crate) fn gradient_of_input(&mut self, first: &Linear) {
        if let Some(own) = self.maps[first.target.0].gradient {
            self.source_gradients(first, own);
        }
    }

    /// The gradient of a map, once something has added to it.
    pub(super) fn gradient_of(&self, map: Map) -> Option<Image> {
        self.maps[map.0].gradient
    }

    /// The map and its gradient are not needed any more.
    pub(super) fn forget(&mut self, map: Map) {
        let entry = &mut self.maps[map.0];
        self.layout.give(entry.image.buffer);
        for buffer in
            entry.statistics.take().into_iter().chain(entry.gradient.take().map(|g| g.buffer))
        {
            self.layout.give(buffer);
        }
    }

    /// What was added has the gradient of the sum.
    pub(super) fn pass_on(&mut self, target: Map, residual: Map, own: Image) {
        match self.maps[residual.0].gradient {
            None => self.maps[residual.0].gradient = self.maps[target.0].gradient.take(),
            Some(output) => self.push(Combine { input: own, output, way: Way::Same, add: true }),
        }
    }

    fn resize_gradient(&mut self, source: Map, target: Map, way: Way) {
        if let Some(input) = self.maps[target.0].gradient {
            let (output, add) = self.gradient(source);
            self.push(Combine { input, output, way, add });
        }
        self.forget(target);
    }

    /// Gradients of weights, biases and offset; gives where that of the target is.
    fn weight_gradients(&mut self, linear: &Linear) -> Option<Image> {
        let own = self.maps[linear.target.0].gradient?;
        let Linear { sources, target, taps, filter, biases, end } = linear;
        if end.factor != 1.0 {
            self.push(Scale { map: own, factor: end.factor });
        }
        let offset = end.offset.and_then(|projection| self.projected(projection).map);
        let output = match offset {
            Some(map) => self.gradient(map).0.buffer,
            None => self.take(own.stride()),
        };
        self.push(Sums { input: own, biases: biases.clone(), output });
        if offset.is_none() {
            self.give(output);
        }
        let images: Vec<Image> = sources.iter().map(|&source| self.image(source)).collect();
        let to = self.image(*target);
        match form(&images, &to, *taps) {
            Form::Winograd(variant) => self.push(WinogradGradient::new(
                variant,
                images[0],
                own,
                taps.doubled,
                filter.clone(),
            )),
            Form::Direct => {
                let mut first = 0;
                for image in images {
                    self.push(DirectGradient::new(image, own, *taps, filter.clone(), first));
                    first += image.channels();
                }
            }
        }
        Some(own)
    }

    /// Gradients of all sources, from `own`, that of the target.
    fn source_gradients(&mut self, linear: &Linear, own: Image) {
        let Linear { sources, taps, filter, .. } = linear;
        let plain = Taps { doubled: false, ..*taps };
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
            let weights = self.pack(filter.clone(), form, true, inputs, outputs);
            let finish = Finish {
                residual: (add && !taps.doubled).then_some(target),
                ..Finish::new(&zeros, self.isa.panel())
            };
            let constants = Constants::Placed(weights);
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
            self.tape().placed.give(weights);
            if taps.doubled {
                self.push(Combine { input: target, output: gradient, way: Way::Doubled, add });
                self.give(target.buffer);
            }
            first += image.channels();
        }
    }

    fn norm_gradient(&mut self, norm: Normalised) {
        let Normalised { sources, target, groups, function, map, moments, .. } = norm;
        if let Some(gradient) = self.maps[target.0].gradient {
            let image = self.image(target);
            let pairs = sources
                .iter()
                .map(|&source| {
                    let (value, (gradient, add)) = (self.image(source), self.gradient(source));
                    NormSource { value, gradient, add }
                })
                .collect();
            let modulation = norm.modulation.map(|map| {
                let values = self.image(map).buffer;
                (values, self.gradient(map).0.buffer)
            });
            let shares = self.take(2 * image.channels());
            let [weight, bias] = norm.parameters.map(|number| self.tape().row(number, 0, 1.0));
            self.push(NormGradient {
                sources: pairs,
                target: Image { buffer: gradient.buffer, ..image },
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
        self.give(map);
        self.give(moments);
        self.forget(target);
    }
}

/// Which operation pays for a convolution.
fn form(sources: &[Image], target: &Image, taps: Taps) -> Form {
    match sources {
        [source] => variant(source, target, taps).map_or(Form::Direct, Form::Winograd),
        _ => Form::Direct,
    }
}
