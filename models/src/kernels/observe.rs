//! Maps shown to whoever watches, while a program runs.

use std::sync::Arc;

use super::arena::Buffer;
use super::image::Image;
use super::program::{Memory, Operation, Split};

/// Is told a sample's time and its map, `[pixels, stride]`.
pub(crate) type Watch = dyn Fn(f32, &[f32]) + Send + Sync;

/// Shows a map of f32, sample by sample in their order.
pub(crate) struct Observe {
    pub(crate) input: Image,
    /// The input that has the time of each sample.
    pub(crate) time: usize,
    pub(crate) watch: Arc<Watch>,
}

impl Operation for Observe {
    fn split(&self, _: usize, _: usize) -> Split {
        Split::one(1)
    }
    fn reads(&self) -> Vec<Buffer> {
        vec![self.input.buffer]
    }
    fn writes(&self) -> Vec<Buffer> {
        Vec::new()
    }
    fn name(&self) -> String {
        format!("observe {} at {}", self.input.channels(), self.input.pixels())
    }
    unsafe fn run(&self, memory: &Memory, _: usize, _: usize, _: usize) {
        let len = self.input.pixels() * self.input.stride();
        for sample in 0..memory.batch {
            let map = memory.at(self.input.buffer, sample).cast_const();
            // SAFETY: the sample's part of the map, which nothing writes now.
            let map = unsafe { std::slice::from_raw_parts(map, len) };
            (self.watch)(memory.inputs[self.time][sample], map);
        }
    }
}
