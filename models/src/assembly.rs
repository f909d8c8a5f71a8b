//! What a network's layers are added to, one after another, when it is compiled: each family describes itself once,
//! and becomes kernels for the CPU ([`crate::plan`]) or for a GPU (`crate::gpu`).

use candle_core::Tensor;

use crate::kernels::{Function, Taps};
use crate::weights::Weights;

/// Numbers of a compiled network's inputs: the noisy samples; what they are told, which may have a gradient; and
/// what is told without one.
pub(crate) const X: usize = 0;
pub(crate) const TOLD: usize = 1;
pub(crate) const FIXED: usize = 2;

/// A map of each sample, of pixels or tokens and channels, that some later step still reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Map(pub(crate) usize);

/// How large a map is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) height: usize,
    pub(crate) width: usize,
    pub(crate) channels: usize,
}

/// A vector of each sample that the time embedding is projected to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Projection(pub(crate) usize);

/// What is added to the sums of a convolution or linear map.
#[derive(Debug, Clone, Copy)]
pub(crate) struct End {
    /// At every pixel.
    pub(crate) offset: Option<Projection>,
    pub(crate) residual: Option<Map>,
    /// What all of it is multiplied with then.
    pub(crate) factor: f32,
}

impl Default for End {
    fn default() -> Self {
        Self { offset: None, residual: None, factor: 1.0 }
    }
}

/// A linear map: a weight `[output channels, input channels]`, a bias, and a factor for both.
pub(crate) type Affine = (Tensor, Tensor, f64);

/// A compiled network in the making, of a family whose configuration is `C`.
///
/// A new map has one use; each [`Assembly::retain`] adds one, each [`Assembly::release`] ends one, and after the last
/// its memory may be another's. Errors are those of missing or misshapen weights and of the device.
pub(crate) trait Assembly<'a, C> {
    /// The network's configuration.
    fn config(&self) -> &'a C;

    /// How large a map is.
    fn size(&self, map: Map) -> Size;

    /// A new map that a later step writes.
    fn map(&mut self, height: usize, width: usize, channels: usize) -> Map;

    /// As [`Assembly::map`], for the network's answer.
    fn answer(&mut self, height: usize, width: usize, channels: usize) -> Map;

    /// One more use.
    fn retain(&mut self, map: Map) -> Map;

    /// One use less.
    fn release(&mut self, map: Map);

    /// Input `input`, `[B, channels, height, width]`, times `factor`, plus `shift`.
    fn import(&mut self, input: usize, size: Size, factor: f32, shift: f32) -> Map;

    /// The network's answer, the last step; divided by the numbers of input `divisor`, one per sample. `answer` is
    /// used up.
    fn export(&mut self, answer: Map, divisor: Option<usize>);

    /// The map of one pixel that is the time embedding, which [`Assembly::project`] projects.
    fn time(&mut self, time: Map);

    /// The projection of the time embedding, of `input` numbers, to `width`.
    fn project(
        &mut self,
        weights: &Weights,
        input: usize,
        width: usize,
    ) -> crate::Result<Projection>;

    /// Group norm over the channels of all `sources`, one or two, times one plus the first half of `modulation`, plus
    /// its second half, then `function`.
    fn normalise(
        &mut self,
        weights: &Weights,
        sources: &[Map],
        groups_and_eps: (usize, f64),
        modulation: Option<Projection>,
        function: Function,
    ) -> crate::Result<Map>;

    /// A 3×3 convolution with bias into `target`; `end` is what else goes into the sums.
    fn convolve(
        &mut self,
        weights: &Weights,
        source: Map,
        target: Map,
        taps: Taps,
        end: End,
    ) -> crate::Result<()>;

    /// A linear map of each pixel: the products with all `parts`, one after another in the channels.
    fn pointwise(
        &mut self,
        sources: &[Map],
        target: Map,
        parts: &[Affine],
        end: End,
    ) -> crate::Result<()>;

    /// The values of `parts` of `source` (scaled queries, keys and values) gathered for each query and head.
    fn attend(&mut self, source: Map, parts: &[Affine; 3], heads: usize) -> crate::Result<Map>;

    /// The mean of each four pixels; `map` is used up.
    fn halve(&mut self, map: Map) -> Map;

    /// Each pixel as four.
    fn double(&mut self, map: Map) -> Map;

    /// A vector of each sample, of which others add or multiply parts.
    fn told(&mut self, channels: usize) -> Map;

    /// Tokens normalised (Ba et al. 2016), times one plus part `scale` of what is told, plus part `shift`; a part has
    /// as many numbers as a token.
    fn modulate(&mut self, source: Map, eps: f64, told: Map, scale_and_shift: [usize; 2]) -> Map;

    /// `residual + gate·source`, with part `gate` of what is told.
    fn gate(&mut self, source: Map, residual: Map, told: Map, gate: usize) -> Map;

    /// An element-wise function.
    fn activate(&mut self, source: Map, function: Function) -> Map;

    /// A map that is the same for every sample, `[pixels, channels]`, of the size of `like`; it has no gradient.
    fn constant(&mut self, values: &[f32], like: Map) -> crate::Result<Map>;

    /// One pixel as a map of its own.
    fn pixel(&mut self, source: Map, from: usize) -> Map;
}
