//! Gradients that only move: of maps that change size, and of sums.

use crate::kernels::arena::Buffer;
use crate::kernels::image::{CHUNK, Image, resample};
use crate::kernels::program::{Memory, Operation, Split};

/// How one gradient follows from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// The same.
    Same,
    /// Each pixel is the sum of four: the gradient of doubling.
    Doubled,
    /// Each pixel gives a quarter to each of four: the gradient of halving.
    Halved,
}

/// `output = way(input)`, or `output += way(input)`.
pub(crate) struct Combine {
    pub(crate) input: Image,
    pub(crate) output: Image,
    pub(crate) way: Way,
    pub(crate) add: bool,
}

impl Operation for Combine {
    fn split(&self, batch: usize, _: usize) -> Split {
        Split::one(batch * self.output.pixels().div_ceil(CHUNK))
    }
    fn reads(&self) -> Vec<Buffer> {
        vec![self.input.buffer]
    }
    fn writes(&self) -> Vec<Buffer> {
        vec![self.output.buffer]
    }
    fn name(&self) -> String {
        format!("combine {:?}", self.way)
    }
    unsafe fn run(&self, memory: &Memory, _: usize, item: usize, _: usize) {
        let (stride, width) = (self.output.stride(), self.output.width);
        resample(&self.input, &self.output, memory, item, |input, p, pixel| {
            let (y, x) = (p / width, p % width);
            match self.way {
                Way::Same => {
                    let from = &input[p * stride..][..stride];
                    set(self.add, pixel, |c| from[c]);
                }
                Way::Halved => {
                    let from = &input[(y / 2 * self.input.width + x / 2) * stride..][..stride];
                    set(self.add, pixel, |c| 0.25 * from[c]);
                }
                Way::Doubled => {
                    let row = |dy: usize| {
                        let first = ((2 * y + dy) * self.input.width + 2 * x) * stride;
                        &input[first..][..2 * stride]
                    };
                    let (above, below) = (row(0), row(1));
                    set(self.add, pixel, |c| {
                        (above[c] + above[stride + c]) + (below[c] + below[stride + c])
                    });
                }
            }
        });
    }
}

#[inline(always)]
fn set(add: bool, pixel: &mut [f32], value: impl Fn(usize) -> f32) {
    if add {
        pixel.iter_mut().enumerate().for_each(|(c, y)| *y += value(c));
    } else {
        pixel.iter_mut().enumerate().for_each(|(c, y)| *y = value(c));
    }
}

/// `map *= factor`.
pub(crate) struct Scale {
    pub(crate) map: Image,
    pub(crate) factor: f32,
}

impl Operation for Scale {
    fn split(&self, batch: usize, _: usize) -> Split {
        Split::one(batch)
    }
    fn reads(&self) -> Vec<Buffer> {
        Vec::new()
    }
    fn writes(&self) -> Vec<Buffer> {
        vec![self.map.buffer]
    }
    fn name(&self) -> String {
        "scale".to_string()
    }
    unsafe fn run(&self, memory: &Memory, _: usize, sample: usize, _: usize) {
        let len = self.map.pixels() * self.map.stride();
        // SAFETY: the sample's part of the map, which this item alone touches.
        let map =
            unsafe { std::slice::from_raw_parts_mut(memory.at(self.map.buffer, sample), len) };
        map.iter_mut().for_each(|x| *x *= self.factor);
    }
}
