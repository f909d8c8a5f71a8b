//! What the machine itself reaches now, for a kernel's speed to be compared with.

use std::marker::PhantomData;
use std::time::{Duration, Instant};

use super::arena::Aligned;
use super::element::{Bf16, F32, Int8, Product};
use super::gemm::{self, Rows};
use super::isa::{Isa, Kernel, dispatch};
use super::simd::Simd;

/// Words of each operand's rows: with them both sides of a product stay in the nearest cache.
const DEPTH: usize = 128;
/// Repetitions between two looks at the clock.
const REPEATS: usize = 256;
/// Floats that do not fit any cache.
const FAR: usize = 64 << 20;
const MEASURE: Duration = Duration::from_millis(200);

/// Ceilings of the threads of the current rayon pool together.
#[derive(Debug, Clone, Copy)]
pub struct Peak {
    /// Floating-point operations per second of f32 products whose operands are in the nearest cache.
    pub f32_flop_per_second: f64,
    /// The same of bf16, where the processor multiplies it.
    pub bf16_flop_per_second: Option<f64>,
    /// Operations per second of products of 8 bits, where the processor multiplies them.
    pub int8_op_per_second: Option<f64>,
    /// Bytes per second read from memory.
    pub bytes_per_second: f64,
}

impl Peak {
    /// Measures for about a second.
    pub fn measure(isa: Isa) -> Self {
        let far = Aligned::zeros(FAR);
        Self {
            f32_flop_per_second: products::<F32>(isa),
            bf16_flop_per_second: isa.multiplies_bf16().then(|| products::<Bf16>(isa)),
            int8_op_per_second: isa.multiplies_int8().then(|| products::<Int8>(isa)),
            bytes_per_second: reads(isa, far.as_slice()),
        }
    }
}

/// Work per second of all threads, each doing `work(thread)` units again and again.
fn rate(work: impl Fn(usize) -> f64 + Sync) -> f64 {
    let rates = rayon::broadcast(|context| {
        work(context.index());
        let (start, mut done) = (Instant::now(), 0.0);
        while start.elapsed() < MEASURE {
            done += work(context.index());
        }
        done / start.elapsed().as_secs_f64()
    });
    rates.iter().sum()
}

fn products<E: Product>(isa: Isa) -> f64 {
    let (rows, columns) = (isa.rows(), isa.panel());
    rate(|_| {
        let (x, y) = (Aligned::zeros(rows * DEPTH), Aligned::zeros(columns * DEPTH));
        let mut sums = Aligned::zeros(rows * columns);
        let numbers = PhantomData::<E>;
        let (x, y, to) = (x.as_slice(), y.as_slice(), sums.as_mut_slice());
        dispatch(isa, Products { x, y, sums: to, numbers });
        std::hint::black_box(sums.as_slice());
        (2 * E::PER_WORD * rows * columns * DEPTH * REPEATS) as f64
    })
}

/// The product of a block again and again.
struct Products<'a, E> {
    x: &'a [f32],
    y: &'a [f32],
    sums: &'a mut [f32],
    numbers: PhantomData<E>,
}

impl<E: Product> Kernel for Products<'_, E> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // SAFETY: there are as many rows.
        unsafe { gemm::with_rows(s, S::ROWS, &Block(&self, self.sums.as_ptr().cast_mut())) };
    }
}

struct Block<'a, E>(&'a Products<'a, E>, *mut f32);

impl<E: Product> Rows for Block<'_, E> {
    #[inline(always)]
    unsafe fn run<S: Simd, const R: usize>(&self, s: S) {
        let Products { x, y, .. } = self.0;
        let width = 2 * S::LANES;
        let mut rows = [x.as_ptr(); R];
        for (r, row) in rows.iter_mut().enumerate() {
            *row = row.wrapping_add(r * DEPTH);
        }
        let mut acc = gemm::zeros::<S, R, 2>(s);
        // SAFETY: `R` rows of `DEPTH` words, as many columns of a panel's width, and their sums.
        unsafe {
            for _ in 0..REPEATS {
                gemm::accumulate::<S, E, R, 2>(s, &mut acc, &rows, y.as_ptr(), width, DEPTH);
            }
            for (r, sums) in acc.iter().enumerate() {
                s.store(self.1.add(r * width), sums[0]);
                s.store(self.1.add(r * width + S::LANES), sums[1]);
            }
        }
    }
}

fn reads(isa: Isa, far: &[f32]) -> f64 {
    let threads = rayon::current_num_threads().max(1);
    rate(|thread| {
        let part = &far[thread * far.len() / threads..(thread + 1) * far.len() / threads];
        let mut sum = 0.0;
        dispatch(isa, Sum { part, sum: &mut sum });
        std::hint::black_box(sum);
        (4 * part.len()) as f64
    })
}

/// Reads all, and adds it up so that it must be read.
struct Sum<'a> {
    part: &'a [f32],
    sum: &'a mut f32,
}

impl Kernel for Sum<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut sums = [s.splat(0.0); 8];
        for chunk in self.part.chunks_exact(8 * S::LANES) {
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: a chunk is eight vectors.
                *sum = s.add(*sum, unsafe { s.load(chunk.as_ptr().add(i * S::LANES)) });
            }
        }
        let mut lanes = [0f32; 16];
        let all = sums.into_iter().fold(s.splat(0.0), |a, b| s.add(a, b));
        // SAFETY: no vector is wider.
        unsafe { s.store(lanes.as_mut_ptr(), all) };
        *self.sum = lanes.iter().sum();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_thread_adds_to_a_rate() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build();
        let seen = std::sync::Mutex::new(std::collections::BTreeSet::new());
        let rate = pool.expect("three threads").install(|| {
            rate(|thread| {
                seen.lock().unwrap_or_else(|e| e.into_inner()).insert(thread);
                1.0
            })
        });
        assert!(rate > 0.0);
        assert_eq!(seen.into_inner().unwrap_or_else(|e| e.into_inner()).len(), 3);
    }
}
