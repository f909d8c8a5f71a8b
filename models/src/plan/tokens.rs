//! The layers that only transformers have, and their gradients. A token is a pixel; what a sample is told
//! is a map of one pixel.

use super::builder::{Builder, Entry, Map};
use super::tape::Step;
use crate::kernels::{
    Activate, ActivateGradient, Buffer, Fill, Function, Gate, GateGradient, Image, Modulate,
    ModulateGradient, Numbers, Pixel, Told, padded,
};

/// Floats that vectors may be read further than what they are for.
const WIDEST: usize = 16;

/// Layer normalisation with a scale and a shift.
pub(crate) struct Modulated {
    source: Map,
    target: Map,
    /// Of which scale and shift are parts, and which.
    told: Map,
    scale: usize,
    shift: usize,
    moments: Buffer,
}

/// `target = residual + gate·source`.
pub(crate) struct Gated {
    source: Map,
    residual: Map,
    target: Map,
    told: Map,
    gate: usize,
}

impl<C> Builder<'_, C> {
    /// A map of one pixel, parts of which norms and gates will read.
    pub(crate) fn told(&mut self, channels: usize) -> Map {
        let buffer = self.layout.take(padded(channels) + WIDEST);
        let segments = [channels, 0];
        let image = Image { buffer, numbers: Numbers::F32, height: 1, width: 1, segments };
        self.enter(Entry::new(image))
    }

    /// Part `index` of what is told, each as long as `like` has channels.
    fn part(&self, told: Map, index: usize, like: Map) -> Told {
        let start = index * self.image(like).channels();
        Told { buffer: self.image(told).buffer, start }
    }

    /// The gradients of a part, all of which begin as zeros.
    fn gradient_part(&mut self, told: Map, index: usize, like: Map) -> Told {
        let (gradient, begun) = self.gradient(told);
        if !begun {
            self.push(Fill::new(&vec![0.0; gradient.channels()], gradient));
        }
        Told { buffer: gradient.buffer, start: index * self.image(like).channels() }
    }

    /// Tokens normalised, times one plus part `scale` of what is told, plus part `shift`.
    pub(crate) fn modulate(
        &mut self,
        source: Map,
        eps: f64,
        told: Map,
        [scale, shift]: [usize; 2],
    ) -> Map {
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

    /// `residual + gate·source`, with part `gate` of what is told.
    pub(crate) fn gate(&mut self, source: Map, residual: Map, told: Map, gate: usize) -> Map {
        let image = self.image(source);
        let target = self.map(image.height, image.width, image.channels());
        let part = self.part(told, gate, source);
        self.push(Gate::new(image, self.image(residual), self.image(target), part));
        self.record(Step::Gate(Gated { source, residual, target, told, gate }));
        target
    }

    /// An element-wise function.
    pub(crate) fn activate(&mut self, source: Map, function: Function) -> Map {
        let input = self.image(source);
        let target = self.map(input.height, input.width, input.channels());
        self.push(Activate { input, output: self.image(target), function });
        self.record(Step::Activate { source, target, function });
        target
    }

    /// A map that is the same for every sample, `[pixels, channels]`; it has no gradient.
    pub(crate) fn constant(&mut self, values: &[f32], like: Map) -> Map {
        let image = self.image(like);
        let target = self.map(image.height, image.width, image.channels());
        self.push(Fill::new(values, self.image(target)));
        target
    }

    /// One pixel as a map of its own.
    pub(crate) fn pixel(&mut self, source: Map, from: usize) -> Map {
        let input = self.image(source);
        let target = self.map(1, 1, input.channels());
        self.push(Pixel { input, from, output: self.image(target), to: 0 });
        self.record(Step::Pixel { source, target, from });
        target
    }

    pub(super) fn modulate_gradient(&mut self, step: &Modulated) {
        let Modulated { source, target, told, scale, shift, moments } = *step;
        if let Some(output) = self.gradient_of(target) {
            let value = self.image(source);
            let of_told = [scale, shift].map(|index| self.gradient_part(told, index, source));
            let scale = self.part(told, scale, source);
            let gradient = self.gradient(source);
            self.push(ModulateGradient::new(value, output, gradient, moments, scale, of_told));
        }
        self.give(moments);
        self.forget(target);
    }

    pub(super) fn gate_gradient(&mut self, step: &Gated) {
        let Gated { source, residual, target, told, gate } = *step;
        if let Some(output) = self.gradient_of(target) {
            let value = self.image(source);
            let (gradient, begun) = self.gradient(source);
            assert!(!begun, "what is gated goes nowhere else");
            let of_gate = self.gradient_part(told, gate, source);
            let gate = self.part(told, gate, source);
            self.push(GateGradient::new(value, output, gradient, gate, of_gate));
            self.pass_on(target, residual, output);
        }
        self.forget(target);
    }

    pub(super) fn activate_gradient(&mut self, source: Map, target: Map, function: Function) {
        if let Some(output) = self.gradient_of(target) {
            let value = self.image(source);
            let (gradient, add) = self.gradient(source);
            self.push(ActivateGradient { value, output, gradient, add, function });
        }
        self.forget(target);
    }

    /// Each pixel is taken once, and all of them are.
    pub(super) fn pixel_gradient(&mut self, source: Map, target: Map, to: usize) {
        if let Some(input) = self.gradient_of(target) {
            let (output, _) = self.gradient(source);
            self.push(Pixel { input, from: 0, output, to });
        }
        self.forget(target);
    }
}
