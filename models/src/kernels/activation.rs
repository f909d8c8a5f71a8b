//! Element-wise functions.

use super::simd::Simd;

/// Functions between a norm and a convolution. All of them leave 0 as it is, which padding relies on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Function {
    /// `x`.
    Identity,
    /// `x·σ(x)`.
    Silu,
    /// `x·tanh(ln(1 + eˣ))`.
    Mish,
    /// `x·Φ(x)`, exact.
    Gelu,
    /// `½·x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))` (Hendrycks & Gimpel 2016).
    GeluTanh,
    /// `x·σ(1.702·x)` (Hendrycks & Gimpel 2016), as CLIP has it.
    QuickGelu,
    /// `max(x, 0)`.
    Relu,
    /// `3·tanh(x/3)`, with which the tiny autoencoder bounds its latents.
    SoftClamp,
}

/// What [`Function::QuickGelu`] multiplies with.
const QUICK: f64 = 1.702;

/// What [`Function::SoftClamp`] stays below.
const CLAMP: f64 = 3.0;

/// √(2/π), and what the cube weighs, of [`Function::GeluTanh`].
const GELU: [f64; 2] = [0.797_884_560_802_865_4, 0.044_715];

impl Function {
    /// The function of one number, in f64: what the vectors are compared with, and what computes the
    /// functions that few networks use.
    pub(crate) fn scalar(self, x: f64) -> f64 {
        match self {
            Self::Identity => x,
            Self::Silu => x / (1.0 + libm::exp(-x)),
            Self::Mish => x * libm::tanh(x.max(0.0) + libm::log1p(libm::exp(-x.abs()))),
            Self::Gelu => 0.5 * x * (1.0 + libm::erf(x * std::f64::consts::FRAC_1_SQRT_2)),
            Self::GeluTanh => 0.5 * x * (1.0 + libm::tanh(GELU[0] * (x + GELU[1] * x * x * x))),
            Self::QuickGelu => x / (1.0 + libm::exp(-QUICK * x)),
            Self::Relu => {
                if x < 0.0 {
                    0.0
                } else {
                    x
                }
            }
            Self::SoftClamp => CLAMP * libm::tanh(x / CLAMP),
        }
    }

    /// Its derivative, in f64.
    pub(crate) fn slope(self, x: f64) -> f64 {
        let logistic = 1.0 / (1.0 + libm::exp(-x));
        match self {
            Self::Identity => 1.0,
            Self::Silu => logistic * (1.0 + x * (1.0 - logistic)),
            Self::Mish => {
                let t = libm::tanh(x.max(0.0) + libm::log1p(libm::exp(-x.abs())));
                t + x * (1.0 - t * t) * logistic
            }
            Self::Gelu => {
                let density = libm::exp(-0.5 * x * x) / (2.0 * std::f64::consts::PI).sqrt();
                0.5 * (1.0 + libm::erf(x * std::f64::consts::FRAC_1_SQRT_2)) + x * density
            }
            Self::GeluTanh => {
                let t = libm::tanh(GELU[0] * (x + GELU[1] * x * x * x));
                let inner = GELU[0] * (1.0 + 3.0 * GELU[1] * x * x);
                0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner
            }
            Self::QuickGelu => {
                let logistic = 1.0 / (1.0 + libm::exp(-QUICK * x));
                logistic * (1.0 + QUICK * x * (1.0 - logistic))
            }
            // At 0 itself candle and PyTorch take 0.
            Self::Relu => f64::from(u8::from(x > 0.0)),
            Self::SoftClamp => {
                let t = libm::tanh(x / CLAMP);
                1.0 - t * t
            }
        }
    }

    /// The derivative at each lane.
    #[inline(always)]
    pub(super) fn slopes<S: Simd>(self, s: S, x: S::V) -> S::V {
        let one = s.splat(1.0);
        match self {
            Self::Identity => one,
            Self::Silu => {
                let logistic = s.div(one, s.add(one, exp(s, s.sub(s.splat(0.0), x))));
                s.mul(logistic, s.fma(x, s.sub(one, logistic), one))
            }
            Self::GeluTanh => {
                let half = gelu_logistic(s, x);
                let inner = s.fma(
                    s.mul(x, x),
                    s.splat((6.0 * GELU[0] * GELU[1]) as f32),
                    s.splat((2.0 * GELU[0]) as f32),
                );
                let rest = s.mul(s.mul(x, inner), s.sub(one, half));
                s.fma(half, rest, half)
            }
            Self::Gelu => {
                let (below, bell) = normal(s, x);
                s.fma(s.mul(x, bell), s.splat(BELL), below)
            }
            Self::QuickGelu => {
                let scaled = s.mul(x, s.splat(QUICK as f32));
                let logistic = s.div(one, s.add(one, exp(s, s.sub(s.splat(0.0), scaled))));
                s.mul(logistic, s.fma(scaled, s.sub(one, logistic), one))
            }
            other => each(s, x, |x| other.slope(x)),
        }
    }

    /// The function of each lane.
    #[inline(always)]
    pub(super) fn vector<S: Simd>(self, s: S, x: S::V) -> S::V {
        match self {
            Self::Identity => x,
            Self::Silu => silu(s, x),
            Self::GeluTanh => s.mul(x, gelu_logistic(s, x)),
            // With `x` second, what is no number stays so.
            Self::Relu => s.max(s.splat(0.0), x),
            Self::Gelu => s.mul(x, normal(s, x).0),
            Self::QuickGelu => {
                let e = exp(s, s.mul(x, s.splat(-QUICK as f32)));
                s.div(x, s.add(s.splat(1.0), e))
            }
            Self::Mish | Self::SoftClamp => each(s, x, |x| self.scalar(x)),
        }
    }
}

/// `½·(1 + tanh u)`, which is `1/(1 + e^(−2u))`, with `u` that of [`Function::GeluTanh`].
#[inline(always)]
fn gelu_logistic<S: Simd>(s: S, x: S::V) -> S::V {
    let cube = s.fma(
        s.mul(x, x),
        s.splat((-2.0 * GELU[0] * GELU[1]) as f32),
        s.splat((-2.0 * GELU[0]) as f32),
    );
    s.div(s.splat(1.0), s.add(s.splat(1.0), exp(s, s.mul(x, cube))))
}

/// 1/√(2π).
const BELL: f32 = 0.398_942_3;

/// The normal distribution: `Φ(x)`, with an error of at most 1e-7, and `e^(−x²/2)`.
///
/// `1 − Φ(|x|) = ½·P(t)·e^(−x²/2)` with `t = 1/(1 + 0.3275911·|x|/√2)` (Abramowitz & Stegun, 7.1.26).
#[inline(always)]
fn normal<S: Simd>(s: S, x: S::V) -> (S::V, S::V) {
    let (zero, one) = (s.splat(0.0), s.splat(1.0));
    let size = s.max(x, s.sub(zero, x));
    let t = s.div(one, s.fma(size, s.splat(0.231_641_89), one));
    let mut p = s.splat(0.530_702_7);
    for c in [-0.726_576, 0.710_706_9, -0.142_248_37, 0.127_414_8] {
        p = s.fma(p, t, s.splat(c));
    }
    let bell = exp(s, s.mul(s.mul(x, x), s.splat(-0.5)));
    let tail = s.mul(s.mul(p, t), bell);
    // Above 0 what is left of one: min and max choose without a mask, for a tail is at most a half.
    let positive = s.min(one, s.mul(s.max(x, zero), s.splat(f32::MAX)));
    (s.fma(positive, s.sub(one, s.add(tail, tail)), tail), bell)
}

/// `f` of each lane, in f64.
#[inline(always)]
fn each<S: Simd>(s: S, x: S::V, f: impl Fn(f64) -> f64) -> S::V {
    let mut lanes = [0f32; 16];
    // SAFETY: no vector is longer than 16.
    unsafe {
        s.store(lanes.as_mut_ptr(), x);
        for lane in &mut lanes[..S::LANES] {
            *lane = f(f64::from(*lane)) as f32;
        }
        s.load(lanes.as_ptr())
    }
}

/// `eˣ` with at most 2 ulp error for results that are normal numbers; below e⁻⁸⁷ it stays there, above
/// e⁸⁸ there too.
///
/// `x = n·ln 2 + r` with whole `n` and |r| ≤ ½·ln 2, the degree-5 polynomial of Cephes' `expf` for
/// `eʳ`, and `2ⁿ` from its bits.
#[inline(always)]
pub(super) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    const ROUND: f32 = 12_582_912.0; // 1.5·2²³: adding it leaves no place for a fraction.
    // With `x` second, what is no number stays so.
    let x = s.max(s.splat(-87.0), s.min(s.splat(88.0), x));
    let shifted = s.fma(x, s.splat(std::f32::consts::LOG2_E), s.splat(ROUND));
    let n = s.sub(shifted, s.splat(ROUND));
    // ln 2 in two parts, of which the first has few bits, so that its multiples are exact.
    let r = s.fma(n, s.splat(-0.693_359_4), x);
    let r = s.fma(n, s.splat(2.121_944_4e-4), r);
    let mut p = s.splat(1.987_569_1e-4);
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = s.fma(p, r, s.splat(c));
    }
    let p = s.fma(s.mul(r, r), p, s.add(r, s.splat(1.0)));
    s.mul(p, s.exp2(n))
}

/// `x / (1 + e⁻ˣ)` with at most 4 ulp error from −20 up, by true division: the approximate ones differ
/// between vendors.
#[inline(always)]
pub(super) fn silu<S: Simd>(s: S, x: S::V) -> S::V {
    let e = exp(s, s.sub(s.splat(0.0), x));
    s.div(x, s.add(s.splat(1.0), e))
}

#[cfg(test)]
mod tests {
    use super::super::isa::{Isa, Kernel, dispatch};
    use super::super::simd::Simd;

    struct Each<'a> {
        x: &'a [f32],
        y: &'a mut [f32],
        exp: bool,
    }

    impl Kernel for Each<'_> {
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let lanes = self.x.chunks_exact(S::LANES).zip(self.y.chunks_exact_mut(S::LANES));
            for (x, y) in lanes {
                // SAFETY: both chunks are as long as a vector.
                unsafe {
                    let x = s.load(x.as_ptr());
                    let v = if self.exp { super::exp(s, x) } else { super::silu(s, x) };
                    s.store(y.as_mut_ptr(), v);
                }
            }
        }
    }

    /// The largest error in units of the last place of the exact result, over a fine grid.
    fn worst(isa: Isa, exp: bool, from: f32, to: f32, exact: impl Fn(f64) -> f64) -> f64 {
        let count = 1 << 22;
        let x: Vec<f32> =
            (0..count).map(|i| from + (to - from) * (i as f32 / count as f32)).collect();
        let mut y = vec![0.0; count];
        dispatch(isa, Each { x: &x, y: &mut y, exp });
        let error = |(x, y): (&f32, &f32)| {
            let exact = exact(f64::from(*x));
            let near = (exact as f32).abs();
            let unit = f64::from(near.next_up()) - f64::from(near);
            (f64::from(*y) - exact).abs() / unit
        };
        x.iter().zip(&y).map(error).fold(0.0, f64::max)
    }

    #[test]
    fn exponential_and_silu_err_by_few_units_in_the_last_place() {
        for isa in Isa::available() {
            let exponential = worst(isa, true, -86.9, 87.9, libm::exp);
            let silu = worst(isa, false, -20.0, 20.0, |x| x / (1.0 + libm::exp(-x)));
            println!("{isa}: exp {exponential:.2} ulp, silu {silu:.2} ulp");
            assert!(exponential <= 2.4 && silu <= 4.0, "{isa}: {exponential} and {silu} ulp");
        }
    }

    #[test]
    fn what_is_no_number_stays_so() {
        for isa in Isa::available() {
            let mut y = [0.0; 16];
            dispatch(isa, Each { x: &[f32::NAN; 16], y: &mut y, exp: false });
            assert!(y.iter().all(|y| y.is_nan()), "{isa}");
        }
    }
}
