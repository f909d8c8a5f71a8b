//! Weights that are transformed as they are used: for small maps of so many channels that weights come from memory, of which
//! nine numbers come then instead of sixteen.

use std::ops::Range;

use super::{Multiply, SHIFT, Variant, Winograd};
use crate::kernels::constants::Constants;
use crate::kernels::element::{Element, ElementType};
use crate::kernels::finish::Finish;
use crate::kernels::image::Image;
use crate::kernels::isa::Isa;
use crate::kernels::scheme::{self, F2, Scheme};
use crate::kernels::simd::Simd;

/// Words of the depth whose weights are transformed at a time: those of a group of panels stay in a near cache.
const CHUNK: usize = 64;
/// Words by which weights are asked for before they are needed.
const AHEAD: usize = 512;

impl Winograd {
    /// Two by two pixels at a time, with f32 weights as [`Direct::pack`](crate::kernels::Direct::pack) leaves them.
    ///
    /// # Panics
    /// Where the maps are not of f32, or the output has fewer channels than a panel.
    pub(crate) fn of_taps(
        isa: Isa,
        source: Image,
        output: Image,
        doubled: bool,
        weights: Constants,
        finish: Finish,
    ) -> Self {
        assert!(source.element == ElementType::F32 && output.channels() >= isa.panel());
        let run = Self::with(isa, Variant::F2, source, output, doubled, weights, finish);
        Self { of_taps: true, ..run }
    }

    /// Words from the transformed weights at one position to those at the next; none where all weights are transformed
    /// already.
    pub(super) fn transformed_len(&self) -> usize {
        if self.of_taps { CHUNK * self.panel + SHIFT } else { 0 }
    }
}

impl Multiply<'_> {
    /// The products of `count` panels, whose weights are transformed a part of the depth at a time.
    #[inline(always)]
    pub(super) fn of_taps<S: Simd, E: Element>(&self, s: S, panel: usize, count: usize) {
        let (conv, depth) = (self.conv, self.conv.source.depth());
        let (positions, len) = (conv.positions(), conv.transformed_len());
        // Behind the products of a group.
        let to = self.product(conv.group, 0, 0);
        for first in (0..depth).step_by(CHUNK) {
            let words = first..depth.min(first + CHUNK);
            for i in 0..count {
                let to = to.wrapping_add(i * positions * len);
                // SAFETY: the scratch has room for the weights of a chunk at every position.
                unsafe { self.transform(s, panel + i, words.clone(), to) };
            }
            for position in 0..positions {
                for i in 0..count {
                    let weights = to.wrapping_add((i * positions + position) * len);
                    // SAFETY: they have just been written.
                    unsafe { self.rows::<S, E>(s, position, i, weights, words.clone()) };
                }
            }
        }
    }

    /// `G g Gᵀ` of a panel's weights for some words of the depth.
    ///
    /// # Safety
    /// `to` is good for writing so many at each position.
    #[inline(always)]
    unsafe fn transform<S: Simd>(&self, s: S, panel: usize, words: Range<usize>, to: *mut f32) {
        let (conv, len) = (self.conv, self.conv.transformed_len());
        let tap = conv.source.depth() * conv.panel;
        let from = conv.weights.at(self.memory).wrapping_add(9 * panel * tap);
        for (place, k) in words.enumerate() {
            for lane in (0..conv.panel).step_by(S::LANES) {
                let from = from.wrapping_add(k * conv.panel + lane);
                let to = to.wrapping_add(place * conv.panel + lane);
                let mut taps = [s.splat(0.0); 9];
                for (i, weight) in taps.iter_mut().enumerate() {
                    let from = from.wrapping_add(i * tap);
                    s.prefetch(from.wrapping_add(AHEAD));
                    // SAFETY: panel, tap and depth are the convolution's.
                    *weight = unsafe { s.load(from) };
                }
                let all = scheme::weights::<S, F2>(s, &taps);
                // A number that the compiler knows, so that none of them leaves the registers before.
                for position in 0..F2::IN * F2::IN {
                    // SAFETY: the caller's promise.
                    unsafe { s.store(to.wrapping_add(position * len), all[position]) };
                }
            }
        }
    }
}
