//! Sums of a gradient over all pixels: what a bias, and a vector added at every pixel, take from it.

use super::filter::Row;
use crate::kernels::arena::Buffer;
use crate::kernels::image::Image;
use crate::kernels::isa::{Kernel, dispatch};
use crate::kernels::program::{Memory, Operation, Split};
use crate::kernels::simd::Simd;

/// The sums of each sample, and of all samples as the gradients of biases.
pub(crate) struct Sums {
    pub(crate) input: Image,
    /// One for each channel.
    pub(crate) biases: Vec<Row>,
    /// `[stride]`: the gradient of a vector that was added at every pixel.
    pub(crate) output: Buffer,
}

impl Operation for Sums {
    fn split(&self, batch: usize, _: usize) -> Split {
        Split { items: [batch, 1], ..Split::one(0) }
    }
    fn reads(&self) -> Vec<Buffer> {
        vec![self.input.buffer]
    }
    fn writes(&self) -> Vec<Buffer> {
        vec![self.output]
    }
    fn name(&self) -> String {
        "sums".to_string()
    }
    unsafe fn run(&self, memory: &Memory, phase: usize, item: usize, _: usize) {
        if phase == 0 {
            let from = memory.at(self.input.buffer, item);
            let to = memory.at(self.output, item);
            let (pixels, stride) = (self.input.pixels(), self.input.stride());
            return dispatch(memory.isa, Sample { from, to, pixels, stride });
        }
        for (c, row) in self.biases.iter().enumerate() {
            // SAFETY: the sums of every sample are there, and nothing else writes this gradient.
            unsafe {
                let of = |sample| f64::from(*memory.at(self.output, sample).add(c));
                let sum: f64 = (0..memory.batch).map(of).sum();
                *memory.gradients().add(row.gradient) = row.factor * sum as f32;
            }
        }
    }
}

struct Sample {
    from: *const f32,
    to: *mut f32,
    pixels: usize,
    stride: usize,
}

impl Kernel for Sample {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut c = 0;
        while c < self.stride {
            let mut sums = [s.splat(0.0); 4];
            let mut p = 0;
            while p < self.pixels {
                for (i, sum) in sums.iter_mut().enumerate() {
                    if p + i < self.pixels {
                        // SAFETY: the pixel is one of the sample's, the vector one of its channels.
                        *sum = s
                            .add(*sum, unsafe { s.load(self.from.add((p + i) * self.stride + c)) });
                    }
                }
                p += 4;
            }
            // SAFETY: the result is as long as a pixel.
            unsafe {
                s.store(self.to.add(c), s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])));
            }
            c += S::LANES;
        }
    }
}
