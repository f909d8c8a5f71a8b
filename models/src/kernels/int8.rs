//! Codes of 8 bits, four in a word of 32, as processors with AVX512-VNNI handle them, one lane at a time.

/// `acc + Σ aᵢ·bᵢ` of the four u8 in `a` and the four i8 in `b`; `acc` and the result are the bits of an i32. Sums that do
/// not fit wrap, as VPDPBUSD's do.
pub(super) fn dot(a: f32, b: f32, acc: f32) -> f32 {
    let (a, b) = (a.to_bits().to_le_bytes(), b.to_bits().to_le_bytes());
    let products = a.iter().zip(b).map(|(&a, b)| i32::from(a) * i32::from(b.cast_signed()));
    let sum = products.fold(acc.to_bits().cast_signed(), i32::wrapping_add);
    f32::from_bits(sum.cast_unsigned())
}

/// The nearest code of a number from 0 to 255, ties to even.
pub(super) fn narrow(x: f32) -> u8 {
    x.round_ties_even() as u8
}

/// Puts a signed code into byte `k % 4` of a word.
pub(super) fn put(word: &mut f32, k: usize, code: i8) {
    let mut bytes = word.to_bits().to_le_bytes();
    bytes[k % 4] = code.cast_unsigned();
    *word = f32::from_bits(u32::from_le_bytes(bytes));
}

/// A word of the same unsigned code four times.
pub(super) fn splat(code: u8) -> f32 {
    f32::from_bits(u32::from_le_bytes([code; 4]))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::isa::{Isa, Kernel, dispatch};
    use super::super::simd::Simd;

    /// What a vector makes of three words in each lane, and of numbers from 0 to 255.
    struct Each<'a> {
        words: &'a [[u32; 16]; 3],
        numbers: &'a [f32; 16],
        dots: &'a mut [u32; 16],
        widened: &'a mut [f32; 16],
        codes: &'a mut [u8; 16],
    }

    impl Kernel for Each<'_> {
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            for i in (0..16).step_by(S::LANES) {
                // SAFETY: 16 is a multiple of the lanes of every vector.
                unsafe {
                    let [a, b, c] = self.words.map(|words| s.load(words.as_ptr().add(i).cast()));
                    s.store(self.dots.as_mut_ptr().add(i).cast(), s.dot_int8(a, b, c));
                    s.store(self.widened.as_mut_ptr().add(i), s.floats_of(c));
                    let number = s.load(self.numbers.as_ptr().add(i));
                    s.store_u8(self.codes.as_mut_ptr().add(i).cast(), number);
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]

        #[test]
        fn every_vector_does_as_the_scalar_twin(
            words in prop::array::uniform3(prop::array::uniform16(any::<u32>())),
            numbers in prop::array::uniform16(prop_oneof![
                0f32..=255.0, (0u16..510).prop_map(|x| f32::from(x) / 2.0),
            ]),
        ) {
            for isa in Isa::available() {
                let (mut dots, mut widened, mut codes) = ([0; 16], [0f32; 16], [0; 16]);
                dispatch(isa, Each {
                    words: &words, numbers: &numbers,
                    dots: &mut dots, widened: &mut widened, codes: &mut codes,
                });
                for i in 0..16 {
                    let [a, b, c] = words.map(|words| words[i]);
                    let sum = a.to_le_bytes().iter().zip(b.to_le_bytes())
                        .map(|(&a, b)| i64::from(a) * i64::from(b as i8))
                        .fold(i64::from(c as i32), |sum, product| sum + product);
                    let twin = super::dot(f32::from_bits(a), f32::from_bits(b), f32::from_bits(c));
                    prop_assert_eq!(twin.to_bits(), sum as u32);
                    prop_assert_eq!(dots[i], sum as u32, "{}", isa);
                    prop_assert_eq!(widened[i], c as i32 as f32, "{}", isa);
                    prop_assert_eq!(codes[i], super::narrow(numbers[i]), "{}: {}", isa, numbers[i]);
                }
            }
        }
    }
}
