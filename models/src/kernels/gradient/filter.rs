//! Where a layer's weights are among the parameters.

use crate::kernels::image::Image;
use crate::kernels::program::Memory;

/// The numbers of one output channel.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Row {
    /// The parameter that holds them.
    pub(crate) parameter: usize,
    /// Where in it they begin.
    pub(crate) start: usize,
    /// Where in the gradients of all parameters those of these numbers begin.
    pub(crate) gradient: usize,
    /// What they are multiplied with before use.
    pub(crate) factor: f32,
}

/// The weights of a convolution: `[output channels][input channels][taps]`.
#[derive(Debug, Clone)]
pub(crate) struct Filter {
    /// One for each output channel.
    pub(crate) rows: Vec<Row>,
    /// Taps.
    pub(crate) taps: usize,
}

impl Filter {
    /// Those from input channel `c` to output channel `o`: one for each tap, to be multiplied with the
    /// row's factor.
    #[inline(always)]
    pub(super) fn taps<'a>(&self, memory: &'a Memory, o: usize, c: usize) -> (&'a [f32], f32) {
        let row = self.rows[o];
        let all = &memory.parameters[row.parameter][row.start + c * self.taps..];
        (&all[..self.taps], row.factor)
    }

    /// Where the gradients of the weights from input channel `c` to output channel `o` go, one for each
    /// tap, and what they are multiplied with.
    ///
    /// The pointer is good where the run has gradients: the filter lies in the parameters, of which each
    /// has as many.
    #[inline(always)]
    pub(super) fn gradients(&self, memory: &Memory, o: usize, c: usize) -> (*mut f32, f32) {
        let row = &self.rows[o];
        (memory.gradients().wrapping_add(row.gradient + c * self.taps), row.factor)
    }
}

/// Which channel is at each place of a pixel of `images`, one after another, each to its stride or, with
/// `short`, only as far as products read it; `first` is the number of the first channel.
pub(crate) fn places(images: &[Image], first: usize, short: bool) -> Vec<Option<usize>> {
    let (mut places, mut before) = (Vec::new(), first);
    for image in images {
        let start = places.len();
        places.resize(start + if short { image.depth() } else { image.stride() }, None);
        for c in 0..image.channels() {
            places[start + image.place(c)] = Some(before + c);
        }
        before += image.channels();
    }
    places
}
