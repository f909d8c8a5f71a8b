//! Heads by their root mean square (Zhang & Sennrich 2019).

use std::sync::Arc;

use super::arena::{Aligned, Buffer};
use super::bf16;
use super::element::ElementType;
use super::image::{CHUNK, Image};
use super::program::{Memory, Operation, Split};

/// `x·weight / √(mean(x²) + eps)` of each head of a pixel, which is as wide as the weight.
pub(crate) struct RmsNorm {
    input: Image,
    output: Image,
    weight: Arc<Aligned>,
    eps: f64,
}

impl RmsNorm {
    /// Of maps of one segment, whose channels are whole heads.
    pub(crate) fn new(input: Image, output: Image, weight: Arc<Aligned>, eps: f64) -> Self {
        assert_eq!(input.segments, output.segments);
        assert!(input.segments[1] == 0 && input.channels().is_multiple_of(weight.as_slice().len()));
        Self { input, output, weight, eps }
    }
}

impl Operation for RmsNorm {
    fn split(&self, batch: usize, _: usize) -> Split {
        Split::one(batch * self.input.pixels().div_ceil(CHUNK))
    }
    fn reads(&self) -> Vec<Buffer> {
        vec![self.input.buffer]
    }
    fn writes(&self) -> Vec<Buffer> {
        vec![self.output.buffer]
    }
    fn name(&self) -> String {
        format!("rms norm {} at {}", self.input.channels(), self.input.pixels())
    }
    fn weight_bytes(&self) -> usize {
        4 * self.weight.as_slice().len()
    }
    unsafe fn run(&self, memory: &Memory, _: usize, item: usize, _: usize) {
        let (input, output) = (&self.input, &self.output);
        let chunks = input.pixels().div_ceil(CHUNK);
        let (sample, first) = (item / chunks, item % chunks * CHUNK);
        let count = CHUNK.min(input.pixels() - first);
        let (from, to) = (input.words(), output.words());
        // SAFETY: the item's pixels of the input, which nothing writes now, and of the output, which it alone writes.
        let (source, target) = unsafe {
            let at =
                |image: &Image| memory.at(image.buffer, sample).wrapping_add(first * image.words());
            (
                std::slice::from_raw_parts(at(input).cast_const(), count * from),
                std::slice::from_raw_parts_mut(at(output), count * to),
            )
        };
        let weight = self.weight.as_slice();
        for (x, y) in source.chunks_exact(from).zip(target.chunks_exact_mut(to)) {
            y.fill(0.0);
            for head in (0..input.channels()).step_by(weight.len()) {
                let number = |c: usize| match input.element {
                    ElementType::F32 => x[head + c],
                    ElementType::Bf16 => bf16::get(x[(head + c) / 2], (head + c) % 2 == 1),
                };
                let squares: f64 = (0..weight.len()).map(|c| f64::from(number(c)).powi(2)).sum();
                let scale = 1.0 / (squares / weight.len() as f64 + self.eps).sqrt();
                for (c, &weight) in weight.iter().enumerate() {
                    let normed = number(c) * scale as f32 * weight;
                    output.element.put(y, head + c, 1, 0, normed);
                }
            }
        }
    }
}
