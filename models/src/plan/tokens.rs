//! The gradients of the layers that only transformers have. A token is a pixel; what a sample is told is a map of
//! one pixel.

use super::builder::Builder;
use crate::assembly::Map;
use crate::kernels::{
    ActivateGradient, Buffer, Fill, Function, GateGradient, ModulateGradient, Pixel, Told,
};

/// Layer normalisation with a scale and a shift.
pub(crate) struct Modulated {
    pub(super) source: Map,
    pub(super) target: Map,
    /// Of which scale and shift are parts, and which.
    pub(super) told: Map,
    pub(super) scale: usize,
    pub(super) shift: usize,
    pub(super) moments: Buffer,
}

/// `target = residual + gate·source`.
pub(crate) struct Gated {
    pub(super) source: Map,
    pub(super) residual: Map,
    pub(super) target: Map,
    pub(super) told: Map,
    pub(super) gate: usize,
}

impl<C> Builder<'_, C> {
    /// Part `index` of what is told, each as long as `like` has channels.
    pub(super) fn part(&self, told: Map, index: usize, like: Map) -> Told {
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
