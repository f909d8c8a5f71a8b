//! The gradient of attention.
//!
//! Per head, with `P = softmax(Q·Kᵀ)` and `∂P = ∂O·Vᵀ`: `∂V = Pᵀ·∂O`, `∂S = P ⊙ (∂P − rows(P ⊙ ∂P))`,
//! `∂Q = ∂S·K`, `∂K = ∂Sᵀ·Q`. The scores are worked out again instead of being kept.

use super::outer;
use crate::kernels::activation::exp;
use crate::kernels::arena::{Buffer, LINE, padded};
use crate::kernels::element::F32;
use crate::kernels::gemm::{self, Rows};
use crate::kernels::image::{Channels, Image};
use crate::kernels::isa::{Isa, Kernel, dispatch};
use crate::kernels::program::{Memory, Needs, Operation, Split};
use crate::kernels::simd::Simd;

/// From the gradient of attention's result, those of queries, keys and values.
pub(crate) struct AttendGradient {
    /// Queries, keys and values.
    parts: [Channels; 3],
    /// Where their gradients go; nothing is there yet.
    gradients: [Channels; 3],
    /// The gradient of the result.
    output: Image,
    heads: usize,
    panel: usize,
    causal: bool,
    /// Where the number of keys that are seen is; all are without.
    count: Option<Buffer>,
}

impl AttendGradient {
    pub(crate) fn new(
        isa: Isa,
        parts: [Channels; 3],
        gradients: [Channels; 3],
        output: Image,
        (heads, causal): (usize, bool),
    ) -> Self {
        Self { parts, gradients, output, heads, panel: isa.panel(), causal, count: None }
    }

    /// Of an attention that sees as many keys as the buffer says.
    pub(crate) fn counted(self, count: Option<Buffer>) -> Self {
        Self { count, ..self }
    }

    /// How many queries there are.
    fn query_count(&self) -> usize {
        self.parts[0].image.pixels()
    }

    /// How many keys there are.
    fn key_count(&self) -> usize {
        self.parts[1].image.pixels()
    }

    /// How many keys a query of a sample sees.
    fn seen(&self, memory: &Memory, sample: usize, query: usize) -> usize {
        let there = match self.count {
            // SAFETY: the sample's number, which nothing writes now.
            Some(count) => unsafe { *memory.at(count, sample) as usize },
            None => self.key_count(),
        };
        if self.causal { there.min(query + 1) } else { there }
    }

    fn channels(&self) -> usize {
        self.output.channels()
    }

    /// Channels of a head.
    fn width(&self) -> usize {
        self.channels() / self.heads
    }

    /// Keys, padded to whole panels.
    fn keys(&self) -> usize {
        self.key_count().next_multiple_of(self.panel)
    }

    /// Floats from one row of a matrix to the next: not a power of two, or columns would share cache
    /// sets.
    fn pitch(&self) -> usize {
        self.keys() + LINE
    }

    /// Floats of a matrix.
    fn matrix(&self) -> usize {
        self.pitch() * self.query_count()
    }
}

impl Operation for AttendGradient {
    fn split(&self, batch: usize, _: usize) -> Split {
        // Two matrices of queries by keys, and keys and values as packed columns.
        let scratch = 2 * (self.matrix() + self.keys() * self.width());
        Split { items: [batch * self.heads, 0], needs: Needs { scratch, shared: 0 } }
    }
    fn reads(&self) -> Vec<Buffer> {
        let parts = self.parts.map(|part| part.image.buffer);
        parts.into_iter().chain([self.output.buffer]).chain(self.count).collect()
    }
    fn writes(&self) -> Vec<Buffer> {
        let mut buffers: Vec<Buffer> =
            self.gradients.iter().map(|part| part.image.buffer).collect();
        buffers.dedup();
        buffers
    }
    fn name(&self) -> String {
        format!("attend gradient {} heads of {}", self.heads, self.width())
    }
    fn flop(&self) -> f64 {
        10.0 * (self.query_count() * self.key_count() * self.channels()) as f64
    }
    unsafe fn run(&self, memory: &Memory, _: usize, item: usize, worker: usize) {
        let (sample, head) = (item / self.heads, item % self.heads);
        let weights = memory.scratch(worker);
        let slopes = weights.wrapping_add(self.matrix());
        let columns = slopes.wrapping_add(self.matrix());
        dispatch(memory.isa, Head { op: self, memory, sample, head, weights, slopes, columns });
        if head == 0 {
            for image in self.gradients.map(|part| part.image) {
                let (channels, stride) = (image.channels(), image.stride());
                for p in 0..image.pixels() {
                    let pixel = memory.at(image.buffer, sample).wrapping_add(p * stride);
                    for c in channels..padded(channels) {
                        // SAFETY: the padding of the sample's gradient, which only head 0 writes.
                        unsafe { *pixel.add(c) = 0.0 };
                    }
                }
            }
        }
    }
}

struct Head<'a> {
    op: &'a AttendGradient,
    memory: &'a Memory<'a>,
    sample: usize,
    head: usize,
    /// `[queries][keys]`: `P`.
    weights: *mut f32,
    /// `[queries][keys]`: `∂P`, then `∂S`.
    slopes: *mut f32,
    /// `[2]` of packed columns.
    columns: *mut f32,
}

impl Kernel for Head<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (width, keys, pixels) = (self.op.width(), self.op.keys(), self.op.query_count());
        let (pitch, values) = (self.op.pitch(), self.columns.wrapping_add(width * keys));
        let (query, stride) = self.part(0);
        let (answer, answer_stride) = self.answer();
        // SAFETY: the scratch is as `split` says; the head's channels are part of each pixel.
        unsafe {
            self.pack(1, self.columns);
            self.pack(2, values);
            let mut row = 0;
            while row < pixels {
                let rows = S::ROWS.min(pixels - row);
                let of = Columns { from: query, stride, row, width, columns: self.columns };
                gemm::with_rows(s, rows, &Scores { of, keys, pitch, to: self.weights });
                let of =
                    Columns { from: answer, stride: answer_stride, row, width, columns: values };
                gemm::with_rows(s, rows, &Scores { of, keys, pitch, to: self.slopes });
                for r in row..row + rows {
                    self.softmax(s, r);
                }
                let (key, _) = self.part(1);
                gemm::with_rows(s, rows, &Queries { head: &self, row, key });
                row += rows;
            }
            let (from, to) = (self.part(0).0, self.gradient(1));
            self.across(s, self.slopes, (from, stride), to);
            self.across(s, self.weights, (answer, answer_stride), self.gradient(2));
        }
    }
}

impl Head<'_> {
    /// Where the head's queries (0), keys (1) or values (2) begin, and the floats between pixels.
    #[inline(always)]
    fn part(&self, number: usize) -> (*const f32, usize) {
        let part = &self.op.parts[number];
        let from = part.at(self.memory, self.sample).wrapping_add(self.head * self.op.width());
        (from.cast_const(), part.image.stride())
    }

    #[inline(always)]
    fn gradient(&self, number: usize) -> (*mut f32, usize) {
        let part = &self.op.gradients[number];
        let to = part.at(self.memory, self.sample).wrapping_add(self.head * self.op.width());
        (to, part.image.stride())
    }

    #[inline(always)]
    fn answer(&self) -> (*const f32, usize) {
        let output = &self.op.output;
        let from = self.memory.at(output.buffer, self.sample);
        (from.wrapping_add(self.head * self.op.width()).cast_const(), output.stride())
    }

    /// Keys or values as the columns of panels, zeros after the last.
    ///
    /// # Safety
    /// `to` is good for writing `width × keys` floats.
    #[inline(always)]
    unsafe fn pack(&self, number: usize, to: *mut f32) {
        let (from, stride) = self.part(number);
        let (width, pixels, panel) = (self.op.width(), self.op.key_count(), self.op.panel);
        for first in (0..self.op.keys()).step_by(panel) {
            for c in 0..width {
                let to = to.wrapping_add(first * width + c * panel);
                for j in 0..panel {
                    // SAFETY: the caller's promise; the pixel has these channels.
                    unsafe {
                        let inside = first + j < pixels;
                        *to.add(j) = if inside { *from.add((first + j) * stride + c) } else { 0.0 };
                    }
                }
            }
        }
    }

    /// Of one query: scores become `P`, `∂P` becomes `∂S`.
    ///
    /// # Safety
    /// Both rows are there.
    #[inline(always)]
    unsafe fn softmax<S: Simd>(&self, s: S, row: usize) {
        let (pixels, keys) = (self.op.seen(self.memory, self.sample, row), self.op.keys());
        let weights = self.weights.wrapping_add(row * self.op.pitch());
        let slopes = self.slopes.wrapping_add(row * self.op.pitch());
        // SAFETY: the caller's promise; a row has `keys` floats, whole vectors.
        unsafe {
            for i in pixels..keys {
                *weights.add(i) = f32::NEG_INFINITY;
            }
            let mut most = s.load(weights);
            for i in (S::LANES..keys).step_by(S::LANES) {
                most = s.max(most, s.load(weights.add(i)));
            }
            let most = s.splat(across(s, most, f32::NEG_INFINITY, f32::max));
            let mut sum = s.splat(0.0);
            for i in (0..keys).step_by(S::LANES) {
                s.store(weights.add(i), exp(s, s.sub(s.load(weights.add(i)), most)));
            }
            for i in pixels..keys {
                *weights.add(i) = 0.0;
            }
            for i in (0..keys).step_by(S::LANES) {
                sum = s.add(sum, s.load(weights.add(i)));
            }
            let inverse = s.splat(1.0 / across(s, sum, 0.0, |a, b| a + b));
            let mut mean = s.splat(0.0);
            for i in (0..keys).step_by(S::LANES) {
                let weight = s.mul(s.load(weights.add(i)), inverse);
                s.store(weights.add(i), weight);
                mean = s.fma(weight, s.load(slopes.add(i)), mean);
            }
            let mean = s.splat(across(s, mean, 0.0, |a, b| a + b));
            for i in (0..keys).step_by(S::LANES) {
                let slope = s.sub(s.load(slopes.add(i)), mean);
                s.store(slopes.add(i), s.mul(s.load(weights.add(i)), slope));
            }
        }
    }

    /// `to[key][c] = Σ_query matrix[query][key] · from[query][c]`.
    ///
    /// # Safety
    /// The matrix is there; `from` has the head's channels of each pixel, and so has `to`, which this
    /// item alone writes.
    #[inline(always)]
    unsafe fn across<S: Simd>(
        &self,
        s: S,
        matrix: *const f32,
        (from, stride): (*const f32, usize),
        (to, pitch_of_to): (*mut f32, usize),
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            if S::LANES == 16 {
                self.across_by::<S, 8>(s, matrix, (from, stride), (to, pitch_of_to));
            } else {
                self.across_by::<S, 4>(s, matrix, (from, stride), (to, pitch_of_to));
            }
        }
    }

    /// # Safety
    /// As [`Head::across`].
    #[inline(always)]
    unsafe fn across_by<S: Simd, const R: usize>(
        &self,
        s: S,
        matrix: *const f32,
        (from, stride): (*const f32, usize),
        (to, pitch_of_to): (*mut f32, usize),
    ) {
        let (pitch, width) = (self.op.pitch(), self.op.width());
        let (queries, keys) = (self.op.query_count(), self.op.key_count());
        for c in (0..width).step_by(2 * S::LANES) {
            for key in (0..keys).step_by(R) {
                let mut acc = gemm::zeros::<S, R, 2>(s);
                let x = |query: usize| matrix.wrapping_add(query * pitch + key);
                let y = |query: usize| from.wrapping_add(query * stride + c);
                // SAFETY: a row of the matrix is padded to whole panels; a vector that is wider than
                // what is left of the head reads what follows it, or the arena's slack.
                unsafe {
                    outer::accumulate(s, &mut acc, queries, x, y);
                    for (r, sums) in acc.iter().enumerate().take(keys - key) {
                        let to = to.add((key + r) * pitch_of_to + c);
                        store(s, sums, to, width - c);
                    }
                }
            }
        }
    }
}

/// All lanes as one number.
#[inline(always)]
fn across<S: Simd>(s: S, v: S::V, start: f32, f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0f32; 16];
    // SAFETY: no vector is longer than 16.
    unsafe { s.store(lanes.as_mut_ptr(), v) };
    lanes[..S::LANES].iter().fold(start, |a, &b| f(a, b))
}

/// Stores up to `count` of two vectors' floats.
///
/// # Safety
/// `to` is good for writing as many.
#[inline(always)]
unsafe fn store<S: Simd>(s: S, vectors: &[S::V; 2], to: *mut f32, count: usize) {
    if count >= 2 * S::LANES {
        // SAFETY: the caller's promise.
        unsafe {
            s.store(to, vectors[0]);
            s.store(to.add(S::LANES), vectors[1]);
        }
        return;
    }
    let mut lanes = [0f32; 32];
    // SAFETY: two vectors are no longer than 32; the caller's promise.
    unsafe {
        s.store(lanes.as_mut_ptr(), vectors[0]);
        s.store(lanes.as_mut_ptr().add(S::LANES), vectors[1]);
        std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, count.min(2 * S::LANES));
    }
}

/// Some rows of a map against packed columns.
#[derive(Clone, Copy)]
struct Columns {
    from: *const f32,
    stride: usize,
    row: usize,
    width: usize,
    columns: *const f32,
}

/// `to[row][key] = from[row] · columns[key]`.
struct Scores {
    of: Columns,
    keys: usize,
    /// Floats from one row of the result to the next.
    pitch: usize,
    to: *mut f32,
}

impl Rows for Scores {
    #[inline(always)]
    unsafe fn run<S: Simd, const R: usize>(&self, s: S) {
        let Columns { from, stride, row, width, mut columns } = self.of;
        let panel = 2 * S::LANES;
        // SAFETY: the rows are pixels of the sample; columns and result have `keys` columns.
        unsafe {
            let mut rows = [from.add(row * stride); R];
            for (r, pointer) in rows.iter_mut().enumerate() {
                *pointer = pointer.add(r * stride);
            }
            let mut target = self.to.add(row * self.pitch);
            for _ in 0..self.keys / panel {
                let mut acc = gemm::zeros::<S, R, 2>(s);
                gemm::accumulate::<S, F32, _, _>(s, &mut acc, &rows, columns, panel, width);
                for (r, sums) in acc.iter().enumerate() {
                    s.store(target.add(r * self.pitch), sums[0]);
                    s.store(target.add(r * self.pitch + S::LANES), sums[1]);
                }
                columns = columns.add(width * panel);
                target = target.add(panel);
            }
        }
    }
}

/// `∂Q = ∂S · K` for some rows.
struct Queries<'a> {
    head: &'a Head<'a>,
    row: usize,
    key: *const f32,
}

impl Rows for Queries<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd, const R: usize>(&self, s: S) {
        let (head, op) = (self.head, self.head.op);
        let (keys, pitch, width) = (op.key_count(), op.pitch(), op.width());
        let from = op.parts[1].image.stride();
        let (target, to) = head.gradient(0);
        // SAFETY: the rows are queries of the sample. A vector that is wider than what is left of the
        // head reads what follows in the input, or the arena's slack, and does not store it.
        unsafe {
            let mut rows = [head.slopes.add(self.row * pitch).cast_const(); R];
            for (r, pointer) in rows.iter_mut().enumerate() {
                *pointer = pointer.add(r * pitch);
            }
            let target = target.add(self.row * to);
            for c in (0..width).step_by(2 * S::LANES) {
                let mut acc = gemm::zeros::<S, R, 2>(s);
                gemm::accumulate::<S, F32, _, _>(s, &mut acc, &rows, self.key.add(c), from, keys);
                for (r, sums) in acc.iter().enumerate() {
                    store(s, sums, target.add(r * to + c), width - c);
                }
            }
        }
    }
}
