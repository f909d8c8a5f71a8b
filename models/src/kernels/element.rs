//! What maps are made of, and with them the products that read them.
//!
//! All memory is counted in words of 32 bits: an f32 each, or two bf16. A product of bf16 takes its
//! operands word by word and sums in f32, so the loops around it are the same for both.

use super::bf16;
use super::simd::Simd;

/// The element type of a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ElementType {
    /// One in a word.
    F32,
    /// Two in a word.
    Bf16,
}

impl ElementType {
    /// ElementType in a word.
    pub(super) fn per_word(self) -> usize {
        match self {
            Self::F32 => F32::PER_WORD,
            Self::Bf16 => Bf16::PER_WORD,
        }
    }

    /// Words that so many numbers take.
    pub(crate) fn words(self, count: usize) -> usize {
        count.div_ceil(self.per_word())
    }

    /// Puts `x` where the number `k` of a row is in packed columns: row `k / per_word` of `pitch` words.
    pub(super) fn put(self, words: &mut [f32], k: usize, pitch: usize, column: usize, x: f32) {
        let word = &mut words[k / self.per_word() * pitch + column];
        match self {
            Self::F32 => *word = x,
            Self::Bf16 => bf16::put(word, k % 2 == 1, x),
        }
    }

    /// The numbers from `c` on of the pixel at `pixel`, `c` being a multiple of the lanes.
    ///
    /// # Safety
    /// The pixel is good for reading so many.
    #[inline(always)]
    pub(super) unsafe fn load<S: Simd>(self, s: S, pixel: *const f32, c: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Self::Bf16 if S::BF16 => Bf16::load(s, pixel, c),
                _ => F32::load(s, pixel, c),
            }
        }
    }

    /// Puts `v` where [`ElementType::load`] would find it.
    ///
    /// # Safety
    /// The pixel is good for writing so many.
    #[inline(always)]
    pub(super) unsafe fn store<S: Simd>(self, s: S, pixel: *mut f32, c: usize, v: S::V) {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Self::Bf16 if S::BF16 => Bf16::store(s, pixel, c, v),
                _ => F32::store(s, pixel, c, v),
            }
        }
    }
}

impl ElementType {
    /// Copies the first `count` numbers from `from` to the channels `c..c + count` of a pixel.
    ///
    /// # Safety
    /// `from` is good for reading, the pixel for writing so many, and they do not overlap.
    #[inline(always)]
    pub(super) unsafe fn copy(self, from: *const f32, pixel: *mut f32, c: usize, count: usize) {
        // SAFETY: the caller's promise; a bf16 is half a word.
        unsafe {
            match self {
                Self::F32 => std::ptr::copy_nonoverlapping(from, pixel.add(c), count),
                Self::Bf16 => {
                    let pixel = pixel.cast::<u16>();
                    std::ptr::copy_nonoverlapping(from.cast(), pixel.add(c), count);
                }
            }
        }
    }

    /// Makes some channels of a pixel 0.
    ///
    /// # Safety
    /// The pixel is good for writing them.
    #[inline(always)]
    pub(super) unsafe fn clear(self, pixel: *mut f32, channels: std::ops::Range<usize>) {
        for c in channels {
            // SAFETY: the caller's promise.
            unsafe { self.copy(&0.0, pixel, c, 1) };
        }
    }
}

/// What the words of a product's operands hold.
pub(super) trait Product: Copy {
    /// Numbers in a word.
    const PER_WORD: usize;

    /// `acc` plus, in each lane, the products of the numbers in the words of `x` and `y`.
    fn multiply<S: Simd>(s: S, x: S::V, y: S::V, acc: S::V) -> S::V;
}

/// [`ElementType`] as a type, for loops that are compiled for each.
pub(super) trait Element: Product {
    /// As [`ElementType::load`].
    ///
    /// # Safety
    /// As there.
    unsafe fn load<S: Simd>(s: S, pixel: *const f32, c: usize) -> S::V;

    /// As [`ElementType::store`].
    ///
    /// # Safety
    /// As there.
    unsafe fn store<S: Simd>(s: S, pixel: *mut f32, c: usize, v: S::V);
}

/// [`ElementType::F32`].
#[derive(Clone, Copy)]
pub(super) struct F32;

/// [`ElementType::Bf16`].
#[derive(Clone, Copy)]
pub(super) struct Bf16;

/// Codes of 8 bits, four in a word: unsigned in `x`, signed in `y`. Sums are of i32.
#[derive(Clone, Copy)]
pub(super) struct Int8;

impl Product for Int8 {
    const PER_WORD: usize = 4;

    #[inline(always)]
    fn multiply<S: Simd>(s: S, x: S::V, y: S::V, acc: S::V) -> S::V {
        s.dot_int8(x, y, acc)
    }
}

impl Product for F32 {
    const PER_WORD: usize = 1;

    #[inline(always)]
    fn multiply<S: Simd>(s: S, x: S::V, y: S::V, acc: S::V) -> S::V {
        s.fma(x, y, acc)
    }
}

impl Element for F32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, pixel: *const f32, c: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load(pixel.add(c)) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(s: S, pixel: *mut f32, c: usize, v: S::V) {
        // SAFETY: the caller's promise.
        unsafe { s.store(pixel.add(c), v) }
    }
}

impl Product for Bf16 {
    const PER_WORD: usize = 2;

    #[inline(always)]
    fn multiply<S: Simd>(s: S, x: S::V, y: S::V, acc: S::V) -> S::V {
        s.dot(x, y, acc)
    }
}

impl Element for Bf16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, pixel: *const f32, c: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load_bf16(pixel.add(c / 2)) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(s: S, pixel: *mut f32, c: usize, v: S::V) {
        // SAFETY: the caller's promise.
        unsafe { s.store_bf16(pixel.add(c / 2), v) }
    }
}
