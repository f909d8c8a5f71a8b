//! Attention of the pixels of a map over those of the same or another (Vaswani et al. 2017), a block of queries at a time.
//!
//! The scores of a block against all keys stay in a near cache from their product to the one with the
//! values; no matrix of all scores exists.

use std::marker::PhantomData;

use super::activation::exp;
use super::arena::{Buffer, padded};
use super::element::{Bf16, Element, ElementType, F32};
use super::gemm::{self, Rows};
use super::image::{Channels, Image};
use super::isa::{Kernel, dispatch};
use super::program::{Memory, Needs, Operation, Split};
use super::simd::Simd;

/// Blocks of rows in a block of queries.
const BLOCKS: usize = 2;

/// The most rows of three vectors of sums that 32 registers hold beside what is multiplied.
const MOST_OF_THREE: usize = 7;

/// Keys as the columns of packed panels: `[heads][panels of keys][head channels][panel]` words, with
/// zeros after the last key.
pub(crate) struct PackKeys {
    /// A head's channels fill whole words.
    pub(crate) keys: Channels,
    pub(crate) heads: usize,
    pub(crate) panel: usize,
    pub(crate) output: Buffer,
}

impl PackKeys {
    /// Words per sample of the result.
    pub(crate) fn len(keys: &Channels, panel: usize) -> usize {
        keys.words() * keys.image.pixels().next_multiple_of(panel)
    }
}

impl Operation for PackKeys {
    fn split(&self, batch: usize, _: usize) -> Split {
        Split::one(batch * self.heads)
    }
    fn reads(&self) -> Vec<Buffer> {
        vec![self.keys.image.buffer]
    }
    fn writes(&self) -> Vec<Buffer> {
        vec![self.output]
    }
    fn name(&self) -> String {
        "pack keys".to_string()
    }
    unsafe fn run(&self, memory: &Memory, _: usize, item: usize, _: usize) {
        let (sample, head) = (item / self.heads, item % self.heads);
        let image = self.keys.image;
        let (pixels, stride, first) = (image.pixels(), image.words(), self.keys.first());
        let width = self.keys.words() / self.heads;
        let len = pixels.next_multiple_of(self.panel);
        // SAFETY: the sample's part of the input, which nothing writes now, and the head's part of
        // the output, which this item alone writes.
        let (input, output) = unsafe {
            let to = memory.at(self.output, sample).wrapping_add(head * width * len);
            (
                std::slice::from_raw_parts(memory.at(image.buffer, sample), pixels * stride),
                std::slice::from_raw_parts_mut(to, width * len),
            )
        };
        for (i, panel) in output.chunks_exact_mut(width * self.panel).enumerate() {
            for (j, pixel) in (i * self.panel..(i + 1) * self.panel).enumerate() {
                for c in 0..width {
                    panel[c * self.panel + j] = if pixel < pixels {
                        input[pixel * stride + first + head * width + c]
                    } else {
                        0.0
                    };
                }
            }
        }
    }
}

/// Values of bf16 as the columns of a product that takes keys in pairs: `[pairs of keys][stride]` words, a
/// word being one channel of both; after an odd last key come zeros.
pub(crate) struct PackValues {
    pub(crate) values: Channels,
    pub(crate) output: Buffer,
}

impl PackValues {
    /// Words from one pair of keys to the next.
    fn stride(values: &Channels) -> usize {
        padded(values.width)
    }

    /// Words per sample of the result.
    pub(crate) fn len(values: &Channels) -> usize {
        values.image.pixels().div_ceil(2) * Self::stride(values)
    }
}

impl Operation for PackValues {
    fn split(&self, batch: usize, _: usize) -> Split {
        Split::one(batch)
    }
    fn reads(&self) -> Vec<Buffer> {
        vec![self.values.image.buffer]
    }
    fn writes(&self) -> Vec<Buffer> {
        vec![self.output]
    }
    fn name(&self) -> String {
        "pack values".to_string()
    }
    unsafe fn run(&self, memory: &Memory, _: usize, sample: usize, _: usize) {
        let image = self.values.image;
        let (pixels, words, start) = (image.pixels(), image.words(), self.values.first());
        let (width, stride) = (self.values.words(), Self::stride(&self.values));
        // SAFETY: the sample's part of the input, which nothing writes now, and of the output, which this
        // item alone writes; a word is as good a u32 as an f32.
        let (input, output) = unsafe {
            let from = memory.at(image.buffer, sample).cast::<u32>();
            let to = memory.at(self.output, sample).cast::<u32>();
            (
                std::slice::from_raw_parts(from, pixels * words),
                std::slice::from_raw_parts_mut(to, pixels.div_ceil(2) * stride),
            )
        };
        // Heads' channels fill whole words, so the values begin with one.
        let values = |pixel: usize| &input[pixel * words + start..][..width];
        let none = vec![0; width];
        for (pair, output) in output.chunks_exact_mut(stride).enumerate() {
            let first = values(2 * pair);
            let second = if 2 * pair + 1 < pixels { values(2 * pair + 1) } else { &none };
            for (to, (first, second)) in output.chunks_exact_mut(2).zip(first.iter().zip(second)) {
                to[0] = first & 0xffff | second << 16;
                to[1] = first >> 16 | second & 0xffff_0000;
            }
        }
    }
}

/// The values, averaged for each query and head with weights `softmax(query · keys)`; whoever made the
/// queries has scaled them.
pub(crate) struct Attend {
    /// A head's channels fill whole words.
    pub(crate) queries: Channels,
    /// As [`PackKeys`] left them.
    pub(crate) keys: Buffer,
    pub(crate) values: Channels,
    /// Where they are of bf16, the values in pairs, as [`PackValues`] left them.
    pub(crate) pairs: Option<Buffer>,
    /// Whether a query sees no key after its own place.
    pub(crate) causal: bool,
    /// Where the number of keys that are seen is, as [`super::CountTokens`] left it; all are without.
    pub(crate) count: Option<Buffer>,
    pub(crate) heads: usize,
    pub(crate) panel: usize,
    pub(crate) rows: usize,
    pub(crate) output: Image,
}

impl Attend {
    fn block(&self) -> usize {
        BLOCKS * self.rows
    }

    /// How many keys there are.
    fn key_count(&self) -> usize {
        self.values.image.pixels()
    }

    /// Keys, padded to whole panels.
    fn padded_keys(&self) -> usize {
        self.key_count().next_multiple_of(self.panel)
    }

    fn width(&self) -> usize {
        self.output.channels() / self.heads
    }
}

impl Operation for Attend {
    fn split(&self, batch: usize, _: usize) -> Split {
        let items = batch * self.heads * self.output.pixels().div_ceil(self.block());
        // The scores, and one over the sum of each query's weights.
        let scratch = self.block() * (self.padded_keys() + 1);
        Split { items: [items, 0], needs: Needs { scratch, shared: 0 } }
    }
    fn reads(&self) -> Vec<Buffer> {
        let mut reads = vec![self.queries.image.buffer, self.keys];
        // Where they are in pairs, nothing else of them is read.
        reads.push(self.pairs.unwrap_or(self.values.image.buffer));
        reads.extend(self.count);
        reads
    }
    fn writes(&self) -> Vec<Buffer> {
        vec![self.output.buffer]
    }
    fn name(&self) -> String {
        format!("attend {} heads of {} at {}", self.heads, self.width(), self.output.pixels())
    }
    fn flop(&self) -> f64 {
        4.0 * (self.output.pixels() * self.key_count() * self.output.channels()) as f64
    }
    unsafe fn run(&self, memory: &Memory, _: usize, item: usize, worker: usize) {
        let blocks = self.output.pixels().div_ceil(self.block());
        let (sample, head, block) =
            (item / blocks / self.heads, item / blocks % self.heads, item % blocks);
        let first = block * self.block();
        let count = self.block().min(self.output.pixels() - first);
        let scores = memory.scratch(worker);
        let sums = scores.wrapping_add(self.block() * self.padded_keys());
        let run = Queries { attend: self, memory, sample, head, first, count, scores, sums };
        dispatch(memory.isa, run);
    }
}

struct Queries<'a> {
    attend: &'a Attend,
    memory: &'a Memory<'a>,
    sample: usize,
    head: usize,
    first: usize,
    count: usize,
    /// `[queries][padded keys]`.
    scores: *mut f32,
    /// `[queries]`.
    sums: *mut f32,
}

impl Kernel for Queries<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.attend.queries.image.element {
            ElementType::Bf16 if S::BF16 => self.of::<S, Bf16>(s),
            _ => self.of::<S, F32>(s),
        }
    }
}

impl Queries<'_> {
    #[inline(always)]
    fn of<S: Simd, E: Element>(&self, s: S) {
        let numbers = PhantomData::<E>;
        let mut row = 0;
        while row < self.count {
            let rows = S::ROWS.min(self.count - row);
            // SAFETY: the rows are queries of this item.
            unsafe {
                gemm::with_rows(s, rows, &Scores { queries: self, numbers, row });
                for r in row..row + rows {
                    self.softmax::<S, E>(s, r);
                }
                self.values::<S, E>(s, row, rows);
            }
            row += rows;
        }
        if self.head == 0 {
            self.clear_padding();
        }
    }

    /// `output = weights · values / sum` of some rows, two vectors of channels at a time. Of an odd number three come first,
    /// where registers hold them for half of the rows, or one is last.
    ///
    /// # Safety
    /// The queries' weights are there.
    #[inline(always)]
    unsafe fn values<S: Simd, E: Element>(&self, s: S, row: usize, rows: usize) {
        let numbers = PhantomData::<E>;
        let vectors = self.attend.width().div_ceil(S::LANES);
        let mut vector = 0;
        // SAFETY: the caller's promise.
        unsafe {
            if S::ROWS >= 2 * MOST_OF_THREE && vectors % 2 == 1 && vectors > 1 {
                let mut done = 0;
                while done < rows {
                    let count = rows.div_ceil(rows.div_ceil(MOST_OF_THREE)).min(rows - done);
                    let row = row + done;
                    gemm::with_rows(
                        s,
                        count,
                        &Values::<E, 3> { queries: self, numbers, row, vector },
                    );
                    done += count;
                }
                vector = 3;
            }
            while vector + 1 < vectors {
                gemm::with_rows(s, rows, &Values::<E, 2> { queries: self, numbers, row, vector });
                vector += 2;
            }
            if vector < vectors {
                gemm::with_rows(s, rows, &Values::<E, 1> { queries: self, numbers, row, vector });
            }
        }
    }

    /// `e^(score − max)` in place, rounded to what the product with the values takes, and one over the sum,
    /// both in an order that only the number of keys decides.
    ///
    /// # Safety
    /// The query's scores are there.
    #[inline(always)]
    unsafe fn softmax<S: Simd, E: Element>(&self, s: S, row: usize) {
        let all = self.attend.padded_keys();
        let there = match self.attend.count {
            // SAFETY: the sample's number, which nothing writes now.
            Some(count) => unsafe { *self.memory.at(count, self.sample) as usize },
            None => self.attend.key_count(),
        };
        let keys = if self.attend.causal { there.min(self.first + row + 1) } else { there };
        let scores = self.scores.wrapping_add(row * all);
        // SAFETY: a row has `all` scores, whole vectors; vectors have at most 16 lanes.
        unsafe {
            // What is beyond the last key must weigh nothing.
            let end = keys.next_multiple_of(S::LANES).min(all);
            for i in keys..end {
                *scores.add(i) = f32::NEG_INFINITY;
            }
            let mut most = s.splat(f32::NEG_INFINITY);
            let mut i = 0;
            while i < end {
                most = s.max(most, s.load(scores.add(i)));
                i += S::LANES;
            }
            let mut lanes = [0f32; 16];
            s.store(lanes.as_mut_ptr(), most);
            let most = lanes[..S::LANES].iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
            let most = s.splat(most);
            let mut sum = s.splat(0.0);
            let mut i = 0;
            while i < end {
                let mut weight = exp(s, s.sub(s.load(scores.add(i)), most));
                if i + S::LANES > keys {
                    s.store(lanes.as_mut_ptr(), weight);
                    lanes[keys - i..].fill(0.0);
                    weight = s.load(lanes.as_ptr());
                }
                // Two in a word end before the place of the next to be read.
                E::store(s, scores, i, weight);
                sum = s.add(sum, E::load(s, scores, i));
                i += S::LANES;
            }
            while i < all {
                E::store(s, scores, i, s.splat(0.0));
                i += S::LANES;
            }
            s.store(lanes.as_mut_ptr(), sum);
            *self.sums.add(row) = 1.0 / lanes[..S::LANES].iter().sum::<f32>();
        }
    }

    /// Zeros in the padding of the output's channels, which no head writes.
    #[inline(always)]
    fn clear_padding(&self) {
        let output = &self.attend.output;
        let channels = output.channels();
        for p in self.first..self.first + self.count {
            let pixel = self.memory.at(output.buffer, self.sample).wrapping_add(p * output.words());
            // SAFETY: the pixel is one of this item, and only head 0 writes its padding.
            unsafe { output.element.clear(pixel, channels..padded(channels)) };
        }
    }
}

/// `scores = queries · keysᵀ` for some rows.
struct Scores<'a, E> {
    queries: &'a Queries<'a>,
    numbers: PhantomData<E>,
    row: usize,
}

impl<E: Element> Rows for Scores<'_, E> {
    #[inline(always)]
    unsafe fn run<S: Simd, const R: usize>(&self, s: S) {
        let Queries { attend, memory, sample, head, first, scores, .. } = *self.queries;
        let (all, panel) = (attend.padded_keys(), 2 * S::LANES);
        let (width, stride) = (attend.width() / E::PER_WORD, attend.queries.image.words());
        // SAFETY: the rows are queries of the sample; keys and scores have `all` columns.
        unsafe {
            let start = attend.queries.at(memory, sample).cast_const();
            let mut rows = [start.add((first + self.row) * stride + head * width); R];
            for (r, pointer) in rows.iter_mut().enumerate() {
                *pointer = pointer.add(r * stride);
            }
            let mut keys = memory.at(attend.keys, sample).add(head * width * all).cast_const();
            let mut target = scores.add(self.row * all);
            for _ in 0..all / panel {
                let mut acc = gemm::zeros::<S, R, 2>(s);
                gemm::accumulate::<S, E, R, 2>(s, &mut acc, &rows, keys, panel, width);
                for (r, sums) in acc.iter().enumerate() {
                    s.store(target.add(r * all), sums[0]);
                    s.store(target.add(r * all + S::LANES), sums[1]);
                }
                keys = keys.add(width * panel);
                target = target.add(panel);
            }
        }
    }
}

/// `output = weights · values / sum` for some rows and `C` vectors of a head's channels.
struct Values<'a, E, const C: usize> {
    queries: &'a Queries<'a>,
    numbers: PhantomData<E>,
    row: usize,
    /// The first of the vectors.
    vector: usize,
}

impl<E: Element, const C: usize> Rows for Values<'_, E, C> {
    #[inline(always)]
    unsafe fn run<S: Simd, const R: usize>(&self, s: S) {
        if C == 3 && R > MOST_OF_THREE {
            unreachable!("so many sums are in no registers");
        }
        let Queries { attend, memory, sample, head, first, scores, sums, .. } = *self.queries;
        let (width, all) = (attend.width(), attend.padded_keys());
        let to = attend.output.words();
        let numbers = attend.output.element;
        // SAFETY: the rows are queries of the sample. Vectors that are wider than what is left of the
        // head read what follows the values, or the arena's slack, and do not store it.
        unsafe {
            let mut rows = [scores.add(self.row * all).cast_const(); R];
            for (r, pointer) in rows.iter_mut().enumerate() {
                *pointer = pointer.add(r * all);
            }
            let (values, from) = match attend.pairs {
                Some(pairs) => (memory.at(pairs, sample), PackValues::stride(&attend.values)),
                None => (attend.values.at(memory, sample), attend.values.image.words()),
            };
            let c = self.vector * S::LANES;
            let values = values.add(head * width + c).cast_const();
            let target = memory.at(attend.output.buffer, sample);
            let target = target.add((first + self.row) * to);
            let mut acc = gemm::zeros::<S, R, C>(s);
            let keys = attend.key_count().div_ceil(E::PER_WORD);
            gemm::accumulate::<S, E, R, C>(s, &mut acc, &rows, values, from, keys);
            for (r, block) in acc.iter().enumerate() {
                let inverse = s.splat(*sums.add(self.row + r));
                let mut lanes = [0f32; 48];
                let start = lanes.as_mut_ptr();
                for (i, vector) in block.iter().enumerate() {
                    numbers.store(s, start, i * S::LANES, s.mul(*vector, inverse));
                }
                let count = (C * S::LANES).min(width - c);
                numbers.copy(start, target.add(r * to), head * width + c, count);
            }
        }
    }
}
