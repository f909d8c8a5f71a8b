//! The inner product of everything: a block of rows times a panel of packed columns, in registers.

use super::element::Product;
use super::simd::Simd;

/// Words by which columns are asked for before they are needed: processors look ahead by themselves, but
/// not from one page to the next, and a panel of few rows is through with a page before it is there.
const AHEAD: usize = 1024;

/// `R` rows of `C` vectors.
pub(super) type Block<S, const R: usize, const C: usize> = [[<S as Simd>::V; C]; R];

/// A block of zeros.
#[inline(always)]
pub(super) fn zeros<S: Simd, const R: usize, const C: usize>(s: S) -> Block<S, R, C> {
    [[s.splat(0.0); C]; R]
}

/// `acc[r][c] += Σ_k rows[r][k] · columns[k·pitch + c]` for words `k < depth`, one product after
/// another, so a row's bits do not depend on how many rows there are.
///
/// # Safety
/// Each of `rows` is good for reading `depth` words; `columns` for `C` vectors at each `k·pitch`.
#[inline(always)]
pub(super) unsafe fn accumulate<S: Simd, E: Product, const R: usize, const C: usize>(
    s: S,
    acc: &mut Block<S, R, C>,
    rows: &[*const f32; R],
    columns: *const f32,
    pitch: usize,
    depth: usize,
) {
    let mut block = *acc;
    let mut column = columns;
    for k in 0..depth {
        for c in 0..C {
            s.prefetch(column.wrapping_add(AHEAD + c * S::LANES));
        }
        // SAFETY: k is below `depth`, for which the caller vouches.
        unsafe {
            let mut panel = [s.splat(0.0); C];
            for c in 0..C {
                panel[c] = s.load(column.add(c * S::LANES));
            }
            column = column.wrapping_add(pitch);
            for r in 0..R {
                let x = s.splat(*rows[r].add(k));
                for c in 0..C {
                    block[r][c] = E::multiply(s, x, panel[c], block[r][c]);
                }
            }
        }
    }
    *acc = block;
}

/// Rows of each block of `count` rows, so that all blocks have nearly as many: one of few rows waits for
/// its sums more than it works.
#[inline(always)]
pub(super) fn even<S: Simd>(count: usize) -> usize {
    count.div_ceil(count.div_ceil(S::ROWS).max(1))
}

/// Something to be done for a number of rows that is only known at run time.
pub(super) trait Rows {
    /// For exactly `R` rows.
    ///
    /// # Safety
    /// As the implementation says.
    unsafe fn run<S: Simd, const R: usize>(&self, s: S);
}

/// Runs `work` for `count` rows, from 1 to `S::ROWS`.
///
/// # Safety
/// What `work` asks for.
#[inline(always)]
pub(super) unsafe fn with_rows<S: Simd, W: Rows>(s: S, count: usize, work: &W) {
    debug_assert!((1..=S::ROWS).contains(&count));
    macro_rules! cases {
        ($($rows:literal)*) => {
            match count {
                $(
                    // SAFETY: the caller's promise.
                    $rows if S::ROWS >= $rows => unsafe { work.run::<S, $rows>(s) },
                )*
                _ => {}
            }
        };
    }
    cases!(1 2 3 4 5 6 7 8 9 10 11 12 13 14);
}
