//! Vectors of f32, the same operations for each instruction set.
//!
//! A value of a type that implements [`Simd`] is proof that the processor has the instructions: it
//! is only made after asking. So arithmetic is safe, and only memory is not.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64 as x86;

use super::{bf16, int8};

/// The most floats in a vector.
const WIDEST: usize = 16;

/// Vectors of `LANES` f32.
pub(crate) trait Simd: Copy {
    /// Floats in a vector.
    const LANES: usize;
    /// Rows of the register block of products, beside two vectors of columns: as many as the
    /// registers hold.
    const ROWS: usize;
    /// Whether maps may be of bf16: where they are instructions, and in the reference.
    const BF16: bool = false;
    /// A vector.
    type V: Copy;

    /// `x` in every lane.
    fn splat(self, x: f32) -> Self::V;
    /// `LANES` floats from `p`, which need not be aligned.
    ///
    /// # Safety
    /// `p` is good for reading `LANES` floats.
    unsafe fn load(self, p: *const f32) -> Self::V;
    /// `LANES` floats to `p`, which need not be aligned.
    ///
    /// # Safety
    /// `p` is good for writing `LANES` floats.
    unsafe fn store(self, p: *mut f32, v: Self::V);
    /// `a + b`.
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a − b`.
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a · b`.
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`, correctly rounded.
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a · b + c`, rounded once where the processor can.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger; `b` where one of them is no number.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The smaller; `b` where one of them is no number.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// `2ⁿ` for whole `n` from −126 to 127.
    fn exp2(self, n: Self::V) -> Self::V;
    /// `a` where `mask` is 1 and 0 where it is 0, whatever `a` is there.
    fn keep(self, a: Self::V, mask: Self::V) -> Self::V;

    /// Asks for the cache line at `p`, which may be anywhere, where there is an instruction for it.
    #[inline(always)]
    fn prefetch(self, p: *const f32) {
        let _ = p;
    }

    /// `acc + a₁·b₁ + a₀·b₀`, each lane of `a` and `b` being a word of two bf16: [`bf16::dot`], one lane
    /// after another where there is no instruction.
    #[inline(always)]
    fn dot(self, a: Self::V, b: Self::V, acc: Self::V) -> Self::V {
        let mut lanes = [[0f32; WIDEST]; 3];
        for (lanes, v) in lanes.iter_mut().zip([a, b, acc]) {
            // SAFETY: no vector is wider.
            unsafe { self.store(lanes.as_mut_ptr(), v) };
        }
        for i in 0..Self::LANES {
            lanes[2][i] = bf16::dot(lanes[0][i], lanes[1][i], lanes[2][i]);
        }
        // SAFETY: no vector is wider.
        unsafe { self.load(lanes[2].as_ptr()) }
    }
    /// `LANES` bf16, half as many words, from `p`, which need not be aligned.
    ///
    /// # Safety
    /// `p` is good for reading so many.
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const f32) -> Self::V {
        let mut lanes = [0f32; WIDEST];
        for (i, lane) in lanes[..Self::LANES].iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            *lane = bf16::widen(unsafe { p.cast::<u16>().add(i).read_unaligned() });
        }
        // SAFETY: no vector is wider.
        unsafe { self.load(lanes.as_ptr()) }
    }
    /// `v` rounded to `LANES` bf16, half as many words, to `p`, which need not be aligned.
    ///
    /// # Safety
    /// `p` is good for writing so many.
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut f32, v: Self::V) {
        let mut lanes = [0f32; WIDEST];
        // SAFETY: no vector is wider.
        unsafe { self.store(lanes.as_mut_ptr(), v) };
        for (i, lane) in lanes[..Self::LANES].iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { p.cast::<u16>().add(i).write_unaligned(bf16::narrow(*lane)) };
        }
    }

    /// `acc + Σ aᵢ·bᵢ` of i32, each lane of `a` being a word of four u8 and of `b` one of four i8:
    /// [`int8::dot`], one lane after another where there is no instruction.
    #[inline(always)]
    fn dot_int8(self, a: Self::V, b: Self::V, acc: Self::V) -> Self::V {
        let mut lanes = [[0f32; WIDEST]; 3];
        for (lanes, v) in lanes.iter_mut().zip([a, b, acc]) {
            // SAFETY: no vector is wider.
            unsafe { self.store(lanes.as_mut_ptr(), v) };
        }
        for i in 0..Self::LANES {
            lanes[2][i] = int8::dot(lanes[0][i], lanes[1][i], lanes[2][i]);
        }
        // SAFETY: no vector is wider.
        unsafe { self.load(lanes[2].as_ptr()) }
    }
    /// The nearest floats, ties to even, of lanes that are i32.
    #[inline(always)]
    fn floats_of(self, v: Self::V) -> Self::V {
        let mut lanes = [0f32; WIDEST];
        // SAFETY: no vector is wider.
        unsafe { self.store(lanes.as_mut_ptr(), v) };
        for lane in &mut lanes[..Self::LANES] {
            *lane = lane.to_bits().cast_signed() as f32;
        }
        // SAFETY: no vector is wider.
        unsafe { self.load(lanes.as_ptr()) }
    }
    /// `v`, from 0 to 255, rounded to `LANES` u8, ties to even, a quarter as many words, to `p`, which need not be
    /// aligned.
    ///
    /// # Safety
    /// `p` is good for writing so many.
    #[inline(always)]
    unsafe fn store_u8(self, p: *mut f32, v: Self::V) {
        let mut lanes = [0f32; WIDEST];
        // SAFETY: no vector is wider.
        unsafe { self.store(lanes.as_mut_ptr(), v) };
        for (i, lane) in lanes[..Self::LANES].iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { *p.cast::<u8>().add(i) = int8::narrow(*lane) };
        }
    }
}

/// What the compiler makes of arrays.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

/// Applies `f` lane by lane.
#[inline(always)]
fn lanes(a: [f32; 8], b: [f32; 8], f: impl Fn(f32, f32) -> f32) -> [f32; 8] {
    let mut y = [0.0; 8];
    for i in 0..8 {
        y[i] = f(a[i], b[i]);
    }
    y
}

impl Simd for Portable {
    const LANES: usize = 8;
    const ROWS: usize = 3;
    const BF16: bool = true;
    type V = [f32; 8];

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; 8]
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::V {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<Self::V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: Self::V) {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<Self::V>().write_unaligned(v) }
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        lanes(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        lanes(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        lanes(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        lanes(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        self.add(self.mul(a, b), c)
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        lanes(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        lanes(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn exp2(self, n: Self::V) -> Self::V {
        lanes(n, n, |n, _| f32::from_bits(((n as i32 + 127) << 23) as u32))
    }
    #[inline(always)]
    fn keep(self, a: Self::V, mask: Self::V) -> Self::V {
        lanes(a, mask, |a, mask| if mask == 0.0 { 0.0 } else { a })
    }
}

/// Vectors of 8 with fused multiply-add. Its field keeps others from making one unasked.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

/// Vectors of 16 with fused multiply-add. Its field keeps others from making one unasked.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

/// Vectors of 16 with fused multiply-add and products of 8 bits. Its field keeps others from making one
/// unasked.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx512Vnni(());

/// Vectors of 16 with fused multiply-add and products of 8 bits and of bf16. Its field keeps others from making one
/// unasked.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx512Bf16(());

#[cfg(target_arch = "x86_64")]
impl Avx2 {
    /// A token where the processor has AVX2 and FMA.
    #[inline]
    pub(crate) fn detect() -> Option<Self> {
        let found = std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma");
        found.then_some(Self(()))
    }
}

#[cfg(target_arch = "x86_64")]
impl Avx512 {
    /// A token where the processor has AVX-512F, AVX2 and FMA.
    #[inline]
    pub(crate) fn detect() -> Option<Self> {
        (std::is_x86_feature_detected!("avx512f") && Avx2::detect().is_some()).then_some(Self(()))
    }
}

#[cfg(target_arch = "x86_64")]
impl Avx512Vnni {
    /// A token where the processor has AVX512-VNNI, AVX-512F, AVX2 and FMA.
    #[inline]
    pub(crate) fn detect() -> Option<Self> {
        let found = std::is_x86_feature_detected!("avx512vnni") && Avx512::detect().is_some();
        found.then_some(Self(()))
    }
}

#[cfg(target_arch = "x86_64")]
impl Avx512Bf16 {
    /// A token where the processor has AVX512-BF16, AVX512-VNNI, AVX-512F, AVX2 and FMA.
    #[inline]
    pub(crate) fn detect() -> Option<Self> {
        let found = std::is_x86_feature_detected!("avx512bf16") && Avx512Vnni::detect().is_some();
        found.then_some(Self(()))
    }
}

/// The methods of [`Simd`] that are one intrinsic each.
#[cfg(target_arch = "x86_64")]
macro_rules! intrinsics {
    ($vector:ty, $splat:ident, $load:ident, $store:ident, $fma:ident, $exp2:expr, $keep:expr,
     $($name:ident => $two:ident),*) => {
        type V = $vector;

        #[inline(always)]
        fn splat(self, x: f32) -> Self::V {
            // SAFETY: `self` is proof that the processor has the instruction.
            unsafe { x86::$splat(x) }
        }
        #[inline(always)]
        fn prefetch(self, p: *const f32) {
            // SAFETY: every x86-64 processor has the instruction, and it takes any address.
            unsafe { x86::_mm_prefetch::<{ x86::_MM_HINT_T0 }>(p.cast()) }
        }
        #[inline(always)]
        unsafe fn load(self, p: *const f32) -> Self::V {
            // SAFETY: `self` is proof of the instruction, the caller vouches for the memory.
            unsafe { x86::$load(p) }
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut f32, v: Self::V) {
            // SAFETY: `self` is proof of the instruction, the caller vouches for the memory.
            unsafe { x86::$store(p, v) }
        }
        #[inline(always)]
        fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
            // SAFETY: `self` is proof that the processor has the instruction.
            unsafe { x86::$fma(a, b, c) }
        }
        #[inline(always)]
        fn exp2(self, n: Self::V) -> Self::V {
            // SAFETY: `self` is proof that the processor has the instructions.
            unsafe { $exp2(n) }
        }
        #[inline(always)]
        fn keep(self, a: Self::V, mask: Self::V) -> Self::V {
            // SAFETY: `self` is proof that the processor has the instructions.
            unsafe { $keep(a, mask) }
        }
        $(
            #[inline(always)]
            fn $name(self, a: Self::V, b: Self::V) -> Self::V {
                // SAFETY: `self` is proof that the processor has the instruction.
                unsafe { x86::$two(a, b) }
            }
        )*
    };
}

#[cfg(target_arch = "x86_64")]
impl Simd for Avx2 {
    const LANES: usize = 8;
    const ROWS: usize = 6;

    intrinsics!(
        x86::__m256, _mm256_set1_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_fmadd_ps,
        |n| {
            let biased = x86::_mm256_add_epi32(x86::_mm256_cvtps_epi32(n), x86::_mm256_set1_epi32(127));
            x86::_mm256_castsi256_ps(x86::_mm256_slli_epi32::<23>(biased))
        },
        |a, mask| {
            let zero = x86::_mm256_setzero_ps();
            x86::_mm256_and_ps(a, x86::_mm256_cmp_ps::<{ x86::_CMP_NEQ_OQ }>(mask, zero))
        },
        add => _mm256_add_ps, sub => _mm256_sub_ps, mul => _mm256_mul_ps, div => _mm256_div_ps,
        max => _mm256_max_ps, min => _mm256_min_ps
    );
}

/// The methods of [`Simd`] that AVX-512F has.
#[cfg(target_arch = "x86_64")]
macro_rules! avx512f {
    () => {
        const LANES: usize = 16;
        const ROWS: usize = 14;

        intrinsics!(
            x86::__m512, _mm512_set1_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_fmadd_ps,
            |n| {
                let biased = x86::_mm512_add_epi32(x86::_mm512_cvtps_epi32(n), x86::_mm512_set1_epi32(127));
                x86::_mm512_castsi512_ps(x86::_mm512_slli_epi32::<23>(biased))
            },
            |a, mask| {
                let kept = x86::_mm512_cmp_ps_mask::<{ x86::_CMP_NEQ_OQ }>(mask, x86::_mm512_setzero_ps());
                x86::_mm512_maskz_mov_ps(kept, a)
            },
            add => _mm512_add_ps, sub => _mm512_sub_ps, mul => _mm512_mul_ps, div => _mm512_div_ps,
            max => _mm512_max_ps, min => _mm512_min_ps
        );

        #[inline(always)]
        fn floats_of(self, v: Self::V) -> Self::V {
            // SAFETY: `self` is proof that the processor has the instruction.
            unsafe { x86::_mm512_cvtepi32_ps(x86::_mm512_castps_si512(v)) }
        }
        #[inline(always)]
        unsafe fn store_u8(self, p: *mut f32, v: Self::V) {
            // SAFETY: `self` is proof of the instructions, the caller vouches for the memory.
            unsafe {
                let codes = x86::_mm512_cvtusepi32_epi8(x86::_mm512_cvtps_epi32(v));
                x86::_mm_storeu_si128(p.cast(), codes);
            }
        }
    };
}

/// The method of [`Simd`] that AVX512-VNNI has.
#[cfg(target_arch = "x86_64")]
macro_rules! avx512vnni {
    () => {
        #[inline(always)]
        fn dot_int8(self, a: Self::V, b: Self::V, acc: Self::V) -> Self::V {
            // SAFETY: `self` is proof that the processor has the instruction.
            unsafe {
                let (a, b) = (x86::_mm512_castps_si512(a), x86::_mm512_castps_si512(b));
                let sums = x86::_mm512_dpbusd_epi32(x86::_mm512_castps_si512(acc), a, b);
                x86::_mm512_castsi512_ps(sums)
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
impl Simd for Avx512 {
    avx512f!();
}

#[cfg(target_arch = "x86_64")]
impl Simd for Avx512Vnni {
    avx512f!();
    avx512vnni!();
}

#[cfg(target_arch = "x86_64")]
impl Simd for Avx512Bf16 {
    const BF16: bool = true;
    avx512f!();
    avx512vnni!();

    #[inline(always)]
    fn dot(self, a: Self::V, b: Self::V, acc: Self::V) -> Self::V {
        // SAFETY: `self` is proof that the processor has the instruction; both types are 64 bytes, any
        // of which are a vector of bf16.
        unsafe {
            let pairs = |v: Self::V| std::mem::transmute::<x86::__m512, x86::__m512bh>(v);
            x86::_mm512_dpbf16_ps(acc, pairs(a), pairs(b))
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const f32) -> Self::V {
        // SAFETY: `self` is proof of the instructions, the caller vouches for the memory.
        unsafe {
            let halves = x86::_mm512_cvtepu16_epi32(x86::_mm256_loadu_si256(p.cast()));
            x86::_mm512_castsi512_ps(x86::_mm512_slli_epi32::<16>(halves))
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut f32, v: Self::V) {
        // SAFETY: `self` is proof of the instructions, the caller vouches for the memory; both types
        // are 32 bytes.
        unsafe {
            let halves = x86::_mm512_cvtneps_pbh(v);
            let halves = std::mem::transmute::<x86::__m256bh, x86::__m256i>(halves);
            x86::_mm256_storeu_si256(p.cast(), halves);
        }
    }
}
