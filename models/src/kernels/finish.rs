//! What happens to a convolution's sums before they are stored.

use super::arena::{Aligned, Buffer};
use super::constants::Constants;
use super::image::Image;
use super::program::Memory;
use super::simd::Simd;

/// `(sum + bias + offset + residual) · factor`.
pub(crate) struct Finish {
    /// One for each output channel, padded with zeros to whole panels.
    pub(crate) bias: Constants,
    /// A vector of each sample, added at every pixel: the buffer and where in it the vector begins.
    pub(crate) offset: Option<(Buffer, usize)>,
    /// An image of the output's shape that is added.
    pub(crate) residual: Option<Image>,
    /// 1, but for networks that scale down after each residual sum.
    pub(crate) factor: f32,
}

impl Finish {
    /// `bias` alone, for panels of `panel` channels.
    pub(crate) fn new(bias: &[f32], panel: usize) -> Self {
        Self::with(Constants::Own(Aligned::of(bias, panel).into()))
    }

    /// A bias alone, as it lies in memory.
    pub(crate) fn with(bias: Constants) -> Self {
        Self { bias, offset: None, residual: None, factor: 1.0 }
    }

    /// The buffers it reads.
    pub(super) fn reads(&self) -> Vec<Buffer> {
        let offset = self.offset.map(|(buffer, _)| buffer);
        offset.into_iter().chain(self.residual.map(|image| image.buffer)).collect()
    }

    /// Where the terms of one output pixel are.
    #[inline(always)]
    pub(super) fn terms(&self, memory: &Memory, sample: usize, pixel: usize) -> Terms {
        Terms {
            bias: self.bias.at(memory),
            offset: match self.offset {
                None => std::ptr::null(),
                Some((buffer, start)) => memory.at(buffer, sample).wrapping_add(start),
            },
            residual: match self.residual {
                None => std::ptr::null(),
                Some(image) => memory.at(image.buffer, sample).wrapping_add(pixel * image.words()),
            },
        }
    }

    /// The finished values of channels `c..c + LANES`.
    ///
    /// # Safety
    /// `terms` come from [`Finish::terms`] in the same run, and the vector lies in the padded
    /// channels of the output.
    #[inline(always)]
    pub(super) unsafe fn apply<S: Simd>(&self, s: S, sum: S::V, terms: Terms, c: usize) -> S::V {
        // SAFETY: bias, offset and residual have as many padded channels as the output.
        unsafe {
            let mut y = s.add(sum, s.load(terms.bias.add(c)));
            if !terms.offset.is_null() {
                y = s.add(y, s.load(terms.offset.add(c)));
            }
            if let Some(image) = self.residual {
                y = s.add(y, image.element.load(s, terms.residual, c));
            }
            if self.factor != 1.0 {
                y = s.mul(y, s.splat(self.factor));
            }
            y
        }
    }
}

/// Where a pixel's terms begin; null where there are none.
#[derive(Clone, Copy)]
pub(super) struct Terms {
    bias: *const f32,
    offset: *const f32,
    residual: *const f32,
}
