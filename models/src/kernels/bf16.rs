//! bf16, the upper half of an f32, as processors with AVX512-BF16 handle it, one number at a time.
//!
//! Two numbers share a word of 32 bits, the first in its lower half. ElementType below the smallest normal
//! one are taken for zero, before and after every operation.

/// The nearest bf16, ties to even.
pub(super) fn narrow(x: f32) -> u16 {
    let bits = x.to_bits();
    let upper = (bits >> 16) as u16;
    if x.is_nan() {
        upper | 0x40
    } else if x.is_subnormal() {
        upper & 0x8000
    } else {
        ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
    }
}

/// The same number as f32.
pub(super) fn widen(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

/// `acc + a₁·b₁ + a₀·b₀` of the two numbers in a word, rounded after each product, as VDPBF16PS does.
pub(super) fn dot(a: f32, b: f32, acc: f32) -> f32 {
    let flushed = |x: f32| if x.is_subnormal() { 0f32.copysign(x) } else { x };
    let number = |word, upper| flushed(get(word, upper));
    let odd = flushed(number(a, true).mul_add(number(b, true), flushed(acc)));
    flushed(number(a, false).mul_add(number(b, false), odd))
}

/// The number in the lower or upper half of a word, as f32.
pub(super) fn get(word: f32, upper: bool) -> f32 {
    let bits = word.to_bits();
    f32::from_bits(if upper { bits & 0xffff_0000 } else { bits << 16 })
}

/// Puts a number into the lower or upper half of a word.
pub(super) fn put(word: &mut f32, upper: bool, x: f32) {
    let bits = word.to_bits();
    let half = u32::from(narrow(x));
    *word = f32::from_bits(if upper {
        bits & 0x0000_ffff | half << 16
    } else {
        bits & 0xffff_0000 | half
    });
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::isa::{Isa, Kernel, dispatch};
    use super::super::simd::Simd;

    /// `dot` of three vectors of words, and `store_bf16` and `load_bf16` of the third.
    struct Each<'a> {
        words: &'a [[u32; 16]; 3],
        dots: &'a mut [u32; 16],
        narrowed: &'a mut [u32; 8],
        widened: &'a mut [u32; 16],
    }

    impl Kernel for Each<'_> {
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let mut i = 0;
            while i < 16 {
                // SAFETY: 16 is a multiple of the lanes of every vector.
                unsafe {
                    let [a, b, c] = self.words.map(|words| s.load(words.as_ptr().add(i).cast()));
                    s.store(self.dots.as_mut_ptr().add(i).cast(), s.dot(a, b, c));
                    let half = self.narrowed.as_mut_ptr().add(i / 2).cast();
                    s.store_bf16(half, c);
                    s.store(self.widened.as_mut_ptr().add(i).cast(), s.load_bf16(half));
                }
                i += S::LANES;
            }
        }
    }

    /// Bits of any number, also of none, and often of one near 1 or near the smallest.
    fn any_bits() -> impl Strategy<Value = u32> {
        let with_exponent = |range: std::ops::Range<u32>| {
            (any::<u32>(), range).prop_map(|(bits, e)| bits & 0x807f_ffff | e << 23)
        };
        prop_oneof![any::<u32>(), with_exponent(118..134), with_exponent(0..70)]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]

        #[test]
        fn every_vector_does_as_the_scalar_twin(
            a in prop::array::uniform16((any_bits(), any_bits())),
            b in prop::array::uniform16((any_bits(), any_bits())),
            c in prop::array::uniform16(any_bits()),
        ) {
            let pair = |(x, y): (u32, u32)| x >> 16 | y & 0xffff_0000;
            let words = [a.map(pair), b.map(pair), c];
            let number = |bits: u32| match f32::from_bits(bits) {
                x if x.is_nan() => f32::NAN.to_bits(),
                x => x.to_bits(),
            };
            for isa in Isa::available() {
                let (mut dots, mut narrowed, mut widened) = ([0; 16], [0; 8], [0; 16]);
                let (dots_of, narrowed_of, widened_of) = (&mut dots, &mut narrowed, &mut widened);
                let each = Each {
                    words: &words, dots: dots_of, narrowed: narrowed_of, widened: widened_of,
                };
                dispatch(isa, each);
                for i in 0..16 {
                    let [x, y, z] = words.map(|words| f32::from_bits(words[i]));
                    let expected = super::dot(x, y, z).to_bits();
                    prop_assert_eq!(number(dots[i]), number(expected), "{}: {} {} {}", isa, x, y, z);
                    let half = (narrowed[i / 2] >> (16 * (i % 2))) as u16;
                    prop_assert_eq!(half, super::narrow(z), "{}: {}", isa, z);
                    prop_assert_eq!(widened[i], super::widen(half).to_bits(), "{}", isa);
                }
            }
        }
    }
}
