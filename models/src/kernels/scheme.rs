//! The transforms of Winograd's convolution in one dimension.

use super::simd::Simd;

/// `F(OUT, 3)`: `OUT` results of three taps from `IN = OUT + 2` values by `IN` products.
///
/// Arrays have room for the largest; what lies beyond `IN` or `OUT` is not used.
pub(super) trait Scheme {
    /// Results of a tile in one dimension.
    const OUT: usize;
    /// Values they depend on.
    const IN: usize;

    /// `G g`.
    fn weights<S: Simd>(s: S, g: [S::V; 3]) -> [S::V; 6];

    /// `Bᵀ d`.
    fn forward<S: Simd>(s: S, d: [S::V; 6]) -> [S::V; 6];

    /// `Aᵀ m`.
    fn back<S: Simd>(s: S, m: [S::V; 6]) -> [S::V; 6];
}

/// Points 0, ±1, ∞.
pub(super) struct F2;

impl F2 {
    pub(super) const G: [[f64; 3]; 4] =
        [[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]];
}

impl Scheme for F2 {
    const OUT: usize = 2;
    const IN: usize = 4;

    #[inline(always)]
    fn weights<S: Simd>(s: S, g: [S::V; 3]) -> [S::V; 6] {
        let half = s.splat(0.5);
        let (even, odd) = (s.mul(s.add(g[0], g[2]), half), s.mul(g[1], half));
        [g[0], s.add(even, odd), s.sub(even, odd), g[2], half, half]
    }

    #[inline(always)]
    fn forward<S: Simd>(s: S, d: [S::V; 6]) -> [S::V; 6] {
        let zero = d[4];
        [s.sub(d[0], d[2]), s.add(d[1], d[2]), s.sub(d[2], d[1]), s.sub(d[1], d[3]), zero, zero]
    }

    #[inline(always)]
    fn back<S: Simd>(s: S, m: [S::V; 6]) -> [S::V; 6] {
        let zero = m[4];
        let (sum, difference) = (s.add(m[1], m[2]), s.sub(m[1], m[2]));
        [s.add(m[0], sum), s.sub(difference, m[3]), zero, zero, zero, zero]
    }
}

/// Points 0, ±1/√2, ±√2, ∞: half the error of 0, ±1, ±2, ∞ (after Barabasz et al. 2018, who looked
/// for such points).
pub(super) struct F4;

const ROOT: f64 = std::f64::consts::SQRT_2;

impl F4 {
    pub(super) const G: [[f64; 3]; 6] = [
        [1.0, 0.0, 0.0],
        [-2.0 / 3.0, -ROOT / 3.0, -1.0 / 3.0],
        [-2.0 / 3.0, ROOT / 3.0, -1.0 / 3.0],
        [1.0 / 6.0, ROOT / 6.0, 1.0 / 3.0],
        [1.0 / 6.0, -ROOT / 6.0, 1.0 / 3.0],
        [0.0, 0.0, 1.0],
    ];
}

impl Scheme for F4 {
    const OUT: usize = 4;
    const IN: usize = 6;

    #[inline(always)]
    fn weights<S: Simd>(s: S, g: [S::V; 3]) -> [S::V; 6] {
        let third = s.splat((1.0 / 3.0) as f32);
        let (g0, g1, g2) = (g[0], s.mul(g[1], s.splat((ROOT / 6.0) as f32)), s.mul(g[2], third));
        let near = s.fma(g0, s.splat((-2.0 / 3.0) as f32), s.sub(s.splat(0.0), g2));
        let near_odd = s.add(g1, g1);
        let far = s.fma(g0, s.splat((1.0 / 6.0) as f32), g2);
        [g0, s.sub(near, near_odd), s.add(near, near_odd), s.add(far, g1), s.sub(far, g1), g[2]]
    }

    /// Rows `[1,0,−5/2,0,1,0]`, `[0,∓√2,−2,±√2/2,1,0]`, `[0,∓√2/2,−½,±√2,1,0]`, `[0,1,0,−5/2,0,1]`.
    #[inline(always)]
    fn forward<S: Simd>(s: S, d: [S::V; 6]) -> [S::V; 6] {
        let (root, half_root) = (s.splat(ROOT as f32), s.splat((ROOT / 2.0) as f32));
        let far = s.splat(-2.5);
        let even_1 = s.fma(d[2], s.splat(-2.0), d[4]);
        let odd_1 = s.sub(s.mul(d[3], half_root), s.mul(d[1], root));
        let even_2 = s.fma(d[2], s.splat(-0.5), d[4]);
        let odd_2 = s.sub(s.mul(d[3], root), s.mul(d[1], half_root));
        [
            s.add(s.fma(d[2], far, d[0]), d[4]),
            s.add(even_1, odd_1),
            s.sub(even_1, odd_1),
            s.add(even_2, odd_2),
            s.sub(even_2, odd_2),
            s.add(s.fma(d[3], far, d[1]), d[5]),
        ]
    }

    /// Rows `[1,1,1,1,1,0]`, `[0,±√2/2,±√2,0]`, `[0,½,½,2,2,0]`, `[0,±√2/4,±2√2,1]`.
    #[inline(always)]
    fn back<S: Simd>(s: S, m: [S::V; 6]) -> [S::V; 6] {
        let (near, far) = (s.add(m[1], m[2]), s.add(m[3], m[4]));
        let near_odd = s.mul(s.sub(m[1], m[2]), s.splat((ROOT / 4.0) as f32));
        let far_odd = s.mul(s.sub(m[3], m[4]), s.splat(ROOT as f32));
        let two = s.splat(2.0);
        let zero = m[5];
        [
            s.add(s.add(m[0], near), far),
            s.fma(near_odd, two, far_odd),
            s.fma(far, two, s.mul(near, s.splat(0.5))),
            s.add(s.fma(far_odd, two, near_odd), m[5]),
            zero,
            zero,
        ]
    }
}

/// `G g Gᵀ` of nine taps, position by position.
#[inline(always)]
pub(super) fn weights<S: Simd, F: Scheme>(s: S, taps: &[S::V; 9]) -> [S::V; 36] {
    let zero = s.splat(0.0);
    let mut half = [[zero; 3]; 6];
    for j in 0..3 {
        let column = F::weights(s, [taps[j], taps[3 + j], taps[6 + j]]);
        for i in 0..F::IN {
            half[i][j] = column[i];
        }
    }
    let mut all = [zero; 36];
    for i in 0..F::IN {
        let row = F::weights(s, half[i]);
        for j in 0..F::IN {
            all[i * F::IN + j] = row[j];
        }
    }
    all
}
