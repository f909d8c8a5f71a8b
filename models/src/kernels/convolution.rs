//! One convolution by itself, from and to channels first: for benches and comparisons.

use super::{
    Direct, Export, Finish, Image, Import, Isa, Layout, Numbers, Operation, Program, Taps, Variant,
    Winograd, padded,
};

/// How a 3×3 convolution is worked out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// All products.
    Direct,
    /// Winograd's, two by two pixels at a time.
    F2,
    /// Winograd's, four by four pixels at a time.
    F4,
}

/// A 3×3 convolution with bias that keeps the size of a map.
pub struct Convolution(Program);

impl Convolution {
    /// Of maps `[channels, height, width]`, with `weights` `[bias.len(), channels, 3, 3]`.
    ///
    /// # Panics
    /// Where there are not as many weights.
    pub fn new(
        isa: Isa,
        algorithm: Algorithm,
        [channels, height, width]: [usize; 3],
        weights: &[f32],
        bias: &[f32],
    ) -> Self {
        let mut layout = Layout::default();
        let mut image = |channels: usize| {
            let buffer = layout.take(height * width * padded(channels));
            Image { buffer, numbers: Numbers::F32, height, width, segments: [channels, 0] }
        };
        let (source, target) = (image(channels), image(bias.len()));
        let finish = Finish::new(bias, isa.panel());
        let winograd = |variant, finish| -> Box<dyn Operation> {
            Box::new(Winograd::new(isa, variant, source, target, false, weights, finish))
        };
        let convolution: Box<dyn Operation> = match algorithm {
            Algorithm::Direct => {
                let taps = Taps { side: 3, stride: 1, padding: 1, doubled: false };
                Box::new(Direct::new(isa, &[source], target, taps, weights, finish))
            }
            Algorithm::F2 => winograd(Variant::F2, finish),
            Algorithm::F4 => winograd(Variant::F4, finish),
        };
        let operations: Vec<Box<dyn Operation>> = vec![
            Box::new(Import { input: 0, output: source, factor: 1.0, shift: 0.0 }),
            convolution,
            Box::new(Export { input: target, divisor: None }),
        ];
        let sizes = (channels * height * width, bias.len() * height * width);
        Self(Program::new(isa, operations, &layout, vec![sizes.0], sizes.1))
    }

    /// `x` `[batch, channels, height, width]` → `y` `[batch, outputs, height, width]`, on the threads
    /// of the current rayon pool.
    ///
    /// # Panics
    /// Where the lengths are others.
    pub fn forward(&self, batch: usize, x: &[f32], y: &mut [f32]) {
        self.0.run(batch, &[x], y);
    }
}
