//! Sums of outer products: what gradients with respect to weights are made of.

use crate::kernels::gemm::Block;
use crate::kernels::simd::Simd;

/// `acc[r][c] += Σ_k x(k)[r] · y(k)[c]` for `k < count`, in this order.
///
/// # Safety
/// `x(k)` is good for reading `R` floats, `y(k)` for `C` vectors.
#[inline(always)]
pub(super) unsafe fn accumulate<S: Simd, const R: usize, const C: usize>(
    s: S,
    acc: &mut Block<S, R, C>,
    count: usize,
    x: impl Fn(usize) -> *const f32,
    y: impl Fn(usize) -> *const f32,
) {
    let mut block = *acc;
    for k in 0..count {
        let (x, y) = (x(k), y(k));
        // SAFETY: the caller's promise.
        unsafe {
            let mut columns = [s.splat(0.0); C];
            for c in 0..C {
                columns[c] = s.load(y.add(c * S::LANES));
            }
            for r in 0..R {
                let x = s.splat(*x.add(r));
                for c in 0..C {
                    block[r][c] = s.fma(x, columns[c], block[r][c]);
                }
            }
        }
    }
    *acc = block;
}

/// Rows of a block for the vectors of `S`: a divisor of every padded number of channels.
#[inline(always)]
pub(super) fn rows<S: Simd>() -> usize {
    if S::LANES == 16 { 8 } else { 4 }
}

/// `sums[r·pitch + c] += Σ_k x(k)[r] · y(k)[c]` for `rows` × `columns` sums, or `=` where they are `new`.
///
/// # Safety
/// `rows` is a multiple of [`rows`], `columns` of the vectors' length; `x(k)` is good for reading `rows`
/// floats, `y(k)` for `columns`, `sums` for writing `rows` of `pitch`, at least `columns`.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn product<S: Simd>(
    s: S,
    sums: *mut f32,
    pitch: usize,
    (rows, columns): (usize, usize),
    new: bool,
    count: usize,
    x: impl Fn(usize) -> *const f32 + Copy,
    y: impl Fn(usize) -> *const f32 + Copy,
) {
    // SAFETY: the caller's promise.
    unsafe {
        if S::LANES == 16 {
            blocks::<S, 8>(s, sums, pitch, (rows, columns), new, count, x, y);
        } else {
            blocks::<S, 4>(s, sums, pitch, (rows, columns), new, count, x, y);
        }
    }
}

/// # Safety
/// As [`product`].
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn blocks<S: Simd, const R: usize>(
    s: S,
    sums: *mut f32,
    pitch: usize,
    (rows, columns): (usize, usize),
    new: bool,
    count: usize,
    x: impl Fn(usize) -> *const f32 + Copy,
    y: impl Fn(usize) -> *const f32 + Copy,
) {
    let mut c = 0;
    while c < columns {
        let wide = columns - c >= 2 * S::LANES;
        let y = move |k| y(k).wrapping_add(c);
        let mut r = 0;
        while r < rows {
            let x = move |k| x(k).wrapping_add(r);
            let to = sums.wrapping_add(r * pitch + c);
            // SAFETY: the block lies within the rows and columns.
            unsafe {
                if wide {
                    block::<S, R, 2>(s, to, pitch, new, count, x, y);
                } else {
                    block::<S, R, 1>(s, to, pitch, new, count, x, y);
                }
            }
            r += R;
        }
        c += if wide { 2 * S::LANES } else { S::LANES };
    }
}

/// # Safety
/// As [`product`], for one block.
#[inline(always)]
unsafe fn block<S: Simd, const R: usize, const C: usize>(
    s: S,
    sums: *mut f32,
    pitch: usize,
    new: bool,
    count: usize,
    x: impl Fn(usize) -> *const f32,
    y: impl Fn(usize) -> *const f32,
) {
    let mut acc = [[s.splat(0.0); C]; R];
    // SAFETY: the caller's promise.
    unsafe {
        if !new {
            for r in 0..R {
                for c in 0..C {
                    acc[r][c] = s.load(sums.add(r * pitch + c * S::LANES));
                }
            }
        }
        accumulate(s, &mut acc, count, x, y);
        for r in 0..R {
            for c in 0..C {
                s.store(sums.add(r * pitch + c * S::LANES), acc[r][c]);
            }
        }
    }
}
