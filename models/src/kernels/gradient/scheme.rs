//! Winograd's transforms for gradients with respect to weights.
//!
//! Of `y = Aᵀ[(G g) ⊙ (Bᵀ d)]` the gradient is `Gᵀ[(Bᵀ d) ⊙ (A ∂y)]`.

use crate::kernels::scheme::{F2, F4, Scheme};
use crate::kernels::simd::Simd;

/// The transforms that are missing for it.
pub(super) trait Gradient: Scheme {
    /// `A y`.
    fn spread<S: Simd>(s: S, y: [S::V; 6]) -> [S::V; 6];

    /// The rows of `G`.
    fn weight_rows() -> &'static [[f64; 3]];
}

impl Gradient for F2 {
    #[inline(always)]
    fn spread<S: Simd>(s: S, y: [S::V; 6]) -> [S::V; 6] {
        let zero = y[5];
        [y[0], s.add(y[0], y[1]), s.sub(y[0], y[1]), s.sub(zero, y[1]), zero, zero]
    }

    #[inline(always)]
    fn weight_rows() -> &'static [[f64; 3]] {
        &F2::G
    }
}

impl Gradient for F4 {
    #[inline(always)]
    fn spread<S: Simd>(s: S, y: [S::V; 6]) -> [S::V; 6] {
        let root = std::f64::consts::SQRT_2;
        let (quarter, one) = (s.splat((root / 4.0) as f32), s.splat(root as f32));
        let (half, two) = (s.splat(0.5), s.splat(2.0));
        let near = s.fma(y[2], half, y[0]);
        let near_odd = s.mul(s.fma(y[1], two, y[3]), quarter);
        let far = s.fma(y[2], two, y[0]);
        let far_odd = s.mul(s.fma(y[3], two, y[1]), one);
        [
            y[0],
            s.add(near, near_odd),
            s.sub(near, near_odd),
            s.add(far, far_odd),
            s.sub(far, far_odd),
            y[3],
        ]
    }

    #[inline(always)]
    fn weight_rows() -> &'static [[f64; 3]] {
        &F4::G
    }
}

/// `Gᵀ m G`: nine taps from the sums of all positions.
#[inline(always)]
pub(super) fn taps<S: Simd, F: Gradient>(s: S, m: &[S::V; 36]) -> [S::V; 9] {
    let g = F::weight_rows();
    let zero = s.splat(0.0);
    let mut half = [[zero; 6]; 3];
    for t in 0..3 {
        for j in 0..F::IN {
            for i in 0..F::IN {
                half[t][j] = s.fma(s.splat(g[i][t] as f32), m[i * F::IN + j], half[t][j]);
            }
        }
    }
    let mut all = [zero; 9];
    for t in 0..3 {
        for u in 0..3 {
            for j in 0..F::IN {
                all[t * 3 + u] = s.fma(s.splat(g[j][u] as f32), half[t][j], all[t * 3 + u]);
            }
        }
    }
    all
}
