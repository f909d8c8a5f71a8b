//! Feature maps in the arena, and how they come in, go out, and change size.

use super::arena::{Buffer, padded};
use super::bf16;
use super::element::ElementType;
use super::program::{Memory, Operation, Split};

/// Feature maps of each sample, channels last: `[height, width, stride]` numbers.
///
/// The channels are one segment, or two where two maps were joined; each segment is padded with
/// zeros to whole cache lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Image {
    pub(crate) buffer: Buffer,
    pub(crate) element: ElementType,
    pub(crate) height: usize,
    pub(crate) width: usize,
    /// Channels of the segments; the second may be empty.
    pub(crate) segments: [usize; 2],
}

impl Image {
    /// Channels of a pixel, padding counted.
    pub(crate) fn stride(&self) -> usize {
        padded(self.segments[0]) + padded(self.segments[1])
    }

    /// Words from one pixel to the next.
    pub(crate) fn words(&self) -> usize {
        self.element.words(self.stride())
    }

    /// Pixels of a sample.
    pub(crate) fn pixels(&self) -> usize {
        self.height * self.width
    }

    /// Channels, padding not counted.
    pub(crate) fn channels(&self) -> usize {
        self.segments[0] + self.segments[1]
    }

    /// How many words of a pixel a product must read: with one segment the padding is left out.
    pub(crate) fn depth(&self) -> usize {
        self.element.words(if self.segments[1] == 0 { self.segments[0] } else { self.stride() })
    }

    /// Where in a pixel channel `c` is.
    pub(crate) fn place(&self, c: usize) -> usize {
        if c < self.segments[0] { c } else { padded(self.segments[0]) + c - self.segments[0] }
    }
}

/// Some channels of a map of one segment. Where two numbers share a word, they begin with one and fill whole ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Channels {
    pub(crate) image: Image,
    /// The first.
    pub(crate) start: usize,
    /// How many.
    pub(crate) width: usize,
}

impl Channels {
    /// Words of a pixel before them.
    pub(super) fn first(&self) -> usize {
        self.image.element.words(self.start)
    }

    /// Words of a pixel that they fill.
    pub(super) fn words(&self) -> usize {
        self.image.element.words(self.width)
    }

    /// Where they begin in the first pixel of `sample`.
    pub(super) fn at(&self, memory: &Memory, sample: usize) -> *mut f32 {
        memory.at(self.image.buffer, sample).wrapping_add(self.first())
    }
}

/// Pixels that one item of a simple pass works on.
pub(super) const CHUNK: usize = 128;

/// Numbers of an input, channels first and unpadded, as an image of f32: `factor·x + shift`.
pub(crate) struct Import {
    pub(crate) input: usize,
    /// Where among a sample's numbers of the input they begin, and how many of those there are.
    pub(crate) start: usize,
    pub(crate) apart: usize,
    pub(crate) output: Image,
    pub(crate) factor: f32,
    pub(crate) shift: f32,
}

impl Import {
    /// All numbers of an input as they are.
    pub(crate) fn whole(input: usize, output: Image) -> Self {
        let apart = output.pixels() * output.channels();
        Self { input, start: 0, apart, output, factor: 1.0, shift: 0.0 }
    }
}

impl Operation for Import {
    fn split(&self, batch: usize, _: usize) -> Split {
        Split::one(batch)
    }
    fn reads(&self) -> Vec<Buffer> {
        Vec::new()
    }
    fn writes(&self) -> Vec<Buffer> {
        vec![self.output.buffer]
    }
    fn name(&self) -> String {
        "import".to_string()
    }
    unsafe fn run(&self, memory: &Memory, _: usize, sample: usize, _: usize) {
        let (pixels, channels, words) =
            (self.output.pixels(), self.output.channels(), self.output.words());
        let len = pixels * channels;
        let input = &memory.inputs[self.input][sample * self.apart + self.start..][..len];
        // SAFETY: the sample's part of the output, which this item alone writes.
        let output = unsafe {
            std::slice::from_raw_parts_mut(memory.at(self.output.buffer, sample), pixels * words)
        };
        for (p, pixel) in output.chunks_exact_mut(words).enumerate() {
            let number = |c: usize| self.factor * input[c * pixels + p] + self.shift;
            match self.output.element {
                ElementType::F32 => {
                    for (c, value) in pixel.iter_mut().enumerate() {
                        *value = if c < channels { number(c) } else { 0.0 };
                    }
                }
                element @ ElementType::Bf16 => {
                    pixel.fill(0.0);
                    (0..channels).for_each(|c| element.put(pixel, c, 1, 0, number(c)));
                }
            }
        }
    }
}

/// An image of f32 as part of the output, channels first and unpadded: `factor·x + shift`; where `divisor` is given,
/// divided by each sample's number in that input.
pub(crate) struct Export {
    pub(crate) input: Image,
    pub(crate) factor: f32,
    pub(crate) shift: f32,
    pub(crate) divisor: Option<usize>,
    /// Where among a sample's numbers of the output it begins, and how many of those there are.
    pub(crate) start: usize,
    pub(crate) apart: usize,
}

impl Export {
    /// An image that is all of the output.
    pub(crate) fn whole(input: Image) -> Self {
        let apart = input.pixels() * input.channels();
        Self { input, factor: 1.0, shift: 0.0, divisor: None, start: 0, apart }
    }
}

impl Operation for Export {
    fn split(&self, batch: usize, _: usize) -> Split {
        Split::one(batch)
    }
    fn reads(&self) -> Vec<Buffer> {
        vec![self.input.buffer]
    }
    fn writes(&self) -> Vec<Buffer> {
        Vec::new()
    }
    fn name(&self) -> String {
        "export".to_string()
    }
    unsafe fn run(&self, memory: &Memory, _: usize, sample: usize, _: usize) {
        let (pixels, channels, stride) =
            (self.input.pixels(), self.input.channels(), self.input.stride());
        let divisor = self.divisor.map_or(1.0, |input| memory.inputs[input][sample]);
        let len = pixels * channels;
        debug_assert!(self.start + len <= self.apart);
        let start = sample * self.apart + self.start;
        // SAFETY: the sample's part of the input, which nothing writes now, and of the output, which
        // this item alone writes and whose length the program has checked.
        let (input, output) = unsafe {
            (
                std::slice::from_raw_parts(memory.at(self.input.buffer, sample), pixels * stride),
                std::slice::from_raw_parts_mut(memory.output().wrapping_add(start), len),
            )
        };
        for (c, plane) in output.chunks_exact_mut(pixels).enumerate() {
            for (p, value) in plane.iter_mut().enumerate() {
                *value = (self.factor * input[p * stride + c] + self.shift) / divisor;
            }
        }
    }
}

/// Half the size, by the mean of each four pixels.
pub(crate) struct Downsample {
    pub(crate) input: Image,
    pub(crate) output: Image,
}

impl Operation for Downsample {
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
        "downsample".to_string()
    }
    unsafe fn run(&self, memory: &Memory, _: usize, item: usize, _: usize) {
        let (words, width) = (self.output.words(), self.output.width);
        let mean = |above: [f32; 2], below: [f32; 2]| {
            ((above[0] + above[1]) + (below[0] + below[1])) * 0.25
        };
        resample(&self.input, &self.output, memory, item, |input, p, pixel| {
            let first = (p / width * 2 * self.input.width + p % width * 2) * words;
            let below = first + self.input.width * words;
            for (c, word) in pixel.iter_mut().enumerate() {
                let above = [input[first + c], input[first + words + c]];
                let below = [input[below + c], input[below + words + c]];
                match self.input.element {
                    ElementType::F32 => *word = mean(above, below),
                    ElementType::Bf16 => {
                        for upper in [false, true] {
                            let number = |word| bf16::get(word, upper);
                            bf16::put(word, upper, mean(above.map(number), below.map(number)));
                        }
                    }
                }
            }
        });
    }
}

/// Twice the size, each pixel becoming four.
pub(crate) struct Upsample {
    pub(crate) input: Image,
    pub(crate) output: Image,
}

impl Operation for Upsample {
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
        "upsample".to_string()
    }
    unsafe fn run(&self, memory: &Memory, _: usize, item: usize, _: usize) {
        let (words, width) = (self.output.words(), self.output.width);
        resample(&self.input, &self.output, memory, item, |input, p, pixel| {
            let from = (p / width / 2 * self.input.width + p % width / 2) * words;
            pixel.copy_from_slice(&input[from..][..words]);
        });
    }
}

/// Calls `fill(input of the sample, pixel number, pixel)` for the output pixels of one item.
pub(super) fn resample(
    input: &Image,
    output: &Image,
    memory: &Memory,
    item: usize,
    fill: impl Fn(&[f32], usize, &mut [f32]),
) {
    let chunks = output.pixels().div_ceil(CHUNK);
    let (sample, first) = (item / chunks, item % chunks * CHUNK);
    let count = CHUNK.min(output.pixels() - first);
    let (words, from) = (output.words(), input.pixels() * input.words());
    // SAFETY: the sample's part of the input, which nothing writes now, and the item's pixels of the
    // output, which it alone writes.
    let (source, target) = unsafe {
        let target = memory.at(output.buffer, sample).wrapping_add(first * words);
        (
            std::slice::from_raw_parts(memory.at(input.buffer, sample), from),
            std::slice::from_raw_parts_mut(target, count * words),
        )
    };
    for (i, pixel) in target.chunks_exact_mut(words).enumerate() {
        fill(source, first + i, pixel);
    }
}
