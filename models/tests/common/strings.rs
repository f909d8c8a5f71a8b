//! Strings that tokenizers are compared by.

/// The generator of `golden/make_tokenizers.py`.
struct Draw(u32);

impl Draw {
    fn new(seed: u32) -> Self {
        Self(seed.wrapping_mul(2_654_435_761).wrapping_add(1))
    }

    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.0 >> 8) as usize % limit
    }
}

/// Up to forty pieces, a tenth of them any character, two thirds of them with a space behind.
pub(crate) fn string(seed: u32, pieces: &[String]) -> String {
    let (mut draw, mut text) = (Draw::new(seed), String::new());
    for _ in 0..draw.below(40) {
        if draw.below(10) == 0 {
            text.push(char::from_u32(draw.below(0x30000) as u32).unwrap_or('?'));
        } else {
            text.push_str(&pieces[draw.below(pieces.len())]);
        }
        if draw.below(3) > 0 {
            text.push(' ');
        }
    }
    text
}
